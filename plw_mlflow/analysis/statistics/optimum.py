"""Where a fitted parabola turns, and how sure that is; all in w_p.

"No interior optimum" is an answer: the parabola may bend upwards, or turn outside the range. An interval by Fieller's
method (1954) can be the whole line, and then says so: with a bend that could be 0, the turning point could be anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from plw_mlflow.transforms import Array

LEVEL = 0.05  # of every test; intervals are at 1 - LEVEL
POWER = 0.8  # with which a planned study is to find what is there
STEPS = 512  # at which a confidence set's borders are looked for


@dataclass(frozen=True)
class Parabola:
    """score = const + slope w + bend w^2 on a range of w, with what is known of its uncertainty."""

    slope: float
    bend: float
    covariance: Array  # [2, 2], of slope and bend
    freedom: Callable[[Array], float]  # degrees of freedom of a contrast, [2], of slope and bend; may be infinite
    low: float
    high: float

    @property
    def vertex(self) -> float | None:
        """Where it turns, be it a maximum or not and wherever it lies; None for a straight line."""
        return None if self.bend == 0 else -self.slope / (2 * self.bend)

    @property
    def has_interior_maximum(self) -> bool:
        """Whether it has its maximum strictly inside the range."""
        return self.bend < 0 and self.low < -self.slope / (2 * self.bend) < self.high

    def vertex_error(self) -> tuple[float, float] | None:
        """Standard error of the vertex by the delta method, and its degrees of freedom."""
        if self.bend == 0:
            return None
        gradient = np.array([-1 / (2 * self.bend), self.slope / (2 * self.bend**2)])
        return math.sqrt(gradient @ self.covariance @ gradient), self.freedom(gradient)

    def delta_interval(self) -> tuple[float, float] | None:
        """Vertex plus and minus t standard errors; None for a straight line."""
        if (vertex := self.vertex) is None or (error := self.vertex_error()) is None:
            return None
        reach = _two_sided(error[1]) * error[0]
        return vertex - reach, vertex + reach

    def excess(self, w: float) -> float:
        """How far the slope at w is from 0, beyond what is compatible with 0: below 0 in the confidence set."""
        contrast = np.array([1.0, 2 * w])
        variance = contrast @ self.covariance @ contrast
        derivative = self.slope + 2 * self.bend * w
        return float(derivative**2 - _two_sided(self.freedom(contrast)) ** 2 * variance)

    def fieller_set(self) -> tuple[list[tuple[float, float]], bool]:
        """Every w in the range at which the slope may be 0, as intervals; and whether the set goes on without end.

        By inverting the t test of the slope at w, whose degrees of freedom may depend on w.
        """
        grid = np.linspace(self.low, self.high, STEPS + 1)
        if self.vertex is not None and self.low < self.vertex < self.high:  # which the set holds, however narrow it is
            grid = np.sort(np.append(grid, self.vertex))
        values = [self.excess(w) for w in grid]
        borders = [
            float(optimize.brentq(self.excess, grid[i], grid[i + 1]))
            for i in range(len(grid) - 1)
            if values[i] * values[i + 1] < 0
        ]
        if values[0] <= 0:
            borders.insert(0, self.low)
        if values[-1] <= 0:
            borders.append(self.high)
        pairs = list(zip(borders[::2], borders[1::2], strict=False))
        far = np.array([0.0, 1.0])  # the slope far out is the bend's
        certain = self.bend**2 > _two_sided(self.freedom(far)) ** 2 * self.covariance[1, 1]
        return pairs, not certain

    def interior_probability(self) -> float:
        """Of a maximum inside the range: rising at its low end and falling at its high one.

        From the distribution of the coefficients that the data leave (normal or t around the estimates), which is the
        posterior under a flat prior; not a test.
        """
        ends = np.array([[1.0, 2 * self.low], [-1.0, -2 * self.high]])  # slopes that must be above 0
        mean, covariance = ends @ [self.slope, self.bend], ends @ self.covariance @ ends.T
        freedom = min(self.freedom(np.array([1.0, 2 * w])) for w in (self.low, self.high))
        scale = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(scale, scale)
        # The chance that a standard pair exceeds -mean / scale is that of its mirror image lying below mean / scale.
        return _below(mean / scale, float(np.clip(correlation[0, 1], -1, 1)), freedom)


def _two_sided(freedom: float) -> float:
    """The quantile of t for a two-sided test; scipy.stats has it too, and takes 50 times as long."""
    return float(special.stdtrit(min(freedom, 1e9), 1 - LEVEL / 2))


def maximisers(slope: Array, bend: Array, low: float, high: float) -> Array:
    """Where each of many parabolas is highest on the range: its vertex, or an end."""
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -slope / (2 * bend)
    inside = (bend < 0) & (low < vertex) & (vertex < high)
    rise = slope * (high - low) + bend * (high**2 - low**2)
    return np.where(inside, vertex, np.where(rise > 0, high, low))


def _below(bounds: Array, correlation: float, freedom: float) -> float:
    """The chance that a pair of standard normal or t variables with that correlation lies below both bounds.

    One integral: given the first variable, the second is normal or t again.
    """
    if abs(correlation) > 1 - 1e-12:
        first = stats.t.cdf if math.isfinite(freedom) else lambda x, _: stats.norm.cdf(x)
        a, b = bounds
        return float(first(min(a, b), freedom) if correlation > 0 else max(0.0, first(a, freedom) - first(-b, freedom)))
    root = math.sqrt(1 - correlation**2)
    # Substituting the first variable's probability: nodes where it lies.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    if not math.isfinite(freedom):
        share = stats.norm.cdf(bounds[0])
        x = stats.norm.ppf(share * (nodes + 1) / 2)
        inner = stats.norm.cdf((bounds[1] - correlation * x) / root)
    else:
        share = stats.t.cdf(bounds[0], freedom)
        x = stats.t.ppf(share * (nodes + 1) / 2, freedom)
        widening = np.sqrt((freedom + x**2) / (freedom + 1))
        inner = stats.t.cdf((bounds[1] - correlation * x) / (root * widening), freedom + 1)
    return float(share / 2 * (weights @ inner))
