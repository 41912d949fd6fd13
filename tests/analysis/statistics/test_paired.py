"""Are questions compared as the textbooks do it, and is the luck of training found where it is?"""

import numpy as np
import pytest
from scipy import stats

from plw_mlflow.analysis.statistics import paired
from plw_mlflow.analysis.statistics.paired import Luck


def answers(rng, *, seeds=1, questions=300, right=0.6):
    return (rng.random((seeds, questions)) < right).astype(float)


def test_mcnemars_mid_p_by_hand():
    # Of 10 questions that one model alone answers right, 2 or fewer are one's: 1 + 10 + 45 ways of 1024; 45 count half.
    assert paired.mcnemar(8, 2) == pytest.approx((2 * (1 + 10) + 45) / 1024)
    assert paired.mcnemar(2, 8) == paired.mcnemar(8, 2)
    assert paired.mcnemar(0, 0) == 1
    assert paired.mcnemar(4, 4) == 1


def test_right_and_wrong_answers_of_two_runs_are_compared_by_mcnemar():
    first, second = np.array([[1.0, 1, 1, 0, 0, 1]]), np.array([[1.0, 0, 0, 0, 1, 0]])
    found = paired.compare([first], [second])
    assert (found.test, found.gained, found.lost) == ("McNemar, mid-p", 3, 1)
    assert found.difference == pytest.approx(2 / 6)
    assert found.paired.p == pytest.approx(paired.mcnemar(3, 1))
    more, less = 4 / 8, 2 / 8  # with one more question of each kind
    half = 1.959964 * ((more + less - (more - less) ** 2) / 8) ** 0.5
    assert (found.paired.low, found.paired.high) == pytest.approx((more - less - half, more - less + half), rel=1e-6)
    assert found.with_luck is None


def test_other_values_are_compared_by_the_paired_t_test():
    rng = np.random.default_rng(1)
    first, second = rng.random((1, 40)), rng.random((1, 40))
    found, expected = paired.compare([first], [second]), stats.ttest_rel(first[0], second[0])
    assert found.test == "paired t"
    assert found.paired.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.paired.low, found.paired.high) == pytest.approx((interval.low, interval.high))
    expected = abs(first.mean() - second.mean()) / (first.var(ddof=1) / 40 + second.var(ddof=1) / 40) ** 0.5
    assert found.unpaired.p == pytest.approx(2 * stats.norm.sf(expected))


def test_seeds_are_averaged_on_each_question_first():
    rng = np.random.default_rng(2)
    first, second = answers(rng, seeds=3), answers(rng, seeds=3)
    found = paired.compare([first], [second])
    assert found.paired.p == pytest.approx(stats.ttest_rel(first.mean(0), second.mean(0)).pvalue)


def test_tasks_have_equal_weights_in_their_mean():
    rng = np.random.default_rng(3)
    first = [answers(rng, questions=50), answers(rng, questions=500)]
    second = [answers(rng, questions=50), answers(rng, questions=500)]
    found = paired.compare(first, second)
    apart = [paired.compare([one], [other]) for one, other in zip(first, second, strict=True)]
    assert found.difference == pytest.approx(np.mean([one.difference for one in apart]))
    assert found.paired.error == pytest.approx(np.hypot(*(one.paired.error for one in apart)) / 2)


def test_models_that_answer_alike_do_not_differ():
    same = np.array([[1.0, 0, 1]])
    found = paired.compare([same, same], [same, same])
    assert (found.difference, found.paired.p, found.paired.low, found.paired.high) == (0, 1, 0, 0)


def test_luck_is_what_seeds_differ_by_beyond_plws_and_beyond_noise():
    scores = np.array([0.50, 0.54, 0.60, 0.66, 0.70, 0.75])  # three PLWs of two seeds
    plws, seeds = [0, 0, 1, 1, 2, 2], [1, 2] * 3
    # The seeds differ by 0.04, 0.06 and 0.05, so by 0.05 everywhere and by 0.005 around it at two PLWs.
    luck = paired.luck_of(scores, np.full(6, 1e-5), plws, seeds)
    assert (luck.spread, luck.freedom) == (pytest.approx(4 * 0.005**2 / 2), 2)
    assert luck.variance == pytest.approx(5e-5 - 1e-5)
    apart = paired.luck_of(scores, np.zeros(6), plws, [0] * 6)  # whose seeds have nothing in common
    assert (apart.spread, apart.freedom) == (pytest.approx((0.04**2 + 0.06**2 + 0.05**2) / 2 / 3), 3)
    assert paired.luck_of(scores, np.ones(6), plws, seeds).variance == 0


def test_luck_of_too_few_runs_is_not_given():
    scores = np.array([0.50, 0.54, 0.60, 0.66])
    few = paired.luck_of(scores, np.zeros(4), [0, 0, 1, 1], [1, 2, 1, 2])  # what seeds share cannot be told apart
    assert (few.spread, few.freedom) == (pytest.approx((0.04**2 + 0.06**2) / 4), 2)
    assert paired.luck_of(scores[:3], np.zeros(3), [0, 0, 1], [1, 2, 1]) is None
    assert paired.luck_of(scores[:2], np.zeros(2), [0, 1], [1, 1]) is None


def test_luck_widens_the_interval_as_far_as_seeds_do_not_average_it_out():
    rng = np.random.default_rng(4)
    first, second = answers(rng, seeds=2), answers(rng, seeds=2)
    found = paired.compare([first], [second], Luck(0.01**2, 0.01**2, 1e9))
    assert found.with_luck.error == pytest.approx(np.hypot(found.paired.error, 0.01))  # of two means of two seeds
    none = paired.compare([first], [second], Luck(0.0, 0.0, 1))
    assert none.with_luck.p == pytest.approx(none.paired.p)


def test_a_spread_without_luck_leaves_the_degrees_of_freedom_that_it_was_estimated_with():
    rng = np.random.default_rng(4)
    found = paired.compare([answers(rng, seeds=2)], [answers(rng, seeds=2)], Luck(0.0, 0.5, 6))
    assert found.with_luck.high - found.difference == pytest.approx(stats.t.isf(0.025, 6) * found.paired.error)


def test_noise_of_answers_is_the_residual_of_questions_and_seeds():
    values = np.array([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    # Both seeds score 0.75, so their residuals are half the differences, 0, -1, 1, 0, of 3 degrees of freedom.
    assert paired.answer_noise(values) == pytest.approx((4 * 0.25) / 3 / 4)
    assert np.isnan(paired.answer_noise(values[:1]))


def test_a_difference_that_is_the_same_on_every_question_has_a_p_and_an_interval():
    ones, zeros = np.ones((2, 5)), np.zeros((2, 5))
    found = paired.compare([ones], [zeros])
    assert found.test == "sign test, mid-p"
    assert found.paired.p == pytest.approx(2 * 0.5**5 - 0.5**5)
    assert found.paired.low < 1 <= found.paired.high
