"""Is a simulated study what the analysis of its tables would give, and do the proposed PLWs tell most?"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from plw_mlflow.analysis import analyze, planning, score_table
from plw_mlflow.analysis.statistics import fitting, next_plws, over_tasks, power, simulation
from plw_mlflow.analysis.statistics.power import Design, Truth
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Transform
from tests.stores import Place

STUDY = Path(__file__).parents[3] / "paper" / "tables" / "v1_scores.csv"
TRUTH = Truth(
    slope=0.05,
    bend=-0.04,
    task_slope_sd=0.03,
    task_bend_sd=0.025,
    task_correlation=-0.9,
    run_sd=0.002,
    residual_sd=0.005,
    transform=Transform("w_p", PUBLISHED_PLWS),
)


@pytest.fixture(scope="module")
def study():
    """The study's data sets as the models take them."""
    return {grid.dataset: grid for grid in analyze.grids(score_table.read_scores(STUDY))}


def scores_of(truth, design, tables, seed=1):
    """Scores of so many tables, drawn one by one: [N, R, T], with the PLW of each of R runs; models take turns."""
    random = np.random.default_rng(seed)
    plws = np.repeat(design.plws, design.seeds * design.models)
    w = truth.transform(plws)
    mean = [truth.slope, truth.bend]
    curves = random.multivariate_normal(mean, truth.between, (tables, design.tasks))
    level = random.normal(0.5, 0.05, (tables, 1, design.tasks))
    luck = truth.run_sd * random.standard_normal((tables, len(w), 1))
    noise = truth.residual_sd * random.standard_normal((tables, len(w), design.tasks))
    return level + np.einsum("rk,ntk->nrt", np.column_stack([w, w**2]), curves) + luck + noise, plws


def grid_of(scores, plws, of_models=1, dataset="made"):
    """A table of scores [R, T], whose runs belong to the models in turn, as the models take it."""
    rows = [
        {"model": f"m{run % of_models}", "dataset": dataset, "plw": plw, "seed": run, "task": f"t{task:03}"}
        | {"metric": "acc", "score": score}
        for run, plw in enumerate(plws)
        for task, score in enumerate(scores[run])
    ]
    (grid,) = analyze.grids(pd.DataFrame(rows))
    return grid


def curve_of(curves):
    """What `over_tasks.fit` found of tables, of slope and bend alone."""
    kept = slice(1, 3)
    return replace(
        curves,
        coefficients=curves.coefficients[..., kept],
        between=curves.between[..., kept, kept],
        bread=curves.bread[kept, kept],
        contrasts=np.eye(2),
    )


def scores_in(grids):
    """Scores of tables of one design as their grids have them, [N, R, T]."""
    return np.stack([grid.scores for grid in grids])


# --------------------------------------------------------------------------- against the analysis of real tables


@pytest.mark.parametrize("run_sd", [0.0, 0.004])
@pytest.mark.parametrize(
    "design",
    [Design(30, 1, (0.0, 0.026, 0.26, 1.0)), Design(9, 2, (0.0, 0.026, 0.26, 1.0), 2), Design(40, 2, PUBLISHED_PLWS)],
)
def test_intervals_are_those_of_the_lead_model(design, run_sd):
    """Of designs with few degrees of freedom, too, where quantiles of t change along the set."""
    truth = replace(TRUTH, run_sd=run_sd, slope=0.1, bend=-0.08)
    scores, plws = scores_of(truth, design, 30)
    grids = [grid_of(one, plws, design.models) for one in scores]
    seen = curve_of(over_tasks.fit(scores_in(grids), grids[0].x, grids[0].contrasts, runs_differ=True))
    answers = simulation.fit_tables(seen, truth.transform)
    assert answers.is_located.sum() >= 10
    for grid, interval, is_located in zip(grids, answers.interval, answers.is_located, strict=True):
        fit = fitting.fit("crossed", grid)
        assert is_located == (fit.has_interior_optimum and not fit.optimum_set_is_unbounded)
        ends = [fit.optimum_set[0][0], fit.optimum_set[-1][1]] if is_located else [0, 1]
        np.testing.assert_allclose(interval, truth.transform(ends), atol=3e-4)


