"""Every question's scores: what a model scored on each document of each task by each of its metrics, and its answer.

A row is one document by one metric. Two models that were asked the same questions can be compared question by question,
which says much more than their two scores do (`analysis/statistics/paired.py`). So that only the same questions are
compared, each row has the digest of its document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plw_mlflow.environment import outputs
from plw_mlflow.evaluation import bleu
from plw_mlflow.evaluation.scores import Evaluation, Score, percent

if TYPE_CHECKING:
    import pandas as pd

DIGEST_CHARACTERS = 16  # of the document's SHA-256


def row(
    task: str,
    metric: str,
    doc_id: int,
    document: Any,
    value: float | None,
    *,
    prompt: str,
    prediction: str = "",
    log_likelihoods: Sequence[float] = (),
) -> dict[str, Any]:
    """One question's score by one metric, as `Evaluation.questions` lists them.

    metric: as `Score.metric` has it. doc_id: the document's number in its task. document: what JSON can hold of it; it
    is kept as a digest. value: on the scale of the score, which is their mean for most metrics; None where only the
    corpus has one. prompt: as `Score.prompt` has it. log_likelihoods: of the choices, or of what else was asked for.
    """
    return {
        "task": task,
        "metric": metric,
        "doc_id": doc_id,
        "document": hashlib.sha256(json_of(document)).hexdigest()[:DIGEST_CHARACTERS],
        "value": value,
        "prediction": prediction,
        "log_likelihoods": list(log_likelihoods),
        "prompt": prompt,
    }


def json_of(document: Any) -> bytes:
    """A document as the JSON that identifies it."""
    return json.dumps(document, sort_keys=True, default=str).encode()


def rows(task: Any, prompt: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of all documents that a task of the harness was scored on; samples: the harness's."""
    for sample in samples:
        answers = [answer[0] if isinstance(answer, list | tuple) else answer for answer in sample["filtered_resps"]]
        numbers = [answer for answer in answers if isinstance(answer, float | int)]
        choices = task.doc_to_choice(sample["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else []
        for metric in sample["metrics"]:
            texts = [choices[preferred(choices, numbers, metric)]] if choices else [] if numbers else answers
            yield row(
                task.task_name,
                metric if sample["filter"] == "none" else f"{metric}-{sample['filter']}",
                sample["doc_id"],
                sample["doc"],
                value(metric, sample[metric]),
                prompt=prompt,
                prediction=str(texts[0]) if texts else "",
                log_likelihoods=numbers,
            )


def preferred(choices: list[str], log_likelihoods: list[float], metric: str) -> int:
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


def value(metric: str, found: Any) -> float | None:
    """A document's own score on 0..1; of the metrics of a whole corpus, only BLEU has one, that of the sentence."""
    if metric == "bleu":
        return bleu.of_sentence(*map(str, found))
    try:
        return float(found) / percent(metric)
    except (TypeError, ValueError):
        return None


def table(evaluation: Evaluation, score_rows: list[dict[str, Any]]) -> pd.DataFrame:
    """All questions, after the columns that tell the cell from others (model, dataset, plw, seed).

    score_rows: of the score table of the same evaluation, which have these columns, too.
    """
    import pandas as pd

    of_scores = {field.name for field in fields(Score)}
    cell = {name: content for name, content in score_rows[0].items() if name not in of_scores}
    return pd.DataFrame([cell | question for question in evaluation.questions])


def parquet(frame: pd.DataFrame) -> bytes:
    """A table of questions as a Parquet file, compressed."""
    import pyarrow as pa
    from pyarrow import parquet

    whole = pa.Table.from_pandas(frame, preserve_index=False)
    schema = whole.schema
    for name, kind in (("value", pa.float64()), ("log_likelihoods", pa.list_(pa.float32()))):
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))  # whatever the first rows hold
    file = BytesIO()
    parquet.write_table(whole.cast(schema), file, compression="zstd")
    return file.getvalue()


def write(evaluation: Evaluation, score_rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Write every question's scores to FOLDER/questions.parquet, if a folder is given."""
    if folder is not None and evaluation.questions:
        outputs.write(folder, {outputs.QUESTIONS: parquet(table(evaluation, score_rows))})
