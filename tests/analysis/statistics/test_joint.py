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
    # The others' shares reach to 0.5, which `short` has at PLW 0.1.
    beyond = 2 * sum(plw > 0.1 for plw in PUBLISHED_PLWS) if axis == "share" else 0
    assert found.best.beyond == {"long": 0, "middle": 0, "short": beyond}


def by_run(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over tasks of each run."""
    return table.groupby(["dataset", "model", "plw"], as_index=False)[["score", "prompt_share"]].mean()


def highest(runs: pd.DataFrame) -> tuple[float, np.ndarray]:
    """The highest log-likelihood that a general optimiser finds in the share, and where: levels, slope, bend, spreads.

    A level is of each data set and model, a spread of each data set.
    """
    w = runs["prompt_share"].to_numpy()
    x = np.column_stack([pd.get_dummies(runs["dataset"] + runs["model"]).to_numpy(float), w, w**2])
    which, names = pd.factorize(runs["dataset"])

    def deviance(parameters):
        coefficients, spreads = np.split(parameters, [x.shape[1]])
        return -stats.norm.logpdf(runs["score"], x @ coefficients, np.exp(spreads)[which]).sum()

    start = np.concatenate([np.linalg.lstsq(x, runs["score"])[0], np.full(len(names), -4.0)])
    best = optimize.minimize(deviance, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000})
    return -best.fun, best.x


def test_the_likelihood_is_the_highest_that_a_general_optimiser_finds():
    table = score_table.check(simulated("share", noise=0.01))
    found = joint.compare_axes(table).of("share")
    expected, parameters = highest(by_run(table))
    assert found.loglik == pytest.approx(expected, abs=1e-4)
    assert found.parameters == len(parameters)
    assert found.aic == pytest.approx(2 * (len(parameters) - found.loglik))


@pytest.mark.parametrize("left_out", RATIOS)
def test_a_left_out_data_set_is_predicted_by_the_curve_of_the_others_alone(left_out):
    """In the share, these data sets have a curve each, so that a fit to all of them would miss by another amount."""
    table = score_table.check(simulated("w_p", noise=0.01))
    found, runs = joint.compare_axes(table), by_run(table)
    is_here = runs["dataset"] == left_out
    _, (*_, slope, bend, _, _) = highest(runs[~is_here])  # of two data sets, with a spread each
    here = runs[is_here]
    for axis, predicted in [("share", slope * here["prompt_share"] + bend * here["prompt_share"] ** 2), (None, 0.0)]:
        missed = here["score"] - predicted
        missed -= missed.groupby(here["model"]).transform("mean")  # what no other data set can tell
        # To the five digits or so to which the general optimiser finds a curve.
        assert found.of(axis).left_out[left_out] == pytest.approx(np.sqrt((missed**2).mean()), rel=1e-5)


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