@pytest.mark.parametrize("run_sd", [0.0, 0.01])
@pytest.mark.parametrize("design", [Design(4, 2, (0.0, 0.01, 0.1, 1.0)), Design(9, 2, PUBLISHED_PLWS, models=2)])
def test_answers_are_those_of_the_lead_model_table_by_table(design, run_sd):
    truth = replace(TRUTH, run_sd=run_sd, slope=0.01, bend=-0.006)
    scores, plws = scores_of(truth, design, 12)
    grids = [grid_of(one, plws, design.models) for one in scores]
    fits = [fitting.fit("crossed", grid) for grid in grids]
    seen = curve_of(over_tasks.fit(scores_in(grids), grids[0].x, grids[0].contrasts, runs_differ=True))
    answers = simulation.fit_tables(seen, truth.transform)
    np.testing.assert_allclose(answers.joint_p, [fit.joint_p for fit in fits])
    assert answers.has_optimum.tolist() == [fit.has_interior_optimum for fit in fits]
    assert 0 < answers.has_optimum.sum() < 12
    for fit, best in zip(fits, answers.best, strict=True):
        if fit.has_interior_optimum:
            assert truth.transform.back(best) == pytest.approx(fit.optimum_plw)
        else:
            assert truth.transform.back(best) == (fit.plws[0] if best == 0 else fit.plws[-1])


def test_both_kinds_of_table_were_among_those_compared():
    """Runs' luck is counted in some of the tables above and not in others."""
    design = Design(9, 2, PUBLISHED_PLWS, models=2)
    counted = set()
    for run_sd in (0.0, 0.01):
        scores, plws = scores_of(replace(TRUTH, run_sd=run_sd), design, 12)
        grids = [grid_of(one, plws, 2) for one in scores]
        counted |= set(over_tasks.fit(scores_in(grids), grids[0].x, grids[0].contrasts, runs_differ=True).counts_runs)
    assert counted == {True, False}


def test_drawn_summaries_are_distributed_as_those_of_tables():
    design = Design(6, 2, (0.0, 0.02, 0.2, 0.6, 1.0))
    scores, plws = scores_of(TRUTH, design, 4000, seed=2)
    w = TRUTH.transform(plws)
    x = np.column_stack([np.ones_like(w), w, w**2])
    told = curve_of(over_tasks.fit(scores, x, np.eye(3)[1:], runs_differ=True))
    drawn = simulation.draw(TRUTH, design, 30_000, seed=2)
    looks = [
        lambda s: s.coefficients[:, 0],
        lambda s: s.coefficients[:, 1],
        lambda s: s.coefficients.sum(1),
        lambda s: s.between[:, 0, 0],
        lambda s: s.between[:, 0, 1],
        lambda s: np.linalg.det(s.between),
        lambda s: s.of_runs,
        lambda s: s.of_noise,
        lambda s: simulation.fit_tables(s, TRUTH.transform).joint_p,
        lambda s: simulation.fit_tables(s, TRUTH.transform).interval[:, 1],
    ]
    assert min(stats.ks_2samp(look(told), look(drawn)).pvalue for look in looks) > 0.01


def test_a_design_has_the_precision_of_its_table(study):
    grid = study["AlpacaDataShort"]
    design = simulation.design_of(grid)
    assert design == Design(8, 1, PUBLISHED_PLWS, 2)
    assert design.runs == 20
    assert design.free == grid.x.shape[0] - grid.x.shape[1]
    np.testing.assert_allclose(design.bread(grid.transform), np.linalg.inv(grid.x.T @ grid.x)[1:3, 1:3])


# -------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("run_sd", [0.0, 0.01])
@pytest.mark.parametrize("tasks", [8, 13, 40])
def test_without_an_effect_the_test_rejects_as_often_as_it_says(tasks, run_sd):
    none = replace(TRUTH, slope=0.0, bend=0.0, run_sd=run_sd)
    outcome = simulation.simulate(none, Design(tasks, 2, PUBLISHED_PLWS), 0.2, 20_000)
    assert 0.04 < outcome.power.value < 0.06
    assert outcome.power.error == pytest.approx(0.0015, abs=1e-4)
    assert outcome.found.value == 0


