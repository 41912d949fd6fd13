"""Are both questions answered in plain words, and does the advice follow from the answers?"""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from plw_mlflow.analysis import analyze, exports, findings, means, report, score_table, wording
from tests.analysis.test_analyze import simulate
from tests.stores import ROOT

STUDY = ROOT / "paper" / "tables" / "v1_scores.csv"


@pytest.fixture(scope="module")
def study():
    return analyze.analyze(score_table.read_scores(STUDY), draws=0)


def answer_of(analysis, dataset="AlpacaDataShort"):
    return next(answer for answer in analysis.answers if answer.dataset == dataset)


def test_both_questions_are_answered_in_their_order(study):
    lines = wording.verdicts(study).splitlines()
    at = lines.index("AlpacaDataShort: Use 0.18 to 0.39 on data like these.")
    these, others = lines[at + 1 : at + 3]
    assert these.startswith("- Did PLW move these 8 tasks? Yes (p = 3.9e-07): the curve of their mean score peaks at ")
    assert "PLW 0.243 (95 % interval 0.177 to 0.395)" in these
    assert others.startswith("- Would it move others like them? Not shown (p = 0.16): ")
    assert "(95 % interval 0 to 0.0338 or 0.0802 to 1), which may be chance." in others
    assert all(line in wording.table_text(study) for line in (lines[at], these, others))


def test_an_effect_too_small_to_matter_is_said_to_be_so(study):
    plain = answer_of(study, "AlpacaData")
    assert plain.these_tasks.kind == "yes"
    assert plain.advice == "Any value will do, within 0.34 points."
    assert plain.these_tasks.equivalence.smallest_margin == pytest.approx(0.0034, abs=5e-5)
    strict = analyze.analyze(score_table.read_scores(STUDY), margin=0.002, draws=0)
    assert not answer_of(strict, "AlpacaData").advice.startswith("Any value")


def test_fit_json_has_both_answers(study):
    told = exports.to_json(study, score_table.read_scores(STUDY))
    answer = next(one for one in told["answers"] if one["dataset"] == "AlpacaDataShort")
    fits = {fit["model"]: fit for fit in told["fits"] if fit["dataset"] == "AlpacaDataShort"}
    for key, model in (("these_tasks", "fixed-tasks"), ("other_tasks", "crossed")):
        found, fit = answer[key], fits[model]
        assert found["model"] == model
        assert (found["p"], found["holm_p"]) == (fit["joint_p"], fit["holm_p"])
        assert (found["peak_plw"], found["interval"]) == (fit["optimum_plw"], fit["optimum_set"])
    assert answer["lead"] == "crossed"
    assert answer["advice"] == answer_of(study).advice


@pytest.mark.parametrize(
    ("p", "holm_p", "kind"), [(0.01, 0.03, "yes"), (0.02, 0.06, "perhaps"), (0.2, 0.6, "not shown")]
)
def test_the_number_of_data_sets_counts(study, p, holm_p, kind):
    fit = study.fit_of("AlpacaDataShort", "fixed-tasks")
    test = dataclasses.replace(fit.joint_tests[0], p=p)
    found = findings.about_these(
        dataclasses.replace(fit, joint_tests=[test]), holm_p, None, 8, findings.Unit(1.0, True), ""
    )
    assert found.kind == kind
    assert found.verdict.startswith(kind.capitalize())
    assert ("for so many data sets" in found.verdict) == (kind == "perhaps")
    assert ("may be chance" in found.verdict) == (kind != "yes")


def test_few_tasks_tell_of_themselves_only():
    (answer,) = analyze.analyze(simulate(tasks=2, b=(0.5, 0.2, -0.15)), draws=0).answers
    assert answer.these_tasks.kind == "yes"
    assert (answer.other_tasks.kind, answer.other_tasks.p, answer.other_tasks.peak_plw) == ("untold", None, None)
    assert "needs 4 tasks or more, there are 2" in answer.other_tasks.verdict
    (one,) = analyze.analyze(simulate(tasks=1), draws=0).answers
    assert one.these_tasks.question == "Did PLW move this task?"


def without(table, **where):
    """The table without the scores that have these values."""
    return table[~pd.concat([table[column] == value for column, value in where.items()], axis=1).all(axis=1)]


