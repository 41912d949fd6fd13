"""Is a recorded cell repeated to the bit, and is each thing that differs named? Is nothing recorded changed?"""

import json
import shutil
import sqlite3

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file

from plw_mlflow import cell, tracking, verification
from plw_mlflow.config import MainConfig, VerifyConfig
from plw_mlflow.environment import provenance
from plw_mlflow.errors import RunError, UserError
from plw_mlflow.verification import Finding
from tests.stores import ROOT, Place

ALL = ("code", "packages", "machine", "model", "data", "examples", "base", "options", "loss", "weights")
ALL = (*ALL, "benchmarks", "scores")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with a store that holds a cell, and with the file that the cell was trained on."""
    folder = tmp_path_factory.mktemp("recorded")
    Place(folder)
    rows = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_cell(folder, **options):
    """Run a tiny cell in a folder's store; gives the id of its run."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    config = MainConfig(
        **{
            "dataset": str(folder / "sums.jsonl"),
            "tasks": "toy_choice",
            "limit": 3,
            "epochs": 1.0,
            "batch_examples": 32,
        }
        | {"micro_batch_examples": 8, "checkpoint_dir": folder / "checkpoints", "cache_dir": folder / "cache"}
        | options
    )
    with tracking.open_run(config, "cell") as run:
        cell.lead(config, run)
    return run.id


@pytest.fixture(scope="module")
def run_ids(recorded):
    return {method: make_cell(recorded, method=method) for method in ("full", "lora")}