def test_intervals_hold_the_optimum_as_often_as_they_say():
    outcome = simulation.simulate(TRUTH, Design(13, 2, PUBLISHED_PLWS), 0.2, 20_000)
    assert 0.93 < outcome.coverage.value < 0.97


def test_tasks_seeds_and_plws_all_help():
    small = Design(8, 1, PUBLISHED_PLWS)
    larger = [replace(small, tasks=30), replace(small, seeds=5), replace(small, plws=PUBLISHED_PLWS * 2)]
    before = simulation.simulate(TRUTH, small, 0.3)
    for design in larger:
        after = simulation.simulate(TRUTH, design, 0.3)
        assert after.found.value > before.found.value + 3 * before.found.error
        assert after.median_width.value < before.median_width.value - 3 * before.median_width.error
        assert after.median_error.value < before.median_error.value - 3 * before.median_error.error


def test_a_simulation_is_its_seeds_and_its_errors_are_those_of_its_seeds():
    design = Design(8, 1, PUBLISHED_PLWS)
    outcomes = [simulation.simulate(TRUTH, design, 0.3, 1000, seed) for seed in range(100)]
    assert simulation.simulate(TRUTH, design, 0.3, 1000, 7) == outcomes[7]
    for name in ("power", "interior", "found", "coverage", "median_width", "median_error"):
        estimates = [getattr(one, name) for one in outcomes]
        expected = np.std([one.value for one in estimates], ddof=1)
        assert np.mean([one.error for one in estimates]) == pytest.approx(expected, rel=0.25)


def test_the_truth_is_recovered_from_a_large_table():
    design = Design(600, 40, PUBLISHED_PLWS)
    (scores,), plws = scores_of(TRUTH, design, 1)
    found = simulation.estimate_truth(grid_of(scores, plws))
    for name in simulation.STATED:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.12), name
    assert found.best_plw == pytest.approx(TRUTH.best_plw, abs=0.02)


def test_where_tasks_differ_no_more_than_noise_they_do_not_differ(study):
    """AlpacaData's covariance has one direction below the noise's: what is left is a line, not less than nothing."""
    truth = simulation.estimate_truth(study["AlpacaData"])
    eigenvalues = np.linalg.eigvalsh(truth.between)
    assert eigenvalues[1] > 1e-6
    assert abs(eigenvalues[0]) < 1e-12
    assert truth.run_sd == 0
    assert simulation.simulate(truth, Design(8, 1, PUBLISHED_PLWS), 0.2, 1000).power.value > 0.05


# ---------------------------------------------------------------------------------------------- stated numbers


def test_what_is_printed_can_be_stated():
    again = simulation.parse_truth(TRUTH.spelled())
    assert again == TRUTH
    assert simulation.parse_truth(f" {TRUTH.spelled().replace(',', ' , ').replace('=', ' = ')},") == TRUTH


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("slope=0.05,", "", "assume lacks slope"),
        ("run_sd=0.002,residual_sd=0.005", "", "assume lacks run_sd, residual_sd"),
        ("bend=-0.04", "bent=-0.04", "'bent=-0.04', but takes each of slope, bend"),
        ("bend=-0.04", "bend=-0.04,bend=-0.04", "takes each of"),
        ("bend=-0.04", "bend=down", "bend must be a number, got 'down'"),
        ("bend=-0.04", "bend", "bend must be a number, got ''"),
        ("bend=-0.04", "bend=nan", "bend must be a number, got nan"),
        ("run_sd=0.002", "run_sd=-1", "run_sd must be 0 or more, got -1"),
        ("residual_sd=0.005", "residual_sd=0", "residual_sd must be above 0"),
        ("task_correlation=-0.9", "task_correlation=-1.1", "task_correlation must lie in -1..1"),
    ],
)
def test_a_mistake_in_stated_numbers_is_named(old, new, told):
    with pytest.raises(ValueError, match=told):
        simulation.parse_truth(TRUTH.spelled().replace(old, new))