def test_a_task_missing_at_one_plw_is_left_out_and_said_to_be():
    table = simulate(b=(0.5, 0.2, -0.15))
    (answer,) = analyze.analyze(without(table, plw=0.1, task="task2"), draws=0).answers
    assert answer.these_tasks.kind == "yes"
    assert answer.these_tasks.question == "Did PLW move these 5 tasks?"
    assert answer.these_tasks.verdict.endswith(" Left out: task task2 (some runs lack it).")
    (expected,) = analyze.analyze(without(table, task="task2"), draws=0).answers
    for name in ("p", "peak_plw", "interval", "equivalence"):
        assert getattr(answer.these_tasks, name) == getattr(expected.these_tasks, name)
    assert answer.advice == expected.advice


def test_runs_left_out_are_said_to_be_with_the_number_of_tasks_used():
    table = simulate(b=(0.5, 0.2, -0.15))
    rare = without(without(table, task="task2", seed=0), task="task2", plw=0.1)
    (answer,) = analyze.analyze(without(rare, plw=1, seed=1, task="task0"), draws=0).answers
    assert answer.these_tasks.question == "Did PLW move these 5 tasks?"
    assert "Left out: task task2 (few runs have it), 1 of 20 runs (not scored on every task)." in (
        answer.these_tasks.verdict
    )


def test_where_no_task_is_complete_more_scores_are_advised_and_not_seeds():
    table = simulate(tasks=2)
    some = without(without(table, plw=0.1, task="task0"), plw=0.5, task="task1")
    (answer,) = analyze.analyze(some, draws=0).answers
    assert answer.advice == "These runs cannot tell; score every task at PLW 0.1, 0.5."
    assert answer.these_tasks.verdict == (
        "These scores cannot tell: no run at PLW 0.1, 0.5 is scored on every task, and no task is scored on every run."
    )
    assert "lmm-slopes" not in "".join(finding.verdict for finding in answer.findings)


def test_an_end_that_is_highest_by_chance_is_said_to_be_so():
    (answer,) = analyze.analyze(simulate(b=(0.5, 0.0, 0.004), seed=2), draws=0).answers
    assert answer.these_tasks.kind == "not shown"
    assert answer.these_tasks.peak_plw is None
    assert "is highest at PLW 1, which may be chance." in answer.these_tasks.verdict


def test_the_second_question_has_the_leads_reason_where_crossed_was_fitted(study):
    lead = dataclasses.replace(study.fit_of("AlpacaDataShort", "lmm"), notes=["lmm leads, as so it is."])
    found = findings.about_others(lead, 0.5, None, findings.Unit(1.0, True), "")
    assert found.verdict == "These scores cannot tell: lmm leads, as so it is."


def test_three_runs_tell_nothing():
    table = simulate(seeds=1)
    (answer,) = analyze.analyze(table[table["plw"].isin([0, 0.1, 1])], draws=0).answers
    assert [finding.kind for finding in answer.findings] == ["untold", "untold"]
    assert answer.advice == (
        "These runs cannot tell: 1 more seed would show by how much runs differ anyway, and so how many it takes."
    )
    assert "3 runs are too few" in answer.these_tasks.verdict
    (grid,) = analyze.grids(table[table["plw"].isin([0, 0.1, 1])])
    assert findings.seeds_for_noise(grid) == 1
    assert findings.seeds_for_noise(analyze.grids(table)[0]) == 0


def test_seeds_that_are_named_are_enough():
    """Where the noise stays as it is, so many more seeds find the margin in 4 of 5 studies, and one fewer do not."""
    table = simulate(seeds=1, b=(0.5, 0, 0), sd=0.05)
    (answer,) = analyze.analyze(table, draws=0).answers
    assert answer.these_tasks.kind == "not shown"
    (grid,) = analyze.grids(table)
    fit = analyze.analyze(table, draws=0).fits[-1]
    error = answer.these_tasks.equivalence.standard_error
    more = findings.seeds_needed(fit, error, grid, 0.01)
    assert 1 < more < findings.MOST_SEEDS
    # By the bounds of the SD that chi square has for 7 degrees of freedom, 10 % and 90 %.
    low, high = (findings.seeds_needed(fit, error * (7 / x) ** 0.5, grid, 0.01) for x in (12.01704, 2.833107))
    assert low < more < high
    shown = f"{low} to {'more than 99' if high > 99 else high} more seeds would probably"
    assert answer.advice == f"These runs cannot tell: {shown}, if PLW makes a difference of 1 point."
    assert findings.seeds_needed(fit, error, grid, 0.02) < more
    assert findings.seeds_needed(fit, error, grid, 1e-6) == findings.MOST_SEEDS + 1
    assert findings.seeds_needed(fit, error, grid, 1.0) == 1


