"""Prompt and completion loss of some cells in one figure:  python -m benchmarks.curves --run-id A,B --output FILE.png

Solid lines are means over the training examples of a step, smoothed over ten steps; points are the validation slice.
Both are unweighted, in nats a token, so that they compare across PLWs. At PLW 0 the prompt's rows are dropped before
the head, so its prompt loss comes from validation alone.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib
import numpy as np

from plw_mlflow.config import split_list
from plw_mlflow.tracking import Run

matplotlib.use("agg")
from matplotlib import pyplot as plt

SIDES = ("prompt", "completion")
SMOOTHED_STEPS = 10


@click.command(help=__doc__)
@click.option("--run-id", "listed", required=True, help="Runs of cells in the tracking store, comma-separated.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where to write the figure.")
@click.option("--until", type=int, help="Last step to draw (unset: all).")
def main(listed: str, output: Path, until: int | None) -> None:
    runs = sorted(map(Run, split_list(listed)), key=lambda run: float(run.cell()["plw"]))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for colour, run in zip(plt.get_cmap("viridis")(np.linspace(0, 0.85, len(runs))), runs, strict=True):
        plw = run.cell()["plw"]
        print(f"PLW {plw:g}, run {run.id}")
        for axis, side in zip(axes, SIDES, strict=True):
            for kind in ("train", "eval"):
                steps, losses = np.array(list(run.curves.values(f"{kind}/{side}_loss").items())).reshape(-1, 2).T
                kept = steps <= (until or np.inf)
                steps, losses = steps[kept], losses[kept]
                if not len(steps):
                    continue
                if kind == "eval":
                    axis.plot(steps, losses, "o:", color=colour, markersize=4, linewidth=0.7)
                    print(f"  validation, {side}: {losses[0]:.3f} before, {losses[-1]:.3f} at step {steps[-1]:.0f}")
                else:
                    window = np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS
                    axis.plot(steps[SMOOTHED_STEPS - 1 :], np.convolve(losses, window, "valid"), color=colour)
            axis.plot([], [], color=colour, label=f"PLW {plw:g}")
    for axis, side in zip(axes, SIDES, strict=True):
        axis.set(title=f"{side} tokens", xlabel="optimiser step", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("mean loss (nats a token)")
    axes[1].legend()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