@pytest.mark.parametrize("changes", [{"tasks": 3}, {"plws": (0.0, 0.5)}, {"seeds": 1, "plws": (0.0, 0.5, 1.0)}])
def test_a_design_that_cannot_be_analysed_is_refused(changes):
    with pytest.raises(ValueError, match="cannot be analysed"):
        replace(Design(8, 2, PUBLISHED_PLWS), **changes)


# -------------------------------------------------------------------------------------------------------- plan


@pytest.fixture(scope="module")
def plan(study):
    short = study["AlpacaDataShort"]
    return power.plan(
        simulation.estimate_truth(short), 0.5, dataset="short", models=2, as_run=simulation.design_of(short), draws=1000
    )


def test_a_plan_names_the_smallest_designs_that_suffice(plan):
    runs = [one.design.runs for one in plan.outcomes]
    assert runs == sorted(runs)
    good = [one.design for one in plan.outcomes if one.found.value >= 0.8]
    assert 0 < len(good) < len(plan.outcomes)
    kept = [one.design for one in plan.enough]
    for design in good:  # whatever suffices is matched or beaten in runs and tasks by one that is named
        assert any(named.runs <= design.runs and named.tasks <= design.tasks for named in kept)
    for one, other in itertools.pairwise(kept):
        assert one.runs < other.runs
        assert one.tasks > other.tasks
    assert all(
        f"  {one.design.runs:4}{one.power.value:8.3f}{one.found.value:8.3f}" in plan.text() for one in plan.enough
    )
    assert "<- as it was run" in plan.text()
    assert "With its 8 tasks none does" in plan.text()


def test_a_plan_is_a_table_with_a_row_per_design(plan):
    frame = plan.frame()
    assert len(frame) == 1 + len(plan.outcomes)
    first = frame.iloc[0]
    assert first["is_as_run"]
    assert not frame["is_as_run"][1:].any()
    assert (first["runs"], first["tasks"], first["plws"]) == (20, 8, " ".join(f"{plw:g}" for plw in PUBLISHED_PLWS))
    assert first["power"] == plan.as_run.power.value
    assert (frame["runs"] == frame["seeds"] * frame["models"] * frame["plws"].str.split().str.len()).all()
    assert frame.filter(like="_se").notna().all(axis=None)


def test_designs_that_could_not_be_concluded_from_are_not_planned(monkeypatch):
    tried = []
    monkeypatch.setattr(power, "simulate", lambda _, design, *__: tried.append(design))
    few = Design(8, 1, (0.0, 0.1, 0.5, 1.0))
    power.plan(TRUTH, 0.3, as_run=few)
    assert tried.pop() == few
    assert min(design.runs for design in tried) == 8  # of one model, 7 runs are the least
    assert all(design.free >= fitting.MIN_FREE for design in tried)


def test_that_no_design_suffices_is_said():
    hopeless = power.plan(replace(TRUTH, task_bend_sd=0.5), 0.01, draws=200)
    assert hopeless.enough == ()
    assert f"Of {len(hopeless.outcomes)} designs of up to 100 tasks and 240 runs, none finds it" in hopeless.text()


@pytest.mark.parametrize(
    ("changes", "width", "told"),
    [({"bend": 0.01}, 0.2, "no maximum inside"), ({"slope": 0.5}, 0.2, "no maximum inside"), ({}, 0, "width must be")],
)
def test_a_plan_needs_something_to_find(changes, width, told):
    with pytest.raises(ValueError, match=told):
        power.plan(replace(TRUTH, **changes), width)


def test_spaced_plws_are_equally_far_apart_on_the_curve():
    assert power.spaced_plws(TRUTH.transform, 5) == (0, 0.01, 0.1, 0.385, 1)
    wide = Transform("w_p", (0.0, 0.5, 2.0))
    assert power.spaced_plws(wide, 4)[-1] == 2


