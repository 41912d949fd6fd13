"""Does MLflow hold what a run said, once, in the caller's own words?  (tests/test_pipeline.py sees the rest.)"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
import torch
import yaml
from mlflow.entities import ViewType
from mlflow.utils import validation
from safetensors.torch import load_file, save_file

from plw_mlflow import sweep, tracking
from plw_mlflow.config import DataOptions, EvaluateConfig, MainConfig, PrepareConfig, TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.sources import Source
from plw_mlflow.errors import Refused
from plw_mlflow.evaluation.scores import Evaluation, Score, table
from plw_mlflow.tracking import StoredCheckpoints, connection, outbox, resumption
from plw_mlflow.tracking import run as run_module
from plw_mlflow.tracking.cells import cell_columns
from plw_mlflow.training import checkpoints
from plw_mlflow.training.checkpoints import Checkpoint
from tests.conftest import byte_tokenizer, tiny_llama
from tests.stores import ROOT, Place


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


def history(store, run_id, name):
    return [(point.step, point.value) for point in store.get_metric_history(run_id, name)]


def test_parameters_already_logged_keep_their_spelling(store, monkeypatch):
    begun = store.create_run("0")  # as `mlflow run` begins one
    store.log_param(begun.info.run_id, "plw", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun.info.run_id)
    with tracking.open_run(TrainConfig(plw=0.01, invert=True), "cell") as run:
        assert run.id == begun.info.run_id
        assert "MLFLOW_RUN_ID" not in os.environ  # no process started from here inherits it
    params = store.get_run(run.id).data.params
    assert (params["plw"], params["invert"], params["max_records"]) == ("1e-2", "true", "")


def test_every_data_set_is_an_input_and_the_profile_a_table_and_a_figure(store, tmp_path):
    rows = [{"instruction": f"Add {number}.", "output": str(number)} for number in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(mix=str(tmp_path / "sums.jsonl"))
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        tracking.log_data(run, prepared.sources, prepared.profile)
    found = store.get_run(run.id)
    inputs = {one.dataset.name: one.dataset.digest for one in found.inputs.dataset_inputs}
    assert inputs == {
        name: source.sha256[:36]
        for name, source in zip(("toy-short + 0.5 sums", "sums"), prepared.sources, strict=True)
    }
    assert found.data.tags["plw.data_sha256"] == ",".join(source.sha256 for source in prepared.sources)
    profile = store.download_artifacts(run.id, "profile.json", str(tmp_path))
    assert json.loads(Path(profile).read_text()) == dataclasses.asdict(prepared.profile)
    assert Path(store.download_artifacts(run.id, "profile.png", str(tmp_path))).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "content"),
    [("mine.jinja", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), ("alpaca", "not this file")],
)
def test_a_template_that_is_a_file_is_kept_with_the_run(store, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(template=name, max_records=5))
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        tracking.log_data(run, prepared.sources, prepared.profile)
    kept = [item.path for item in store.list_artifacts(run.id, "template")]
    assert kept == ([f"template/{name}"] if name.endswith(".jinja") else [])
    for path in kept:
        assert Path(store.download_artifacts(run.id, path, str(tmp_path))).read_text() == content


def test_a_failure_is_told_on_the_run(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    found = store.get_run(run.id)
    assert found.info.status == "FAILED"
    assert found.data.tags["plw.error"] == "ValueError: bad luck"


def test_a_failing_run_keeps_the_metrics_held_back(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        lose(run)
    assert history(store, run.id, "train/loss") == [(1, 0.5)]


def lose(run):
    run.curves.log_step({"train/loss": 0.5}, 1)
    raise ValueError("bad luck")


def test_what_is_added_well_to_a_failed_run_mends_it(store):
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    with tracking.open_run(TrainConfig(), "", run_id=run.id):
        pass
    found = store.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert "plw.error" not in found.data.tags


def test_a_reopened_run_keeps_its_status_when_what_is_added_fails(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        pass
    with pytest.raises(ValueError, match="no such task"), tracking.open_run(TrainConfig(), "", run_id=run.id):
        raise ValueError("no such task")
    assert store.get_run(run.id).info.status == "FINISHED"


def test_metrics_held_back_arrive_once(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        for step in range(2500):  # more than one request takes
            run.curves.log_step({"train/loss": float(step)}, step)
    assert history(store, run.id, "train/loss") == [(step, float(step)) for step in range(2500)]


def test_a_cut_short_run_hands_its_curve_over(store, tmp_path):
    first = tracking.Run(store.create_run("0").info.run_id)  # its process died: nobody ended it
    tracking.begin_cell(first, "c", tmp_path, 0)
    for step in range(1, 6):
        first.curves.log_step({"train/loss": step / 10}, step)
    first.curves.flush()
    with tracking.open_run(TrainConfig(), "cell") as second:
        tracking.begin_cell(second, "c", tmp_path, 3)  # the last checkpoint was of step 3
        second.curves.log_step({"train/loss": 0.4}, 4)
    assert history(store, second.id, "train/loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "plw.cell" not in store.get_run(first.id).data.tags
    assert store.get_run(first.id).info.status == "KILLED"
    assert store.get_run(second.id).data.tags["plw.cell"] == "c"


def test_a_run_cut_short_before_its_first_checkpoint_hands_nothing_over(store, tmp_path):
    for _ in range(2):
        with tracking.open_run(TrainConfig(), "cell") as run:
            tracking.begin_cell(run, "c", tmp_path, 0)
            run.curves.log_step({"eval/prompt_loss": 1.0}, 0)
    assert history(store, run.id, "eval/prompt_loss") == [(0, 1.0)]


def test_a_cut_short_run_that_somebody_deleted_hands_its_curve_over_and_is_left_alone(store, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as first:
        tracking.begin_cell(first, "c", tmp_path, 0)
        first.curves.log_step({"train/loss": 1.0}, 1)
    store.delete_run(first.id)
    with tracking.open_run(TrainConfig(), "cell") as second:
        tracking.begin_cell(second, "c", tmp_path, 1)
    assert (tmp_path / "run_id").read_text() == second.id
    assert history(store, second.id, "train/loss") == [(1, 1.0)]
    assert "plw.superseded_by" not in store.get_run(first.id).data.tags


@pytest.fixture
def impatient(monkeypatch):
    """Nothing is waited for: whoever sleeps until the store is back fails."""
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: pytest.fail("the store is there"))
    monkeypatch.setattr(outbox, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.01, 0.1))


@pytest.mark.filterwarnings("ignore:sending the metrics")
def test_a_run_that_is_deleted_while_it_trains_is_said_at_once(store, tmp_path, impatient, capsys):
    with pytest.raises(Refused) as error:
        train_deleted(store, tmp_path)
    (deleted,) = store.search_runs(["0"], run_view_type=ViewType.DELETED_ONLY)
    run_id = deleted.info.run_id
    for part in (f"metrics of run {run_id}", f"mlflow runs restore --run-id {run_id}", f"checkpoints in {tmp_path}"):
        assert part in str(error.value)
    assert "waiting" not in capsys.readouterr().out
    with tracking.open_run(TrainConfig(), "cell") as second:  # the same command again
        tracking.begin_cell(second, "c", tmp_path, 2)
    assert history(store, second.id, "train/loss") == [(1, 1.0), (2, 0.5)]


def train_deleted(store, folder):
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "c", folder, 0)
        run.curves.log_step({"train/loss": 1.0}, 1)
        run.curves.flush()
        store.delete_run(run.id)
        run.curves.log_step({"train/loss": 0.5}, 2)  # goes on
        run.curves.save_unsent()
        with pytest.warns(UserWarning, match="step-000002 is not in the store"):
            StoredCheckpoints(run, "abc").store(saved(folder, 2))
        run.curves.flush()


def test_what_the_store_refuses_after_the_training_is_said_at_once(store, impatient):
    with pytest.raises(Refused, match=r"logging the measures: the tracking store .* refuses it: .* 'active' state"):
        measure_deleted(store)


def measure_deleted(store):
    with tracking.open_run(TrainConfig(), "cell") as run:
        store.delete_run(run.id)
        tracking.log_measures(run, {"length": 1.0})


def test_a_name_that_mlflow_refuses_is_one_line(store):
    with pytest.raises(Refused, match=r"run \w+: the tracking store .* refuses it: Invalid value .what"):
        log_badly()
    (found,) = store.search_runs(["0"])
    assert found.info.status == "FAILED"
    assert found.data.tags["plw.error"].startswith("Refused: run ")


def log_badly():
    with tracking.open_run(TrainConfig(), "cell"):
        mlflow.log_metric("what?!", 1.0)


@pytest.mark.parametrize("given", ["f" * 32, "no id at all/.."])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_an_unknown_run_is_said(monkeypatch, given, by):
    if by == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with pytest.raises(ValueError, match=f"there is no run '{given}'"):
        open_and_end(given if by == "option" else None)


def open_and_end(run_id=None):
    with tracking.open_run(EvaluateConfig(model="toy"), "name", run_id):
        pass


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_deleted_run_is_said(store, monkeypatch, by):
    run = store.create_run("0").info.run_id
    store.delete_run(run)
    if by == "environment":
        monkeypatch.setenv("MLFLOW_RUN_ID", run)
    with pytest.raises(
        ValueError, match=f"run {run} in .* was deleted; restore it by mlflow runs restore --run-id {run}"
    ):
        open_and_end(run if by == "option" else None)
    with pytest.raises(ValueError, match="was deleted"):
        tracking.score_table(sweep=run)


def test_a_deleted_or_unknown_experiment_is_said(store, monkeypatch):
    gone = store.create_experiment("gone")
    store.delete_experiment(gone)
    with pytest.raises(ValueError, match=f"experiment 'gone' in .* was deleted; .* --experiment-id {gone}"):
        tracking.score_table(experiment="gone")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    with pytest.raises(Refused, match=f"opening a run: .* mlflow experiments restore --experiment-id {gone}"):
        open_and_end()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    with pytest.raises(Refused, match=r"opening a run: .* MLFLOW_EXPERIMENT_ID .* `4711` does not exist"):
        open_and_end()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    store.delete_experiment("0")
    with pytest.raises(Refused, match=r"opening a run: .* --experiment-id 0"):
        open_and_end()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "ftp://me:secret@host/x",
            r"ftp://me:\*\*\*@host/x cannot be used: MLflow knows no such kind of address; .*sqlite",
        ),
        ("sqlite:///{folder}/file/mlflow.db", "cannot be used: .*File exists"),
        ("sqlite:///{folder}", "cannot be used: unable to open database file"),
        ("sqlite:///{folder}/file", "cannot be used: file is not a database"),
        ("sqlite:///file:{folder}/mlflow.db?mode=ro&uri=true", "cannot be used: attempt to write a readonly database"),
        ("postgresql+nosuch://me:secret@host/db", r"postgresql\+nosuch://me:\*\*\*@host/db cannot be used: "),
        ("postgresql://me:se/cret@host:port/db", r"me:\*\*\*@host:port/db cannot be used: it is not a valid address"),
        ("http://me:se/cret@host", r"http://me:\*\*\*@host cannot be used: it is not a valid address"),
        ("file://{folder}/mlruns", "cannot be used: The filesystem tracking backend"),
    ],
)
def test_a_store_that_cannot_be_one_is_said_in_one_line(tmp_path, impatient, uri, message):
    (tmp_path / "file").write_text("no database " * 100)
    mlflow.set_tracking_uri(uri.format(folder=tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        connection.check_reachable()
    assert "\n" not in str(error.value)
    assert "cret" not in str(error.value)


def test_a_locked_store_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.01)
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConnectionError, match=r"cannot be used: database is locked$"):
            connection.check_reachable()


def test_asking_changes_nothing_in_the_store(tmp_path):
    before = (tmp_path / "mlflow.db").read_bytes()
    connection.check_reachable()
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_what_the_database_layer_logs_is_not_shown_beside_the_error(store, capsys):
    connection.check_reachable()
    assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_is_killed_everywhere(store, stop):
    with pytest.raises(stop), tracking.open_run(TrainConfig(), "cell") as run:
        raise stop
    found = store.get_run(run.id)
    status = "KILLED" if stop is KeyboardInterrupt else "FAILED"
    assert (found.info.status, found.data.tags["plw.status"]) == (status, status.lower())
    assert ("plw.error" in found.data.tags) == (status == "FAILED")


def test_a_second_interrupt_does_not_leave_a_run_half_ended(store, monkeypatch):
    """As a sweep sends one to a cell that has heard of the first at the terminal."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda status: (os.kill(os.getpid(), signal.SIGTERM), end(status)))
    try:
        with pytest.raises(KeyboardInterrupt), tracking.open_run(TrainConfig(), "cell") as run:
            raise KeyboardInterrupt
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert store.get_run(run.id).info.status == "KILLED"