@pytest.fixture
def moved(recorded, run_ids, tmp_path, monkeypatch):
    """A copy of the store and the data in another folder, as on another machine: the first folder is away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    here = tmp_path / "copy"
    shutil.copytree(recorded, here)
    away = recorded.with_name("away")
    recorded.rename(away)
    mlflow.set_tracking_uri(f"sqlite:///{here}/mlflow.db")
    yield here
    away.rename(recorded)


def verify(folder, run_id, **options):
    """What verification finds, by what is compared, and how it ends."""
    output = folder / "found"
    config = VerifyConfig(run_id=run_id, data_dir=folder, output=output, cache_dir=folder / "cache", **options)
    try:
        verification.run(config)
        error = ""
    except RunError as raised:
        error = str(raised)
    found = json.loads((output / "verification.json").read_text())
    return {finding["what"]: Finding(**finding) for finding in found["findings"]}, error


def differing(findings):
    return {what for what, finding in findings.items() if finding.is_same is False}


def contents(folder):
    """Everything that a store holds, but for the tag that verification adds."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: list(database.execute(f"SELECT * FROM {table}")) for table in tables}
    rows["tags"] = [row for row in rows["tags"] if "plw.verified" not in row]
    return rows, {path: path.read_bytes() for path in folder.glob("mlruns/**/*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_cell_is_repeated_to_the_bit_from_a_copy_of_its_store(moved, run_ids, method, capsys):
    before = contents(moved)
    findings, error = verify(moved, run_ids[method])
    assert (differing(findings), error, tuple(findings)) == (set(), "", ALL)
    assert all(finding.is_same for finding in findings.values())
    assert contents(moved) == before
    out = capsys.readouterr().out
    assert "the store was moved: what it says to be in" in out
    assert "all is as recorded, to the bit" in out
    assert len(mlflow.MlflowClient().search_runs(["0"])) == 2
    assert "all is as recorded" in mlflow.MlflowClient().get_run(run_ids[method]).data.tags["plw.verified"]


@pytest.mark.slow
def test_a_changed_data_file_is_named_with_what_it_does(moved, run_ids):
    file = moved / "sums.jsonl"
    file.write_text(file.read_text().replace("Add 7 and 1.", "Add 7 and 2."))
    findings, error = verify(moved, run_ids["full"])
    assert {"data", "examples", "loss", "weights"} <= differing(findings) <= {"data", "examples", *verification.EFFECTS}
    assert "sums.jsonl has the SHA-256" in findings["data"].text
    assert "train/loss from step 1 on, by at most" in findings["loss"].text
    assert "data, examples, loss, weights" in error


@pytest.mark.slow
def test_a_changed_seed_is_named_with_what_it_does(moved, run_ids):
    (file,) = moved.glob(f"mlruns/0/{run_ids['full']}/artifacts/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 4321}))
    findings, _ = verify(moved, run_ids["full"])
    assert {"options", "loss", "weights"} <= differing(findings) <= {"options", *verification.EFFECTS}
    assert "seed is 4321 in config.json, and 1234 as a parameter" in findings["options"].text
    assert "and it was trained as" in findings["options"].text


def test_a_parameter_that_was_changed_is_told_from_a_changed_file(moved, run_ids):
    with sqlite3.connect(moved / "mlflow.db") as database:
        database.execute("UPDATE params SET value = '4321' WHERE key = 'seed' AND run_uuid = ?", (run_ids["full"],))
    findings, error = verify(moved, run_ids["full"], data=True)
    assert differing(findings) == {"options"}
    assert findings["options"].text.endswith("the cell's key agrees with config.json")
    assert error == "1 of 8 comparisons differ: options"


def test_another_package_version_is_named(moved, run_ids, monkeypatch):
    folder = moved / "elsewhere" / "pandas-99.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 99.9\n")
    monkeypatch.syspath_prepend(folder.parent)
    findings, _ = verify(moved, run_ids["full"], data=True)
    assert differing(findings) == {"packages"}
    assert findings["packages"].text.startswith("pandas 99.9, recorded ")


def test_a_changed_line_of_code_is_named(moved, run_ids, monkeypatch):
    shutil.copytree(ROOT / "plw_mlflow", moved / "plw_mlflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*(part for part in provenance.CODE if part != "plw_mlflow"),):
        (moved / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, moved / name)
    monkeypatch.setattr(provenance, "ROOT", moved)
    assert differing(verify(moved, run_ids["full"], data=True)[0]) == set()
    with (moved / "plw_mlflow/training/loss.py").open("a") as file:
        file.write("# changed\n")
    (moved / "plw_mlflow/new.py").write_text("")
    findings, _ = verify(moved, run_ids["full"], data=True)
    assert differing(findings) == {"code"}
    assert findings["code"].text.startswith("plw_mlflow/new.py is new; plw_mlflow/training/loss.py has changed (commit")


@pytest.mark.parametrize(
    ("method", "file", "name"), [("full", "model/model", "embed_tokens"), ("lora", "peft/adapter_model", "lora_B")]
)
def test_a_tampered_model_is_named_without_training(moved, run_ids, method, file, name):
    tamper(moved, run_ids[method], file, name)
    findings, error = verify(moved, run_ids[method], data=True)
    assert differing(findings) == {"model"}
    assert error == "1 of 8 comparisons differ: model"


@pytest.mark.slow
def test_a_tampered_model_is_named_with_its_weights(moved, run_ids):
    tamper(moved, run_ids["full"], "model/model", "embed_tokens", by=1.0)
    findings, _ = verify(moved, run_ids["full"])
    assert differing(findings) == {"model", "weights"}
    assert "1 of 38 tensors, by at most 1 (model.embed_tokens.weight)" in findings["weights"].text
    findings, _ = verify(moved, run_ids["full"], scores=True)
    assert tuple(findings) == ("code", "packages", "machine", "model", "benchmarks", "scores")
    assert "model" in differing(findings)


def tamper(folder, run_id, file, name, by=0.5):
    """Change a number of the model that a run has logged."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "SELECT destination_id FROM inputs WHERE source_id = ? AND destination_type = 'MODEL_OUTPUT'"
        ((model_id,),) = database.execute(query, (run_id,))
    (place,) = folder.glob(f"mlruns/0/models/{model_id}/artifacts/{file}.safetensors")
    weights = load_file(place)
    weights[next(key for key in weights if name in key)].view(-1)[0] += by
    save_file(weights, place, metadata={"format": "pt"})


def test_what_cannot_be_repeated_is_said_in_one_line(moved, run_ids):
    (moved / "sums.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"data set .*sums.jsonl is not here.*; name the folder that holds it: --data-dir"
    ):
        verify(moved, run_ids["full"], data=True)
    with pytest.raises(UserError, match="there is no run 'abc'"):
        verify(moved, "abc")
    other = mlflow.MlflowClient().create_run("0").info.run_id
    with pytest.raises(UserError, match=r"holds no config\.json"):
        verify(moved, other)


def test_the_summary_says_what_differs_and_what_that_does():
    def summary(**found):
        return verification.summarise([Finding(what, is_same, "") for what, is_same in found.items()])

    assert summary(code=True, loss=True) == "all is as recorded, to the bit: code, loss"
    assert summary(code=False, loss=True, scores=True) == "code differ; loss, scores stay the same to the bit"
    assert (
        summary(data=False, loss=False, scores=True)
        == "data differ; with it, loss differ; scores stay the same to the bit"
    )
    assert summary(code=True, loss=False) == "nothing that is compared explains why loss differ"
    assert summary(data=None, code=True) == "all is as recorded, to the bit: code"