def test_few_degrees_of_freedom_are_too_few_to_plan_by():
    """Five runs leave two; a seed more adds five."""
    table = simulate(seeds=1, b=(0.5, 0, 0), sd=0.05)
    (answer,) = analyze.analyze(table[table["plw"].isin([0, 0.01, 0.1, 0.5, 1])], draws=0).answers
    assert answer.advice == f"These runs cannot tell: 1 more seed {findings.SHOWS_NOISE}."


def test_differences_are_told_in_points_where_scores_have_them():
    assert findings.Unit(1.0, True).words(0.0071) == "0.71 points"
    assert findings.Unit(100.0, True).words(1) == "1 point"
    assert findings.Unit(None, False).words(0.0071) == "0.0071"
    assert findings.Unit(1.0, False).words(0.2) == "0.2"


@pytest.mark.parametrize(
    ("b", "starts"),
    [((0.3, 0.3, -0.01), "Use PLW 1 on data"), ((0.3, 0.4, -0.3), "Use "), ((0.6, -0.3, 0.01), "Use PLW 0 ")],
)
def test_what_to_do_follows_from_the_curve(b, starts):
    (answer,) = analyze.analyze(simulate(b=b), draws=0).answers
    assert answer.these_tasks.kind == "yes"
    assert answer.advice.startswith(starts)


def test_means_can_be_told_for_each_model():
    table = simulate(tasks=2)
    both = pd.concat([table, table.assign(model="other", score=table["score"] / 2)])
    means_of = means.mean_scores(both, ("model",)).groupby("curve")["score"].mean()
    assert len(means_of) == 2
    assert means_of.max() == pytest.approx(2 * means_of.min())


def test_the_means_of_a_curve_are_over_the_same_tasks():
    table = simulate(tasks=4)
    shown = means.mean_scores(without(table, plw=0.1, task="task2"))
    there = means.mean_scores(without(table, task="task2"))
    assert shown.attrs.pop("notes") == ["short: the means leave out task2 (some cells lack them)"]
    assert there.attrs.pop("notes") == []
    pd.testing.assert_frame_equal(shown, there)


def test_a_plw_that_lacks_a_weak_model_does_not_look_good():
    """The strong model scores best near PLW 0.1; at PLW 1 the weak model's cells have failed."""
    strong = simulate(b=(0.6, 0.3, -0.3), sd=0.001, tasks=2)
    weak = without(strong.assign(model="weak", score=strong["score"] - 0.4), plw=1)
    shown = means.mean_scores(pd.concat([strong, weak]))
    pd.testing.assert_frame_equal(
        shown[["plw", "score", "error"]], means.mean_scores(strong)[["plw", "score", "error"]]
    )
    assert shown.attrs["notes"] == ["short: the means leave out weak (no cells at PLW 1)"]
    assert shown.loc[shown["score"].idxmax(), "plw"] < 0.5
    neither = pd.concat([without(strong, plw=0), weak])
    marked = report.raw_means(neither)
    assert not any(is_highest for _, cells in marked["rows"] for _, is_highest in cells)
    assert "may be of different models" in marked["notes"][0]


def test_models_count_alike_in_a_mean_and_its_error():
    """Ten cells of one model, by hand: (0.8 + 0.2) / 2, and half the root of the models' squared errors."""
    many = pd.DataFrame({"model": "a", "seed": range(10), "score": [0.79, 0.81] * 5})
    few = pd.DataFrame({"model": "b", "seed": range(2), "score": [0.19, 0.21]})
    table = pd.concat([many, few]).assign(dataset="d", plw=0.1, task="t", metric="acc")
    (row,) = means.mean_scores(table).to_dict("records")
    assert row["score"] == pytest.approx(0.5)
    squares = many["score"].var() / 10 + few["score"].var() / 2
    assert row["error"] == pytest.approx(np.sqrt(squares) / 2)


def test_where_only_the_second_question_is_answered_the_advice_says_so():
    table = simulate(b=(0.5, 0.6, -0.6), seeds=2)
    every_third = table[np.arange(len(table)) % 3 > 0]  # so that no run has all tasks, and no task all runs
    (answer,) = analyze.analyze(every_third, draws=0).answers
    assert (answer.these_tasks.kind, answer.other_tasks.kind) == ("untold", "yes")
    assert answer.advice.startswith("These runs cannot tell of these tasks alone, but they do of others like them ")
