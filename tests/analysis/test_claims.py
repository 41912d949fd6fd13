"""Are claims judged by the rules that paper/claims.json and plw_mlflow/analysis/claims.py write down?"""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from plw_mlflow.advice import evidence
from plw_mlflow.analysis import analyze, claims, score_table
from plw_mlflow.environment import outputs
from tests.analysis.test_analyze import STUDY_PLWS, simulate
from tests.stores import ROOT

STUDY = ROOT / "paper" / "tables" / "v1_scores.csv"
RATIOS = evidence.printed_ratios()
TOLD = json.loads(claims.FILE.read_text())


@pytest.fixture(scope="module")
def study():
    judged = claims.judge(score_table.read_scores(STUDY), ratios=RATIOS)
    return {(one.claim, one.dataset, one.question): one for one in judged}


def test_every_claim_has_a_rule_or_says_why_it_is_not_judged():
    assert len({claim["id"] for claim in TOLD["study"]}) == len(TOLD["study"]) > 20
    for claim in TOLD["study"]:
        assert ("not_judged" in claim) != (claim.get("rule") in {*claims.RULES, "best_runs"})
        assert claim["claim"]
        assert claim["source"]


def test_the_studys_claims_on_its_own_scores(study):
    short = {claim: study[claim, "AlpacaDataShort", "these tasks"].verdict for claim in ("short-effect", "short-peak")}
    assert set(short.values()) == {claims.REPRODUCED}
    assert study["short-effect", "AlpacaDataShort", "others like them"].verdict == claims.CANNOT_TELL
    for dataset in ("AlpacaData", "AlpacaDataCleaned"):
        for question in claims.QUESTIONS:
            assert study["long-none", dataset, question].verdict == claims.REPRODUCED
    assert study["printed-p-short", "AlpacaDataShort", "these tasks"].verdict == claims.CONTRADICTED
    assert study["printed-peak", "AlpacaDataShort", "these tasks"].verdict == claims.REPRODUCED
    assert "on 3 of 3 tasks it is" in study["best-runs", "all", "these tasks"].found
    assert study["long-answers", "AlpacaDataShort", ""].verdict == claims.CANNOT_TELL
    assert study["stability", "", ""].verdict == claims.CANNOT_TELL


def verdicts(b, sd=0.002, **options):
    """Of each claim on short data with that curve, for these tasks."""
    judged = claims.judge(simulate(b=b, sd=sd, dataset="my-short", **options))
    return {one.claim: one.verdict for one in judged if one.question != "others like them"}


def test_what_is_otherwise_is_contradicted():
    convex = verdicts((0.5, -0.2, 0.15))
    assert {convex[claim] for claim in ("short-concave", "short-peak", "short-zero")} == {claims.CONTRADICTED}
    assert convex["short-effect"] == claims.REPRODUCED
    flat = verdicts((0.5, 0.0, 0.0))
    assert flat["short-effect"] == claims.CONTRADICTED
    early = verdicts((0.5, 0.1, -0.2))  # its peak is at w_p 0.25, PLW 0.01
    assert early["short-peak"] == claims.CONTRADICTED
    rising = verdicts((0.5, 0.3, 0.0))  # without a peak inside the range, and highest at PLW 1
    assert rising["short-peak"] == claims.CONTRADICTED
    assert rising["short-effect"] == rising["short-zero"] == claims.REPRODUCED
    faint = verdicts((0.5, 0.001, 0.0))  # a rise within the noise
    assert faint["short-peak"] == claims.CANNOT_TELL
    large = pd.concat([simulate(b=(0.4, 0.3, -0.2), sd=0.002, dataset="mine")])
    judged = claims.judge(large, ratios={"mine": 3.0})
    (long,) = (one for one in judged if (one.claim, one.question) == ("long-none", "these tasks"))
    assert long.verdict == claims.CONTRADICTED


def test_noise_cannot_tell():
    loud = verdicts((0.5, 0.05, -0.04), sd=0.3)
    for claim in ("short-effect", "short-concave", "short-peak", "short-zero"):
        assert loud[claim] == claims.CANNOT_TELL
    assert loud["long-none"] == claims.CANNOT_TELL  # there are no long data


