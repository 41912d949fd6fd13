"""benchmarks.adaptive: what an adaptive sweep uses of a grid, and grids that are drawn."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import adaptive
from plw_mlflow.transforms import make_transform

PLWS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
BEST = 0.4  # on w_p


@pytest.fixture(scope="module")
def table():
    random, transform = np.random.default_rng(0), make_transform("w_p", PLWS)
    rows = [
        ("m", "d", plw, seed, task, "acc", 0.5 - 0.3 * (float(transform(plw)) - BEST) ** 2 + random.normal(0, 0.01))
        for plw in PLWS
        for seed in (1, 2)
        for task in ("a", "b", "c")
    ]
    return pd.DataFrame(rows, columns=["model", "dataset", "plw", "seed", "task", "metric", "score"])


def test_an_adaptive_sweep_uses_a_part_of_the_grid_until_the_interval_is_as_narrow_as_wanted(table):
    used = adaptive.run_adaptive(table, [1, 2], wanted=0.2)
    cells = set(zip(used["plw"], used["seed"], strict=True))
    assert 4 < len(cells) < 2 * len(PLWS)
    assert adaptive.ended(used, None).width <= 0.2
    assert {(plw, 1) for plw in (0.0, 1.0)} <= cells


def test_a_drawn_grid_has_the_curve_and_the_noise_of_the_real_one(table):
    drawn = [adaptive.draw(table, np.random.default_rng(seed)) for seed in range(20)]
    transform = make_transform("w_p", PLWS)
    assert float(transform(drawn[0][1])) == pytest.approx(BEST, abs=0.05)
    scores = np.stack([like.sort_values(["task", "plw", "seed"])["score"].to_numpy() for like, _ in drawn])
    assert scores.std(axis=0).mean() == pytest.approx(0.01, rel=0.3)


def test_its_table_compares_both(table, tmp_path):
    table.to_csv(tmp_path / "scores.csv", index=False)
    options = ["--scores", str(tmp_path / "scores.csv"), "--json", str(tmp_path / "rows.json"), "--simulations", "2"]
    result = CliRunner().invoke(adaptive.main, options)
    assert result.exit_code == 0, result.output
    rows = {row["grid"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["full"]["cells"] == 2 * len(PLWS)
    assert rows["adaptive"]["cells"] < rows["full"]["cells"]
    assert rows["full"]["covers"] is None
    assert rows["full, drawn"]["covers"] in (0, 0.5, 1)
