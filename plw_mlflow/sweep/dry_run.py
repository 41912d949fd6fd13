"""Dry run: the cells of a sweep, what has become of each, and what the rest will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from plw_mlflow.sweep.account import State
from plw_mlflow.sweep.grid import Cell


def text(cells: Sequence[Cell], states: Mapping[str, State]) -> str:
    """The cells of a sweep, a line each with what has become of it, and how many there are of each kind."""
    width = max(len(cell.name) for cell in cells)
    lines = [f"{cell.name:<{width}}  {states[cell.identity]}" for cell in cells]
    counts = Counter(states[cell.identity] for cell in cells)
    return "\n".join([*lines, f"{len(cells)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items())])