def test_a_run_that_fails_as_its_store_goes_away_does_not_wait_for_it(store, monkeypatch):
    asked = []
    end = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda status: (asked.append(os.environ[RETRIES]), end(status)))
    monkeypatch.setattr(tracking.opening, "check_reachable", once(tracking.opening.check_reachable))
    with pytest.raises(ValueError, match="bad luck"), tracking.open_run(TrainConfig(), "cell") as run:
        raise ValueError("bad luck")
    assert asked == ["1"]
    assert os.environ[RETRIES] != "1"
    assert "plw.error" not in store.get_run(run.id).data.tags


RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def once(call):
    """The function, and then a store that is away."""
    calls = []

    def called():
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("away")
        call()

    return called


@pytest.mark.parametrize(
    ("ended", "expected"),
    [(0, ("RUNNING", None)), (130, ("RUNNING", None)), (-9, ("FAILED", "failed")), (None, ("KILLED", "killed"))],
)
def test_a_sweep_marks_the_cell_that_could_not_do_so_itself(store, monkeypatch, ended, expected):
    """ended: the cell's exit status; None where the sweep was interrupted before the cell had begun its work."""
    run = store.create_run("0").info.run_id
    given = []

    def wait(command, environment):
        given.append((command, environment))
        if ended is None:
            raise KeyboardInterrupt
        return ended

    monkeypatch.setattr(sweep, "_run_to_end", wait)
    try:
        assert sweep._run_cell(MainConfig(), run) == ended
    except KeyboardInterrupt:
        assert ended is None
    found = store.get_run(run)
    assert (found.info.status, found.data.tags.get("plw.status")) == expected
    ((command, environment),) = given
    assert environment["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri()
    assert not [part for part in command if "sqlite" in part]  # everybody can read a command line


def test_what_is_longer_than_mlflow_keeps_is_kept_all_the_same(store, tmp_path, monkeypatch):
    assert (run_module.TAG_CHARACTERS, run_module.PARAMETER_CHARACTERS) <= (5000, 6000)  # what MLflow's stores keep
    monkeypatch.setattr(run_module, "TAG_CHARACTERS", 150)  # a digest takes up to 130
    monkeypatch.setattr(run_module, "PARAMETER_CHARACTERS", 150)
    monkeypatch.setattr(validation, "MAX_TAG_VAL_LENGTH", 150)
    monkeypatch.setattr(validation, "MAX_PARAM_VAL_LENGTH", 150)
    names = [f"mmlu_subject_{number}" for number in range(15)]
    run_id = None
    for _ in range(2):  # the same evaluation again
        with tracking.open_run(MainConfig(tasks=",".join(names)), "cell", run_id) as run:
            run_id = run.id
            run.tag(cell="c")
            add_scores(run, *((name, 0.5) for name in names), caveats=dict.fromkeys(names, "0-shot, not 5"))
        found = store.get_run(run_id).data
        assert (found.tags["plw.status"], found.tags["plw.score_comparable"]) == ("scored", "false")
        assert found.metrics["score"] == 0.5
    assert run.read_tag("score_tasks") == ",".join(f"{name}/acc@0" for name in names)
    assert found.tags["plw.score_caveat"].endswith("in tags/score_caveat.txt)")
    assert run.read_tag("score_caveat").count("0-shot, not 5") == 15
    assert found.params["tasks"].startswith("sha256:")
    assert run.config(tmp_path)["tasks"] == ",".join(names)


def test_a_long_reason_is_cut_off_visibly(store):
    with pytest.raises(ValueError, match="xxx"), tracking.open_run(TrainConfig(), "n" * 300) as run:
        raise ValueError("x" * 600)
    found = store.get_run(run.id)
    assert len(found.data.tags["plw.error"]) == 500
    assert found.data.tags["plw.error"].endswith("x …")
    assert (len(found.info.run_name), found.info.run_name[-2:]) == (250, " …")


def test_passwords_in_what_mlflow_run_has_logged_are_told(store, monkeypatch):
    begun = store.create_run("0").info.run_id
    store.log_param(begun, "endpoint", "http://me:secret@host/v1")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    with pytest.warns(UserWarning, match="password in endpoint as a parameter of run .*: change the password"):
        open_and_end()


def test_the_command_that_opens_a_run_shows_no_password(store, monkeypatch):
    with tracking.open_run(TrainConfig(), "cell") as run:
        pass
    assert run.address().startswith(f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()} ")
    for uri in ("postgresql://me:secret@host/db", "https://me:secret@host/"):
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda uri=uri: uri)
        assert "secret" not in run.address()
    assert run.address() == f"https://host/#/experiments/0/runs/{run.id}"


