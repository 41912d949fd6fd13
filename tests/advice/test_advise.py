"""Is advice pooled as it should be, and does it say what it does not know?"""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import linalg, optimize, stats

from plw_mlflow.advice import advise, evidence, evidence_figure, exports, single_runs, wording
from plw_mlflow.advice.evidence import OWN, STUDY, WIT, EvidencePoint
from plw_mlflow.advice.pooling import pool
from plw_mlflow.config import AdviseConfig
from plw_mlflow.evaluation import task_sets
from tests.stores import ROOT, Place

PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


def point(w, sd, ratio, dataset="d", study="a", **more):
    """A point of one model, located to within `sd`."""
    ends = np.clip([w - 2 * sd, w + 2 * sd], 0, 1) if math.isfinite(sd) else (0.0, 1.0)
    told = {"model": "m", "scores": "8 tasks", "ratio_is": "given", "p": 0.01, "fit": "crossed"} | more
    return EvidencePoint(
        study=study, dataset=dataset, ratio=ratio, w=w, low=ends[0], high=ends[1], variance=sd**2, **told
    )


def simulate(slope, bend, plws=PLWS, sd=0.003, seed=1, dataset="mine"):
    """A score table of 8 tasks and 2 seeds that share one curve."""
    random = np.random.default_rng(seed)
    rows = [
        {"model": "m", "dataset": dataset, "plw": plw, "seed": seed, "task": f"t{task}", "metric": "acc"}
        | {"score": 0.4 + task / 50 + slope * plw**0.30103 + bend * plw**0.60206 + random.normal(0, sd)}
        for task in range(8)
        for plw in plws
        for seed in (1, 2)
    ]
    return pd.DataFrame(rows)


def own_point(*given, **more):
    (found,) = evidence.own(simulate(*given, **more), "none", {"mine": 0.5}, {})
    return found


# ------------------------------------------------------------------------- pooling, against independent answers


def test_of_equal_errors_the_pool_is_the_classical_mean():
    """By hand: tau2 is the sample's variance less the errors', and the interval is that of a t test."""
    y = np.array([0.1, 0.5, 0.9, 0.4])
    found = pool(y, np.full(4, 0.01), np.ones((4, 1)))
    assert found.tau2 == pytest.approx(y.var(ddof=1) - 0.01, rel=1e-5)
    expected = stats.t.interval(0.95, 3, y.mean(), stats.sem(y))
    mean, reach = found.mean(np.ones(1))
    assert (mean - reach, mean + reach) == pytest.approx(expected, rel=1e-5)
    _, further = found.next_point(np.ones(1), beside=0.2)
    assert further == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(y.var(ddof=1) / 4 + found.tau2 + 0.2), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_line_is_that_of_the_likelihood_of_error_contrasts(seed):
    """REML written out: the density of what is left of y when the line is projected out, by dense matrices."""
    random = np.random.default_rng(seed)
    x = np.column_stack([np.ones(7), random.normal(size=7)])
    v = random.uniform(0.01, 0.2, 7)
    y = x @ [0.5, 0.2] + random.normal(0, 0.4, 7)
    contrasts = linalg.null_space(x.T)

    def minus_loglik(log_tau2):
        covariance = contrasts.T @ np.diag(v + math.exp(log_tau2)) @ contrasts
        return -stats.multivariate_normal.logpdf(contrasts.T @ y, cov=covariance)

    tau2 = math.exp(optimize.minimize_scalar(minus_loglik, bounds=(-20, 3), method="bounded").x)
    tau2 = tau2 if tau2 > 1e-6 else 0.0
    found = pool(y, v, x)
    assert found.tau2 == pytest.approx(tau2, rel=1e-3, abs=1e-6)
    inverse = np.linalg.inv(np.diag(v + found.tau2))
    bread = np.linalg.inv(x.T @ inverse @ x)
    b = bread @ x.T @ inverse @ y
    assert found.coefficients == pytest.approx(b)
    factor = (y - x @ b) @ inverse @ (y - x @ b) / 5
    assert found.covariance == pytest.approx(max(1, factor) * bread)


