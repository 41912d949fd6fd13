"""From a prompt loss weight (PLW) to a place on the axis on which scores are fitted, and back.

The study's axis is w_p = PLW^0.30103, on which its scores are a parabola; the others show how much hangs on it. Three
of them go by what a PLW means on a data set, which is the prompts' share of all loss weight: one PLW gives long prompts
with short completions nearly all of it, and short prompts with long completions hardly any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plw_mlflow.errors import UserError

Array = NDArray[np.float64]

# log10(2) in the rounding of arXiv:2401.13586v1, section 4, chosen there so that PLW 0.1 becomes w_p 0.5.
EXPONENT = 0.30103
SHARE_AXES = ("share", "w_share", "w_odds")
AXES = ("w_p", "plw", "logit", "rank", *SHARE_AXES)
CURVE_TERMS = ("w_p", "w_p^2")  # named so on every axis
TERMS = ("intercept", *CURVE_TERMS)


@dataclass(frozen=True)
class Transform:
    """A rising function from PLW to a place on an axis, and back.

    w_p: PLW^0.30103. plw: PLW itself. rank: the PLWs tried, equally spaced over 0..1 (and straight lines
    between), as in the draft of the study. logit: log(PLW / (1 - PLW)) after PLW is drawn in from 0 and 1 by half the
    smallest positive PLW tried, scaled to 0..1 over the PLWs tried; for PLWs within 0..1.

    share: the prompts' share of the loss weight. w_share: share^0.30103. w_odds: (the weight of all prompts over that
    of all completions)^0.30103, which on one data set with prompts of one weight is w_p times a number.
    """

    name: str
    plws: tuple[float, ...]  # tried, ascending
    # The weight of all prompt tokens over that of all completion tokens, at PLW 0 and at PLW 1. It is linear in the
    # PLW, and above 0 at PLW 0 where the template's tokens have a weight of their own.
    prompt_odds: tuple[float, float] = (0.0, 1.0)

    def __call__(self, plw: ArrayLike) -> Array:
        """The places of PLWs, of the same shape."""
        plw = np.asarray(plw, float)
        if self.name == "w_p":
            return plw**EXPONENT
        if self.name == "rank":
            return np.interp(plw, self.plws, np.linspace(0, 1, len(self.plws)))
        if self.name == "logit":
            low, high = self._logit(np.array([self.plws[0], self.plws[-1]]))
            return (self._logit(plw) - low) / (high - low)
        if self.name in SHARE_AXES:
            at_0, at_1 = self.prompt_odds
            odds = at_0 + plw * (at_1 - at_0)
            amount = odds if self.name == "w_odds" else odds / (1 + odds)
            return np.asarray(amount if self.name == "share" else amount**EXPONENT)
        if self.name != "plw":
            raise ValueError(f"there is no axis {self.name!r}")
        return plw.copy()

    def back(self, w: ArrayLike) -> Array:
        """The PLWs of places, of the same shape; a place that no PLW has gives the PLW at the nearest end."""
        w = np.asarray(w, float)
        if self.name == "w_p":
            return np.maximum(w, 0) ** (1 / EXPONENT)
        if self.name == "rank":
            return np.interp(w, np.linspace(0, 1, len(self.plws)), self.plws)
        if self.name == "logit":
            low, high = self._logit(np.array([self.plws[0], self.plws[-1]]))
            squeezed = 1 / (1 + np.exp(-(low + w * (high - low))))
            return np.clip((squeezed - self._margin) / (1 - 2 * self._margin), 0, 1)
        if self.name in SHARE_AXES:
            at_0, at_1 = self.prompt_odds
            inside = np.clip(np.asarray(w, float), *self.ends)
            amount = inside if self.name == "share" else inside ** (1 / EXPONENT)
            odds = amount if self.name == "w_odds" else amount / (1 - amount)
            return np.maximum((odds - at_0) / (at_1 - at_0), 0)
        return np.maximum(w, 0)

    @property
    def ends(self) -> tuple[float, float]:
        """The range in which an optimum is looked for: PLW 0 to 1, or further where larger PLWs were tried."""
        return float(self(min(0.0, self.plws[0]))), float(self(max(1.0, self.plws[-1])))

    @property
    def _margin(self) -> float:
        return min((plw for plw in self.plws if plw > 0), default=1.0) / 2

    def _logit(self, plw: Array) -> Array:
        squeezed = self._margin + (1 - 2 * self._margin) * plw
        return np.log(squeezed / (1 - squeezed))


def make_transform(axis: str, plws: ArrayLike, prompt_odds: tuple[float, float] | None = None) -> Transform:
    """The transform to that axis for the PLWs tried. Raises UserError where these do not allow it.

    prompt_odds: as Transform has it; None where it is not known, which the axes of the share need.
    """
    tried = tuple(np.unique(np.asarray(plws, float)).tolist())
    if axis not in AXES:
        raise UserError(f"axis is {axis!r}, but must be one of {', '.join(AXES)}")
    if axis == "logit" and (tried[-1] > 1 or not 0 < min((plw for plw in tried if plw > 0), default=1.0) / 2 < 0.5):
        raise UserError("axis logit is for PLWs within 0..1, some of them between; use w_p")
    if axis in SHARE_AXES and prompt_odds is None:
        raise UserError(
            f"axis {axis} needs the prompts' share of the loss weight of every run, in a column prompt_share or from "
            "--ratios, and needs the weight of prompts over that of completions to be linear in PLW, as it is but for "
            "--loss-divisor share (where --axis plw is the share) and --divisor-scope example"
        )
    return Transform(axis, tried, prompt_odds or (0.0, 1.0))


def curve_terms(w: ArrayLike) -> Array:
    """The terms of a parabola at each place w, 1, w and w^2: [n, 3]."""
    w = np.asarray(w, float)
    return np.column_stack([np.ones_like(w), w, w**2])