def saved(folder, step, cell="abc"):
    """A checkpoint's folder, as training leaves it."""
    writer = checkpoints.Writer(folder, cell, 9, lambda place: None)
    writer.save(Checkpoint(step, {"weight": torch.tensor([float(step)])}, {}))
    writer.wait()
    return folder / f"step-{step:06d}"


def weight_in(place):
    return load_file(place / "weights.safetensors")["weight"].item()


@pytest.fixture
def cut_short(store, tmp_path):
    """A run of the cell "abc" whose checkpoint of step 40 is in the store, and whose machine is gone."""
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "abc", tmp_path, 0)
        run.curves.log_step({"train/loss": 0.5}, 40)
        StoredCheckpoints(run, "abc").store(saved(tmp_path / "old", 20))
        StoredCheckpoints(run, "abc").store(saved(tmp_path / "old", 40))
    return run.id


def artifacts(store, run_id, path=None):
    return [item.path for item in store.list_artifacts(run_id, path)]


def test_the_stores_newest_checkpoint_is_brought_to_another_machine(store, cut_short, tmp_path):
    assert artifacts(store, cut_short, "checkpoints") == ["checkpoints/step-000040"]  # the one before it is gone
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        stored.fetch(folder, newer_than=0)
        assert weight_in(folder / "step-000040") == 40
        tracking.begin_cell(run, "abc", folder, 40)
        assert artifacts(store, cut_short, "checkpoints")  # kept until there is another
        stored.store(saved(tmp_path / "new", 60))
        assert "checkpoints" not in artifacts(store, cut_short)
        assert artifacts(store, run.id, "checkpoints") == ["checkpoints/step-000060"]
        stored.remove()
    assert "checkpoints" not in artifacts(store, run.id)
    tags = store.get_run(cut_short).data.tags | store.get_run(run.id).data.tags
    assert "plw.checkpoint" not in tags
    assert tags["plw.superseded_by"] == run.id
    assert history(store, run.id, "train/loss") == [(40, 0.5)]


