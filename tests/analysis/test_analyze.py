"""Does the fit equal R's, obey its laws, and refuse the tables it should?"""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from plw_mlflow.analysis import analyze, exports, score_table, wording
from plw_mlflow.analysis.answers import Analysis
from plw_mlflow.analysis.statistics import design, fitting, random_intercept
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.errors import UserError
from plw_mlflow.transforms import EXPONENT, make_transform
from tests.stores import Place

TABLES = Path(__file__).parents[2] / "paper" / "tables"
REFERENCE = pd.read_csv(TABLES / "reference_fits_R.csv").query("software.str.startswith('lme4')").set_index("dataset")
STUDY_PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return score_table.read_scores(TABLES / "v1_scores.csv")


@pytest.fixture(scope="module")
def analysis(study) -> Analysis:
    return analyze.analyze(study, margin=0.01)


@pytest.fixture(scope="module")
def study_fits(analysis) -> dict[str, Fit]:
    return {fit.dataset: fit for fit in analysis.fits if fit.model == "lmm"}


def w_p(plw):
    return plw**EXPONENT


def fit_one(table, model="lmm", scale="none"):
    """One model of a table of one data set."""
    scaled = score_table.rescale(score_table.check(table), scale)
    dataset = scaled["dataset"].iloc[0]
    return fitting.fit(model, design.grid(scaled, dataset, make_transform("w_p", scaled["plw"])), scale)


def simulate(seed=1, b=(0.5, 0.1, -0.08), sd_task=0.2, sd=0.01, tasks=6, seeds=2, dataset="short", keep=1.0):
    """A score table whose coefficients are known; `keep` < 1 leaves scores out at random."""
    random = np.random.default_rng(seed)
    level = random.normal(0, sd_task, tasks)
    rows = [
        {"model": "m", "dataset": dataset, "plw": plw, "seed": s, "task": f"task{t}", "metric": "acc"}
        | {"score": b[0] + b[1] * w_p(plw) + b[2] * w_p(plw) ** 2 + level[t] + random.normal(0, sd)}
        for t in range(tasks)
        for plw in STUDY_PLWS
        for s in range(seeds)
    ]
    return pd.DataFrame(rows)[random.random(len(rows)) < keep].reset_index(drop=True)


# ------------------------------------------------------------------------- against an independent answer

QUANTITIES = {
    "b0": (lambda fit: fit.coefficients["intercept"], 1e-5),
    "b1": (lambda fit: fit.coefficients["w_p"], 1e-5),
    "b2": (lambda fit: fit.coefficients["w_p^2"], 1e-5),
    # lme4 stops its search within 6e-5 of the intercept's variance, ours goes on: see the balanced closed form below.
    "se0": (lambda fit: fit.standard_errors["intercept"], 5e-5),
    "se1": (lambda fit: fit.standard_errors["w_p"], 1e-5),
    "se2": (lambda fit: fit.standard_errors["w_p^2"], 1e-5),
    "p1": (lambda fit: fit.p_values["w_p"], 1e-4),
    "p2": (lambda fit: fit.p_values["w_p^2"], 1e-4),
    "var_task": (lambda fit: fit.variances["task intercept"], 1e-4),
    "dispersion": (lambda fit: fit.variances["residual"], 1e-5),
    "lrt_chisq_ml": (lambda fit: fit.joint_tests[0].statistic, 1e-5),
    "lrt_p": (lambda fit: fit.joint_p, 1e-5),
    "vertex_wp": (lambda fit: fit.vertex_wp, 1e-5),
    "vertex_wp_se_delta": (lambda fit: fit.vertex_wp_se, 1e-5),
}


@pytest.mark.parametrize("dataset", REFERENCE.index)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_fit_equals_lme4(study_fits, dataset, quantity):
    value, tolerance = QUANTITIES[quantity]
    assert value(study_fits[dataset]) == pytest.approx(REFERENCE.loc[dataset, quantity], rel=tolerance)