def test_long_answers_are_judged_where_there_are_any():
    table = simulate(b=(0.3, 0.2, 0.0), sd=0.002, dataset="my-short").assign(task_type="long-generation")
    judged = {(one.claim, one.question): one.verdict for one in claims.judge(table)}
    assert judged["long-answers", "these tasks"] == claims.REPRODUCED
    assert judged["long-answers-gain", "these tasks"] == claims.REPRODUCED
    falling = table.assign(score=1 - table["score"])
    judged = {(one.claim, one.question): one.verdict for one in claims.judge(falling)}
    assert judged["long-answers", "these tasks"] == claims.CONTRADICTED


def test_too_few_runs_cannot_tell():
    table = simulate(seeds=1, dataset="my-short")
    few = table[table["plw"].isin([0, 0.1, 1])]
    assert {one.verdict for one in claims.judge(few)} == {claims.CANNOT_TELL}


def test_one_claim_that_cannot_be_fitted_leaves_the_others():
    """Three runs of long data have no residuals."""
    tasks = {f"task{number}": task for number, task in enumerate(("arc_challenge", "piqa", "winogrande"))}
    table = simulate(tasks=3, dataset="my-short").replace({"task": tasks})
    long = simulate(tasks=3, seeds=1, dataset="mine").replace({"task": tasks})
    few = long[long["plw"].isin([0, 0.1, 1])]
    judged = {(one.claim, one.question): one for one in claims.judge(pd.concat([table, few]), ratios={"mine": 3.0})}
    assert judged["best-runs", "these tasks"].verdict == claims.CANNOT_TELL
    assert judged["best-runs", "these tasks"].found == "3 runs are too few for 3 coefficients and a residual"
    assert judged["short-effect", "these tasks"].verdict == claims.REPRODUCED
    assert judged["long-none", "these tasks"].verdict == claims.CANNOT_TELL


def test_an_interval_is_that_of_its_contrast():
    """From PLW 0 to 1 the curve rises by both coefficients; by hand from the runs' means."""
    table = simulate(tasks=3)
    curve = claims._Curve(analyze.grids(table)[0], "fixed-tasks")
    w = np.array(STUDY_PLWS) ** 0.30103
    means = table.groupby(["plw", "seed"])["score"].mean()
    x = np.column_stack([np.ones(20), np.repeat(w, 2), np.repeat(w, 2) ** 2])
    b, (squares,), *_ = np.linalg.lstsq(x, means.to_numpy())
    error = np.sqrt(np.array([0, 1, 1]) @ np.linalg.inv(x.T @ x) @ np.array([0, 1, 1]) * squares / 17)
    low, high = curve.reach(curve.rise(0, 1))
    assert (low + high) / 2 == pytest.approx(b[1] + b[2])
    assert (high - low) / 2 == pytest.approx(2.109816 * error, rel=1e-5)  # t of 17 degrees of freedom
    means, squares = means.groupby("plw").mean(), means.groupby("plw").var().mean()
    low, high = curve.reach_of_means(0, 0.5)
    assert (low + high) / 2 == pytest.approx(means[0.5] - means[0])
    assert (high - low) / 2 == pytest.approx(
        2.228139 * np.sqrt(squares), rel=1e-5
    )  # t of 10; the mean of two runs each


def test_points_follow_the_scale_of_the_scores(study):
    """A point is a hundredth of what scores can differ by; a scale without points cannot tell."""
    table = score_table.read_scores(STUDY)
    percent = table.assign(score=100 * table["score"])
    for one in claims.judge(percent, ratios=RATIOS):
        if not one.claim.startswith("printed"):
            assert one.verdict == study[one.claim, one.dataset, one.question].verdict, one
    in_points = {"long-none", "choice-gain"}
    for one in claims.judge(table, "zscore", ratios=RATIOS):
        if one.claim in in_points:
            assert (one.verdict, claims.NO_POINTS in one.found) == (claims.CANNOT_TELL, True)


def test_a_plw_off_the_curve_does_not_score_lowest():
    """The curve is lowest at PLW 0, whose own scores are those of PLW 0.002236."""
    table = simulate(b=(0.5, 0.3, -0.2), sd=0.002, dataset="my-short")
    at = table["plw"] == 0
    table.loc[at, "score"] = table.loc[table["plw"] == 0.002236, "score"].to_numpy()
    judged = {(one.claim, one.question): one for one in claims.judge(table)}
    one = judged["short-zero", "these tasks"]
    assert (one.verdict, " by the curve; " in one.found) == (claims.CANNOT_TELL, True)
    alone = simulate(b=(0.5, 0.3, -0.2), sd=0.002, dataset="my-short", seeds=1)
    judged = {(one.claim, one.question): one for one in claims.judge(alone)}
    assert "of means: 10 runs are too few" in judged["short-zero", "these tasks"].found