@pytest.mark.parametrize(("cell", "newer_than"), [("abcd", 0), ("ab", 0), ("abc", 40)])
def test_another_cells_or_an_older_checkpoint_is_left_where_it_is(cut_short, tmp_path, cell, newer_than):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, cell).fetch(folder, newer_than=newer_than)
    assert not list(folder.iterdir())


@pytest.fixture
def alive(store, cut_short, monkeypatch):
    """The run, as if it had not ended, and little patience with it."""
    store.update_run(cut_short, "RUNNING")
    monkeypatch.setattr(resumption, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(resumption, "SIGN_SECONDS", 0.1)
    return cut_short


def test_a_cell_that_another_machine_is_at_work_on_is_not_taken(store, alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with (
        resumption.giving_signs_of_life(alive),  # it trains or scores, slowly: no metric arrives
        pytest.raises(ValueError, match=f"another process is training this very cell, as run {alive}"),
        tracking.open_run(TrainConfig(), "cell") as run,
    ):
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=99)
    assert artifacts(store, alive, "checkpoints")


def test_a_run_that_stays_silent_is_taken_for_dead(alive, tmp_path):
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_run_that_ends_while_one_waits_is_dead(store, alive, tmp_path, monkeypatch):
    def end(seconds):
        store.set_tag(alive, "plw.alive", "its last sign")
        store.update_run(alive, "KILLED")

    monkeypatch.setattr(resumption.time, "sleep", end)
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert (folder / "step-000040").is_dir()


def test_a_checkpoint_that_somebody_removed_is_done_without(store, cut_short, tmp_path):
    shutil.rmtree(Path(store.get_run(cut_short).info.artifact_uri) / "checkpoints")
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        with pytest.warns(UserWarning, match="step-000040 of run .* cannot be used"):
            stored.fetch(folder, newer_than=0)
        assert not list(folder.iterdir())
        tracking.begin_cell(run, "abc", folder, 0)
        stored.store(saved(tmp_path / "new", 20))
    assert "plw.checkpoint" not in store.get_run(cut_short).data.tags


def damage(place):
    content = (place / "optimizer.safetensors").read_bytes()
    (place / "optimizer.safetensors").write_bytes(content[:-4])


def replace_by_anothers(place):
    shutil.rmtree(place)
    saved(place.parent, 60, cell="abcd")


def replace_by_an_earlier(place):
    shutil.rmtree(place)
    saved(place.parent, 40).rename(place)


@pytest.mark.parametrize("spoil", [shutil.rmtree, damage, replace_by_anothers, replace_by_an_earlier])
def test_a_stored_checkpoint_that_cannot_be_used_is_left_and_the_one_before_it_taken(spoil, store, cut_short, tmp_path):
    newer = tmp_path / "newer"
    newer.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "abc", newer, 0)
        store.log_artifacts(run.id, str(saved(newer, 60)), "checkpoints/step-000060")
        store.set_tag(run.id, "plw.checkpoint", "abc/step-000060")
    spoil(Path(store.get_run(run.id).info.artifact_uri) / "checkpoints" / "step-000060")
    folder = tmp_path / "other machine"
    folder.mkdir()
    told = pytest.warns(UserWarning, match="step-000060 of run .* cannot be used .*; going on without it")
    with tracking.open_run(TrainConfig(), "cell") as run, told:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert sorted(path.name for path in folder.iterdir()) == ["run_id", "step-000040"]
    assert weight_in(folder / "step-000040") == 40


