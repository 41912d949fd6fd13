"""Does the page of a cell's run say what was trained, how well it does, and a command that gives the same cell?"""

import shlex
import time
import typing

import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, TrainConfig
from plw_mlflow.config.values import read
from plw_mlflow.tracking import descriptions
from tests.tracking.helpers import scored


def description(store, run):
    tracking.describe_cell(run)
    return store.get_run(run.id).data.tags["mlflow.note.content"]


def test_a_cell_says_what_it_is_and_how_well_it_does(store):
    run = scored(MainConfig(plw=0.1, seed=7), ("one", 0.25), ("two", 0.75))
    run.log_metrics({"prompt_share": 0.125, "train/prompt_loss": 2.0, "train/completion_loss": 1.5})
    run.tag(data_sha256="f" * 64, model_version="plw-toy-toy-short/3")
    text = description(store, run)
    assert text.startswith("Score **0.5** at **PLW 0.1**: `toy` trained on `toy-short` (SHA-256 ffffffffffff), ")
    assert "Prompts have 12.5% of the loss weight." in text
    assert "- `one` acc: **0.2500 ± 0.1000** (5 questions)" in text
    assert "- loss at the end, training: 1.5000 of completions, 2.0000 of prompts" in text
    assert 'load_model("models:/plw-toy-toy-short/3"' in text
    assert "Of the sweep" not in text


def test_many_benchmarks_leave_room_for_how_to_repeat_a_cell(store):
    tasks = [f"mmlu_high_school_government_and_politics_{number}" for number in range(120)]
    run = scored(MainConfig(plw=0.1), *((task, 0.25) for task in tasks))
    run.tag(score_caveat="; ".join(f"{task}: only the first 4 of 9 documents" for task in tasks)[:4000])
    run.tag(model_version="plw-toy-toy-short/3")
    text = description(store, run)
    shown = text.count("(5 questions)")
    assert 20 < shown < 120
    assert f"- and {120 - shown} more, in `scores.csv` of the run" in text
    assert "load_model(" in text
    assert f"entrypoints.verify --run-id {run.id}" in text
    assert text.count("```") == 4
    assert 4800 < len(text) <= 5000


def test_what_somebody_has_written_of_a_run_stays(store):
    run = scored(MainConfig(), ("one", 0.25))
    run.describe("first")
    run.describe("second")
    assert store.get_run(run.id).data.tags["mlflow.note.content"] == "second"
    store.set_tag(run.id, "mlflow.note.content", "mine")
    run.describe("third")
    assert store.get_run(run.id).data.tags["mlflow.note.content"] == "mine"


def test_numbers_of_a_run_take_the_place_of_earlier_ones(store):
    run = scored(MainConfig(), ("one", 0.25))
    run.log_metrics({"p": 0.2})
    time.sleep(0.002)
    run.log_metrics({"p": 0.01})
    assert run.metrics()["p"] == 0.01


def test_a_cell_of_a_sweep_says_in_what_it_differs(store):
    sweep = store.create_run("0", run_name="my sweep").info.run_id
    for name, value in {"plw": "0,0.1", "seed": "1,2", "dataset": "toy-short", "output": "here"}.items():
        store.log_param(sweep, name, value)
    run = scored(MainConfig(plw=0.1, seed=2), ("one", 0.25))
    store.set_tag(run.id, "mlflow.parentRunId", sweep)
    text = description(store, run)
    assert f"Of the sweep [my sweep](#/experiments/0/runs/{sweep}?workflowType=machine_learning)" in text
    assert "what differs from its other cells: plw 0.1, seed 2." in text


@pytest.mark.parametrize(
    "config",
    [
        MainConfig(),
        MainConfig(plw=0.25, dataset="my data.jsonl", method="lora", lora_rank=4, template_weight=0.5, invert=True),
        TrainConfig(preset="huerta2024", plw=1.0, model="toy", seed=3),
    ],
)
def test_the_command_gives_the_same_cell(store, config):
    with tracking.open_run(config, "cell") as run:
        pass
    command = shlex.split(descriptions._command(store.get_run(run.id).data.params))
    assert command[:3] == ["python", "-m", f"entrypoints.{'main' if type(config) is MainConfig else 'train'}"]
    assert parsed(type(config), command[3:]).identity() == config.identity()


def parsed(kind, arguments):
    """The config that an entry point makes of its arguments."""
    hints = typing.get_type_hints(kind)
    names = [argument.removeprefix("--").replace("-", "_") for argument in arguments[::2]]
    return kind(**{name: read(text, hints[name]) for name, text in zip(names, arguments[1::2], strict=True)})
