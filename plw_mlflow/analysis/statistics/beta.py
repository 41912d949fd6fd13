"""A mixed model for scores in (0, 1): beta family, logit link, a random intercept by group.

    y_i ~ Beta(mu_i phi_i, (1 - mu_i) phi_i),  logit mu_i = x_i'beta + sigma u_j,  u_j ~ N(0, 1),  phi_i = phi weight_i

so that Var y_i = mu_i (1 - mu_i) / (1 + phi_i): glmmTMB's `beta_family`, by maximum likelihood as there. The integral
over each group's u_j is Laplace's: the integrand is replaced by a normal one at its mode. The gradient of that is
written out below, third derivatives of the density included, and its Hessian is taken by differences of the gradient;
Newton's method then ends in a few steps, and the last Hessian gives the standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

from plw_mlflow.errors import UserError
from plw_mlflow.transforms import Array

MAX_STEPS = 60  # of Newton's method; few fits need 10
DIFFERENCE = 1e-4  # of the gradient's arguments, which are logits and logarithms, all of order 1
BERNOULLI = special.bernoulli(14)[2::2]  # B_2 to B_14
DECREMENT = 1e-11  # where Newton's method stops: twice the log-likelihood that its next step promises


@dataclass(frozen=True)
class BetaFit:
    """A fitted beta model y ~ X + (1 | group)."""

    coefficients: Array  # [columns of X], logits
    covariance: Array  # of the coefficients, from the Hessian over (coefficients, log sd, log phi)
    var_group: float  # between groups, of logits; 0 when the fit is singular
    phi: float  # precision of a score of weight 1
    loglik: float  # Laplace
    converged: bool  # if not, the other fields are the best found and their covariance may hold NaN


@dataclass(frozen=True)
class Density:
    """The beta log-density at each score and its derivatives in the logit e and in t = log phi, each [n]."""

    value: Array
    e: Array
    ee: Array
    eee: Array
    t: Array
    et: Array
    eet: Array


def polygammas(z: Array) -> tuple[Array, Array]:
    """Trigamma and tetragamma of positive numbers: the second and third derivatives of log gamma.

    scipy has both as Hurwitz zeta sums, which took three quarters of a fit's time; from 10 on, the asymptotic series of
    Abramowitz and Stegun, 6.4.12 and 6.4.13, has all digits too and takes a thirtieth.
    """
    inverse = 1 / np.maximum(z, 10)
    square = inverse**2
    tri, tetra = np.zeros_like(z), np.zeros_like(z)
    for k, bernoulli in reversed(list(enumerate(BERNOULLI, start=1))):
        tri = tri * square + bernoulli
        tetra = tetra * square + (2 * k + 1) * bernoulli
    tri = inverse + square / 2 + tri * square * inverse
    tetra = -square - square * inverse - tetra * square**2
    if (small := ~(z >= 10)).any():
        tri[small], tetra[small] = special.zeta(2, z[small]), -2 * special.zeta(3, z[small])
    return tri, tetra


class Scores:
    """Scores with their design: what the likelihood needs at every step."""

    def __init__(self, y: Array, x: Array, group: NDArray[np.intp], weights: Array) -> None:
        self.x, self.group, self.weights = x, group, weights
        self.groups = int(group.max()) + 1
        self.log_y, self.log_rest = np.log(y), np.log1p(-y)
        self.logit = self.log_y - self.log_rest
        self.u = np.zeros(self.groups)  # the modes last found, from where the next search starts

    def sum(self, values: Array) -> Array:
        """Sum within groups."""
        return np.bincount(self.group, values, self.groups).astype(float)

    def curve(self, logit: Array, phi: Array) -> tuple[Array, Array, Array]:
        """The log-density less what no logit changes, and its first two derivatives in the logit."""
        mu, rest = special.expit(logit), special.expit(-logit)
        a, b = mu * phi, rest * phi
        value = a * self.log_y + b * self.log_rest - special.betaln(a, b)
        score = phi * (self.logit - special.digamma(a) + special.digamma(b))
        slope = mu * rest
        second = -((phi * slope) ** 2) * (polygammas(a)[0] + polygammas(b)[0]) + score * slope * (rest - mu)
        return value, score * slope, second

    def density(self, logit: Array, phi: Array) -> Density:
        """All that the gradient of the likelihood needs, at one logit a score."""
        mu, rest = special.expit(logit), special.expit(-logit)
        a, b = mu * phi, rest * phi
        # The first three derivatives of mu in the logit.
        m, mm, mmm = mu * rest, mu * rest * (rest - mu), mu * rest * (1 - 6 * mu * rest)
        digamma_a, digamma_b = special.digamma(a), special.digamma(b)
        (trigamma_a, tetragamma_a), (trigamma_b, tetragamma_b) = polygammas(a), polygammas(b)
        # The log-density's derivatives in mu, and once in t besides (d/dt = phi d/dphi).
        score = phi * (self.logit - digamma_a + digamma_b)
        second = -(phi**2) * (trigamma_a + trigamma_b)
        third = -(phi**3) * (tetragamma_a - tetragamma_b)
        score_t = score - phi * (a * trigamma_a - b * trigamma_b)
        second_t = 2 * second - phi**2 * (a * tetragamma_a + b * tetragamma_b)
        return Density(
            value=(a - 1) * self.log_y + (b - 1) * self.log_rest - special.betaln(a, b),
            e=score * m,
            ee=second * m**2 + score * mm,
            eee=third * m**3 + 3 * second * m * mm + score * mmm,
            t=phi * special.digamma(phi) + a * (self.log_y - digamma_a) + b * (self.log_rest - digamma_b),
            et=score_t * m,
            eet=second_t * m**2 + score_t * mm,
        )

    def modes(self, fixed: Array, sigma: float, phi: Array) -> Array:
        """The u of each group at which its integrand is highest: [groups], NaN where none is found."""

        def look(u: Array) -> tuple[Array, Array, Array]:
            value, first, second = self.curve(fixed + sigma * u[self.group], phi)
            return self.sum(value) - u**2 / 2, sigma * self.sum(first) - u, 1 - sigma**2 * self.sum(second)

        u = self.u
        height, slope, bend = look(u)
        for _ in range(MAX_STEPS):
            if not np.isfinite(height).all():
                break
            # Where the integrand is not concave, a step of the right sign and of at most the prior's width.
            step = np.where(bend > 0, slope / np.where(bend > 0, bend, 1), np.sign(slope))
            if np.abs(step).max() < 1e-8:  # the error after it is of the order of its square
                return u + step
            for _ in range(40):
                ahead = look(u + step)
                lower = ~(ahead[0] >= height - 1e-9 * np.abs(height))
                if not lower.any():
                    break
                step = np.where(lower, step / 2, step)
            u, (height, slope, bend) = u + step, ahead
        return np.full(self.groups, np.nan)

    def loglik(self, theta: Array) -> tuple[float, Array, float]:
        """Laplace's log-likelihood at theta = (coefficients, log sigma, log phi), its gradient, and the largest
        ratio of a group's information on u to the prior's. The first is -inf where theta is out of reach."""
        out_of_reach = -math.inf, np.full(len(theta), np.nan), math.nan
        if not np.abs(theta[:-2]).max() < 1e6 or theta[-2] > 20 or abs(theta[-1]) > 25:
            return out_of_reach
        sigma, phi = math.exp(theta[-2]), math.exp(theta[-1]) * self.weights
        fixed = self.x @ theta[:-2]
        with np.errstate(all="ignore"):  # what overflows is out of reach, and said to be so
            u = self.modes(fixed, sigma, phi)
            d = self.density(fixed + sigma * u[self.group], phi)
            h = 1 - sigma**2 * self.sum(d.ee)  # minus the second derivative of the log-integrand in u
            value = float(d.value.sum() - (u**2).sum() / 2 - np.log(h).sum() / 2)
            # h changes with theta directly and through the mode; u(theta) follows from the slope in u staying 0.
            h_u = -(sigma**3) * self.sum(d.eee)
            through_mode = h_u / h
            h_sigma = 2 * (h - 1) + h_u * u
            h_phi = -(sigma**2) * self.sum(d.eet)
            u_sigma, u_phi = u * (2 - h) / h, sigma * self.sum(d.et) / h
            by_logit = d.e + (sigma**2 * d.eee - through_mode[self.group] * sigma * d.ee) / (2 * h[self.group])
            gradient = np.array(
                [
                    *(by_logit @ self.x),
                    (u**2 - (h_sigma / h + through_mode * u_sigma) / 2).sum(),
                    d.t.sum() - (h_phi / h + through_mode * u_phi).sum() / 2,
                ]
            )
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            return out_of_reach
        self.u = u
        return value, gradient, float(h.max() - 1)

    def hessian(self, theta: Array, free: NDArray[np.bool_]) -> Array:
        """Second derivatives of the log-likelihood in the free parameters, by central differences of its gradient."""
        steps = DIFFERENCE * np.eye(len(theta))[free]
        rows = [
            (self.loglik(theta + step)[1] - self.loglik(theta - step)[1])[free] / (2 * DIFFERENCE) for step in steps
        ]
        return np.add(rows, np.transpose(rows)) / 2


def start(scores: Scores, y: Array) -> Array:
    """Moments of the logits: a first guess of (coefficients, log sigma, log phi)."""
    coefficients = np.linalg.lstsq(scores.x, scores.logit)[0]
    fixed = scores.x @ coefficients
    means = scores.sum(scores.logit - fixed) / scores.sum(np.ones_like(y))
    sigma = max(float(np.std(means)), 0.01)
    mu = special.expit(fixed + means[scores.group])
    variance = ((y - mu) ** 2 * scores.weights / (mu * (1 - mu))).sum() / (len(y) - scores.groups)
    scores.u = means / sigma
    return np.array([*coefficients, math.log(sigma), -math.log(max(float(variance), 1e-12))])


def climb(scores: Scores, theta: Array) -> tuple[Array, float, Array, bool]:
    """Newton's method from theta: the parameters, the log-likelihood, its Hessian, and whether it is a maximum.

    A log sigma of -inf stays there. It gets there when no group's scores tell its intercept from the others'.
    """
    free = np.isfinite(theta)
    value, gradient, information = scores.loglik(theta)
    hessian = np.full((free.sum(), free.sum()), np.nan)
    for _ in range(MAX_STEPS):
        if free[-2] and information < 1e-4:
            return climb(scores, np.array([*theta[:-2], -math.inf, theta[-1]]))
        hessian = scores.hessian(theta, free)
        if not np.isfinite(hessian).all():
            break
        # Each parameter in units of its own curvature; where the likelihood is not concave, the curvature's size still
        # says how far a step may go.
        unit = 1 / np.sqrt(np.maximum(np.abs(np.diag(hessian)), 1e-12))
        values, vectors = np.linalg.eigh(-hessian * np.outer(unit, unit))
        size = np.maximum(np.abs(values), 1e-8)
        along = vectors.T @ (unit * gradient[free])
        step = np.zeros(len(theta))
        step[free] = unit * (vectors @ (along / size))
        if (along**2 / size).sum() < DECREMENT and values.min() > 0:
            return theta, value, hessian, True
        step /= max(1, np.abs(step).max() / 2)
        for _ in range(30):
            ahead = scores.loglik(theta + step)
            if ahead[0] >= value + 1e-4 * float(step[free] @ gradient[free]) - 1e-10 * abs(value):
                break
            step /= 2
        else:
            break
        theta, (value, gradient, information) = theta + step, ahead
    return theta, value, hessian, False


def fit(y: ArrayLike, x: Array, group: ArrayLike, weights: ArrayLike | None = None) -> BetaFit:
    """Fit y ~ X + (1 | group) by maximum likelihood in the beta family with logit link.

    y: [n] scores, each strictly between 0 and 1; if a pandas Series, its index names the rows in messages.
    x: [n, p] of full rank, with a column of ones.
    group: [n] labels of any kind, of 2 groups or more.
    weights: [n] positive, 1 if left out: the precision of score i is phi * weights[i]. A weight near 0 does not make a
        score absent: at precision 0 the family still prefers some means to others.

    A fit that reached no maximum has `converged` False, as when scores follow a curve exactly. Raises UserError for
    scores or weights outside their range, naming the first row, and for a design that cannot be fitted.
    """
    rows = y.index if isinstance(y, pd.Series) else range(np.size(y))
    y, x = np.asarray(y, float), np.asarray(x, float)
    codes, names = pd.factorize(np.asarray(group))
    given = np.ones_like(y) if weights is None else np.asarray(weights, float)
    n, p = x.shape
    if not len(y) == len(codes) == len(given) == n:
        raise UserError(f"{len(y)} scores, {n} rows of x, {len(codes)} groups, {len(given)} weights: must be as many")
    if (bad := ~((y > 0) & (y < 1))).any():
        at = int(np.argmax(bad))
        raise UserError(
            f"row {rows[at]}: score {y[at]:g} is not strictly between 0 and 1, and the beta family has no other, "
            "not even 0 and 1; fit another model (lmm) or leave that task out"
        )
    if (bad := ~((given > 0) & np.isfinite(given))).any():
        at = int(np.argmax(bad))
        raise UserError(f"row {rows[at]}: weight {given[at]:g} must be a finite number above 0; mend or drop the row")
    if (codes < 0).any():
        raise UserError(f"row {rows[int(np.argmax(codes < 0))]}: no group; name the row's group")
    if len(names) < 2:
        raise UserError(f"{len(names)} group; a variance between groups needs 2 or more")
    if len(names) == n:
        raise UserError(f"each of the {n} groups has one score, which cannot tell groups from noise; score more cells")
    if n < p + 2:
        raise UserError(f"{n} scores are too few for {p} coefficients, a variance and a precision; score more cells")
    if not np.isfinite(x).all():
        raise UserError(
            f"row {rows[int(np.argmin(np.isfinite(x).all(axis=1)))]}: x is not finite; mend or drop the row"
        )
    if np.linalg.cond(x / np.linalg.norm(x, axis=0)) > 1e9:
        raise UserError(f"the {p} columns of x depend on each other; leave out those that follow from others")

    # Orthogonal columns of mean square 1 make every parameter a logit or a logarithm, whatever the units of x.
    q, r = np.linalg.qr(x)
    back = np.linalg.inv(r / math.sqrt(n))
    scores = Scores(y, q * math.sqrt(n), codes, given)
    theta, loglik, hessian, converged = climb(scores, start(scores, y))
    covariance = np.full((p, p), np.nan)
    if converged:
        covariance = back @ np.linalg.inv(-hessian)[:p, :p] @ back.T
    return BetaFit(back @ theta[:p], covariance, math.exp(2 * theta[-2]), math.exp(theta[-1]), loglik, converged)
