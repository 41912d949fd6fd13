"""Are the simulation's numbers those of the models it speaks of, and does the report's lead keep its promises in it?"""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import analysis
from benchmarks.analysis import Setting
from plw_mlflow.analysis.statistics import fitting, parametric


@pytest.mark.parametrize(
    "setting", [Setting(8, "free", 0.005), Setting(13, "none", 0.001, True), Setting(40, "tied"), Setting(4, tried=4)]
)
@pytest.mark.parametrize("method", ["crossed", "task-t", "ols-task", "lmm"])
def test_closed_forms_equal_the_models(setting, method):
    assert max(analysis.differences(setting, method, number) for number in range(4)) < 1e-8


@pytest.mark.parametrize("method", ["lmm-slopes", "beta"])
def test_fits_one_by_one_are_the_models(method):
    assert analysis.differences(Setting(8, "free", 0.005), method, 0) < 1e-8


def test_tables_are_what_the_setting_says():
    setting = Setting(8, "free", 0.005, unequal=True)
    scores = analysis.tables(setting, 0, 1500)
    np.testing.assert_array_equal(analysis.tables(setting, 7, 8)[0], scores[7])
    assert scores.shape == (1500, 20, 8)
    assert scores.mean() == pytest.approx(0.5, abs=0.01)
    assert scores[:, 0].std() == pytest.approx(0.29, abs=0.01)  # at PLW 0 there are levels alone
    rise = scores[:, 9] - scores[:, 0]  # slope + bend, and twice the noise
    sds = analysis.SD_RESIDUAL * np.exp(np.log(5) / 2 * np.linspace(-1, 1, 8))
    np.testing.assert_allclose(rise.std(0), np.sqrt(2 * (0.06**2 + sds**2 + 0.005**2)), rtol=0.08)
    between_runs = scores[:, 0] - scores[:, 10]  # one PLW, two models
    assert np.cov(between_runs[:, 0], between_runs[:, 1])[0, 1] == pytest.approx(2 * 0.005**2, rel=0.25)


@pytest.mark.parametrize("sd_run", [0, 0.005])
@pytest.mark.parametrize("slopes", ["none", "free"])
def test_the_lead_keeps_its_level_and_its_coverage(slopes, sd_run):
    setting = Setting(8, slopes, sd_run)
    rows = list(analysis.summary(setting, "crossed", analysis.outcomes("crossed", setting, 0, 6000)))
    assert [row.of for row in rows] == ["T^2", *(f"{i}, curve x{e}" for e in (1, 4) for i in ("Fieller", "delta"))]
    # Three standard errors of 6000 tables are 0.008.
    assert rows[0].rate == pytest.approx(0.05, abs=0.01)
    assert [row.holds for row in rows if row.of.startswith("Fieller")] == pytest.approx([0.95, 0.95], abs=0.02)


def test_taking_tasks_as_moved_alike_misleads_where_they_are_not():
    setting = Setting(8, "free")
    for method in ("lmm", "ols-task"):
        p = analysis.ESTIMATES[method](setting, analysis.tables(setting, 0, 500)).p
        assert all((each < 0.05).mean() > 0.4 for each in p.values())


def test_fieller_sets_are_wide_where_the_curve_is_flat():
    setting = Setting(8, "none")
    estimates = analysis.ESTIMATES["crossed"](setting, analysis.tables(setting, 0, 300))
    flat, steep = (analysis.fieller(estimates.moved(times * analysis.CURVE)) for times in (0, 10))
    assert flat["open"].mean() > 0.85
    assert not steep["open"].any()
    assert np.median(flat["width"]) > 10 * np.median(steep["width"])


def test_a_parametric_bootstrap_that_stops_early_says_the_same(monkeypatch):
    monkeypatch.setattr(analysis, "DRAWS", 39)
    setting = Setting(8, "free", 0.005)
    grids = [replace(analysis.empty(setting), scores=table) for table in analysis.tables(setting, 0, 12)]
    expected = [parametric.joint_test(grid, "lmm", 39, seed).p <= 0.05 for seed, grid in enumerate(grids)]
    assert [analysis._rejects("lmm", grid, seed) for seed, grid in enumerate(grids)] == expected
    assert set(expected) == {True, False}


def test_the_command_writes_what_it_prints(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--json", str(file), "--tables", "20", "--tasks", "8", "--processes", "1"]
    result = CliRunner().invoke(analysis.main, [*options, "--methods", "task-t,bootstrap-tasks"])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert len(rows) == 21 * 5 + 6 * 2
    assert {"case", "metric", "ours", "peer", "peer_value", "ratio"} <= set(rows[0])
    assert rows[0]["case"] == "8 tasks, slopes none, run SD 0: task-t"
    assert len(result.output.splitlines()) == 2 + len(rows)
    assert CliRunner().invoke(analysis.main, [*options, "--methods", "lm"]).exit_code == 2


def test_too_few_runs_are_those_whose_level_is_not_near_what_it_claims():
    """At the number of tasks and the luck at which each is worst; three standard errors of 3000 tables are 0.016."""
    for method in ("crossed", "lmm"):
        assert {setting.models for setting in analysis.few_runs(method)} == {1}
    worst = {4: Setting(100, sd_run=0.002, tried=4, models=1), 7: Setting(40, sd_run=0.002, tried=7, models=1)}
    level = {
        runs: float((analysis.over(setting, analysis.tables(setting, 0, 3000), True).p["T^2"] < 0.05).mean())
        for runs, setting in worst.items()
    }
    assert level[4] > 0.18
    assert level[7] < 0.10
    assert fitting.fewest_runs(3, tasks=40) == 7