def test_points_that_agree_promise_no_more_than_their_errors():
    found = pool(np.array([0.5, 0.5, 0.5]), np.array([0.01, 0.02, 0.04]), np.ones((3, 1)))
    assert found.tau2 == 0
    assert found.covariance[0, 0] == pytest.approx(1 / (100 + 50 + 25))
    with pytest.raises(ValueError, match="2 points are too few to pool by 2 coefficients"):
        pool(np.zeros(2), np.ones(2), np.eye(2))


def test_models_on_one_data_set_are_one_point():
    """By hand: between two models that are 0.6 apart there is a variance of 0.18, less their errors'."""
    points = [point(0.2, 0.1, 2, "x"), point(0.8, 0.1, 2, "x", model="n"), point(0.4, 0.1, 5, "y")]
    found, tau2 = advise.by_dataset([*points, point(0.5, math.inf, 3, "flat")])
    assert tau2 == pytest.approx(0.17, rel=1e-5)
    assert [(one.dataset, one.points) for one in found] == [("x", 2), ("y", 1)]
    assert [one.w for one in found] == pytest.approx([0.5, 0.4])
    assert [one.variance for one in found] == pytest.approx([0.09, 0.18], rel=1e-5)


# ------------------------------------------------------------------------------------------------- points


def test_a_clear_peak_is_located():
    found = own_point(0.3, -0.3)
    assert found.w == pytest.approx(0.5, abs=0.02)
    assert found.low < 0.5 < found.high
    assert 0.02 < math.sqrt(found.variance) < 0.06  # the gap from PLW 0.05 to 0.1 is 0.094 on w_p, over sqrt(12) 0.027
    assert found.p < 1e-6
    assert (found.ratio, found.ratio_is) == (0.5, "given")


@pytest.mark.parametrize(("slope", "w"), [(0.2, 1.0), (-0.2, 0.0)])
def test_the_end_of_a_slope_is_located_too(slope, w):
    found = own_point(slope, 0.0)
    assert found.w == w
    assert found.is_located
    assert abs(found.w - (found.low if w else found.high)) < 0.2


@pytest.mark.parametrize("seed", [0, 2, 3, 4])  # of 20 flat curves one seems to have a peak, as that of 1
def test_a_flat_curve_is_no_evidence(seed):
    found = own_point(0.0, 0.0, seed=seed)
    assert (found.low, found.high) == (0, 1)
    assert not found.is_located


def test_a_valley_is_no_peak():
    assert not own_point(-0.3, 0.3, seed=2).is_located


def test_a_peak_is_located_no_more_finely_than_plws_were_tried():
    fine, coarse = own_point(0.3, -0.3), own_point(0.3, -0.3, plws=[0, 0.5, 1])
    assert coarse.w == pytest.approx(0.5, abs=0.03)
    assert coarse.variance > 20 * fine.variance
    assert coarse.high - coarse.low > 0.7  # no PLW was tried between w_p 0 and 0.81


def test_plws_above_one_are_left_out():
    table = simulate(0.3, -0.3)
    beyond = table[table["plw"] == 1].assign(plw=8.0, score=0.99)
    (found,) = evidence.own(pd.concat([table, beyond], ignore_index=True), "none", {"mine": 0.5}, {})
    assert found == own_point(0.3, -0.3)


def test_the_published_points():
    points = evidence.published()
    assert [len([p for p in points if p.study == study]) for study in (STUDY, WIT, evidence.VAUGHN)] == [12, 15, 1]
    whole, *kinds = [p for p in points if p.dataset == "AlpacaDataShort"]
    assert whole.plw == pytest.approx(0.2434, abs=1e-4)
    assert (whole.ratio, whole.p, whole.is_located) == (0.082, pytest.approx(0.157, abs=5e-4), False)
    assert {p.scores.partition(":")[0]: p.plw for p in kinds if p.is_located} == {
        "multiple-choice": pytest.approx(0.167, abs=1e-3),
        "short-generation": 1,
    }
    (race,) = evidence.vaughn()
    assert race.interval == pytest.approx((0, 0.1))
    table = pd.read_csv(evidence.TABLES / "wit_correlations.csv")
    assert (
        f"correlation {table['spearman'][table['characteristic'] == 'avg generation ratio'].item()}" in wording.IN_PRINT
    )


