"""Does a run hold its configuration and tags, once, in the caller's own words?"""

import dataclasses
import os
from pathlib import Path

import mlflow
import pytest
from mlflow.utils import validation

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.tracking import run as run_module
from tests.conftest import byte_tokenizer
from tests.tracking.helpers import add_scores, open_and_end, scored

pytestmark = pytest.mark.usefixtures("store")


def test_parameters_already_logged_keep_their_spelling(store, monkeypatch):
    begun = store.create_run("0")  # as `mlflow run` begins one
    store.log_param(begun.info.run_id, "plw", "1e-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", begun.info.run_id)
    with tracking.open_run(TrainConfig(plw=0.01, invert=True), "cell") as run:
        assert run.id == begun.info.run_id
        assert "MLFLOW_RUN_ID" not in os.environ  # no process started from here inherits it
    params = store.get_run(run.id).data.params
    assert (params["plw"], params["invert"], params["max_records"]) == ("1e-2", "true", "")


@pytest.mark.usefixtures("untagged_by_others")
def test_a_tag_that_another_process_removes_first_is_no_error(store):
    run_id = store.create_run("0", tags={"plw.status": "killed"}).info.run_id
    run = tracking.Run(run_id)
    run.untag("status")
    assert run.read_tag("status") is None


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
    assert run.address() == f"https://host/#/experiments/0/runs/{run.id}?workflowType=machine_learning"


def test_what_a_run_was_told_comes_back_with_its_template(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"prompt_input": "{instruction}{input}", "prompt_no_input": "{instruction}"}')
    options = TrainConfig(template="mine.json", max_records=5)
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(options, "cell") as run:
        tracking.log_data(run, prepared)
    Path("mine.json").unlink()
    told = run.config(tmp_path)
    assert (told["dataset"], told["max_records"]) == ("toy-short", 5)
    assert "prompt_no_input" in Path(told["template"]).read_text()
    tracking.check_data(run, prepared.sources)
    with pytest.raises(ValueError, match="toy-short has the SHA-256 0, but run"):
        tracking.check_data(run, [dataclasses.replace(prepared.sources[0], sha256="0")])


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
