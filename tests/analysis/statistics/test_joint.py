"""Is the axis found on which data sets share one curve? Are likelihoods and left-out errors those of other software?"""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from plw_mlflow.analysis import score_table
from plw_mlflow.analysis.statistics import joint
from plw_mlflow.errors import UserError
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import EXPONENT

RATIOS = {"long": 8.0, "middle": 1.0, "short": 0.1}


def simulated(axis: str, noise: float = 0.002, seed: int = 1) -> pd.DataFrame:
    """Scores of three data sets on one curve in the share or in w_p, in levels of their own."""
    random = np.random.default_rng(seed)
    rows = []
    for level, (dataset, ratio) in enumerate(RATIOS.items()):
        for model in ("a", "b"):
            for number, plw in enumerate(PUBLISHED_PLWS):
                share = plw / (plw + ratio)
                w = share if axis == "share" else plw**EXPONENT
                mean = 0.5 + 0.03 * level + 0.02 * (model == "b") + 0.2 * w - 0.25 * w**2
                rows += [
                    (model, dataset, plw, number, task, "acc", mean + place + random.normal(0, noise * (1 + level)))
                    for task, place in (("one", 0.0), ("two", 0.1))
                ]
    return score_table.add_prompt_shares(pd.DataFrame(rows, columns=score_table.COLUMNS), RATIOS)


@pytest.mark.parametrize("axis", ["share", "w_p"])
def test_the_axis_on_which_data_sets_share_a_curve_is_found(axis):
    found = joint.compare_axes(score_table.check(simulated(axis)))
    assert found.best.axis == axis
    assert found.best.aic < found.of("w_p" if axis == "share" else "share").aic - 20
    assert found.best.aic < found.of(axis, each=True).aic + 6  # which needs four more numbers
    flat = found.of(None).left_out
    assert found.best.left_out["middle"] < 0.2 * flat["middle"]  # the others' shares reach around it
    if axis == "w_p":
        assert set(found.best.beyond.values()) == {0}
    else:
        assert found.best.beyond["short"] > 0


def test_the_likelihood_is_the_highest_that_a_general_optimiser_finds():
    table = score_table.check(simulated("share", noise=0.01))
    found = joint.compare_axes(table).of("share")
    runs = table.groupby(["dataset", "model", "plw"], as_index=False)[["score", "prompt_share"]].mean()
    w = runs["prompt_share"].to_numpy()
    x = np.column_stack([pd.get_dummies(runs["dataset"] + runs["model"]).to_numpy(float), w, w**2])
    which = runs["dataset"].map({name: number for number, name in enumerate(RATIOS)}).to_numpy()

    def deviance(parameters):
        spread = np.exp(parameters[-3:])[which]
        return -stats.norm.logpdf(runs["score"], x @ parameters[:-3], spread).sum()

    start = np.concatenate([np.linalg.lstsq(x, runs["score"])[0], np.full(3, -4.0)])
    best = optimize.minimize(deviance, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000})
    assert found.loglik == pytest.approx(-best.fun, abs=1e-4)
    assert found.parameters == len(start)
    assert found.aic == pytest.approx(2 * (len(start) - found.loglik))


def test_a_left_out_data_set_is_predicted_from_the_others_by_hand():
    """Without noise between equal variances, weights do not matter, so plain least squares must agree."""
    table = simulated("share", noise=1e-4)
    kept = table[(table["dataset"] != "middle") & (table["model"] == "a")]
    found = joint.compare_axes(score_table.check(table[table["model"] == "a"]))
    means = kept.groupby(["dataset", "plw"], as_index=False)[["score", "prompt_share"]].mean()
    w = means["prompt_share"]
    x = np.column_stack([means["dataset"] == "long", means["dataset"] == "short", w, w**2]).astype(float)
    slope, bend = np.linalg.lstsq(x, means["score"])[0][2:]
    middle = table[(table["dataset"] == "middle") & (table["model"] == "a")].groupby("plw").mean(numeric_only=True)
    missed = middle["score"] - slope * middle["prompt_share"] - bend * middle["prompt_share"] ** 2
    assert found.of("share").left_out["middle"] == pytest.approx(missed.std(ddof=0), rel=0.5)
    assert found.of(None).left_out["middle"] == pytest.approx(middle["score"].std(ddof=0))


def test_shares_need_not_be_known():
    found = joint.compare_axes(score_table.check(simulated("w_p").drop(columns="prompt_share")))
    assert {*found.refusals} == {"share", "w_share", "w_odds"}
    assert found.best.axis == "w_p"


def test_an_axis_on_which_a_curve_fits_exactly_is_left_out():
    table = simulated("w_p")
    exact = score_table.check(table.assign(score=0.3 + 0.2 * table["plw"] - 0.1 * table["plw"] ** 2))
    found = joint.compare_axes(exact)
    assert "follow a curve exactly" in found.refusals["plw"]
    assert {fit.axis for fit in found.fits} == {None, "w_p", "logit", "rank", "share", "w_share", "w_odds"}


def test_what_does_not_allow_it_is_told():
    table = score_table.check(simulated("w_p"))
    with pytest.raises(UserError, match="1 data set left to join"):
        joint.compare_axes(table[table["dataset"] == "long"])
    few = table[(table["dataset"] != "short") | (table["plw"] < 0.003)]
    found = joint.compare_axes(few)
    assert found.datasets == ["long", "middle"]
    assert found.refusals == {"short": "has 6 runs, and it takes 8"}
    with pytest.raises(UserError, match=r"1 data set left to join \(short has 6 runs, and it takes 8\)"):
        joint.compare_axes(few[few["dataset"] != "middle"])
    with pytest.raises(UserError, match="no task is scored on every run"):
        joint.compare_axes(table[(table["task"] == "one") ^ (table["plw"] == 0)])