def test_wits_runs_have_the_ratio_of_their_weights_as_plw():
    table = evidence.wit_scores()
    assert table.groupby(["dataset", "task"]).size().tolist() == [30] * 15
    assert set(table["seed"][table["plw"] == 1]) == {202, 404, 606, 808, 1010}
    assert table["plw"][table["seed"] == 602].unique() == 3  # 0.6 / 0.2
    one = table.query("dataset == 'Tulu-v2' and task == 'Llama-3-1B' and seed == 2")
    assert one["score"].item() == pytest.approx(0.2874)
    part = table.query("dataset == 'LIMA' and task == 'Llama-3-1B' and plw <= 1")
    w = part["plw"] ** 0.30103
    bend, slope, _ = np.polyfit(w, part["score"], 2)
    found = next(p for p in evidence.wit() if (p.dataset, p.model) == ("LIMA", "Llama-3-1B"))
    assert found.w == pytest.approx(-slope / (2 * bend))


def test_task_types_choose_tasks():
    multiple_choice = {p.dataset: p for p in evidence.published(["multiple-choice"])}
    assert multiple_choice["AlpacaDataShort"].scores == "3 tasks"
    assert 0.12 < multiple_choice["AlpacaDataShort"].plw < 0.22
    generation = evidence.published(["medium-generation"])
    assert {p.study for p in generation} == {STUDY, WIT}
    assert not any(p.is_located for p in generation if p.study == STUDY)
    assert {p.study for p in evidence.published(["long-generation"])} == {WIT}


def test_every_type_that_a_score_table_of_our_own_can_have_may_be_asked_for():
    """Tasks of no set have the types generation and likelihood, which the published studies do not know."""
    assert advise.check_types(["generation"]) == ("generation",)
    assert set(task_sets.TASK_TYPE_OF_OUTPUT.values()) <= set(task_sets.TASK_TYPES)
    of_sets = {benchmark.task_type for benchmarks in task_sets.SETS.values() for benchmark in benchmarks}
    assert of_sets <= set(task_sets.TASK_TYPES)
    table = simulate(0.3, -0.3).assign(task_type="generation")
    (point,) = evidence.own(table, "none", {"mine": 1.0}, {}, ["generation"])
    points = [*evidence.published(["generation"]), point]
    assert {p.study for p in points} == {WIT, OWN}
    assert advise.advise(1.0, points, task_types=["generation"]).task_types == ("generation",)


# ------------------------------------------------------------------------------------------------- advice


def lined(slope=0.2, ratios=(0.1, 0.5, 2, 8), study="a"):
    """Located points on a line."""
    return [point(0.5 + slope * math.log10(r), 0.05, r, f"{study}{r}", study) for r in ratios]


def test_points_on_a_line_give_the_line():
    advice = advise.advise(1.0, lined())
    assert advice.w == pytest.approx(0.5)
    assert advice.line.slope[0] == pytest.approx(0.2)
    assert advice.is_located
    assert advice.plw == pytest.approx(0.1, abs=1e-4)
    assert advice.interval[0] < advice.plw < advice.interval[1]
    assert "Suggested PLW 0.1" in wording.sentences(advice)[0]


def test_if_one_share_is_best_the_best_weight_grows_with_the_ratio():
    """Best PLWs of half the ratio give prompts a third of the weight on all data sets, and so on another."""
    ratios = (0.1, 0.4, 1.6)
    points = [point((ratio / 2) ** 0.30103, 0.01, ratio, dataset=str(ratio)) for ratio in ratios]
    line = advise.fit_line(points)
    w, reach = line.by_share(0.05)
    assert evidence.to_plw(w) == pytest.approx(0.025, rel=1e-6)
    assert reach < line.next_one(0.05)[1]
    (told,) = [line for line in wording.sentences(advise.advise(0.05, points)) if "one share" in line]
    assert "put the best PLW at 0.025 here" in told