@pytest.mark.parametrize("dataset", REFERENCE.index)
def test_loglikelihood_equals_lme4(study_fits, dataset):
    assert study_fits[dataset].loglik == pytest.approx(REFERENCE.loc[dataset, "loglik"], abs=1e-5)


def test_the_published_optimum(study_fits):
    fit = study_fits["AlpacaDataShort"]
    assert round(fit.optimum_plw, 4) == 0.2434
    assert fit.delta_interval[0] < 0.2434 < fit.delta_interval[1]
    assert "PLW matters here" in wording.verdict(fit)
    assert study_fits["AlpacaDataCleaned"].optimum_plw is None
    assert "no interior optimum" in wording.verdict(study_fits["AlpacaDataCleaned"])
    assert study_fits["AlpacaData"].delta_interval == [0, 1]  # a peak, but anywhere
    assert "may be chance" in wording.verdict(study_fits["AlpacaData"])


def dense(y, x, group, reml):
    """The same model with its n x n covariance written out and both variances searched for."""
    same = group[:, None] == group[None, :]
    n, p = x.shape

    def solve(log_variances):
        var_group, var_residual = np.exp(log_variances)
        v = var_group * same + var_residual * np.eye(n)
        inverse = np.linalg.inv(v)
        information = x.T @ inverse @ x
        b = np.linalg.solve(information, x.T @ inverse @ y)
        deviance = np.linalg.slogdet(v)[1] + (y - x @ b) @ inverse @ (y - x @ b)
        deviance += (n - p if reml else n) * math.log(2 * math.pi)
        return deviance + (np.linalg.slogdet(information)[1] if reml else 0), b, np.linalg.inv(information)

    start = np.log([y.var(), y.var() / 10])
    options = {"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000, "maxfev": 4000}
    best = optimize.minimize(lambda z: solve(z)[0], start, method="Nelder-Mead", options=options)
    deviance, b, covariance = solve(best.x)
    return b, covariance, *np.exp(best.x), -deviance / 2


@pytest.mark.parametrize("reml", [True, False])
def test_random_intercept_equals_dense_matrices_on_an_unbalanced_table(reml):
    table = simulate(seed=3, sd_task=0.02, tasks=5, keep=0.6)
    w = table["plw"].to_numpy() ** EXPONENT
    x, y, group = np.column_stack([np.ones_like(w), w, w**2]), table["score"].to_numpy(), pd.factorize(table["task"])[0]
    assert len(set(np.bincount(group))) > 2
    b, covariance, var_group, var_residual, loglik = dense(y, x, group, reml)
    fit = random_intercept.fit(y, x, group, reml)
    assert fit.loglik == pytest.approx(loglik, abs=1e-8)
    assert fit.coefficients == pytest.approx(b, rel=1e-6)
    assert fit.covariance == pytest.approx(covariance, rel=1e-5)
    assert (fit.var_group, fit.var_residual) == pytest.approx((var_group, var_residual), rel=1e-5)


# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("dataset", REFERENCE.index)
def test_balanced_variances_have_a_closed_form(study, study_fits, dataset):
    table = study[study["dataset"] == dataset]
    w = table["plw"] ** EXPONENT
    x = np.column_stack([pd.get_dummies(table["task"]).to_numpy(float), w, w**2])
    b, rss, *_ = np.linalg.lstsq(x, table["score"].to_numpy())
    var_residual = rss[0] / (160 - 8 - 2)
    var_task = table.groupby("task")["score"].mean().var(ddof=1) - var_residual / 20
    fit = study_fits[dataset]
    assert (fit.variances["residual"], fit.variances["task intercept"]) == pytest.approx(
        (var_residual, var_task), rel=1e-6
    )
    assert list(fit.coefficients.values())[1:] == pytest.approx(b[-2:], rel=1e-9)


def test_missing_scores_are_those_of_the_full_grid():
    table = simulate(tasks=2)
    gone = table.index[[3, 17]]
    missing = score_table.missing_scores(table.drop(index=gone))
    assert score_table.missing_scores(table).empty
    pd.testing.assert_frame_equal(missing, table.loc[gone, score_table.SCORE].reset_index(drop=True), check_dtype=False)


# ------------------------------------------------------------------------------------------------- by law


def test_fit_recovers_the_coefficients_it_was_given():
    fit = fit_one(simulate(sd=0.001, seeds=5))
    assert fit.coefficients["w_p"] == pytest.approx(0.1, abs=4 * fit.standard_errors["w_p"])
    assert fit.coefficients["w_p^2"] == pytest.approx(-0.08, abs=4 * fit.standard_errors["w_p^2"])
    assert fit.variances["residual"] == pytest.approx(0.001**2, rel=0.2)
    assert fit.vertex_wp == pytest.approx(0.625, abs=4 * fit.vertex_wp_se)
    assert fit.delta_interval[0] < 0.625 ** (1 / EXPONENT) < fit.delta_interval[1]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), shift=st.floats(-0.4, 0.4), factor=st.floats(0.01, 1), keep=st.sampled_from([0.5, 1])
)
def test_shifting_moves_the_intercept_and_scaling_scales(seed, shift, factor, keep):
    table = simulate(seed=seed, b=(0.0, 0.1, -0.08), sd_task=0.05, keep=keep)
    fit = fit_one(table)
    shifted = fit_one(table.assign(score=table["score"] + shift))
    scaled = fit_one(table.assign(score=table["score"] * factor))
    assert shifted.coefficients["intercept"] == pytest.approx(fit.coefficients["intercept"] + shift, abs=1e-8)
    for term in ("w_p", "w_p^2"):
        assert shifted.coefficients[term] == pytest.approx(fit.coefficients[term], rel=1e-5)
        assert scaled.coefficients[term] == pytest.approx(factor * fit.coefficients[term], rel=1e-5)
        assert scaled.standard_errors[term] == pytest.approx(factor * fit.standard_errors[term], rel=1e-5)
        assert scaled.p_values[term] == pytest.approx(fit.p_values[term], rel=1e-3)
    assert scaled.variances["task intercept"] == pytest.approx(factor**2 * fit.variances["task intercept"], rel=1e-4)


