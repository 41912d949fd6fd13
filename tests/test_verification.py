"""Is a recorded cell repeated to the bit, and is each thing that differs named? Is nothing recorded changed?"""

import atexit
import functools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from plw_mlflow import cell, tracking, verification
from plw_mlflow.config import MainConfig, VerifyConfig
from plw_mlflow.environment import provenance
from plw_mlflow.errors import RunError, UserError
from plw_mlflow.verification import Finding
from tests.stores import ROOT, Place

ALL = ("code", "packages", "machine", "model", "data", "examples", "base", "tokenizer", "options", "loss", "weights")
ALL = (*ALL, "benchmarks", "scores", "logged")


@functools.cache
def recorded(method):
    """A folder with a store that holds a tiny cell, and with the file that it was trained on; and the run's id."""
    folder = Path(tempfile.mkdtemp(prefix="recorded-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mlflow.set_tracking_uri(Place(folder).uri)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision, and here are cells of two
    rows = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    new = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(50, 53)]
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, new)))
    config = MainConfig(
        dataset=str(folder / "sums.jsonl"),
        method=method,
        # As on a machine where that is fast; the other method has the arithmetic of the toy model.
        precision="bfloat16" if method == "lora" else "float32",
        tasks="toy_choice",
        held_out=str(folder / "new.jsonl"),
        limit=3,
        epochs=1.0,
        batch_examples=32,
        micro_batch_examples=8,
        checkpoint_dir=folder / "checkpoints",
        cache_dir=folder / "cache",
    )
    with tracking.open_run(config, "cell") as run:
        cell.lead(config, run)
    return folder, run.id


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Makes a copy of a cell's store and data in another folder; as on another machine, the first folder is away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    renamed = []

    def move(method="full"):
        folder, run_id = recorded(method)
        AcceleratorState._reset_state(reset_partial_state=True)
        shutil.copytree(folder, tmp_path / "copy")
        renamed.append((folder.rename(folder.with_name(f"{folder.name}-away")), folder))
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/copy/mlflow.db")
        return tmp_path / "copy", run_id

    yield move
    for away, folder in renamed:
        away.rename(folder)


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
def test_a_cell_is_repeated_to_the_bit_from_a_copy_of_its_store(moved, method, capsys):
    folder, run_id = moved(method)
    before = contents(folder)
    findings, error = verify(folder, run_id)
    assert (differing(findings), error, tuple(findings)) == (set(), "", ALL)
    assert all(finding.is_same for finding in findings.values())
    assert contents(folder) == before
    out = capsys.readouterr().out
    assert "the store was moved: what it says to be in" in out
    assert "all is as recorded, to the bit" in out
    assert len(mlflow.MlflowClient().search_runs(["0"])) == 1
    assert "all is as recorded" in mlflow.MlflowClient().get_run(run_id).data.tags["plw.verified"]


@pytest.mark.slow
def test_a_fresh_copy_of_the_repository_repeats_a_cell_until_a_line_is_changed(moved, tmp_path):
    folder, run_id = moved()
    project = tmp_path / "project"
    copy_project(project)
    command = [sys.executable, "-m", "entrypoints.verify", "--run-id", run_id, "--data-dir", str(folder)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(project)}
    run = functools.partial(subprocess.run, command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is as recorded, to the bit" in done.stdout
    seeding = project / "plw_mlflow/seeding.py"
    seeding.write_text(seeding.read_text().replace("hashlib.sha256(", "hashlib.sha512("))
    done = run()
    assert done.returncode == 1
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("DIFFERS")}
    assert {"code", "loss", "weights"} <= lines.keys()
    assert "plw_mlflow/seeding.py has changed (commit" in lines["code"]
    assert re.search(r"error: \d of 14 comparisons differ: code, ", done.stderr)


def copy_project(folder):
    """Copy all that decides what runs."""
    for name in provenance.CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.mark.slow
def test_a_changed_data_file_is_named_with_what_it_does(moved):
    folder, run_id = moved()
    file = folder / "sums.jsonl"
    file.write_text(file.read_text().replace("Add 7 and 1.", "Add 7 and 2."))
    findings, error = verify(folder, run_id)
    assert {"data", "examples", "loss", "weights"} <= differing(findings) <= {"data", "examples", *verification.EFFECTS}
    assert "sums.jsonl has the SHA-256" in findings["data"].text
    assert "train/loss from step 1 on, by at most" in findings["loss"].text
    assert "data, examples, loss, weights" in error


