"""Are the losses that people mean by PLW what one computes by hand, and the prompts' share that of the batches?"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plw_mlflow.data import weights
from plw_mlflow.data.batches import collate, pack
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.weights import Weights
from tests.conftest import make_example

DIVISORS = ("weights", "tokens", "segments", "share")
SCOPES = ("step", "example")


def example(*lengths):
    """So many tokens of template, instruction, input and completion; nothing predicts the first."""
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    return make_example(range(len(segment)), segment)


# Predicted: 2 + 4 of the prompt and 3 of the completion; 4 and 10; the prompt alone; the completion alone.
EXAMPLES = [example(3, 3, 1, 3), example(3, 2, 0, 10), example(2, 3, 0, 0), example(0, 0, 0, 6)]
COUNTS = weights.count(EXAMPLES)
ONE_GROUP = np.zeros(len(EXAMPLES), np.int64)


def by_hand(loss, rows):
    """By example and side, what all its tokens together weigh in the loss of a step of these examples."""
    scales = {}
    groups = [rows] if loss.divisor_scope == "step" else [[row] for row in rows]
    for group in groups:
        masses, numbers = {}, {}
        for index in group:
            prompt, completion = COUNTS[index, :3].sum(), COUNTS[index, 3]
            if loss.loss_divisor == "share":
                of_prompt = loss.plw * completion if prompt else 0
                masses[index] = [of_prompt, (1 - loss.plw) * completion]
            else:
                masses[index] = [loss.plw * prompt, completion]
            numbers[index] = [prompt, completion]
        sides = np.array(list(numbers.values())).sum(0)
        for index, mass in masses.items():
            if loss.loss_divisor == "segments":
                scales[index] = [m / side if side else 0 for m, side in zip(mass, sides, strict=True)]
            else:
                by = sides.sum() if loss.loss_divisor == "tokens" else np.sum(list(masses.values()))
                scales[index] = [m / by if by else 0 for m in mass]
    found = np.array([scales[index] for index in rows])
    return found / np.count_nonzero(found.sum(1)) if loss.divisor_scope == "example" else found


@pytest.mark.parametrize("make", [collate, pack])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("divisor", DIVISORS)
def test_factors_and_one_divisor_of_the_step_make_each_loss(divisor, scope, make):
    loss = Weights(0.25, None, 1, divisor, scope)
    batch = make(EXAMPLES, loss, weights.factors(COUNTS, loss, ONE_GROUP))
    by = batch.weights.sum() if divisor in ("weights", "share") else batch.weights.count_nonzero()
    owner = np.repeat(np.arange(4), [len(each.tokens) for each in EXAMPLES])
    if make is collate:
        flat = np.concatenate([row[: len(each.tokens)] for row, each in zip(batch.weights, EXAMPLES, strict=True)])
    else:
        flat = batch.weights[0].numpy()
    is_completion = np.concatenate([each.segment for each in EXAMPLES]) == Segment.COMPLETION
    found = np.zeros((4, 2))
    np.add.at(found, (owner, is_completion.astype(int)), flat / by.item())
    assert found == pytest.approx(by_hand(loss, range(4)), rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("divisor", DIVISORS)
def test_the_prompts_share_is_that_of_such_a_step(divisor, scope):
    loss = Weights(0.25, None, 1, divisor, scope)
    masses = by_hand(loss, range(4))
    assert weights.prompt_share(COUNTS, loss) == pytest.approx(masses[:, 0].sum() / masses.sum())


def test_the_usual_losses_have_no_factors_and_their_shares_are_those_of_all_tokens():
    for divisor in ("weights", "tokens"):
        for scope in ("step", "micro-batch"):
            loss = Weights(0.25, None, 1, divisor, scope)
            assert not loss.have_factors
            assert weights.prompt_share(COUNTS, loss) == pytest.approx(0.25 * 14 / (0.25 * 14 + 18))


def test_each_micro_batch_may_have_sides_of_its_own():
    loss = Weights(0.25, None, 1, "segments", "micro-batch")
    found = weights.factors(COUNTS, loss, np.array([0, 0, 1, 1]))
    assert found[:2] == pytest.approx(np.array([[23 / 10, 23 / 13]] * 2))
    assert found[2:] == pytest.approx(np.array([[9 / 4, 9 / 5]] * 2))


@pytest.mark.parametrize("template", [None, 0.0])
def test_under_share_the_plw_is_the_prompts_share_of_every_example(template):
    """As in GoLLIE, whose examples count by the tokens of their completions."""
    loss = Weights(0.3, template, 1, "share")
    found = weights.factors(COUNTS, loss, ONE_GROUP)
    for each, by in zip(EXAMPLES[:2], found, strict=False):
        batch = collate([each], loss, by[None])
        of_prompt = batch.weights[~batch.is_completion].sum().item()
        assert of_prompt / batch.weights.sum().item() == pytest.approx(0.3)
        assert batch.weights.sum().item() == pytest.approx((each.segment == Segment.COMPLETION).sum())
    assert found[2, 0] == 0  # a prompt without completion trains nothing


def test_nothing_weighs_nothing():
    none = weights.count([example(2, 3, 0, 0)])
    for divisor in DIVISORS:
        for scope in SCOPES:
            loss = Weights(0.0, None, 1, divisor, scope)
            assert weights.prompt_share(none, loss) is None
            # Without a completion, prompts have all of the weight, or there is none, as under `share`.
            assert weights.prompt_share(none, replace(loss, plw=0.25)) == (None if divisor == "share" else 1)
            assert weights.plw_of_share(none, loss, 0.5) is None
            assert np.isfinite(weights.factors(none, loss, np.zeros(1, np.int64))).all()


@settings(max_examples=10)
@given(st.lists(st.tuples(*[st.integers(1, 9)] * 4), min_size=1, max_size=6), st.sampled_from([0.0, 0.01, 0.3, 0.9]))
def test_the_plw_of_a_share_has_that_share(lengths, plw):
    counts = np.array(lengths)
    share = weights.prompt_share(counts, Weights(plw))
    for divisor in DIVISORS:
        for scope in SCOPES:
            loss = Weights(1, None, 1, divisor, scope)
            found = weights.plw_of_share(counts, loss, share)
            assert weights.prompt_share(counts, replace(loss, plw=found)) == pytest.approx(share, abs=1e-9)


def test_what_a_plw_of_one_loss_is_in_another_by_hand():
    """Prompts of 6 and 4 tokens, completions of 3 and 10."""
    counts, share = COUNTS[:2], 0.5 * 10 / (0.5 * 10 + 13)
    assert weights.prompt_share(counts, Weights(0.5)) == pytest.approx(share)
    for divisor, scope, expected in [
        ("tokens", "step", 0.5),
        ("segments", "step", 0.5 * 10 / 13),
        ("segments", "example", 0.5 * 10 / 13),
        ("share", "step", share),
    ]:
        assert weights.plw_of_share(counts, Weights(1, None, 1, divisor, scope), share) == pytest.approx(expected)


def test_a_share_that_no_plw_gives_has_none():
    templates_weigh = Weights(1, 0.5)
    assert weights.plw_of_share(COUNTS, templates_weigh, 0.01) is None  # the template alone weighs more
    assert weights.plw_of_share(COUNTS[3:], Weights(1), 0.5) is None  # there is no prompt
