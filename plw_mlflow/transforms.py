"""From a prompt loss weight (PLW) to w_p, the axis on which scores are fitted, and back.

The study's transform is w_p = PLW^0.30103, on which its scores are a parabola; the others show how much hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plw_mlflow.errors import UserError

Array = NDArray[np.float64]

# log10(2) in the rounding of arXiv:2401.13586v1, section 4, chosen there so that PLW 0.1 becomes w_p 0.5.
EXPONENT = 0.30103
TRANSFORMS = ("power", "logit", "rank", "none")
CURVE_TERMS = ("w_p", "w_p^2")
TERMS = ("intercept", *CURVE_TERMS)


@dataclass(frozen=True)
class Transform:
    """A rising function from PLW to w_p, and back.

    power: w_p = PLW^0.30103. none: w_p = PLW. rank: the PLWs tried, equally spaced over 0..1 (and straight lines
    between), as in the draft of the study. logit: log(PLW / (1 - PLW)) after PLW is drawn in from 0 and 1 by half the
    smallest positive PLW tried, scaled to 0..1 over the PLWs tried; for PLWs within 0..1.
    """

    name: str
    plws: tuple[float, ...]  # tried, ascending

    def __call__(self, plw: ArrayLike) -> Array:
        """w_p of PLWs, of the same shape."""
        plw = np.asarray(plw, float)
        if self.name == "power":
            return plw**EXPONENT
        if self.name == "rank":
            return np.interp(plw, self.plws, np.linspace(0, 1, len(self.plws)))
        if self.name == "logit":
            low, high = self._logit(np.array([self.plws[0], self.plws[-1]]))
            return (self._logit(plw) - low) / (high - low)
        return plw.copy()

    def back(self, w: ArrayLike) -> Array:
        """PLWs of w_p, of the same shape; a w_p that no PLW has gives the PLW at the nearest end."""
        w = np.asarray(w, float)
        if self.name == "power":
            return np.maximum(w, 0) ** (1 / EXPONENT)
        if self.name == "rank":
            return np.interp(w, np.linspace(0, 1, len(self.plws)), self.plws)
        if self.name == "logit":
            low, high = self._logit(np.array([self.plws[0], self.plws[-1]]))
            squeezed = 1 / (1 + np.exp(-(low + w * (high - low))))
            return np.clip((squeezed - self._margin) / (1 - 2 * self._margin), 0, 1)
        return np.maximum(w, 0)

    @property
    def ends(self) -> tuple[float, float]:
        """The range of w_p in which an optimum is looked for: PLW 0 to 1, or further where larger PLWs were tried."""
        return float(self(min(0.0, self.plws[0]))), float(self(max(1.0, self.plws[-1])))

    @property
    def _margin(self) -> float:
        return min((plw for plw in self.plws if plw > 0), default=1.0) / 2

    def _logit(self, plw: Array) -> Array:
        squeezed = self._margin + (1 - 2 * self._margin) * plw
        return np.log(squeezed / (1 - squeezed))


def make_transform(name: str, plws: ArrayLike) -> Transform:
    """The transform of that name for the PLWs tried. Raises UserError where the PLWs do not allow it."""
    tried = tuple(np.unique(np.asarray(plws, float)).tolist())
    if name not in TRANSFORMS:
        raise UserError(f"transform is {name!r}, but must be one of {', '.join(TRANSFORMS)}")
    if name == "logit" and (tried[-1] > 1 or not 0 < min((plw for plw in tried if plw > 0), default=1.0) / 2 < 0.5):
        raise UserError("transform logit is for PLWs within 0..1, some of them between; use power")
    return Transform(name, tried)


def curve_terms(w: ArrayLike) -> Array:
    """The terms of a parabola at each w_p, 1, w_p and w_p^2: [n, 3]."""
    w = np.asarray(w, float)
    return np.column_stack([np.ones_like(w), w, w**2])
