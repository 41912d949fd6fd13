"""The per-sample log: what was asked, wanted and given for some documents of each task, as its primary metric sees it.

It is for looking at, on MLflow's page; `questions` keeps the scores of all documents. So it holds the first documents
of a task, the end of a long question, and the beginning of a long answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plw_mlflow.evaluation import questions

MAX_DOCUMENTS = 200  # of each task
MAX_CHARACTERS = 1000  # of each text


def rows(task: Any, primary: str, prompt: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the log for one task.

    primary: its primary metric, as `Score.metric` has it. prompt: the kind of prompt. samples: the harness's.
    """
    metric, _, filter_name = primary.partition("-")
    of_filter = [sample for sample in samples if sample["filter"] == (filter_name or "none")]
    for sample in of_filter[:MAX_DOCUMENTS]:
        target, prediction = _target_and_prediction(task, sample, metric)
        yield {
            "task": task.task_name,
            "document": sample["doc_id"],
            "prompt": prompt,
            "question": str(sample["arguments"][0][0])[-MAX_CHARACTERS:],
            "target": str(target)[:MAX_CHARACTERS],
            "prediction": str(prediction)[:MAX_CHARACTERS],
            "metric": primary,
            "score": questions.value(metric, sample.get(metric)),
        }


def _target_and_prediction(task: Any, sample: dict[str, Any], metric: str) -> tuple[Any, Any]:
    answers = sample["filtered_resps"]
    if task.OUTPUT_TYPE != "multiple_choice":
        return sample["target"], answers[0] if isinstance(answers[0], str) else f"log-likelihood {answers[0]}"
    choices = task.doc_to_choice(sample["doc"])
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    target = choices[gold] if isinstance(gold, int) else gold
    return target, choices[questions.preferred(choices, [answer[0] for answer in answers], metric)]
