"""p-values corrected for looking at several data sets."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")


def adjust_by_holm(p_values: dict[K, float]) -> dict[K, float]:
    """p-values with Holm's (1979) correction for testing all of them, in the same order."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
