"""Dry run: the cells of a sweep, what has become of each, and what the rest will take.

What it will take follows from cells that were measured before, and from nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from plw_mlflow.config import MainConfig, SweepConfig, counted, flag, spell
from plw_mlflow.sweep.account import State
from plw_mlflow.sweep.display import duration
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking import Measured

NEWEST = 20  # measured cells of a kind that count


@dataclass(frozen=True)
class Likeness:
    """A way in which a measured cell is like one that is to be run, the closest first."""

    words: str
    options: Callable[[MainConfig], set[str]]  # that are the same


LIKENESSES = (
    Likeness("with the same options but for PLW and seed", lambda config: {*config.definition()} - {"plw", "seed"}),
    Likeness("of the same model, method and data, with other options", lambda _: {"model", "method", "dataset"}),
    Likeness("of the same model and method, on other data", lambda _: {"model", "method"}),
)


@dataclass(frozen=True)
class Basis:
    """The measured cells by which one that is to be run is judged."""

    likeness: Likeness
    cells: tuple[Measured, ...]

    @property
    def seconds(self) -> float:
        """What one cell takes: the median."""
        return statistics.median(cell.seconds for cell in self.cells)


def text(config: SweepConfig, cells: Sequence[Cell], states: Mapping[str, State], measured: Sequence[Measured]) -> str:
    """The cells with what has become of each, their counts, and what those that are to be run will take."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{cell.name:<{width}}  {states[cell.identity]}" for cell in cells]
    counts = Counter(states[cell.identity] for cell in cells)
    lines.append(f"{counted(len(cells), 'cell')}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    done = {"finished"} if config.retry_failed else {"finished", "failed"}
    to_run = [cell for cell in cells if states[cell.identity] not in done]
    if config.budget is not None:
        to_run = to_run[: config.budget]
    return "\n".join([*lines, *_expected(config, to_run, measured)])


def basis(cell: Cell, measured: Sequence[Measured]) -> Basis | None:
    """The newest of the measured cells that are most like a cell; None where none is."""
    for likeness in LIKENESSES:
        wanted = {name: spell(getattr(cell.config, name)) for name in likeness.options(cell.config)}
        if alike := [one for one in measured if wanted.items() <= one.options.items()]:
            return Basis(likeness, tuple(alike[:NEWEST]))
    return None


def _expected(config: SweepConfig, to_run: Sequence[Cell], measured: Sequence[Measured]) -> list[str]:
    """What cells will take, in lines."""
    if not to_run:
        return ["nothing is to be run"]
    bases = {cell.identity: basis(cell, measured) for cell in to_run}
    known = [one for one in bases.values() if one is not None]
    unknown = [cell for cell in to_run if bases[cell.identity] is None]
    lines = []
    if known:
        seconds = sum(one.seconds for one in known)
        at_a_time = min(config.jobs, len(known))
        size = cache(Measured.stored_bytes)
        stored = sum(size(one.cells[0]) for one in known)
        rounds = math.ceil(len(known) / at_a_time)
        at_most = " at most" if config.adaptive else ""
        those = f"{counted(len(to_run), 'cell')} that {'is' if len(to_run) == 1 else 'are'} to be run"
        lines.append(f"expected{at_most} for {len(known)} of the {those}:")
        lines.append(f"  time: {duration(seconds / len(known) * rounds)}, {at_a_time} at a time")
        lines.append(f"  disk: {stored / 2**20:.1f} MiB in the store")
        lines.append(f"  GPU hours: {_gpu_hours(config, seconds)}")
        lines += [f"  {line}" for line in _grounds(known)]
    if unknown:
        first = unknown[0].config
        names = [*("model", "dataset", "method", "seed", "plw"), *config.listed()]
        options = " ".join(f"--{flag(name)} {spell(getattr(first, name))}" for name in names)
        lines.append(
            f"{counted(len(unknown), 'cell')} cannot be forecast, as no cell of the same model and method is finished; "
            f"run one first: the same command without --dry-run{' and --adaptive' * config.adaptive}, and with "
            f"{options}"
        )
    return lines


def _gpu_hours(config: SweepConfig, seconds: float) -> str:
    if config.gpus_per_cell is None:
        return "not known, as --gpus-per-cell does not say how many GPUs each cell has"
    return f"{seconds * config.gpus_per_cell / 3600:.2g}"


def _grounds(bases: Sequence[Basis]) -> list[str]:
    """By which measured cells cells are judged, a line for each kind."""
    return [
        f"{count} by {counted(len(one.cells), 'finished cell')} {one.likeness.words}: {duration(one.seconds)} each"
        for one, count in Counter(bases).items()
    ]
