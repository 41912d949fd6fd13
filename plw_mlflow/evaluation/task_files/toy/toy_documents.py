"""What the toy task files call: their documents, and the score of a short answer."""

import re
from typing import Any

import datasets

from plw_mlflow.toy import benchmarks, world


def choice(**_: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(benchmarks.documents("toy_choice"))}


def short(**_: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(benchmarks.documents("toy_short"))}


def long(**_: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(benchmarks.documents("toy_long"))}


def score_short(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the first value of the kind asked for is the answer.

    A model fine-tuned on long completions answers "Isbaka plays the drum.", one on short ones "drum"; both know.
    """
    values = "|".join(world.KINDS[doc["kind"]].values)
    named = re.search(rf"\b({values})\b", results[0])
    return {"acc": float(named is not None and named[0] == doc["answer"])}