def test_flat_curves_change_nothing():
    flat = [point(0.9, math.inf, ratio, f"f{ratio}", p=0.6) for ratio in (0.2, 5)]
    with_flat, without = (advise.advise(1.0, points) for points in (lined() + flat, lined()))
    assert (with_flat.w, with_flat.low, with_flat.high) == (without.w, without.low, without.high)
    assert any("highest anywhere: of f0.2 (1 of 1), f5 (1 of 1)." in told for told in wording.sentences(with_flat))


def test_studies_that_disagree_in_sign_are_said_to():
    told = " ".join(wording.sentences(advise.advise(1.0, lined(0.3) + lined(-0.3, study="b"))))
    assert (
        "By their points the studies disagree in sign: the best PLW rises with the generation ratio by a and falls by b"
        in told
    )
    assert "a +0.30 (+0.23 to +0.37) from 4 data sets; b -0.30 (-0.37 to -0.23)" in told
    unsure = " ".join(wording.sentences(advise.advise(1.0, lined(0.3) + lined(-0.01, study="b"))))
    assert "disagree in sign, though not surely" in unsure
    assert "disagree" not in " ".join(wording.sentences(advise.advise(1.0, lined(0.3) + lined(0.1, study="b"))))


def test_the_published_studies_are_said_to_disagree():
    advice = advise.advise(1.0, evidence.published())
    told = wording.sentences(advice)
    assert wording.IN_PRINT in told
    assert any("Not one is sure of its sign." in one for one in told)
    assert {one.study for one in advice.slopes} == {STUDY, WIT}
    assert all(one.low < 0 < one.high for one in advice.slopes)
    assert "whole range" in told[1]
    assert "Nobody has printed the generation ratio of Tulu-v2, which is guessed." in told


def test_own_runs_on_the_very_data_set_outweigh():
    """By hand: the more precise says more, as in a mean weighted by precision."""
    mine = point(0.2, 0.03, 1.0, "mine", OWN)
    others = advise.advise(1.0, evidence.published())
    advice = advise.advise(1.0, [*evidence.published(), mine], dataset=["mine"])
    assert advice.own == mine
    assert advice.line.datasets == others.line.datasets
    sd = (others.high - others.w) / stats.norm.ppf(0.975)
    precisions = np.array([1 / sd**2, 1 / 0.03**2])
    assert advice.own_share == pytest.approx(precisions[1] / precisions.sum())
    assert advice.own_share > 0.97
    assert advice.w == pytest.approx(precisions @ [others.w, 0.2] / precisions.sum())
    assert advice.high - advice.w == pytest.approx(1.96 / math.sqrt(precisions.sum()), rel=1e-4)
    assert advice.is_located
    assert f"have {advice.own_share:.0%} of the weight" in " ".join(wording.sentences(advice))


def test_own_runs_on_another_data_set_are_one_more_point():
    mine = point(0.2, 0.03, 30.0, "mine", OWN)
    advice = advise.advise(1.0, [*lined(), mine], dataset=["yours"])
    assert advice.own is None
    assert len(advice.line.datasets) == 5


def test_own_flat_runs_say_that_they_are_and_leave_it_to_others():
    mine = point(0.6, math.inf, 1.0, "mine", OWN, p=0.7)
    advice = advise.advise(1.0, [*lined(), mine], dataset=["mine"])
    assert advice.own_share == 0
    assert advice.w == pytest.approx(0.5)
    assert "Your own runs on mine show no clear effect of PLW (p = 0.7)" in " ".join(wording.sentences(advice))


def test_own_runs_that_are_too_few_to_tell_are_no_evidence():
    """A clear curve, at four PLWs of one seed each."""
    table = simulate(0.5, -0.5, [0, 0.01, 0.1, 1]).query("seed == 1")
    (few,) = evidence.own(table, "none", {"mine": 0.5}, {})
    assert few.p < 0.05
    assert (few.low, few.high, few.is_located) == (0, 1, False)
    advice = advise.advise(0.5, [*lined(), few], dataset=["mine"])
    assert advice.own_share == 0
    assert "Your own runs on mine are too few to tell" in " ".join(wording.sentences(advice))
    assert f"p = {few.p:.2g}" not in wording.text(advice)
    assert own_point(0.5, -0.5, [0, 0.01, 0.1, 1]).is_located  # two seeds: 8 runs