@pytest.mark.parametrize(
    "name", ["../../stolen", "/stolen", "step-000050/../../x", "step-abc", "step--5", "step-50", ""]
)
def test_a_tag_that_names_no_checkpoint_is_passed_over(name, store, cut_short, tmp_path):
    with tracking.open_run(TrainConfig(), "stranger") as stranger:
        store.set_tag(stranger.id, "plw.checkpoint", f"abc/{name}")
    folder = tmp_path / "other machine"
    folder.mkdir()
    told = pytest.warns(UserWarning, match=f"run {stranger.id} names .* which is none")
    with tracking.open_run(TrainConfig(), "cell") as run, told:
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
    assert sorted(path.name for path in folder.iterdir()) == ["run_id", "step-000040"]


def test_what_cannot_be_removed_stops_nothing(store, cut_short, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as run:
        stored = StoredCheckpoints(run, "abc")
        stored.fetch(tmp_path, newer_than=40)
        tracking.begin_cell(run, "abc", tmp_path, 40)
        store.delete_run(cut_short)  # MLflow then lets nobody change it
        with pytest.warns(UserWarning, match="cannot be removed"):
            stored.store(saved(tmp_path / "new", 60))
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_pod_started_again_goes_on_in_the_run_it_began(store, cut_short, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", cut_short)  # as Kubernetes gives it to the pod's successor
    monkeypatch.setattr(resumption, "SILENT_SECONDS", 1e6)  # there is nobody to wait for
    folder = tmp_path / "other machine"
    folder.mkdir()
    with tracking.open_run(TrainConfig(), "cell") as run:
        assert run.id == cut_short
        StoredCheckpoints(run, "abc").fetch(folder, newer_than=0)
        tracking.begin_cell(run, "abc", folder, 40)
        for step in (40, 41):
            run.curves.log_step({"train/loss": 0.4}, step)
    assert (folder / "step-000040").is_dir()
    assert history(store, cut_short, "train/loss") == [(40, 0.5), (41, 0.4)]  # no step is there twice


def test_a_wrapper_says_whose_run_it_works_on_and_holds_nothing_else(store, monkeypatch):
    with tracking.open_run(MainConfig(), "cell") as cell:
        pass
    wrapper = store.create_run("0").info.run_id  # as `mlflow run -e evaluate -P run_id=...` begins one
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    with tracking.open_run(MainConfig(), "", run_id=cell.id) as reopened:
        assert reopened.id == cell.id
    found = store.get_run(wrapper)
    assert {name: tag for name, tag in found.data.tags.items() if name.startswith("plw.")} == {"plw.for_run": cell.id}
    assert (found.data.params, found.data.metrics) == ({}, {})


def scored(config, *scores):
    """A finished cell with a score per task."""
    with tracking.open_run(config, "cell") as run:
        run.tag(cell=f"{config.plw}/{config.method}")
        add_scores(run, *scores)
    return run


def add_scores(run, *scores, whole=None, caveats=None):
    samples = [{"task": task, "prediction": "yes"} for task, _ in scores]
    found = [
        Score(task, "acc", score, 0.1, 5, 0, "1.0", True, caveat=(caveats or {}).get(task, ""))
        for task, score in scores
    ]
    evaluation = Evaluation(found, {}, samples)
    tracking.log_scores(run, evaluation, table(evaluation, run.cell()), whole)


def test_score_is_the_mean_over_the_tasks_first_scored(store):
    run = scored(MainConfig(), ("a", 0.2), ("b", 0.4))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.6), ("c", 1.0))
    found = store.get_run(run.id).data
    assert found.metrics["score"] == pytest.approx((0.2 + 0.6) / 2)
    assert found.tags["plw.score_tasks"] == "a/acc@0,b/acc@0"
    assert dict(zip(tracking.read_scores(again)["task"], tracking.read_scores(again)["score"], strict=True)) == {
        "a": 0.2,
        "b": 0.6,
        "c": 1.0,
    }


def test_a_larger_set_scored_whole_takes_the_place_of_the_first(store):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.2), ("b", 0.6))
    assert store.get_run(run.id).data.metrics["score"] == pytest.approx(0.4)


def test_there_is_no_score_before_all_of_its_tasks_are_there(store, capsys):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x", status="trained")
        add_scores(run, ("b", 0.4), whole=["a/acc@0", "b/acc@0"])
    found = store.get_run(run.id).data
    assert "score" not in found.metrics
    assert (found.metrics["b/acc"], found.tags["plw.status"]) == (0.4, "trained")
    assert "no score yet, which is the mean of 2 tasks: a/acc@0 to come" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no scored cell"):
        tracking.score_table(experiment="Default")
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.2))
    found = store.get_run(run.id).data
    assert found.metrics["score"] == pytest.approx(0.3)
    assert found.tags["plw.status"] == "scored"


