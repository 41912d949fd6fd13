"""Adaptive sweeps beside full grids:  python -m benchmarks.adaptive --scores FILE --json FILE

FILE is the scores.csv of a sweep of one data set with several seeds at each PLW, whose cells are taken as the grid.
`--adaptive` is run on it again, by the same code, as if the cells were trained one after another: once with the seeds
in the listed order, and once more beginning with each other seed. What is compared with the full grid is

    cells     that were used
    width     of the 95 % interval of the best PLW by the model that leads, at the end; the whole range where the
              scores do not locate it

With `--simulations N`, the same is done with N grids that are drawn: the curve of each task as it was fitted to the
real scores, and on it the residuals of a real run, drawn anew for each cell. There the best PLW is known, and so
is how often an interval covers it: whether ending as soon as it is narrow makes it too sure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from plw_mlflow.analysis import analyze, score_table
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.sweep import adaptive


@dataclass(frozen=True)
class Ended:
    """A sweep that has ended."""

    cells: int
    width: float
    is_located: bool
    covers: bool | None = None  # whether the interval has the true best PLW in it, where that is known


def ended(table: pd.DataFrame, best: float | None) -> Ended:
    """What is known by the cells of a table."""
    (grid,) = analyze.grids(table)
    fit = analyze.lead_fit(grid)
    width, _ = adaptive.interval(fit, grid)
    is_located = bool(fit.has_interior_optimum and fit.optimum_set and not fit.optimum_set_is_unbounded)
    return Ended(len(grid.runs), width, is_located, None if best is None else _covers(fit, is_located, best))


def _covers(fit: Fit, is_located: bool, best: float) -> bool:
    return not is_located or any(low <= best <= high for low, high in fit.optimum_set or ())


def run_adaptive(table: pd.DataFrame, seeds: Sequence[int], wanted: float) -> pd.DataFrame:
    """The cells that an adaptive sweep of a grid uses, one a round."""
    plws = sorted(table["plw"].unique())
    left = dict.fromkeys(plws, len(seeds))
    chosen: list[tuple[float, int]] = []
    coming = adaptive.first_plws(plws)
    while coming:
        for plw in coming:
            chosen.append((plw, seeds[len(seeds) - left[plw]]))
            left[plw] -= 1
        used = table[pd.MultiIndex.from_frame(table[["plw", "seed"]]).isin(chosen)]
        (grid,) = analyze.grids(used)
        coming = adaptive.choose(grid, left, 1, wanted).plws
    return used


def draw(table: pd.DataFrame, random: np.random.Generator) -> tuple[pd.DataFrame, float]:
    """A grid like a real one, and its best PLW."""
    (grid,) = analyze.grids(table)
    coefficients, *_ = np.linalg.lstsq(grid.curve, grid.scores, rcond=None)  # [3, T]
    curves = grid.curve @ coefficients
    freedom = len(curves) - len(coefficients)
    residuals = (grid.scores - curves) * np.sqrt(len(curves) / freedom)
    drawn = curves + residuals[random.integers(len(residuals), size=len(residuals))]
    wide = pd.DataFrame(drawn, columns=list(grid.tasks))
    runs = pd.concat([grid.runs, wide], axis=1)
    scores = runs.melt(id_vars=list(grid.runs.columns), var_name="task", value_name="score")
    metrics = table.drop_duplicates("task").set_index("task")["metric"]
    _, slope, bend = coefficients.mean(axis=1)
    low, high = grid.transform.ends
    vertex = float(np.clip(-slope / (2 * bend), low, high)) if bend < 0 else (high if slope + bend * high > 0 else low)
    return scores.assign(metric=scores["task"].map(metrics)), float(grid.transform.back(vertex))


def summary(name: str, sweeps: Sequence[Ended]) -> dict[str, Any]:
    """A row of the table: means and medians over sweeps."""
    row: dict[str, Any] = {"grid": name, "sweeps": len(sweeps)}
    row["cells"] = float(np.mean([sweep.cells for sweep in sweeps]))
    row["width"] = float(np.median([sweep.width for sweep in sweeps]))
    row["located"] = float(np.mean([sweep.is_located for sweep in sweeps]))
    row["covers"] = None if sweeps[0].covers is None else float(np.mean([sweep.covers for sweep in sweeps]))
    covers = "" if row["covers"] is None else f", {row['covers']:.1%} of the intervals cover the best PLW"
    print(
        f"{name}: {row['cells']:.1f} cells, width {row['width']:.3f} (median), located in {row['located']:.0%}{covers}",
        flush=True,
    )
    return row


@click.command(help=__doc__)
@click.option("--scores", type=click.Path(path_type=Path, exists=True), required=True, help="Of a sweep, scores.csv.")
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--width", default=0.1, show_default=True, help="Of the interval, at which a sweep ends.")
@click.option("--simulations", default=0, show_default=True, help="Grids that are drawn.")
def main(scores: Path, file: Path, width: float, simulations: int) -> None:
    table = score_table.read_scores(scores)
    if table["dataset"].nunique() != 1:
        raise click.ClickException("the scores have to be of one data set")
    if table.groupby("plw")["seed"].nunique().nunique() != 1:
        raise click.ClickException("the scores have to be of as many seeds at each PLW")
    seeds = [int(seed) for seed in sorted(table["seed"].unique())]
    full, chosen = [ended(table, None)], []
    for first in range(len(seeds)):
        chosen.append(ended(run_adaptive(table, [*seeds[first:], *seeds[:first]], width), None))
        print(f"adaptive from seed {seeds[first]}: {asdict(chosen[-1])}", flush=True)
    rows = [summary("full", full), summary("adaptive", chosen)]
    drawn: dict[str, list[Ended]] = {"full, drawn": [], "adaptive, drawn": []}
    for number in range(simulations):
        like, best = draw(table, np.random.default_rng([1234, number]))
        drawn["full, drawn"].append(ended(like, best))
        drawn["adaptive, drawn"].append(ended(run_adaptive(like, seeds, width), best))
    rows += [summary(name, sweeps) for name, sweeps in drawn.items() if sweeps]
    file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
