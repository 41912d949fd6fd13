"""Weights: what the loss of each token weighs in a step, for every loss that people mean by a prompt loss weight.

With w_i the weight of target token i by its segment and l_i its cross-entropy, the loss of a step is (`LossDivisor`)

    weights    sum w_i l_i / sum w_i
    tokens     sum w_i l_i / N                      N tokens weigh something
    segments   sum w_i l_i / N_side(i)              prompt and completion each by its own tokens that weigh something
    share      as weights, with weights by which the prompt of every example has the share PLW of the example's weight

and each of them may be taken of a micro-batch or an example, and then averaged (`DivisorScope`). All come down to
sum f_i w_i l_i / D with factors f_i that are known before the step (`factors`) and one of two divisors of the whole
step: D is the sum of f_i w_i (weights, share), or the number of tokens that weigh something (tokens, segments). So the
sums are divided once, however a step is cut and spread over devices (`Trainer._divisors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.config import DivisorScope, LossDivisor, WeightOptions
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example

Counts = NDArray[np.int64]  # [N, 4] of each example, the tokens of each segment that are predicted
PROMPT, COMPLETION = 0, 1  # the sides of an example, as columns


@dataclass(frozen=True)
class Weights:
    """Loss weight of a token, by the segment it belongs to, and what the loss is divided by."""

    plw: float  # of instruction and input; under loss divisor share, the prompt's share of an example's weight
    template_weight: float | None = None  # None: as the rest of the prompt
    completion_weight: float = 1.0
    loss_divisor: LossDivisor = "weights"
    divisor_scope: DivisorScope = "step"

    @property
    def by_segment(self) -> list[float]:
        """The weight of a token of each segment, before factors."""
        completion = 1 - self.plw if self.loss_divisor == "share" else self.completion_weight
        return [self.plw if self.template_weight is None else self.template_weight, self.plw, self.plw, completion]

    @property
    def have_factors(self) -> bool:
        """Whether a token's weight depends on more than its segment."""
        return self.loss_divisor in ("segments", "share") or self.divisor_scope == "example"


def of_loss(plw: float, options: WeightOptions) -> Weights:
    """The weights of a loss at a PLW."""
    return Weights(plw, options.template_weight, options.completion_weight, options.loss_divisor, options.divisor_scope)


def count(examples: Sequence[Example]) -> Counts:
    """How many tokens of each segment are predicted: all but the first one of an example."""
    return np.array([np.bincount(example.segment[1:], minlength=len(Segment)) for example in examples], np.int64)


def factors(counts: Counts, weights: Weights, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """By what the weights of each example's tokens are multiplied in a step; [N, 2], prompt and completion.

    counts: of the N examples of a step, on all devices. groups: [N] the number of each example's micro-batch.

    Of `divisor_scope` micro-batch, the micro-batches' own divisors are left to be done.
    """
    by_segment = np.array(weights.by_segment)
    masses = _by_side(counts * by_segment)
    tokens = _by_side(counts * (by_segment != 0))
    found = np.ones_like(masses)
    if weights.loss_divisor == "share":  # of which both sides of an example come to its completion tokens
        found[:, PROMPT] = _ratio(counts[:, Segment.COMPLETION], tokens[:, PROMPT])
    elif weights.loss_divisor == "segments":
        totals = tokens
        if weights.divisor_scope != "example":
            groups = groups if weights.divisor_scope == "micro-batch" else np.zeros_like(groups)
            totals = np.zeros((groups.max() + 1, 2))
            np.add.at(totals, groups, tokens)
            totals = totals[groups]
        found = _ratio(totals.sum(1, keepdims=True), totals)
    if weights.divisor_scope == "example":
        has_sum = weights.loss_divisor in ("weights", "share")
        divisors = (found * masses if has_sum else tokens).sum(1, keepdims=True)
        # The sum of these over the step is its divisor, by which the mean of the examples is then taken.
        found = found * _ratio(divisors.sum() / max(1, np.count_nonzero(divisors)), divisors)
    return found


def prompt_share(counts: Counts, weights: Weights) -> float | None:
    """The share that prompt tokens have in the weight of all tokens, over many steps; None where none has any.

    counts: of the examples that are trained on. A micro-batch is taken for one like all others.
    """
    if weights.divisor_scope == "micro-batch":
        weights = replace(weights, divisor_scope="step")
    if weights.divisor_scope == "step" and weights.loss_divisor != "share":  # where it is known from the sums
        counts = counts.sum(0, keepdims=True)
    masses = _by_side(counts * np.array(weights.by_segment))
    if weights.have_factors:
        masses = masses * factors(counts, weights, np.zeros(len(counts), np.int64))
    total = masses.sum()
    return float(masses[:, PROMPT].sum() / total) if total else None


def plw_of_share(counts: Counts, weights: Weights, share: float) -> float | None:
    """The PLW at which prompts have a share of the weight under some divisor and scope; None where there is none.

    weights: all but the PLW counts. It is found to ten digits or so.
    """

    def excess(plw: float) -> float:
        found = prompt_share(counts, replace(weights, plw=plw))
        return (0.0 if found is None else found) - share

    highest = 1.0 if weights.loss_divisor == "share" else 1e9
    if excess(0) > 0 or excess(highest) < 0:
        return None
    first, last = 0.0, 1.0
    while excess(last) < 0:
        last *= 4
    of_first, of_last = excess(first), excess(last)
    for _ in range(100):  # false position, as the Illinois algorithm has it
        if abs(of_last) < 1e-13:
            return last
        middle = last - of_last * (last - first) / (of_last - of_first)
        of_middle = excess(middle)
        if of_middle * of_last > 0:
            of_first /= 2
        else:
            first, of_first = last, of_last
        last, of_last = middle, of_middle
    return None  # where the share jumps


def _by_side(by_segment: NDArray[np.generic]) -> NDArray[np.float64]:
    """[N, 4] numbers by segment as [N, 2] by side."""
    completion = by_segment[:, Segment.COMPLETION]
    return np.stack([by_segment.sum(1) - completion, completion], axis=1).astype(np.float64)


def _ratio(numerator: Any, denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Their ratio, and 0 where the denominator is 0."""
    return np.divide(
        numerator, denominator, out=np.zeros(np.broadcast(numerator, denominator).shape), where=denominator > 0
    )
