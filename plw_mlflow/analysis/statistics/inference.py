"""Tests of the coefficients of linear mixed models, and criteria by which such models are compared.

Letters: `P` coefficients, `K` variance parameters, `k` contrasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array


@dataclass(frozen=True)
class Uncertainty:
    """What Satterthwaite's method needs to know of the variance parameters; their scale cancels out."""

    parameter_covariance: Array  # [K, K], of the variance parameters: twice the inverse Hessian of the deviance
    covariance_gradient: Array  # [K, P, P], of the coefficients' covariance by each parameter


class Fitted(Protocol):
    """A fitted linear mixed model, as the tests need it."""

    @property
    def coefficients(self) -> Array: ...  # [P]
    @property
    def covariance(self) -> Array: ...  # [P, P], of the coefficients
    @property
    def uncertainty(self) -> Uncertainty: ...
    @property
    def loglik(self) -> float: ...  # restricted if fitted by REML
    @property
    def reml(self) -> bool: ...
    @property
    def n(self) -> int: ...  # scores
    @property
    def parameters(self) -> int: ...  # coefficients and variances, as lme4 counts


def satterthwaite(fit: Fitted, contrast: Array) -> float:
    """Degrees of freedom of the t of a contrast [P] of coefficients, such that chi^2 matches its variance's variance.

    As in lmerTest (Kuznetsova and others 2017, J. Stat. Softw. 82(13), section 2): 2 v^2 / (g'A g), v the contrast's
    variance, g its gradient in the variance parameters, A their covariance. Infinite if no variance is uncertain.
    """
    variance = contrast @ fit.covariance @ contrast
    slope = fit.uncertainty.covariance_gradient @ contrast @ contrast
    variance_of_variance = slope @ fit.uncertainty.parameter_covariance @ slope
    return float(2 * variance**2 / variance_of_variance) if variance_of_variance > 0 else math.inf


def f_test(fit: Fitted, contrasts: Array) -> tuple[float, int, float, float]:
    """Joint test that contrasts [k, P] of coefficients are 0: F, its two degrees of freedom, and p.

    The denominator's, after Fai and Cornelius (1996): with k independent t^2 in place of the joint test, the F whose
    mean is theirs; 2 where one of those has no mean.
    """
    covariance = contrasts @ fit.covariance @ contrasts.T
    values, vectors = np.linalg.eigh(covariance)
    if values[0] <= 1e-12 * values[-1]:
        raise UserError(f"{len(contrasts)} contrasts are not independent of each other; drop some")
    separate = vectors.T @ contrasts
    statistic = float(np.mean((separate @ fit.coefficients) ** 2 / values))
    freedom = np.array([satterthwaite(fit, contrast) for contrast in separate])
    if freedom.min() <= 2:
        below = 2.0
    elif np.ptp(freedom) < 1e-8 or np.isinf(freedom).any():
        below = float(freedom.mean())
    else:
        excess = float((freedom / (freedom - 2)).sum())
        below = 2 * excess / (excess - len(freedom))
    return statistic, len(contrasts), below, float(stats.f.sf(statistic, len(contrasts), below))


def likelihood_ratio(fit: Fitted, null: Fitted) -> tuple[float, int, float]:
    """Chi^2 of a fit against one with fewer fixed columns and the same random parts, its degrees of freedom, and p.

    Never below 0: a null that is likelier by more than rounding says that the fit's search missed the highest peak.
    """
    if fit.reml or null.reml:
        raise UserError("restricted likelihoods of different fixed columns cannot be compared; fit both by ML")
    statistic, freedom = max(0.0, 2 * (fit.loglik - null.loglik)), fit.parameters - null.parameters
    return statistic, freedom, float(stats.chi2.sf(statistic, freedom))


def aic_bic(fit: Fitted) -> tuple[float, float]:
    """AIC and BIC, lower being better; BIC counts each score as an observation, as lme4 does."""
    if fit.reml:
        raise UserError("AIC and BIC of a restricted likelihood do not compare fixed columns; fit by ML")
    return 2 * (fit.parameters - fit.loglik), fit.parameters * math.log(fit.n) - 2 * fit.loglik