def test_an_incomplete_table_has_no_design(study):
    grid = study["AlpacaDataShort"]
    scores = grid.scores.copy()
    scores[0, 0] = np.nan
    assert simulation.design_of(replace(grid, scores=scores)) is None
    assert simulation.design_of(replace(grid, runs=grid.runs[1:], scores=grid.scores[1:])) is None


# -------------------------------------------------------------------------------------------------------- next


def variance_of_optimum(truth, plws, tasks, of_models):
    """The delta method's, of a table with runs of each model at these PLWs, by least squares written out."""
    w = truth.transform(np.repeat(plws, of_models))
    model = np.tile(np.arange(of_models), len(plws))
    x = np.column_stack([w, w**2, *(model == one for one in range(of_models))])
    noise = truth.run_sd**2 + truth.residual_sd**2 / tasks
    covariance = truth.between / tasks + noise * np.linalg.inv(x.T @ x)[:2, :2]
    gradient = np.array([-1 / (2 * truth.bend), truth.slope / (2 * truth.bend**2)])
    return gradient @ covariance @ gradient


def certain(of_models=1, **changes):
    """A table so large that its curve is all but known, and its truth."""
    truth = replace(TRUTH, **changes)
    (scores,), plws = scores_of(truth, Design(40, 30, PUBLISHED_PLWS, of_models), 1)
    grid = grid_of(scores, plws, of_models)
    return grid, simulation.estimate_truth(grid)


@pytest.mark.parametrize("of_models", [1, 2])
def test_errors_are_those_of_the_tables_with_and_without_the_runs(of_models):
    grid, truth = certain(of_models, task_slope_sd=0.004, task_bend_sd=0.003)
    proposal = next_plws.propose(grid, 5)
    assert proposal.runs == 5 * of_models
    tried = list(PUBLISHED_PLWS) * 30
    now = variance_of_optimum(truth, tried, 40, of_models)
    then = variance_of_optimum(truth, tried + proposal.plws, 40, of_models)
    last = variance_of_optimum(truth, tried * 10**4, 40, 1) if of_models == 1 else None
    assert proposal.error_now == pytest.approx(now**0.5, rel=0.02)
    assert proposal.error_then / proposal.error_now == pytest.approx((then / now) ** 0.5, rel=1e-4)
    if last is not None:
        assert proposal.error_at_last == pytest.approx(last**0.5, rel=0.02)
        assert proposal.share_that_stays == pytest.approx(last / now, rel=0.02)


def test_no_other_plw_is_better_than_the_next():
    grid, truth = certain(task_slope_sd=0.0, task_bend_sd=0.0)
    tried = list(PUBLISHED_PLWS) * 30
    (chosen,) = next_plws.propose(grid, 1).plws
    after = {
        plw: variance_of_optimum(truth, [*tried, plw], 40, 1)
        for plw in (chosen, *power.spaced_plws(truth.transform, 41))
    }
    assert min(after.values()) == pytest.approx(after[chosen], rel=1e-6)
    assert max(after.values()) > after[chosen] * 1.0005


@pytest.mark.parametrize("first", [PUBLISHED_PLWS, (0.0, 0.001, 0.01, 0.1, 0.2)])
def test_the_next_plws_locate_an_optimum_better_than_equally_spaced_ones(first):
    """By simulation: studies that begin alike and go on at proposed or at spaced PLWs, of tasks that do not differ."""
    truth = replace(TRUTH, task_slope_sd=0.0, task_bend_sd=0.0, residual_sd=0.01)

    def error(more):
        design = Design(8, 1, (*first, *more))
        answers = simulation.fit_tables(simulation.draw(truth, design, 5000, 1), truth.transform)
        return np.sqrt(np.mean((answers.best - truth.best) ** 2))

    begun = [scores_of(truth, Design(8, 1, first), 1, seed) for seed in range(4)]
    proposed = [error(next_plws.propose(grid_of(scores[0], plws), 6).plws) for scores, plws in begun]
    assert np.mean(proposed) < 0.85 * error(power.spaced_plws(truth.transform, 6))


def test_what_tasks_differ_by_stays():
    grid, _ = certain(task_slope_sd=0.1, task_bend_sd=0.08)
    proposal = next_plws.propose(grid, 4)
    assert proposal.share_that_stays > 0.95
    assert proposal.error_at_last > 0.97 * proposal.error_now