def test_the_order_of_rows_changes_no_bit(study, analysis):
    shuffled = study.sample(frac=1, random_state=5)
    again = analyze.analyze(shuffled, margin=0.01)
    assert asdict(analysis) == asdict(again)
    assert exports.to_json(analysis, study) == exports.to_json(again, shuffled)


def mixed_units(study):
    return study.assign(score=study["score"].where(study["metric"] != "bleu", 100 * study["score"]))


def test_fraction_scale_undoes_a_mix_of_units(study, study_fits):
    units = mixed_units(study)
    with pytest.raises(ValueError, match=r"scales are mixed \(0..100 beside 0..1\): give --scale fraction"):
        analyze.analyze(units)
    for dataset, part in units.groupby("dataset"):
        fit = fit_one(part, scale="fraction")
        assert fit.scale == "fraction"
        assert fit.coefficients == pytest.approx(study_fits[dataset].coefficients, rel=1e-9)


def test_units_do_not_matter_to_minmax_and_zscore(study):
    """Each task is then on a scale of its own, over all data sets; paper.md, section 7, has the two vertices."""
    for scale, ends, plw in (("minmax", (0, 1), 0.211), ("zscore", None, 0.216)):
        scaled = score_table.rescale(score_table.check(study), scale)
        other = score_table.rescale(score_table.check(mixed_units(study)), scale)
        assert other["score"].to_numpy() == pytest.approx(scaled["score"].to_numpy(), abs=1e-9)
        per_task = scaled.groupby("task")["score"]
        if ends:
            assert (per_task.min().eq(ends[0]) & per_task.max().sub(ends[1]).abs().lt(1e-12)).all()
        else:
            assert per_task.mean().abs().max() < 1e-12
            assert per_task.std().sub(1).abs().max() < 1e-12
        short = scaled[scaled["dataset"] == "AlpacaDataShort"]
        assert fit_one(short).optimum_plw == pytest.approx(plw, abs=5e-4)