def test_a_task_scored_with_other_shots_does_not_count_as_the_sets(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x")
        add_scores(run, ("a", 0.2), whole=["a/acc@5"])
    assert "score" not in store.get_run(run.id).data.metrics


def test_a_score_that_is_not_comparable_says_so_and_why(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        run.tag(cell="x")
        add_scores(run, ("a", 0.2), ("b", 0.4), caveats={"a": "0-shot, not 25"})
    found = store.get_run(run.id).data
    assert (found.tags["plw.score_comparable"], found.tags["plw.score_caveat"]) == ("false", "a: 0-shot, not 25")
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("a", 0.3))
    found = store.get_run(run.id).data
    assert found.tags["plw.score_comparable"] == "true"
    assert "plw.score_caveat" not in found.tags


def test_samples_are_one_table_that_grows(store, tmp_path):
    run = scored(MainConfig(), ("a", 0.2))
    with tracking.open_run(MainConfig(), "", run_id=run.id) as again:
        add_scores(again, ("b", 0.2))
    table = mlflow.load_table("samples.json", run_ids=[run.id])
    assert list(table["task"]) == ["a", "b"]
    assert list(table["prediction"]) == ["yes", "yes"]
    listed = {item.path for item in store.list_artifacts(run.id, "harness")}
    assert {f"harness/{one}.json" for one in table["evaluation"]} == listed


def test_a_curve_has_one_value_a_step(store):
    with tracking.open_run(MainConfig(), "cell") as run:
        for step, loss in ((2, 5.0), (1, 3.0), (2, 4.0)):
            run.curves.log_step({"train/loss": loss}, step)
            run.curves.flush()
    assert run.curves.values("train/loss") == {1: 3.0, 2: 4.0}


def test_what_a_run_was_told_comes_back_with_its_template(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"prompt_input": "{instruction}{input}", "prompt_no_input": "{instruction}"}')
    options = TrainConfig(template="mine.json", max_records=5)
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(options, "cell") as run:
        tracking.log_data(run, prepared.sources, prepared.profile)
    Path("mine.json").unlink()
    told = run.config(tmp_path)
    assert (told["dataset"], told["max_records"]) == ("toy-short", 5)
    assert "prompt_no_input" in Path(told["template"]).read_text()
    tracking.check_data(run, prepared.sources)
    with pytest.raises(ValueError, match="toy-short has the SHA-256 0, but run"):
        tracking.check_data(run, [dataclasses.replace(prepared.sources[0], sha256="0")])


def test_the_score_table_holds_scored_cells_alone(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))
    scored(MainConfig(plw=1.0), ("a", 0.3))
    with tracking.open_run(MainConfig(), "no cell"):
        pass
    expected = pd.DataFrame({"plw": [0.0, 1.0], "score": [0.2, 0.3]})
    found = tracking.score_table(experiment="Default").sort_values("plw", ignore_index=True)
    pd.testing.assert_frame_equal(found[["plw", "score"]], expected)
    assert set(found["model"]) == {"toy"}


def test_a_data_sets_generation_ratio_is_what_a_run_of_it_measured(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))  # without a profile
    run = scored(MainConfig(plw=1.0), ("a", 0.3))
    scored(MainConfig(plw=1.0, dataset="toy-long"), ("a", 0.3))
    store.log_dict(run.id, {"generation_ratio": 0.18}, "profile.json")
    assert tracking.generation_ratios("Default") == {"toy-short": 0.18}
    with pytest.raises(ValueError, match="there is no experiment 'none'"):
        tracking.generation_ratios("none")


def test_runs_without_scores_are_left_out_and_listed(store):
    scored(MainConfig(plw=0.0), ("a", 0.2))
    running = scored(MainConfig(plw=0.5), ("a", 0.3)).id
    store.set_terminated(running, "RUNNING")
    for plw in (0.0, 1.0):
        with pytest.raises(ZeroDivisionError), tracking.open_run(MainConfig(plw=plw), "broken"):
            raise ZeroDivisionError
    table = tracking.score_table(experiment="Default")
    assert set(table["plw"]) == {0.0}
    failed, still = table.attrs["left_out"]  # PLW 0 failed once, but another run has its scores
    assert "(failed): toy on toy-short, PLW 1, seed 1234" in failed
    assert f"run {running} (running): toy on toy-short, PLW 0.5" in still


def test_of_a_cell_run_twice_the_newest_counts(store):
    scored(MainConfig(), ("a", 0.2))
    scored(MainConfig(), ("a", 0.3))
    assert list(tracking.score_table(experiment="Default")["score"]) == [0.3]


