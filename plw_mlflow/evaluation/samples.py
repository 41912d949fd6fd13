"""The per-sample log: what was asked, wanted and given for some documents of each task, as its primary metric sees it.

It is for looking at, on MLflow's page. So it holds the first documents of a task, the end of a long question, and the
beginning of a long answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plw_mlflow.evaluation.scores import percent

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
            "score": _score(metric, sample.get(metric)),
        }


def _target_and_prediction(task: Any, sample: dict[str, Any], metric: str) -> tuple[Any, Any]:
    answers = sample["filtered_resps"]
    if task.OUTPUT_TYPE != "multiple_choice":
        return sample["target"], answers[0] if isinstance(answers[0], str) else f"log-likelihood {answers[0]}"
    choices = task.doc_to_choice(sample["doc"])
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    target = choices[gold] if isinstance(gold, int) else gold
    return target, choices[_preferred(choices, [answer[0] for answer in answers], metric)]


def _preferred(choices: list[str], log_likelihoods: list[float], metric: str) -> int:
    """The number of the choice that the metric takes for the model's answer.

    It is the one with the highest log-likelihood, which some metrics divide by the choice's characters or bytes.
    """
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    weighed = [
        log_likelihood / length
        for log_likelihood, length in zip(log_likelihoods, lengths.get(metric, [1] * len(choices)), strict=False)
    ]
    return weighed.index(max(weighed))


def _score(metric: str, value: Any) -> float | None:
    """A document's own score on 0..1; of the metrics of a whole corpus, only BLEU has one, that of the sentence."""
    if metric == "bleu":
        import sacrebleu

        target, prediction = value
        return float(sacrebleu.sentence_bleu(prediction, [target]).score / 100)
    try:
        return float(value) / percent(metric)
    except (TypeError, ValueError):
        return None