def test_printed_numbers_are_of_the_studys_own_scores():
    printed = [one for one in claims.judge(simulate(dataset="AlpacaDataShort")) if one.claim.startswith("printed")]
    assert {one.verdict for one in printed} == {claims.CANNOT_TELL}
    assert any("the study's own scores" in one.found for one in printed)


def test_data_are_short_or_long_by_their_ratio_and_else_by_their_name():
    def kinds(dataset, **ratios):
        table = simulate(dataset=dataset, seeds=1)
        return {one.claim: (one.verdict, one.found, one.data_are) for one in claims.judge(table, ratios=ratios)}

    by_ratio = kinds("shortstories", shortstories=9.0)
    assert by_ratio["long-none"][2] == "long data: the generation ratio is 9"
    assert by_ratio["short-effect"][1] == "there are no such data among the scores"
    assert kinds("my-short")["short-effect"][2].startswith("short data: so its name says")
    unknown = kinds("mine")
    for claim in ("short-effect", "long-none"):
        assert unknown[claim][:2] == (claims.CANNOT_TELL, unknown[claim][2])
        assert "--ratios" in unknown[claim][2]


def test_runs_that_differ_by_another_option_are_judged_with_it():
    table = simulate(b=(0.5, 0.3, -0.2), sd=0.002, dataset="my-short", seeds=1)
    both = pd.concat([table.assign(epochs="1"), table.assign(epochs="3")])
    judged = {(one.claim, one.question): one.verdict for one in claims.judge(both, by=("epochs",))}
    assert judged["short-effect", "these tasks"] == claims.REPRODUCED


def test_the_lower_end_of_the_largest_difference_holds_for_all_pairs_at_once():
    """Scheffé's bound by hand. Pair by pair, a difference at the margin would be called larger too often."""
    curve = claims._Curve(analyze.grids(simulate(tasks=3))[0], "fixed-tasks")
    low, high = curve.largest_difference()
    ends = [curve.reach(curve.rise(*pair)) for pair in combinations(STUDY_PLWS, 2)]
    sizes = [(abs(a + b) / 2, (b - a) / 2 / 2.109816) for a, b in ends]  # and standard errors, as t has 17 of freedom
    assert low == pytest.approx(max(size - np.sqrt(2 * 3.591531) * error for size, error in sizes), rel=1e-5)
    assert high == pytest.approx(max(size + 1.739607 * error for size, error in sizes), rel=1e-5)


def test_the_text_has_every_claim(study):
    told = claims.text(list(study.values()))
    assert all(claim["claim"] in told for claim in TOLD["study"])
    assert list(claims.frame(list(study.values()))) == [
        *("claim", "says", "source", "dataset", "question", "verdict", "found", "data_are")
    ]


def test_tasks_that_were_scored_at_few_plws_leave_the_other_claims():
    """As where a sweep went on with another list of tasks."""
    table = simulate(tasks=4, dataset="my-short").replace({"task": {"task0": "arc_challenge", "task1": "piqa"}})
    few = table[(table["task"] != "arc_challenge") | table["plw"].isin([0, 0.1])]
    few = few[(few["task"] != "piqa") | (few["plw"] == 0)]
    judged = {(one.claim, one.question): one for one in claims.judge(few)}
    assert judged["arc-concave", "these tasks"].found == "a curve takes 3 PLWs, and there is none but 0, 0.1"
    assert judged["piqa-concave", "these tasks"].found == "a curve takes 3 PLWs, and there is none but 0"
    assert judged["short-effect", "these tasks"].verdict != ""


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "\x1b[2Jshort", "\u202einverted", "short,<b>", "a" * 5000])
def test_odd_names_in_a_strangers_table_are_judged_as_names(name, tmp_path):
    table = simulate(tasks=4, dataset=name)
    judged = claims.judge(table)
    assert {one.dataset for one in judged if one.question} <= {name, "all"}
    rows = outputs.table(claims.frame(judged)).decode()
    assert "\n=cmd" not in rows
    assert not any(line.startswith(("=", "+", "@")) or ",=" in line for line in rows.splitlines())