def test_two_spellings_of_a_plw_are_one_cell(store, monkeypatch):
    begun = store.create_run("0").info.run_id
    store.log_param(begun, "plw", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    scored(MainConfig(plw=0.01), ("a", 0.2))
    scored(MainConfig(plw=0.01), ("a", 0.3))
    assert list(tracking.score_table(experiment="Default")["score"]) == [0.3]


def test_cells_of_two_recipes_are_not_mixed(store):
    first = scored(MainConfig(), ("a", 0.2))
    second = scored(MainConfig(), ("a", 0.3))
    store.set_tag(second.id, "plw.cell", "another recipe")
    with pytest.raises(ValueError, match="two kinds of cell") as error:
        tracking.score_table(experiment="Default")
    assert first.id in str(error.value)
    assert second.id in str(error.value)


def test_a_parameter_to_compare_by_is_a_column_and_tells_cells_apart(store):
    scored(MainConfig(learning_rate=0.001), ("a", 0.2))
    other = scored(MainConfig(learning_rate=0.002), ("a", 0.3))
    store.set_tag(other.id, "plw.cell", "another rate")
    table = tracking.score_table(experiment="Default", also=("learning_rate",))
    assert dict(zip(table["learning_rate"].astype(float), table["score"], strict=True)) == {0.001: 0.2, 0.002: 0.3}
    with pytest.raises(ValueError, match="has no parameter nothing to compare by"):
        tracking.score_table(experiment="Default", also=("nothing",))


def test_what_was_done_to_a_data_set_makes_it_another_in_the_table(store, monkeypatch):
    """Also where the caller has spelled it his own way, or an older run lacks a parameter."""
    begun = store.create_run("0").info.run_id
    store.log_param(begun, "invert", "True")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    changes = [{"invert": True}, {}, *({"mix": "b/toy-short.json", "mix_share": share} for share in (0.3, 0.7))]
    names = ["toy-long inverted", "toy-long", *(f"toy-long + {share} toy-short.json" for share in (0.3, 0.7))]
    for number, change in enumerate(changes):
        run = scored(MainConfig(dataset="toy-long", **change), ("a", number / 10))
        store.set_tag(run.id, "plw.cell", f"cell {number}")
        assert store.get_run(run.id).data.params["dataset"] == "toy-long"
    table = tracking.score_table(experiment="Default")
    assert dict(zip(table["dataset"], table["score"], strict=True)) == {
        name: number / 10 for number, name in enumerate(names)
    }
    assert cell_columns({"model": "m", "dataset": "d", "plw": "1", "seed": "1"})["dataset"] == "d"


def test_methods_in_one_table_count_as_models(store):
    scored(MainConfig(), ("a", 0.2))
    scored(MainConfig(method="lora"), ("a", 0.3))
    assert set(tracking.score_table(experiment="Default")["model"]) == {"toy (full)", "toy (lora)"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tracking.score_table(experiment="none"), "there is no experiment 'none'"),
        (lambda: tracking.score_table(experiment="Default"), "holds no scored cell"),
        (lambda: tracking.score_table(sweep="f" * 32), "there is no run 'ffff"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_a_preset_made_of_an_unset_parameter_is_told_and_read_back(store, monkeypatch):
    """`mlflow run` has logged the empty value, which stays; nobody is misled by it."""
    begun = store.create_run("0").info.run_id
    for name, value in {"seed": "", "method": "''", "learning_rate": "", "mix": "''", "epochs": "3.0"}.items():
        store.log_param(begun, name, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    config = MainConfig(preset="huerta2024-lora")
    scored(config, ("a", 0.2))
    run = store.get_run(begun)
    assert run.data.params.keys() == set(MainConfig.__dataclass_fields__)
    assert (run.data.params["seed"], run.data.params["batch_examples"]) == ("", "128")
    told = {name: value for name, value in run.data.tags.items() if name.startswith("plw.preset.")}
    assert told == {"plw.preset.seed": "42", "plw.preset.method": "lora", "plw.preset.learning_rate": "0.0002"}

    scored(MainConfig(preset="huerta2024-lora", method="full"), ("a", 0.3))
    table = tracking.score_table(experiment="Default").set_index("model")
    assert dict(table["score"]) == {"toy (lora)": 0.2, "toy (full)": 0.3}
    assert set(table["seed"]) == {42}
    assert set(table["dataset"]) == {"toy-short"}


@pytest.mark.parametrize(
    ("options", "files", "expected"),
    [
        ({}, {}, "plw-toy-toy-short"),
        ({"dataset": "toy-long", "mix": "toy-short"}, {}, "plw-toy-toy-long-0.5-toy-short"),
        ({"dataset": "a/train.jsonl"}, {"a/train.jsonl": "1"}, "plw-toy-train-11111111"),
        ({"dataset": "b/train.jsonl"}, {"b/train.jsonl": "2"}, "plw-toy-train-22222222"),
        ({"dataset": "b/指令 集.jsonl"}, {"b/指令 集.jsonl": "2"}, "plw-toy-指令-集-22222222"),
        (
            {"dataset": "!.csv", "mix": "toy-short"},
            {"!.csv": "3", "toy-short": "4"},
            "plw-toy-unnamed-0.5-toy-short-33333333",
        ),
        ({"dataset": "x" * 200 + ".csv"}, {"x" * 200 + ".csv": "3"}, f"plw-toy-{'x' * 64}-33333333"),
        ({"model": "a/b/base", "base": "5" * 64}, {}, "plw-base-55555555-toy-short"),
        ({"model": "org/base@v1", "base": "org/base@" + "6" * 40}, {}, "plw-base-66666666-toy-short"),
        ({"model": "llama-7b", "base": "huggyllama/llama-7b@4782"}, {}, "plw-llama-7b-toy-short"),
    ],
)
def test_registered_models_are_named_by_content(store, monkeypatch, options, files, expected):
    """By the names alone, two files of one name would share one registered model and its alias `best`."""
    flavor = SimpleNamespace(log_model=lambda *_, **__: SimpleNamespace(model_id="m-1"))
    monkeypatch.setattr(mlflow, "transformers", flavor)
    monkeypatch.setattr(mlflow, "register_model", lambda *_, **__: SimpleNamespace(version=1))
    config = TrainConfig(**{name: value for name, value in options.items() if name != "base"})
    run = tracking.Run(store.create_run("0").info.run_id)
    run.tag(base_model=options.get("base", "f" * 64))
    sources = [Source(name, name, sha * 64, "", "", False, iter) for name, sha in files.items()]
    tracking.log_model(run, None, None, config, sources)
    assert store.get_run(run.id).data.tags["plw.model_version"] == f"{expected}/1"


def test_a_name_in_any_script_can_be_registered(store):
    name = "plw-toy-指令-集-22222222"
    store.create_registered_model(name)
    version = store.create_model_version(name, "runs:/0/model").version
    store.set_registered_model_alias(name, "best", version)
    assert store.get_model_version_by_alias(name, "best").name == name
    assert [one.version for one in store.search_model_versions(f"name = '{name}'")] == [version]


def test_a_registered_model_comes_back_by_version_and_alias(store):
    model, tokens = tiny_llama(), torch.arange(6).unsqueeze(0)
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(max_records=20))
        tracking.log_data(run, prepared.sources, prepared.profile)
        for step, loss in ((0, 14.8), (1, 9.0), (2, 5.4)):
            run.curves.log_step({"train/loss": loss, "eval/prompt_loss": loss}, step)
        run.curves.flush()
        tracking.log_model(run, model, byte_tokenizer(), config, prepared.sources, step=2)
        run.tag(cell="c")
        add_scores(run, ("a", 0.25))
    check_page_of_logged_model(store, run.id)
    store.set_registered_model_alias("plw-tiny-toy-short", "best", "1")
    for uri in ("models:/plw-tiny-toy-short/1", "models:/plw-tiny-toy-short@best"):
        loaded, tokenizer = tracking.load_registered(uri)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
    with pytest.raises(ValueError, match=r"model models:/plw-tiny-toy-short/7 cannot be loaded: .*not found"):
        tracking.load_registered("models:/plw-tiny-toy-short/7")


def check_page_of_logged_model(store, run_id):
    """The losses are the last ones, and the scores are of no training data."""
    (output,) = store.get_run(run_id).outputs.model_outputs
    metrics = store.get_logged_model(output.model_id).metrics
    assert {metric.key: (metric.step, metric.value) for metric in metrics} == {
        "train/loss": (2, 5.4),
        "eval/prompt_loss": (2, 5.4),
        "a/acc": (0, 0.25),
        "a/acc_stderr": (0, 0.1),
        "score": (0, 0.25),
    }
    assert {metric.dataset_name for metric in metrics} == {None}


@pytest.mark.slow
def test_several_processes_make_one_fresh_store(tmp_path):
    """MLflow's migrations race: without a lock, all but one of them end in an error of the database."""
    script = "from plw_mlflow.tracking import connection; connection.check_reachable(); print('well')"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new/ml.db", "PYTHONPATH": str(ROOT)}
    several = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in several] == ["well"] * 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ml.db", "ml.db.lock"]


@pytest.fixture
def registered(store):
    """The folder in the store of a model that is registered as plw-tiny-toy-short, version 1, and its run."""
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), config)
    return Path(store.get_logged_model(run.model_id).artifact_location.removeprefix("file://")), run