def test_own_runs_alone_are_evidence():
    advice = advise.advise(1.0, [point(0.5, 0.05, 1.0, "mine", OWN)], dataset=["mine"])
    assert advice.line is None
    assert advice.own_share == 1
    assert (advice.w, advice.high - advice.w) == pytest.approx((0.5, 1.96 * 0.05), rel=1e-4)


@pytest.mark.parametrize("points", [[], lined()[:2], [point(0.5, math.inf, 1, "flat")]])
def test_no_evidence_is_an_answer(points):
    advice = advise.advise(1.0, points)
    assert (advice.plw, advice.interval) == (None, (0, 1))
    assert "no evidence of a best PLW: any PLW from 0 to 1 will do; 0 is fine." in wording.sentences(advice)[0]
    assert wording.text(advice)
    assert evidence_figure.draw(advice).startswith(b"\x89PNG")


def test_wide_intervals_are_said_to_be_wide():
    def first(spread):
        points = [dataclasses.replace(p, variance=spread**2) for p in lined(ratios=(0.1, 0.2, 0.5, 1, 2, 4, 8))]
        return " ".join(wording.sentences(advise.advise(0.9, points))[:2])

    assert "wide" not in first(0.05)
    assert "PLW 0 lies outside it." in first(0.05)
    assert "That is a wide interval, which rules out little" in first(0.33)
    assert "does not tell which PLW is best for such a data set: any PLW from 0 to 1 may be." in first(1.0)


def test_a_ratio_beyond_the_evidence_is_said_to_be():
    assert "beyond the ratios there is evidence for, 0.1 to 8" in " ".join(
        wording.sentences(advise.advise(50.0, lined()))
    )


def test_advice_is_json_with_its_evidence_and_its_figure(tmp_path):
    advice = advise.advise(0.3, evidence.published(), dataset=["mine"], task_types=["long-generation"])
    paths = exports.write(advice, tmp_path / "new")
    assert [path.name for path in paths] == ["advice.json", "advice.png"]
    told = json.loads(paths[0].read_text())
    assert told["suggested_plw"] == advice.plw
    assert len(told["evidence"]) == len(advice.points)
    assert told["evidence"][0]["variance"] is None  # AlpacaData: flat
    assert told["line"]["slope_per_tenfold"] == advice.line.slope[0]
    assert wording.LONG_GENERATION in told["sentences"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(ValueError, match="ratio must be a number above 0, got 0"):
        advise.advise(0.0, [])
    with pytest.raises(ValueError, match=r"task-types must be among multiple-choice, .*, got essays"):
        advise.check_types(["essays"])
    with pytest.raises(ValueError, match="mine has no generation ratio"):
        advise.measured_ratio(SimpleNamespace(name="mine", generation_ratio=None))
    with pytest.raises(ValueError, match='the generation ratio of mine is not known; give it, as in --ratios "mine='):
        evidence.own(simulate(0.3, -0.3), "none", {}, {"other": 1.0})
    with pytest.raises(ValueError, match="ratios names the data set 'mien', which is not among the scores"):
        evidence.own(simulate(0.3, -0.3), "none", {"mine": 1.0, "mien": 1.0}, {})
    with pytest.raises(ValueError, match=r"data set mine has 1 PLWs within 0\.\.1; a curve needs 3 or more"):
        evidence.own(simulate(0.3, -0.3, plws=[1, 2, 4, 8]), "none", {"mine": 1.0}, {})
    table = simulate(0.3, -0.3).assign(task_type="short-generation")
    with pytest.raises(ValueError, match="has no task of the type multiple-choice"):
        evidence.own(table, "none", {"mine": 1.0}, {}, ["multiple-choice"])


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, "give the data set's generation ratio, or dataset to measure it on"),
        ({"ratio": -1.0}, "ratio must be a number above 0, got -1"),
        ({"ratio": 1.0, "scores": "a", "experiment": "b"}, "give one of scores and experiment"),
        ({"ratio": 1.0, "ratios": "a=1"}, "ratios belong to your own runs"),
        ({"ratio": 1.0, "scores": "a", "ratios": "a=much"}, "ratios must be like mine=0.5,other=7, got a=much"),
        ({"ratio": 1.0, "scores": "a", "ratios": "a=0"}, "ratios must be like"),
        ({"ratio": 1.0, "scores": "a", "ratios": "0.5"}, "ratios must be like"),
        ({"ratio": 1.0, "scores": "a", "ratios": "a=1,b=2,a=3"}, "ratios must name each data set once"),
    ],
)
def test_what_is_wrong_with_a_config(values, fault):
    with pytest.raises(ValueError, match=fault):
        AdviseConfig(**values)