@pytest.mark.slow
def test_a_changed_seed_is_named_with_what_it_does(moved):
    folder, run_id = moved()
    (file,) = folder.glob(f"mlruns/0/{run_id}/artifacts/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 4321}))
    findings, _ = verify(folder, run_id)
    assert {"options", "loss", "weights"} <= differing(findings) <= {"options", *verification.EFFECTS}
    assert "seed is 4321 in config.json, and 1234 as a parameter" in findings["options"].text
    assert "and it was trained as" in findings["options"].text


def test_a_parameter_that_was_changed_is_told_from_a_changed_file(moved):
    folder, run_id = moved()
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("UPDATE params SET value = '4321' WHERE key = 'seed' AND run_uuid = ?", (run_id,))
    findings, error = verify(folder, run_id, data=True)
    assert differing(findings) == {"options"}
    assert findings["options"].text.endswith("the cell's key agrees with config.json")
    assert error == "1 of 9 comparisons differ: options"


def test_another_package_version_is_named(moved, monkeypatch):
    folder, run_id = moved()
    package = folder / "elsewhere" / "pandas-99.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 99.9\n")
    monkeypatch.syspath_prepend(package.parent)
    findings, _ = verify(folder, run_id, data=True)
    assert differing(findings) == {"packages"}
    assert findings["packages"].text.startswith("pandas 99.9, recorded ")


def test_another_machine_is_named_and_is_no_fault(moved, monkeypatch):
    folder, run_id = moved()
    here = provenance.fingerprint() | {"processor": "another one"}
    monkeypatch.setattr(provenance, "fingerprint", lambda: here)
    findings, error = verify(folder, run_id, data=True)
    assert (differing(findings), error) == ({"machine"}, "")
    assert "processor another one, recorded " in findings["machine"].text


def test_another_tokenizer_is_named_and_what_is_not_repeated_is_said(moved):
    folder, run_id = moved()
    client = mlflow.MlflowClient()
    client.set_tag(run_id, "plw.tokenizer_sha256", "f" * 64)
    client.log_metric(run_id, "measure/kl", 0.5)
    with tracking.recorded(run_id) as record:
        record.environment["processes"] = "2"
        said = [finding.text for finding in verification._not_repeated(record)]
    assert said == ["measure/kl: measures are not repeated", "the cell was trained by 2, and is repeated by one"]
    findings, error = verify(folder, run_id, data=True)
    assert (differing(findings), error) == ({"tokenizer"}, "1 of 9 comparisons differ: tokenizer")


def test_a_changed_line_of_code_is_named(moved, monkeypatch):
    folder, run_id = moved()
    copy_project(folder)
    monkeypatch.setattr(provenance, "ROOT", folder)
    assert differing(verify(folder, run_id, data=True)[0]) == set()
    with (folder / "plw_mlflow/training/loss.py").open("a") as file:
        file.write("# changed\n")
    (folder / "plw_mlflow/new.py").write_text("")
    findings, _ = verify(folder, run_id, data=True)
    assert differing(findings) == {"code"}
    assert findings["code"].text.startswith("plw_mlflow/training/loss.py has changed; plw_mlflow/new.py is new (commit")


@pytest.mark.parametrize(
    ("method", "file", "name"),
    [
        ("full", "model/model", "embed_tokens"),
        pytest.param("lora", "peft/adapter_model", "lora_B", marks=pytest.mark.slow),
    ],
)
def test_a_tampered_model_is_named_without_training(moved, method, file, name):
    folder, run_id = moved(method)
    tamper(folder, run_id, file, name)
    findings, error = verify(folder, run_id, data=True)
    assert differing(findings) == {"model"}
    assert error == "1 of 9 comparisons differ: model"


@pytest.mark.slow
def test_a_tampered_model_is_named_with_its_weights(moved):
    folder, run_id = moved()
    tamper(folder, run_id, "model/model", "embed_tokens", by=1.0)
    findings, _ = verify(folder, run_id)
    assert differing(findings) == {"model", "weights"}
    assert "1 of 38 tensors, by at most 1 (model.embed_tokens.weight)" in findings["weights"].text
    findings, _ = verify(folder, run_id, scores=True)
    assert tuple(findings) == ("code", "packages", "machine", "model", "benchmarks", "scores", "logged")
    assert "model" in differing(findings)


def test_tampered_scores_are_named_where_people_and_analyses_read_them(moved):
    folder, run_id = moved()
    findings, error = verify(folder, run_id, scores=True)
    assert (differing(findings), error) == (set(), "")
    assert findings["logged"].text.endswith(" of questions")
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics"):
            where = "run_uuid = ? AND key IN ('score', 'toy_choice/acc')"
            database.execute(f"UPDATE {table} SET value = value + 0.01 WHERE {where}", (run_id,))
    files = folder / f"mlruns/0/{run_id}/artifacts"
    scores = pd.read_csv(files / "scores.csv")
    scores.assign(score=scores["score"] + 0.01).to_csv(files / "scores.csv", index=False)
    (kept,) = (files / "questions").glob("*.parquet")
    questions = pd.read_parquet(kept)
    questions.assign(value=1 - questions["value"]).to_parquet(kept)
    findings, error = verify(folder, run_id, scores=True)
    assert error == "1 of 7 comparisons differ: logged"
    for name in ("the metric score ", "the metric toy_choice/acc ", "score in scores.csv of toy_choice/acc "):
        assert name in findings["logged"].text
    assert "questions' scores, such as" in findings["logged"].text
    kept.write_bytes(b"none")
    assert "cannot be compared" in verify(folder, run_id, scores=True)[0]["logged"].text