def test_scores_on_neither_scale_are_fitted_and_noted(study, study_fits):
    for dataset, part in study.assign(score=100 * (study["score"] - 0.35)).groupby("dataset"):
        fit = fit_one(part)
        assert fit.joint_p == pytest.approx(study_fits[dataset].joint_p, rel=1e-6)
        assert "Some scores are negative" in fit.notes[0]


@pytest.mark.parametrize(
    ("b", "note", "verdict"),
    [
        ((0.5, -0.1, 0.02), "does not bend downwards", "no interior optimum; the curve is highest at PLW 0,"),
        ((0.5, 0.3, -0.1), "rises over the whole range", "no interior optimum; the curve is highest at PLW 1,"),
        ((0.5, -0.1, -0.1), "falls over the whole range", "no interior optimum; the curve is highest at PLW 0,"),
    ],
)
def test_no_interior_optimum_is_an_answer(b, note, verdict):
    fit = fit_one(simulate(b=b, sd_task=0.05, sd=0.001))
    assert not fit.has_interior_optimum
    assert fit.optimum_plw is None
    assert fit.delta_interval is None
    assert note in fit.notes[0]
    assert verdict in wording.verdict(fit)


def test_a_plw_above_one_widens_the_range():
    table = simulate(b=(0.5, 0.2, -0.08), sd_task=0.05, sd=0.001)
    extended = table.assign(plw=table["plw"] * 8)
    w = extended["plw"] ** EXPONENT
    extended["score"] = 0.3 + 0.2 * w - 0.08 * w**2 + np.random.default_rng(2).normal(0, 0.001, len(w))
    fit = fit_one(extended)
    assert fit.optimum_plw == pytest.approx(1.25 ** (1 / EXPONENT), rel=0.05)


def test_a_singular_fit_is_said_and_is_least_squares():
    table = simulate(sd_task=0.0, sd=0.05)
    table["score"] -= table.groupby("task")["score"].transform("mean") - 0.5
    fit = fit_one(table)
    w = table["plw"].to_numpy() ** EXPONENT
    expected = np.polynomial.polynomial.polyfit(w, table["score"], 2)
    assert fit.is_singular
    assert fit.variances["task intercept"] == 0
    assert "Singular fit" in fit.notes[0]
    assert list(fit.coefficients.values()) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- bad input

