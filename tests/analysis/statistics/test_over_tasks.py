"""Do tests over tasks equal the textbook's where there is one, and obey their laws where there is none?"""

import numpy as np
import pytest
from scipy import stats

from plw_mlflow.analysis.statistics import over_tasks
from plw_mlflow.study import PUBLISHED_PLWS

PLWS = np.array(PUBLISHED_PLWS)
W = np.tile(PLWS**0.30103, 2)
X = np.column_stack([np.ones(20), W, W**2, np.repeat([1.0, -1.0], 10)])
CURVE = np.eye(4)[1:3]


def simulate(seed, tasks=8, sd_slopes=0.0, sd_run=0.0, sd=0.01):
    """Scores [20, tasks] under no mean curve."""
    random = np.random.default_rng(seed)
    slopes = random.normal(0, 1, (2, tasks)) * sd_slopes
    luck = random.normal(0, 1, (20, 1)) * sd_run
    return random.random(tasks) + X[:, 1:3] @ slopes + luck + random.normal(0, sd, (20, tasks))


def fit(scores, x=X, *, runs_differ=True):
    return over_tasks.fit(scores, x, CURVE, runs_differ=runs_differ)


# -------------------------------------------------------------------------------------------- exact tests


@pytest.mark.parametrize("tasks", [4, 9])
def test_without_luck_the_tests_are_hotellings_and_students(tasks):
    scores = simulate(1, tasks, sd_slopes=0.05)
    by_task = np.linalg.lstsq(X, scores)[0][1:3].T
    squared = tasks * by_task.mean(0) @ np.linalg.solve(np.cov(by_task.T), by_task.mean(0))
    f = squared * (tasks - 2) / ((tasks - 1) * 2)
    curves = fit(scores, runs_differ=False)
    assert curves.joint_test() == pytest.approx((f, 2, tasks - 2, stats.f.sf(f, 2, tasks - 2)))
    student = stats.ttest_1samp(by_task[:, 0], 0)
    assert curves.t_test(CURVE[0])[2:] == pytest.approx((tasks - 1, student.pvalue))


def test_where_runs_alone_differ_the_tests_are_of_the_means_of_runs():
    scores = simulate(3, sd_run=0.01, sd=1e-6)
    mean = scores.mean(1)
    curves = fit(scores)
    assert curves.counts_runs
    b, residual = np.linalg.lstsq(X, mean)[:2]
    null = np.linalg.lstsq(X[:, [0, 3]], mean)[1]
    f = (null[0] - residual[0]) / 2 / (residual[0] / 16)
    assert curves.joint_test() == pytest.approx((f, 2, 16, stats.f.sf(f, 2, 16)), rel=1e-4)
    error = np.sqrt(residual[0] / 16 * np.linalg.inv(X.T @ X)[1, 1])
    t = curves.t_test(CURVE[0])
    assert t == pytest.approx((b[1], error, 16, 2 * stats.t.sf(abs(b[1]) / error, 16)), rel=1e-4)


def test_reference_is_exact_for_what_is_known():
    """Of a Wishart matrix it is Hotelling's, of a known matrix times an estimated factor F's."""
    for k, n in ((2, 7), (3, 9), (4, 30)):
        wishart = over_tasks.reference(k, np.array(2 * k / n), np.array((k + k**2) / n))
        assert wishart == pytest.approx(((n - k + 1) / n, n - k + 1))
        factor = over_tasks.reference(k, np.array(2 * k**2 / n), np.array(2 * k / n))
        assert factor == pytest.approx((1, n))


@pytest.mark.parametrize("tasks", [4, 5, 8])
def test_reference_has_no_step_between_the_two(tasks):
    """From curves alone to luck alone, of 17 degrees of freedom."""
    share, k = np.linspace(0, 1, 201), 2
    first = 2 * (k * (1 - share) ** 2 / (tasks - 1) + k**2 * share**2 / 17)
    second = 2 * ((k + k**2) / 2 * (1 - share) ** 2 / (tasks - 1) + k * share**2 / 17)
    factor, freedom = over_tasks.reference(k, first, second)
    np.testing.assert_allclose(
        [factor[0], freedom[0], factor[-1], freedom[-1]], [(tasks - 2) / (tasks - 1), tasks - 2, 1, 17]
    )
    assert np.abs(np.diff(np.log(freedom))).max() < 0.03
    assert np.abs(np.diff(np.log(factor))).max() < 0.03


# -------------------------------------------------------------------------------------------------- luck


