"""Published single runs: a score at one PLW and at another, of one run each.

They cannot say where between two PLWs the best one lies, and nothing in print tells how far another seed would have
moved them. So they have no weight in the advice, and are shown beside it. The uncertainty that can be given is that of
the questions alone: of a rate of successes among n, as if the two models had been asked different questions. Asked the
same ones, as they were, they differ by somewhat less; the luck of training, which is not in it, adds to that.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from scipy import stats

from plw_mlflow.advice.evidence import TABLES
from plw_mlflow.analysis.statistics.optimum import LEVEL


@dataclass(frozen=True)
class SingleRuns:
    """What one run at each of two PLWs scored, or what somebody says of them without figures."""

    study: str
    dataset: str
    model: str
    task: str
    task_type: str
    ratio: float | None  # generation ratio, where it is known
    says: str  # in words, where there are no figures; else empty
    caveat: str
    source: str
    plws: tuple[float, float] | None = None  # None without figures, as are the next two
    scores: tuple[float, float] | None = None  # shares of n
    n: int | None = None  # questions

    @property
    def gain(self) -> float | None:
        """How much more the larger PLW scored."""
        return None if self.scores is None else self.scores[1] - self.scores[0]

    @property
    def reach(self) -> float | None:
        """Half the 95 % interval of the gain, of the questions alone; None where their number is not told."""
        if self.scores is None or self.n is None:
            return None
        variance = sum(score * (1 - score) / self.n for score in self.scores)
        return float(stats.norm.ppf(1 - LEVEL / 2)) * math.sqrt(variance)


def published(task_types: Sequence[str] = ()) -> list[SingleRuns]:
    """Every entry of single_runs.csv, of tasks of these types or of no type told; each PLW beside the lowest."""
    with (TABLES / "single_runs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not task_types or row["task_type"] in (*task_types, "")]
    found = []
    for _, group in groupby(rows, lambda row: (row["study"], row["dataset"], row["model"], row["task"])):
        first, *others = group
        told: dict[str, Any] = {name: first[name] for name in SingleRuns.__annotations__ if name in first}
        told |= {"ratio": float(first["ratio"]) if first["ratio"] else None}
        if first["says"]:
            found.append(SingleRuns(**told | {"n": None}))
        for other in others:
            plws, scores = ((float(first[name]), float(other[name])) for name in ("plw", "score"))
            n = int(first["n"]) if first["n"] else None
            found.append(SingleRuns(**told | {"n": n}, plws=plws, scores=scores))
    return found
