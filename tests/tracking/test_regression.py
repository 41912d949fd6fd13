"""The registered regression: what it predicts, and that it serves over HTTP."""

import importlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from plw_mlflow.analysis import analyze, exports, score_table
from plw_mlflow.tracking import regression, regression_model
from plw_mlflow.transforms import EXPONENT, TERMS, Transform

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fit_json():
    table = score_table.read_scores(ROOT / "paper" / "tables" / "v1_scores.csv")
    return json.loads(json.dumps(exports.to_json(analyze.analyze(table, draws=0), table), allow_nan=False))


@pytest.fixture(scope="module")
def model(fit_json):
    found = regression_model.Regression()
    found.use(fit_json)
    return found


def ask(model, *rows):
    return model.predict(None, pd.DataFrame(rows, columns=["dataset", "plw", "task"]))


def test_the_mean_curve_is_the_leads(model, fit_json):
    (fit,) = (fit for fit in fit_json["fits"] if (fit["dataset"], fit["model"]) == ("AlpacaDataShort", "crossed"))
    found = ask(model, ("AlpacaDataShort", 0.242, None), ("AlpacaData", 0.0, math.nan))
    w = 0.242**EXPONENT
    b0, b1, b2 = (fit["coefficients"][term] for term in TERMS)
    assert found["score"][0] == pytest.approx(b0 + b1 * w + b2 * w**2)
    assert found["optimum_plw"][0] == fit["optimum_plw"]
    assert (found["score"] - found["low"]).to_numpy() == pytest.approx((found["high"] - found["score"]).to_numpy())
    around = np.array([0, w - fit["centre"][1], w**2 - fit["centre"][2]])
    freedom = min(fit["degrees_of_freedom"][term] for term in ("w_p", "w_p^2"))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(around @ np.array(fit["covariance"])[:3, :3] @ around)
    assert found["high"][0] - found["score"][0] == pytest.approx(reach)


def test_a_tasks_curve_is_its_own(model, fit_json):
    (answer,) = (answer for answer in fit_json["answers"] if answer["dataset"] == "AlpacaDataShort")
    (task,) = (curve for curve in answer["by_task"] if curve["task"] == "piqa")
    found = ask(model, ("AlpacaDataShort", 1.0, "piqa"))
    assert found["score"][0] == pytest.approx(sum(task["coefficients"].values()))
    error = math.sqrt(np.sum(task["covariance"]))
    assert found["high"][0] - found["score"][0] == pytest.approx(stats.t.ppf(0.975, task["degrees_of_freedom"]) * error)
    assert math.isnan(ask(model, ("AlpacaDataCleaned", 0.1, None))["optimum_plw"][0])


def test_too_few_runs_give_no_interval_and_no_optimum():
    table = score_table.read_scores(ROOT / "paper" / "tables" / "v1_scores.csv")
    kept = table[(table["model"] == "LLaMA1-7B") & table["plw"].isin([0, 0.01, 0.1, 1])]
    found = regression_model.Regression()
    found.use(exports.to_json(analyze.analyze(kept, draws=0), kept))
    predicted = ask(found, ("AlpacaDataShort", 0.1, None), ("AlpacaDataShort", 0.1, "piqa"))
    assert predicted["score"].notna().all()
    assert predicted[["low", "high", "optimum_plw"]].isna().all(axis=None)


def test_a_curve_that_does_not_fit_has_no_interval_and_no_optimum():
    table = score_table.read_scores(ROOT / "paper" / "tables" / "v1_scores.csv")
    table["score"] -= 0.15 * (table["plw"] == 0.1)
    described = exports.to_json(analyze.analyze(table, draws=0), table)
    assert all(answer["misfit"] for answer in described["answers"])
    found = regression_model.Regression()
    found.use(described)
    predicted = ask(found, ("AlpacaDataShort", 0.1, None), ("AlpacaDataShort", 0.1, "piqa"))
    assert predicted["score"].notna().all()
    assert predicted[["low", "high", "optimum_plw"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("AlpacaDataShort", -0.1, None), "plw must be 0 or more"),
        (("Dolly", 0.1, None), "no fit of data set 'Dolly'; there are AlpacaData, AlpacaDataCleaned, AlpacaDataShort"),
        (("AlpacaData", 0.1, "mmlu"), "no curve of task 'mmlu' on AlpacaData; there are arc_challenge, piqa"),
    ],
)
def test_what_it_does_not_know_is_an_error(model, row, message):
    with pytest.raises(ValueError, match=message):
        ask(model, row)


def test_its_code_has_a_name_of_its_own(tmp_path, monkeypatch):
    """Otherwise the copy would hide this package in the process that loads the model, or the other way round."""
    model, code = regression._copy_code(tmp_path)
    lines = [line for file in (model, *code.iterdir()) for line in file.read_text().splitlines()]
    imports = {line for line in lines if line.startswith(("from plw_mlflow", "import plw_mlflow"))}
    assert imports
    assert all(line.startswith(f"from {code.name}.") for line in imports)
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module(f"{code.name}.transforms")
    assert copy.Transform is not Transform
    assert copy.Transform("w_p", (0.0, 1.0))(0.1) == Transform("w_p", (0.0, 1.0))(0.1)


def test_it_serves_over_http(fit_json, model, tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps(fit_json))
    register = (
        "import mlflow, pathlib, sys; from plw_mlflow.tracking import log_regression\n"
        "with mlflow.start_run(): log_regression(pathlib.Path('fit.json'))"
    )
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:/bin",
    }
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", register]
    subprocess.run(command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)}, check=True, timeout=240)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = ["models", "serve", "-m", "models:/plw-regression/1", "--env-manager", "local", "--port", str(port)]
    # Without this project on its path: the model carries its code.
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *served, "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    rows = [{"dataset": "AlpacaDataShort", "plw": 0.242}, {"dataset": "AlpacaDataShort", "plw": 1.0}]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"dataframe_records": rows}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        answer = None
        for _ in range(480):
            assert server.poll() is None, server.stderr.read().decode()
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.loads(response.read())["predictions"]
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 15)
        server.communicate(timeout=60)
    expected = ask(model, *[(row["dataset"], row["plw"], None) for row in rows])
    assert pd.DataFrame(answer).to_numpy() == pytest.approx(expected.to_numpy())