def test_a_proposal_is_its_seeds_and_can_be_run(study):
    grid = study["AlpacaDataShort"]
    proposal = next_plws.propose(grid, 6, seed=5)
    assert proposal == next_plws.propose(grid, 6, seed=5)
    assert proposal.plws[:3] == next_plws.propose(grid, 3, seed=5).plws
    assert all(0 <= plw <= 1 and (plw == float(f"{plw:.3g}") or plw in PUBLISHED_PLWS) for plw in proposal.plws)
    assert proposal.error_at_last < proposal.error_then < proposal.error_now
    assert fitting.fit("crossed", grid).vertex_wp_se < proposal.error_now < 0.15
    assert "12 runs" in proposal.text()


def test_no_plw_is_proposed_without_an_optimum(study):
    with pytest.raises(ValueError, match="a maximum inside the range has probability"):
        next_plws.propose(study["AlpacaDataCleaned"], 3)
    with pytest.raises(ValueError, match="must be 1 or more"):
        next_plws.propose(study["AlpacaDataShort"], 0)


def test_scores_without_residuals_are_refused():
    exact = replace(TRUTH, run_sd=0.0, residual_sd=1e-300)
    (scores,), plws = scores_of(exact, Design(8, 2, PUBLISHED_PLWS), 1)
    with pytest.raises(ValueError, match="follow a curve exactly"):
        simulation.estimate_truth(grid_of(scores, plws))


# ---------------------------------------------------------------------------------------------------- planning


def test_each_data_set_is_asked_and_refusals_are_told(study, tmp_path, monkeypatch):
    monkeypatch.setattr(power, "TASKS", (8, 30))
    planned = planning.ask(list(study.values()), width=0.5, next_plws=2)
    assert [one.dataset for one in planned.plans] == ["AlpacaData", "AlpacaDataShort"]
    assert [one.dataset for one in planned.proposals] == ["AlpacaData", "AlpacaDataShort"]
    assert [line.partition(":")[0] for line in planned.refusals] == ["not done", "not done"]
    assert all("AlpacaDataCleaned" in line and line in planned.text() for line in planned.refusals)
    files = planned.write(tmp_path / "new")
    assert [file.name for file in files] == ["power.csv", "next.json"]
    assert set(pd.read_csv(files[0])["dataset"]) == {"AlpacaData", "AlpacaDataShort"}
    assert json.loads(files[1].read_text())[1]["plws"] == planned.proposals[1].plws


def test_nothing_asked_gives_nothing(study, tmp_path):
    planned = planning.ask(list(study.values()), width=None, next_plws=None)
    assert planned.text() == ""
    assert planned.write(tmp_path) == []


@pytest.mark.slow
def test_the_command_plans_from_scores(tmp_path):
    place = Place(tmp_path)
    table = pd.read_csv(STUDY).query("dataset == 'AlpacaDataShort'")
    table.to_csv(tmp_path / "scores.csv", index=False)
    out, _ = place.run(
        "analyze", "--scores", "scores.csv", "--power", "--width", "0.5", "--next", "2", "--bootstrap", "0"
    )
    assert "how many runs find PLW* within 0.5?" in out
    assert "run next, with new seeds, PLW" in out
    (run,) = place.runs()
    logged = {file.path for file in place.client.list_artifacts(run.info.run_id)}
    assert {"power.csv", "next.json", "report.html"} <= logged


@pytest.mark.slow
def test_the_command_plans_without_scores(tmp_path):
    place = Place(tmp_path)
    out, _ = place.run("analyze", "--power", "--assume", TRUTH.spelled(), "--output", "out")
    assert f"simulated with {TRUTH.spelled()}: PLW* = {TRUTH.best_plw:.3g}" in out
    assert [file.name for file in (tmp_path / "out").glob("[!.]*")] == ["power.csv"]
    _, err = place.run("analyze", "--power", "--assume", "slope=1", status=2)
    assert err.startswith("error: assume lacks bend")
    assert len(place.runs()) == 1