def test_names_and_ratios_of_a_config():
    config = AdviseConfig(dataset="folder/mine.json", invert=True, scores="a", ratios="a b = 0.5, c=2")
    assert config.given_ratios() == {"a b": 0.5, "c": 2.0}
    assert config.dataset_names() == ("mine.json inverted", "folder/mine.json inverted", "mine inverted")


@pytest.mark.slow
def test_the_command_advises_from_a_table_and_logs_what_it_found(tmp_path):
    place = Place(tmp_path)
    table = simulate(0.3, -0.3)
    table.to_csv(tmp_path / "mine.csv", index=False)
    out, _ = place.run("advise", "--ratio", 0.5, "--dataset", "mine", "--scores", "mine.csv", "--output", "out")
    assert "Your own runs on mine put it at" in out
    told = json.loads((tmp_path / "out/advice.json").read_text())
    assert told["own_share"] > 0.9
    assert told["suggested_plw"] == pytest.approx(0.1, abs=0.02)
    (run,) = place.runs()
    assert {item.path for item in place.client.list_artifacts(run.info.run_id)} >= {"advice.json", "advice.png"}


def test_the_image_has_the_tables():
    assert "COPY paper /code/paper" in (ROOT / "Dockerfile").read_text()
    assert "!paper" in (ROOT / ".dockerignore").read_text().splitlines()
    assert ROOT / "paper/tables" == evidence.TABLES


# ------------------------------------------------------------------------------------------------- single runs


def test_a_single_runs_uncertainty_is_that_of_its_questions():
    """By hand: 4.42 % and 9.78 % of 805 questions, as two shares that are not of the same questions."""
    of_one = [one for one in single_runs.published() if one.dataset == "Less MMLU Chat"]
    runs, benchmarks = of_one
    assert (benchmarks.gain, benchmarks.reach) == (pytest.approx(0.0066), None)
    assert runs.plws == (0, 1)
    assert runs.ratio == pytest.approx(1 / 26.33, abs=5e-4)
    error = math.sqrt(0.0442 * 0.9558 / 805 + 0.0978 * 0.9022 / 805)
    assert (runs.gain, runs.reach) == pytest.approx((0.0536, 1.959964 * error))


def test_single_runs_are_told_with_their_caveats_and_have_no_weight(monkeypatch):
    points = evidence.published()
    with_them = advise.advise(0.04, points)
    text = wording.text(with_them)
    assert "The nearest in ratio (0.038) is of Instruction Modelling 2024, on Less MMLU Chat: PLW 1 less" in text
    assert "of the weights tried, 0 on the prompt was best" in text
    assert "https://github.com/hitz-zentroa/GoLLIE/issues/16" in text
    told = json.loads(json.dumps(exports.to_json(with_them), allow_nan=False))["single_runs"]
    assert len(told) == 16
    assert [one["gain"] for one in told if one["says"]] == [None, None]
    of_no_type = [one.study for one in single_runs.published(["multiple-choice"]) if one.says]
    assert of_no_type == ["GoLLIE 2024", "tokenkit 2026"]
    monkeypatch.setattr(single_runs, "published", lambda task_types: [])
    without = advise.advise(0.04, points)
    assert (without.w, without.low, without.high) == (with_them.w, with_them.low, with_them.high)
    assert "ingle runs" not in wording.text(without)


def test_a_suggestion_says_what_share_it_comes_to():
    lines = wording.sentences(advise.advise(0.5, [point(0.5, 0.05, r, d) for r, d in ((0.1, "a"), (1, "b"), (9, "c"))]))
    assert lines[0].startswith("Suggested PLW 0.1,")
    assert lines[2].startswith("It gives prompts 17% of the loss weight on such data, and its interval")