def test_what_is_missing_for_the_scores_is_said_before_the_training(moved, monkeypatch):
    folder, run_id = moved()
    monkeypatch.setattr(cell, "lead", None)  # whoever trains fails otherwise
    (folder / "new.jsonl").unlink()
    with pytest.raises(UserError, match=r"data set .*new.jsonl is not here"):
        verify(folder, run_id)
    found = json.loads((folder / "found" / "verification.json").read_text())["findings"]
    assert [finding["what"] for finding in found][-2:] == ["options", "the rest"]
    assert "plw.verified" in mlflow.MlflowClient().get_run(run_id).data.tags


def test_a_comparison_that_cannot_be_made_leaves_the_others(tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"none")
    (finding,) = verification._guarded("weights", lambda: [Finding("weights", not verification._places(tmp_path), "")])
    assert (finding.what, finding.is_same) == ("weights", False)
    assert "cannot be compared: " in finding.text


def test_code_that_decides_nothing_of_a_cell_is_named_and_is_no_fault(moved, monkeypatch):
    folder, run_id = moved()
    copy_project(folder)
    monkeypatch.setattr(provenance, "ROOT", folder)
    with (folder / "plw_mlflow/analysis/report.py").open("a") as file:
        file.write("# changed\n")
    findings, error = verify(folder, run_id, data=True)
    assert (differing(findings), error) == ({"code"}, "")
    assert "none of them decides what a cell's model and scores are" in findings["code"].text


def tamper(folder, run_id, file, name, by=0.5):
    """Change a number of the model that a run has logged."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "SELECT destination_id FROM inputs WHERE source_id = ? AND destination_type = 'MODEL_OUTPUT'"
        ((model_id,),) = database.execute(query, (run_id,))
    (place,) = folder.glob(f"mlruns/0/models/{model_id}/artifacts/{file}.safetensors")
    weights = load_file(place)
    weights[next(key for key in weights if name in key)].view(-1)[0] += by
    save_file(weights, place, metadata={"format": "pt"})


def test_what_cannot_be_repeated_is_said_in_one_line(moved):
    folder, run_id = moved()
    (folder / "sums.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"data set .*sums.jsonl is not here.*; name the folder that holds it: --data-dir"
    ):
        verify(folder, run_id, data=True)
    mlflow.MlflowClient().set_terminated(run_id, "FAILED")
    with pytest.raises(UserError, match=f"run {run_id} is FAILED, so it does not hold a whole cell"):
        verify(folder, run_id)
    with pytest.raises(UserError, match="there is no run 'abc'"):
        verify(folder, "abc")
    other = mlflow.MlflowClient().create_run("0").info.run_id
    with pytest.raises(UserError, match=r"holds no config\.json"):
        verify(folder, other)
    mlflow.MlflowClient().delete_tag(run_id, "plw.cell")
    with pytest.raises(UserError, match=f"run {run_id} is not the run of a cell: it has no tag plw.cell"):
        verify(folder, run_id)
    mlflow.MlflowClient().set_tag(run_id, "plw.grid", "grid")
    with pytest.raises(UserError, match=f"run {run_id} is that of a sweep, and a cell's is needed: give one of those"):
        verify(folder, run_id)


def test_the_summary_says_what_differs_and_what_that_does():
    def summary(**found):
        return verification.summarise([Finding(what, is_same, "") for what, is_same in found.items()])

    assert summary(code=True, loss=True) == "all is as recorded, to the bit: code, loss"
    assert summary(data=None, code=True) == "all is as recorded, to the bit: code"
    assert summary(code=False) == "what differs is code"
    assert summary(code=False, loss=True, scores=True) == "what differs is code; it does not change loss, scores"
    said = "what differs is data; this may be why loss differs; it does not change scores"
    assert summary(data=False, loss=False, scores=True) == said
    said = "what differs is machine; it does not change loss"
    assert summary(machine=False, loss=True) == said
    assert "this may be why loss differs (another machine may add" in summary(machine=False, loss=False)
    said = "what differs is loss, and nothing that is compared explains why"
    assert summary(code=True, loss=False) == said