HEADER = "model,dataset,plw,seed,task,metric,score"
GOOD = [
    f"m,d,{plw},1,{task},acc,{0.5 + plw / 10 + 0.03 * (i % 2)}" for i, plw in enumerate([0, 0.1, 1]) for task in "ab"
]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "scores.csv: empty"),
        ([HEADER], "scores.csv: holds no scores"),
        ([HEADER.replace("plw,seed,", ""), "m,d,a,acc,0.5"], "scores.csv: no column plw, seed; a score table has"),
        ([HEADER + ",score", *(row + ",1" for row in GOOD)], "column score occurs twice"),
        ([HEADER, *GOOD, "m,d,0.5,1,a,acc"], "scores.csv, row 8: 6 fields, but the header has 7"),
        ([HEADER, *GOOD, "m,d,lots,1,a,acc,0.5"], "scores.csv, row 8: plw is 'lots', but must be a finite number"),
        ([HEADER, *GOOD, "m,d,nan,1,a,acc,0.5"], "row 8: plw is 'nan', but must be a finite number"),
        ([HEADER, *GOOD, "m,d,-0.1,1,a,acc,0.5"], "row 8: plw is '-0.1', but must be 0 or more"),
        ([HEADER, *GOOD, "m,d,0.5,1.5,a,acc,0.5"], "row 8: seed is '1.5', but must be a whole number"),
        ([HEADER, "", *GOOD, "m,d,0.5,1,a,acc,NaN"], "row 9: score is 'NaN', but must be a finite number"),
        ([HEADER, *GOOD, "m,d,0.5,1,a,acc,inf"], "row 8: score is 'inf', but must be a finite number"),
        ([HEADER, *GOOD, "m,d,0.5,1,a,acc,1e300"], "row 8: score is '1e300', too large to be one"),
        ([HEADER, *GOOD, "m,d,0.5,1,a,acc,"], "row 8: score is '', but must be a finite number"),
        ([HEADER, *GOOD, "m,,0.5,1,a,acc,0.5"], "row 8: dataset is '', a name is needed"),
        ([HEADER, *GOOD, "m,d,1e-1,1,a,acc,0.5"], "row 8: scores the same model, dataset, plw, seed, task as row 4"),
        ([HEADER, *GOOD, "m,d,0.1,1,a,f1,0.5"], "task a has the metrics acc and f1; choose one metric per task"),
        ([HEADER, *GOOD[:4]], "data set d has 2 distinct PLWs; a curve needs 3 or more"),
        ([HEADER, *(row.rsplit(",", 1)[0] + ",0.5" for row in GOOD)], "data set d has constant scores"),
        ([HEADER, *GOOD[::2]], "data set d can be fitted by no model"),
        ([HEADER, *GOOD[:3], GOOD[5]], "lmm: 4 scores for 2 tasks are too few for a curve"),
        (
            [HEADER, *(row.replace("m,d,1,", "m,d,2,") for row in GOOD), "m,d,4,1,a,acc,56.1"],
            "scores 56.1 here but 0.5",
        ),
        ([HEADER + ",n", *(row + ",many" for row in GOOD)], "row 2: n is 'many', but must be a finite number"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, lines, message):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared whole, below
        analyze.analyze(score_table.read_scores(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.csv: cannot be read \(No such file"):
        score_table.read_scores(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"x.csv: there is no folder .*nowhere; give"):
        score_table.read_scores(tmp_path / "nowhere" / "x.csv")
    (tmp_path / "scores.csv").touch()
    with pytest.raises(ValueError, match=r"there is no such file; did you mean .*scores.csv\?"):
        score_table.read_scores(tmp_path / "socres.csv")
    with pytest.raises(ValueError, match=r"is a folder; give --scores a CSV file, such as scores.csv in it"):
        score_table.read_scores(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\x89PNG\r\n\xff\x00")
    with pytest.raises(ValueError, match=r"binary.csv: not a CSV file in UTF-8"):
        score_table.read_scores(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"model": "m", "score": 0.5}]', "is JSON, not a CSV file"),
        (b'{\n  "score": 0.5\n}\n', "is JSON, not a CSV file"),
        (b"PK\x03\x04\x14\x00", "is an Excel file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "is an Excel file"),
        (b"PAR1\x15", "is a Parquet file"),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
        ("\n".join([HEADER, *GOOD]).encode("utf-16"), "is text in UTF-16"),
        ("\n".join([HEADER, *GOOD]).replace(",", ";").encode(), "separated by semicolons, not by commas"),
        ("\n".join([HEADER, *GOOD]).replace(",", ";").replace(".", ",").encode(), "and with points in its numbers"),
        ("\n".join([HEADER, *GOOD]).replace(",", "\t").encode(), "separated by tabs, not by commas"),
        ("\n".join([HEADER.upper(), *GOOD]).encode(), "and this one has 'MODEL', 'DATASET', 'PLW'"),
        ("\n".join([HEADER.replace(",", " ,"), *GOOD]).encode(), "and this one has 'model ', 'dataset '"),
    ],
)
def test_what_a_file_is_instead_of_a_table_is_said(tmp_path, content, message):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared whole, below
        score_table.read_scores(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_that_few_runs_share_are_not_called_none():
    """Each task is scored on a third of the runs: there are eight of them, not "0 tasks"."""
    table = simulate(tasks=8, seeds=3)
    table = table[table["seed"] == table["task"].str[-1].astype(int) % 3]
    analysis = analyze.analyze(table, draws=0)
    reasons = {one.what: one.reason for one in analysis.refusals}
    assert reasons["crossed"] == "every task is scored on fewer than half of the runs; use lmm-slopes"
    assert not any("there are 0" in reason for reason in reasons.values())
    few = simulate(tasks=8, seeds=2).query("seed == 0 or task < 'task3'").query("plw != 0 or task < 'task3'")
    assert (
        "there are 3 that at least half of the runs are scored on"
        in {one.what: one.reason for one in analyze.analyze(few, draws=0).refusals}["crossed"]
    )


def test_three_scores_of_one_task_are_too_few_and_not_at_fault():
    with pytest.raises(ValueError, match="ols-task: 3 scores are too few for 3 coefficients and a residual"):
        analyze.analyze(simulate(tasks=1, seeds=1).query("plw in (0, 0.1, 1)"))


def test_a_data_frame_is_checked_as_a_file_is():
    table = simulate()
    table.loc[7, "score"] = float("nan")
    with pytest.raises(ValueError, match="score table, row 7: score is 'nan'"):
        analyze.analyze(table)
    with pytest.raises(ValueError, match="scale is 'percent', but must be one of none, fraction"):
        analyze.analyze(simulate(), scale="percent")


def test_scores_without_residuals_are_refused():
    with pytest.raises(ValueError, match="follow a curve exactly"):
        fit_one(simulate(sd=0.0))
    with pytest.raises(ValueError, match="too close together"):
        fit_one(simulate().assign(plw=lambda t: 0.1 + 1e-12 * t["plw"]))


def test_a_file_with_a_byte_order_mark_quotes_and_extra_columns_is_read(tmp_path):
    path = tmp_path / "scores.csv"
    quoted = [row.replace(",a,", ',"a, and b",') + ",0.1,100,note" for row in GOOD]
    path.write_text("\ufeff" + "\r\n".join([HEADER + ",stderr,n,task_type", *quoted]), newline="")
    table = score_table.read_scores(path)
    assert set(table["task"]) == {"a, and b", "b"}
    assert table["n"].tolist() == [100] * 6
    assert list(table.index) == [2, 3, 4, 5, 6, 7]


def test_analysis_needs_only_a_table():
    """Neither tracking nor training nor drawing is imported to fit a table."""
    heavy = {"mlflow", "torch", "transformers", "matplotlib"}
    code = f"import sys, plw_mlflow.analysis.analyze; print({heavy} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=TABLES.parents[1], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


def test_fit_json_is_json_and_unrounded(study, analysis, study_fits):
    told = json.loads(json.dumps(exports.to_json(analysis, study), allow_nan=False))
    assert told["schema"] == "plw_mlflow.fit/4"
    assert told["table"]["rows"] == 480
    assert told["table"]["missing"] == []
    assert [(fit["dataset"], fit["model"]) for fit in told["fits"]] == [
        (dataset, model) for dataset in sorted(study_fits) for model in fitting.FITS
    ]
    (short,) = (fit for fit in told["fits"] if (fit["dataset"], fit["model"]) == ("AlpacaDataShort", "lmm"))
    assert short["coefficients"] == study_fits["AlpacaDataShort"].coefficients


def test_a_data_set_with_too_few_plws_is_set_aside_and_named():
    rows = [(dataset, plw) for dataset, plws in {"whole": (0, 0.1, 1), "stray": (0.5,)}.items() for plw in plws]
    table = pd.DataFrame(rows, columns=["dataset", "plw"])
    table.attrs = {"left_out": ["a cell without scores"], "notes": ["batch sizes differ"]}
    kept = score_table.fittable(table)
    assert set(kept["dataset"]) == {"whole"}
    assert score_table.remarks(kept) == [
        "left out, with fewer than 3 PLWs: stray",
        "left out: a cell without scores",
        "note: batch sizes differ",
    ]
    only_stray = table[table["dataset"] == "stray"]
    assert score_table.fittable(only_stray) is only_stray  # for `check` to refuse


def test_a_score_table_is_not_read_beyond_any_that_is_one(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    path.write_text(",".join(map(str, range(1001))) + "\n")
    with pytest.raises(ValueError, match=r"scores.csv: 1001 columns, where a score table has at most 1000; drop some"):
        score_table.read_scores(path)
    path.write_text("\n".join(["a,b", "1,2", "1"]))
    with pytest.raises(ValueError, match=r"scores.csv, row 3: 1 fields, but the header has 2; mend the row"):
        score_table.read_scores(path)
    monkeypatch.setattr(score_table, "MOST_BYTES", 8)
    with pytest.raises(ValueError, match=r"scores.csv: more than 0 MiB, which no score table needs"):
        score_table.read_scores(path)


def test_shares_are_taken_from_the_table_and_else_from_ratios():
    rows = [("m", "d", plw, 1, "t", "acc", plw) for plw in (0.0, 0.1, 0.5, 1.0)]
    table = pd.DataFrame(rows, columns=score_table.COLUMNS)
    assert score_table.prompt_odds(table) is None
    by_ratio = score_table.add_prompt_shares(table, {"d": 0.25})
    assert by_ratio["prompt_share"].tolist() == pytest.approx([0, 0.1 / 0.35, 0.5 / 0.75, 0.8])
    assert score_table.prompt_odds(by_ratio) == pytest.approx((0, 4))
    known = table.assign(prompt_share=[0.2, 0.28, None, 0.5])  # odds 0.25 at PLW 0 and 1 at PLW 1
    assert score_table.add_prompt_shares(known, {"d": 9.0})["prompt_share"][:2].tolist() == [0.2, 0.28]
    assert score_table.prompt_odds(known.dropna().iloc[[0, 2]]) == pytest.approx((0.25, 1))
    assert score_table.prompt_odds(table.assign(prompt_share=table["plw"])) is None  # as where a PLW is a share
    assert score_table.prompt_odds(table.assign(prompt_share=[0, 0.5, 0.6, 0.7])) is None
    assert score_table.odds_of_rows(by_ratio).tolist() == pytest.approx([0, 0.4, 2, 4])
    with pytest.raises(UserError, match="a share is at most 1"):
        score_table.check(table.assign(prompt_share=1.5))


def test_a_ratio_of_a_data_set_without_scores_is_refused(tmp_path):
    """Else it would be left out in silence, and the misspelt data set would have none."""
    scores = TABLES / "v1_scores.csv"
    _, err = Place(tmp_path).run("analyze", "--scores", scores, "--ratios", "AlpacaDataLong=2", status=2)
    assert "ratios names the data set 'AlpacaDataLong'" in err
    table = simulate(dataset="mine")
    table.attrs["too_few_plws"] = ["stray"]
    score_table.check_ratios(table, {"mine": 0.5, "stray": 2.0})
    misspelt = r"ratios names the data set 'mien', which is not among the scores \(did you mean 'mine'\?\); they are of"
    with pytest.raises(UserError, match=misspelt):
        score_table.check_ratios(table, {"mine": 0.5, "mien": 2.0})
    with pytest.raises(UserError, match="'other', which is not among the scores; they are of mine, stray"):
        score_table.check_ratios(table, {"other": 2.0})


def test_the_terminals_table_names_the_axis_and_keeps_its_columns():
    head, *lines = wording.table_text(analyze.analyze(simulate(), axis="logit", draws=0)).splitlines()
    assert "logit (SE)" in head
    assert "logit^2 (SE)" in head
    assert "w_p" not in head
    rows = lines[: lines.index("")]
    assert any("fixed-tasks" in row for row in rows)
    assert {row[head.index("optimum PLW") - 1] for row in rows} == {" "}
    assert {row[head.index("logit (SE)") - 1] + row[head.index("logit (SE)")] for row in rows} <= {" +", " -"}