def test_a_runs_luck_is_counted_where_it_shows():
    quiet, loud = (fit(simulate(1, 13, 0.06, sd_run)) for sd_run in (0, 0.02))
    assert not quiet.counts_runs
    assert loud.counts_runs
    plain = fit(simulate(1, 13, 0.06, 0.02), runs_differ=False)
    extra = loud.var_run * np.linalg.inv(X.T @ X)
    np.testing.assert_allclose(loud.covariance - plain.covariance, extra, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(loud.coefficients, plain.coefficients)


def test_the_variances_are_unbiased():
    tables = np.stack([simulate(seed, 13, 0.06, 0.02, 0.03) for seed in range(2000)])
    found = fit(tables)
    assert found.var_run.mean() == pytest.approx(0.02**2, rel=0.05)
    assert found.of_noise.mean() == pytest.approx(0.03**2, rel=0.02)
    spread = np.cov(found.coefficients, rowvar=False)
    np.testing.assert_allclose(np.diag(found.covariance.mean(0)), np.diag(spread), rtol=0.1)


def test_luck_below_zero_is_deducted_in_part():
    kinds = set()
    for seed in range(40):
        scores = simulate(seed, tasks=6)
        curves, plain = (fit(scores, runs_differ=differ) for differ in (True, False))
        tested = [CURVE @ one.covariance @ CURVE.T for one in (plain, curves)]
        smaller = np.linalg.eigvals(np.linalg.solve(*tested)).real
        kinds.add((curves.var_run < 0, bool(curves.counts_runs)))
        if curves.var_run < 0:
            assert smaller.min() >= 1 - over_tasks.DEDUCTED - 1e-9
            assert smaller.max() < 1
            if smaller.min() > 1 - over_tasks.DEDUCTED + 1e-6:  # all of it
                np.testing.assert_allclose(tested[0] - tested[1], -curves.var_run * curves.bread[1:3, 1:3])
        elif curves.counts_runs:
            assert smaller.min() > 1
        else:
            np.testing.assert_array_equal(curves.covariance, plain.covariance)
        assert np.linalg.eigvalsh(curves.covariance).min() > 0
    assert kinds == {(True, False), (False, True), (False, False)}


# -------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("sd_run", [0, 0.005])
def test_units_and_origin_of_w_and_units_of_scores_do_not_matter(sd_run):
    scores = simulate(4, sd_slopes=0.02, sd_run=sd_run)
    w = 7 * W - 3
    moved = np.column_stack([np.ones(20), w, w**2, X[:, 3]])
    plain, other = fit(scores), fit(100 * scores, moved)
    assert plain.counts_runs == (sd_run > 0)
    np.testing.assert_allclose(other.joint_test(), plain.joint_test(), rtol=1e-6)
    np.testing.assert_allclose(other.t_test(CURVE[1])[2:], plain.t_test(CURVE[1])[2:], rtol=1e-6)


def test_many_tables_at_once_are_each_of_them():
    tables = np.stack([simulate(seed, 6, sd_slopes=0.01, sd_run=0.003) for seed in range(30)])
    together, apart = fit(tables), [fit(table) for table in tables]
    assert set(together.counts_runs) == {True, False}
    assert together.var_run.min() < 0
    np.testing.assert_allclose(together.covariance, [one.covariance for one in apart])
    np.testing.assert_allclose(np.transpose(together.joint_test()[::3]), [one.joint_test()[::3] for one in apart])
    np.testing.assert_allclose(np.transpose(together.t_test(CURVE[0])), [one.t_test(CURVE[0]) for one in apart])


@pytest.mark.parametrize("sd_run", [0, 0.005])
@pytest.mark.parametrize("sd_slopes", [0, 0.06])
def test_differences_between_three_groups_are_found_as_often_as_they_say(sd_slopes, sd_run):
    """Four coefficients together, of eight tasks: 3,000 tables, whose three standard errors are 0.012."""
    random = np.random.default_rng(1)
    group, w = np.repeat(np.eye(3)[:, :2] - np.eye(3)[:, 2:], 10, axis=0), np.tile(PLWS**0.30103, 3)
    curve = np.column_stack([np.ones(30), w, w**2])
    x = np.column_stack([curve, group, *(group[:, [i]] * curve[:, 1:] for i in range(2))])
    own = random.normal(0, 1, (3000, 3, 2, 8)) * sd_slopes  # a curve per group and task
    tables = sum(curve[:, [1 + i]] * np.repeat(own[:, :, i], 10, axis=1) for i in range(2))
    tables = tables + random.normal(0, 1, (3000, 30, 1)) * sd_run + random.normal(0, 0.01, (3000, 30, 8))
    p = over_tasks.fit(tables, x, np.eye(9)[5:], runs_differ=True).joint_test()[3]
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize("free", [1, 2, 3, 5])
def test_p_is_a_probability_however_little_is_known(k, free):
    random = np.random.default_rng(k)
    runs = 3 + k + free
    x = np.column_stack([np.vander(np.linspace(0, 1, runs), 3, increasing=True), random.normal(size=(runs, k))])
    seen = [0, 0]
    for sd_run in (0.002, 0.02, 0.2):
        tables = x[:, :3] @ random.normal(0, 0.1, (500, 3, k + 2))
        tables = tables + random.normal(0, sd_run, (500, len(x), 1)) + random.normal(0, 0.01, (500, len(x), k + 2))
        for table in tables:
            try:
                f, _, freedom, p = over_tasks.fit(table, x, np.eye(3 + k)[3:], runs_differ=True).joint_test()
            except ValueError:
                seen[0] += 1
                continue
            seen[1] += 1
            assert f >= 0
            assert freedom > 0
            assert 0 <= p <= 1
    assert seen[1] > 300


def test_refuses_what_does_not_vary():
    level, one = np.linspace(0, 0.5, 8), simulate(6)[:, [0]]
    with pytest.raises(ValueError, match="all tasks have the same curve"):
        fit(level + one)
    curves = fit(np.column_stack([simulate(7)[:, :1], level[1:] + one]), runs_differ=False)
    with pytest.raises(ValueError, match="too much alike to test 2 coefficients"):
        curves.joint_test()


def test_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="2 tasks"):
        fit(simulate(5)[:, :1])
    with pytest.raises(ValueError, match="4 runs are too few"):
        fit(simulate(5)[:4], X[:4])
    with pytest.raises(ValueError, match="too few to test 3 coefficients together"):
        over_tasks.fit(simulate(5, tasks=3, sd_slopes=0.1), X, np.eye(4)[1:], runs_differ=False).joint_test()