def _edit_mlmodel(**changes):
    """Damage to what MLflow says of a logged model's flavour transformers."""

    def damage(folder):
        told = yaml.safe_load((folder / "MLmodel").read_text())
        told["flavors"]["transformers"] |= changes
        (folder / "MLmodel").write_text(yaml.safe_dump(told))

    return damage


def _of_another_flavour(folder):
    told = yaml.safe_load((folder / "MLmodel").read_text())
    del told["flavors"]["transformers"]
    (folder / "MLmodel").write_text(yaml.safe_dump(told))


def _with_code(folder):
    file = folder / "model/config.json"
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "model/mine.py").write_text(f"open({str(folder / 'was run')!r}, 'w')\n")


def _with_a_number_that_is_none(folder):
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


STRANGE = [
    (_of_another_flavour, "is of the flavour python_function; models of the flavour transformers are loaded"),
    (_edit_mlmodel(task="summarization"), "is for the task summarization"),
    (_edit_mlmodel(model_binary="../../elsewhere"), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=[]), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=3), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("[1"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("3"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").unlink(), "its MLmodel is damaged"),
    (lambda folder: shutil.rmtree(folder / "components"), "lacks the folder components/tokenizer"),
    (_with_code, "'models:/.*/model' cannot be loaded: it needs program code of its own, which is not run"),
    (_with_a_number_that_is_none, "model 'models:/.*/model' is damaged: 1 numbers of lm_head.weight"),
]


def test_a_strangers_logged_model_is_refused_in_one_line(registered, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, run = registered
    shutil.copytree(folder, tmp_path / "kept")
    for damage, expected in STRANGE:  # one after another, as it takes a second to log a model
        damage(folder)
        for load in (
            lambda: tracking.load_registered("models:/plw-tiny-toy-short/1"),
            lambda: tracking.load_model(run),
        ):
            with pytest.raises(ValueError, match=expected) as raised:
                load()
            assert "models:/" in str(raised.value)
            assert "\n" not in str(raised.value)
        assert not (folder / "was run").exists()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_logged_model_is_read_and_not_written(is_here, registered, monkeypatch, tmp_path):
    """From a store on this machine in its place, from another by a copy that is then removed."""
    folder, run = registered
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if not is_here:
        monkeypatch.setattr("plw_mlflow.tracking.logged_models.LocalArtifactRepository", type(None))
    model, tokenizer = tracking.load_model(run)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(scratch.iterdir()) == []
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokens = torch.arange(6).unsqueeze(0)
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
