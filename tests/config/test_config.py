"""Are the caller's mistakes all told, in one line, and does everything else do what its help says?"""

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import pytest

from plw_mlflow import config
from plw_mlflow.command_line import cli
from plw_mlflow.command_line.options import field_help
from plw_mlflow.config import (
    CONFIGS,
    AnalyzeConfig,
    DataOptions,
    EvaluateConfig,
    MainConfig,
    PrepareConfig,
    SweepConfig,
    TrainConfig,
    data_name,
    entry_points,
    idle_options,
    options,
    short_name,
    shown_name,
)
from plw_mlflow.data import sources
from plw_mlflow.environment import processes
from tests.stores import ROOT


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a command on arguments: (exit status, output, error output, configs it got)."""

    def called(config_type, *arguments, main=lambda config: None):
        got = []
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
        try:
            cli.command(config_type)(lambda config: (got.append(config), main(config)))()
        except SystemExit as stopped:
            status = stopped.code
        except Exception as error:  # as Python does
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        shown = capsys.readouterr()
        return status, shown.out, shown.err, got

    before = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield called
    logging.setLogRecordFactory(before)


def is_one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plw", "-0.1"], "plw must be a number of 0 or more, got -0.1"),
        (["--plw", "nan"], "plw must be a number of 0 or more, got nan"),
        (["--plw", "inf"], "plw must be a number of 0 or more, got inf"),
        (["--plw", "-inf"], "plw must be a number of 0 or more, got -inf"),
        (["--plw", "heavy"], "'heavy' is not a valid float"),
        (["--plw", "0.1,0.2"], "'0.1,0.2' is not a valid float"),
        (["--plw", ""], "a value is needed"),
        (["--dataset", ""], "a value is needed"),
        (["--plw"], "requires an argument"),
        (["--plx", "0.1"], "--plx"),
        (["extra"], "extra"),
        (["--method", "both"], "'both' is not one of 'full', 'lora', 'dora', 'qlora'"),
        (["--invert", "perhaps"], "'perhaps' is not a valid boolean"),
        (["--max-records", "1.5"], "'1.5' is not a valid integer"),
        (["--max-records", "0"], "max-records must be 1 or more, got 0"),
        (["--max-tokens", "1"], "max-tokens must be 2 or more, got 1"),
        (["--validation-share", "1"], "validation-share must lie between 0 and 1"),
        (["--template-weight", "-1"], "template-weight must be 0 or more"),
        (["--completion-weight", "nan"], "completion-weight must be 0 or more"),
        (["--learning-rate", "inf"], "learning-rate must be a number above 0"),
        (["--epochs", "0"], "epochs must be a number above 0"),
        (["--lora-dropout", "1"], "lora-dropout must be at least 0 and below 1"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--label-smoothing", "-0.1"], "label-smoothing must be at least 0 and below 1"),
        (["--base-penalty", "-1"], "base-penalty must be 0 or more"),
        (["--base-penalty-order", "0.5"], "base-penalty-order must be 1 or more"),
        (["--lora-targets", ","], "lora-targets must name at least one layer"),
        (["--loss-divisor", "share", "--template-weight", "0.5"], "template-weight under loss-divisor share must be 0"),
        (["--loss-divisor", "share", "--completion-weight", "2"], "completions have what the PLW leaves them"),
        (["--preset", "mine"], "'mine' is not one of 'toy', 'huerta2024', 'huerta2024-lora'"),
        (["--warmup-ratio", "1.1"], "warmup-ratio must be at most 1"),
        (["--batch-examples", "6", "--micro-batch-examples", "4"], "must be a multiple of"),
    ],
)
def test_a_mistake_is_told_in_one_line(call, arguments, expected):
    status, _, error, got = call(TrainConfig, *arguments)
    assert (status, got) == (2, [])
    assert is_one_line(error)
    assert expected in error


@pytest.mark.parametrize(
    ("config_type", "arguments", "expected"),
    [
        (TrainConfig, ["--plw", "0.1", "--plw", "0.2"], "--plw is given 2 times; it has one value; give it once"),
        (TrainConfig, ["--plw=0.1", "--seed", "1", "--plw=0.1"], "--plw is given 2 times"),
        (TrainConfig, ["--invert", "--invert=false"], "--invert is given 2 times"),
        (TrainConfig, ["--tokenizer", "", "--tokenizer", ""], "--tokenizer is given 2 times"),
        (SweepConfig, ["--plw", "0.1", "--plw", "0.2"], "separated by commas: --plw A,B"),
        (SweepConfig, ["--tasks", "toy", "--tasks", "piqa", "--tasks", "arc_easy"], "--tasks is given 3 times"),
        (AnalyzeConfig, ["--run-id", "a", "--by", "seed", "--by", "method"], "separated by commas: --by A,B"),
    ],
)
def test_an_option_given_twice_is_refused(call, config_type, arguments, expected):
    """Click alone would use the last of its values, and say nothing."""
    status, _, error, got = call(config_type, *arguments)
    assert (status, got) == (2, [])
    assert is_one_line(error)
    assert expected in error


def test_all_mistakes_are_told_at_once(call):
    _, _, error, _ = call(MainConfig, "--plw", "-1", "--max-tokens", "0", "--epochs", "nan", "--limit", "0")
    assert is_one_line(error)
    for expected in ("plw must", "max-tokens must", "epochs must", "limit must"):
        assert error.count(expected) == 1


def test_a_plw_above_1_is_warned_of_and_used(call):
    status, _, error, (got,) = call(TrainConfig, "--plw", "1.5")
    assert (status, got.plw) == (0, 1.5)
    assert error == "warning: plw 1.5 is above 1: prompt tokens weigh more than completion tokens\n"


@pytest.mark.parametrize("plw", ["1e-2", "0.01", ".01"])
def test_a_number_may_be_spelt_as_one_likes(call, plw):
    _, _, _, (got,) = call(TrainConfig, "--plw", plw)
    assert got.plw == 0.01


@pytest.mark.parametrize("given", [["--invert"], ["--invert", "--plw", "0.1"], ["--invert", "true"], ["--invert=1"]])
def test_an_option_that_is_true_or_false_is_true_by_itself(call, given):
    _, _, _, (got,) = call(TrainConfig, *given)
    assert got.invert is True


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--width", "0.1"], "width is 0.1, but that is for power: give --power"),
        (["--power", "--width", "0"], "width must be a number above 0, got 0.0"),
        (["--next", "0"], "next must be 1 or more, got 0"),
        (["--bootstrap", "-1"], "bootstrap must be 0 or more"),
        (["--power", "--assume", "slope=1"], "give one of scores, run-id or experiment (or assume, for power alone)"),
    ],
)
def test_a_mistake_in_what_to_analyse_is_told(call, arguments, expected):
    status, _, error, got = call(AnalyzeConfig, "--run-id", "abc", *arguments)
    assert (status, got) == (2, [])
    assert is_one_line(error)
    assert expected in error


def test_what_is_assumed_is_for_power_alone(call):
    _, _, error, _ = call(AnalyzeConfig, "--assume", "slope=1", "--next", "2")
    assert "assume is slope=1, but that is for power: give --power; next needs scores, not assume" in error


def test_an_empty_value_is_unset_where_a_field_may_be(call):
    optional = ("--tokenizer", "--max-records", "--template-weight", "--output", "--data-dir", "--limit")
    _, _, _, (got,) = call(MainConfig, *(part for flag in optional for part in (flag, "")))
    assert got == MainConfig()


@pytest.mark.parametrize("name", CONFIGS)
def test_defaults_pass_through_the_command_line_unchanged(call, name):
    of_a_run = {"run_id": "abc"}
    needed = {
        "evaluate": {"model": "toy"},
        "analyze": of_a_run,
        "advise": {"dataset": "toy-short"},
        "verify": of_a_run,
    }.get(name, {})
    _, _, _, (expected,) = call(
        CONFIGS[name], *(part for key in needed for part in (f"--{key.replace('_', '-')}", needed[key]))
    )
    assert expected == CONFIGS[name](**needed)
    spelt = [
        part
        for field in fields(CONFIGS[name])
        for part in (f"--{field.name.replace('_', '-')}", config.spell(getattr(expected, field.name)))
    ]
    _, _, _, (got,) = call(CONFIGS[name], *spelt)
    assert got == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_help_tells_of_every_field(call, name):
    status, shown, _, got = call(CONFIGS[name], "--help")
    assert (status, got) == (0, [])
    shown = "".join(shown.split())  # click breaks lines at hyphens too
    source = [line for module in (options, entry_points) for line in Path(module.__file__).read_text().split("\n")]
    for field in fields(CONFIGS[name]):
        assert f"--{field.name.replace('_', '-')}" in shown
        written = [
            "".join(below.split()).strip('"')
            for above, below in pairwise(source)
            if above.startswith(f"    {field.name}: ")
        ]
        assert any(line and line in shown for line in written), field.name


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_every_option_under_one_heading(call, name):
    _, shown, _, _ = call(CONFIGS[name], "--help")
    begun = [line.split()[0] for line in shown.split("\n") if line.startswith("  --")]
    assert sorted(begun) == sorted([*(f"--{config.flag(field.name)}" for field in fields(CONFIGS[name])), "--help"])


def test_help_begins_with_what_tells_cells_apart(call):
    for config_type, heading in ((SweepConfig, "Axes"), (MainConfig, "What tells one cell from another")):
        _, shown, _, _ = call(config_type, "--help")
        (*_, above), *_ = [part.strip().split("\n") for part in shown.split("  --plw ")]
        assert above.startswith(heading)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (False, "false"),
        (0.001, "0.001"),
        (2.0, "2.0"),
        (512, "512"),
        (Path("a/b"), "a/b"),
        ("drop", "drop"),
    ],
)
def test_a_default_is_spelt_for_mlproject(value, expected):
    assert config.spell(value) == expected


def ours(config):
    sources.find("no/such/file", Path())


def a_missing_package(config):
    import no_such_package  # noqa: F401


def a_full_disk(config):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")


def a_librarys(config):
    json.loads("{")


def not_finite(config):
    from plw_mlflow.training import trainer

    trainer.check_finite({"train/loss": math.nan}, 7)


def interrupted(config):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "status", "expected"),
    [
        (ours, 2, "error: data set 'no/such/file' is neither a file, nor a hub id"),
        (not_finite, 1, "error: train/loss is nan at step 7"),
        (a_missing_package, 2, f"error: {sys.executable} has no package no_such_package; activate the project's"),
        (a_full_disk, 1, "error: some/file: No space left on device"),
        (interrupted, 130, "error: interrupted"),
    ],
)
def test_what_stops_a_command_is_told_in_one_line(call, main, status, expected):
    found, _, error, _ = call(PrepareConfig, main=main)
    assert found == status
    assert is_one_line(error.lstrip("\n"))  # click ends the line that shows ^C
    assert error.lstrip("\n").startswith(expected)


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), (processes.PARENT_REPORTS, "true")])
def test_of_the_processes_that_hear_an_interrupt_one_says_so(call, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    found, _, error, _ = call(PrepareConfig, main=interrupted)
    assert (found, error.strip()) == (130, "")


def names_an_address(config):
    sources.find("http://me:secret@host/records.json?token=secret", Path())


def logs_and_warns(config):
    address = "http://me:secret@host"
    warnings.warn(f"no answer from {address}", stacklevel=1)
    logging.getLogger("some.library").error("%s gives no answer", address)
    try:
        raise OSError(address)
    except OSError:
        logging.getLogger("some.library").exception("again")
    raise RuntimeError(address)  # none that this package raises: it is shown whole


@pytest.mark.parametrize(("main", "shown"), [(names_an_address, 1), (logs_and_warns, 4)])
def test_no_password_is_shown_in_errors_warnings_logs_and_tracebacks(call, monkeypatch, main, shown):
    logged = io.StringIO()
    monkeypatch.setattr(logging.getLogger("some.library"), "handlers", [logging.StreamHandler(logged)])
    found, _, error, _ = call(PrepareConfig, main=main)
    assert found != 0
    text = error + logged.getvalue()
    assert text.count("http://me:***@host") == shown
    assert "me:secret" not in text
    assert "=secret" not in text


def a_fault_of_ours(config):
    raise ValueError("a fault")


def a_missing_file(config):
    raise FileNotFoundError(errno.ENOENT, "a fault")


def a_missing_module(config):
    raise ModuleNotFoundError("a fault", name="plw_mlflow.missing")


@pytest.mark.parametrize("main", [a_librarys, a_fault_of_ours, a_missing_file, a_missing_module])
def test_a_fault_is_shown_with_its_traceback(call, main):
    status, _, error, _ = call(PrepareConfig, main=main)
    assert status == 1
    assert error.startswith("Traceback")
    assert f"in {main.__name__}" in error


def test_a_sweep_is_every_combination_curve_by_curve():
    sweep = SweepConfig(plw="0, 0.1,1", dataset="a,b", seed="1,2", method="lora", epochs=3)
    found = [(cell.seed, cell.dataset, cell.plw) for cell in sweep.cells()]
    assert found == [(seed, dataset, plw) for seed in (1, 2) for dataset in "ab" for plw in (0, 0.1, 1)]
    assert {(cell.method, cell.epochs, cell.model) for cell in sweep.cells()} == {("lora", 3, "toy")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"plw": "0,x"}, "plw must be numbers, got"),
        ({"plw": "0,-1"}, "plw must be a number of 0 or more, got -1"),
        ({"seed": "1,1.5"}, "seed must be whole numbers, got"),
        ({"plw": " , "}, "plw names nothing"),
        ({"plw": "0,,1"}, "plw has an empty place in its list, got 0,,1"),
        ({"epochs": "1,3,"}, "epochs has an empty place in its list, got 1,3,"),
        ({"method": "full,both"}, "method must be full or lora or dora or qlora, got both"),
        ({"tasks": ","}, "tasks must name at least one task"),
    ],
)
def test_a_sweep_refuses_what_a_cell_would(options, expected):
    with pytest.raises(ValueError, match=expected):
        SweepConfig(**options)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TrainConfig(lora_rank=4), ["lora-rank is 4, but has no effect with --method full"]),
        (MainConfig(lora_targets="q_proj"), ["lora-targets is q_proj, but has no effect with --method full"]),
        (TrainConfig(lora_rank=4, method="lora"), []),
        (TrainConfig(preset="huerta2024"), []),
        (TrainConfig(lora_rank=16, lora_alpha=32.0), []),  # as `mlflow run` passes on
        (TrainConfig(base_penalty_order=1.0), ["base-penalty-order is 1.0, but has no effect with --base-penalty 0.0"]),
        (TrainConfig(base_penalty_order=1.0, base_penalty=0.1), []),
        (SweepConfig(lora_rank="4,8"), ["lora-rank is 4,8, but has no effect with --method full"]),
        (SweepConfig(lora_rank="4,8", method="full,lora"), []),
        (SweepConfig(lora_alpha="16"), ["lora-alpha is 16.0, but has no effect with --method full"]),
        (SweepConfig(lora_alpha="32"), []),
    ],
)
def test_an_option_that_has_no_effect_is_told(config, expected):
    assert idle_options(config) == expected


def test_the_published_plws_are_the_default():
    published = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]  # arXiv:2401.13586v1, 3.1
    assert [float(plw) for plw in SweepConfig().plw.split(",")] == published


@pytest.mark.parametrize(
    ("config_type", "options", "is_enough"),
    [
        (EvaluateConfig, {}, False),
        (EvaluateConfig, {"run_id": "r", "model": "toy"}, False),
        (EvaluateConfig, {"run_id": "r"}, True),
        (AnalyzeConfig, {}, False),
        (AnalyzeConfig, {"scores": Path("a.csv"), "experiment": "e"}, False),
        (AnalyzeConfig, {"experiment": "e"}, True),
        (AnalyzeConfig, {"scores": Path("a.csv"), "power": True, "assume": "slope=1"}, False),
        (AnalyzeConfig, {"power": True, "assume": "slope=1"}, True),
    ],
)
def test_what_to_look_at_is_said_once(config_type, options, is_enough):
    if is_enough:
        config_type(**options)
    else:
        with pytest.raises(ValueError, match=r"^give "):
            config_type(**options)


def test_a_share_is_at_most_1():
    with pytest.raises(ValueError, match="plw must be at most 1 under loss-divisor share, got"):
        PrepareConfig(plw=1.5, loss_divisor="share")


def test_an_endpoint_has_a_models_name_and_a_tokenizer():
    EvaluateConfig(model="m", endpoint="http://here/v1", tokenizer="toy")
    with pytest.raises(ValueError, match="endpoint needs the name that its server has"):
        EvaluateConfig(run_id="r", endpoint="http://here/v1")
    for address in ("here:8000/v1", "here", "http:///v1"):
        with pytest.raises(ValueError, match="endpoint must be an address like http"):
            EvaluateConfig(model="m", endpoint=address)
    with pytest.raises(ValueError, match="eval-precision is for a model that is computed here"):
        EvaluateConfig(model="m", endpoint="http://here/v1", eval_precision="float32")
    with pytest.raises(ValueError, match="tokenizer is for the model of an endpoint"):
        EvaluateConfig(model="m", tokenizer="toy")


def test_the_identity_of_a_cell_leaves_out_what_changes_no_number():
    same = TrainConfig(output=Path("a"), checkpoint_dir=Path("b"), save_every=7, micro_batch_examples=4, lora_rank=3)
    assert config.digest(same.identity()) == config.digest(TrainConfig().identity())
    assert config.digest(MainConfig(tasks="x").identity()) == config.digest(TrainConfig().identity())
    assert config.digest(TrainConfig(plw=0.1).identity()) != config.digest(TrainConfig().identity())
    assert set(TrainConfig().identity()) >= {"plw", "seed", "method", "loss_divisor", "epochs", "learning_rate"}
    assert "micro_batch_examples" in TrainConfig(divisor_scope="micro-batch").identity()
    assert "micro_batch_examples" not in TrainConfig(divisor_scope="example").identity()
    assert "lora_rank" in TrainConfig(method="lora").identity()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "b899772cb04e1dd5"),
        ({"plw": 0.1, "seed": 7, "epochs": 1.0, "keep": 3, "processes": 2, "parallel": "fsdp2"}, "146ae5f98392c11f"),
        ({"preset": "huerta2024", "model": "llama-7b", "dataset": "AlpacaDataShort"}, "8a61274e7771a86b"),
        ({"preset": "huerta2024-lora", "lora_targets": "q_proj,v_proj", "template_weight": 0.5}, "a9d0f90645fd2565"),
        (
            {"mix": "toy-long", "mix_share": 0.25, "mix_invert": True, "drop_duplicates": True, "max_tokens": 256},
            "0e4bca11408d811f",
        ),
        (
            {"base_penalty": 0.1, "base_penalty_order": 1.0, "dropout": 0.1, "label_smoothing": 0.05},
            "4b4c11c02ac3c5de",
        ),
        (
            {"divisor_scope": "micro-batch", "packing": False, "micro_batch_examples": 4, "loss_divisor": "tokens"},
            "ab99a0703225a6a6",
        ),
        (
            {"method": "dora", "lora_rank": 8, "precision": "float32", "template": "chat", "max_records": 10},
            "22123169454ad8f0",
        ),
    ],
)
def test_the_identity_of_a_cell_is_what_it_was_when_checkpoints_were_first_stored(values, expected):
    """Another digest would make every checkpoint that is stored somewhere unknown to the command that wrote it."""
    assert config.digest(TrainConfig(**values).identity()) == expected


def test_a_field_without_help_would_be_noticed():
    @dataclass(frozen=True, kw_only=True)
    class Silent:
        """Nothing."""

        loud: int = 1
        """Heard."""
        quiet: int = 2

    assert field_help(Silent) == {"loud": "Heard."}


def test_a_forked_worker_dies_of_sigterm_like_any_other(tmp_path):
    """A pool ends its workers by SIGTERM; one that took it for an interrupt might wait for ever."""
    script = tmp_path / "command.py"
    script.write_text(
        "import multiprocessing, os, signal, time\n"
        "from plw_mlflow.command_line.cli import command\n"
        "from plw_mlflow.config import AnalyzeConfig\n"
        "@command(AnalyzeConfig)\n"
        "def main(config):\n"
        "    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler\n"
        "    ready, begun = os.pipe()\n"
        "    work = lambda: (os.write(begun, b'.'), time.sleep(60))\n"
        "    worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "    worker.start()\n"
        "    os.read(ready, 1)\n"
        "    worker.terminate()\n"
        "    worker.join()\n"
        "    print(worker.exitcode)\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--run-id", "x"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("-15\n", "", 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("toy", "toy"),
        ("meta-llama/Llama-2-7b-hf@01c7f73", "Llama-2-7b-hf"),
        ("/some/folder/stories260K-hf/", "stories260K-hf"),
        ("data/alpaca data.json.gz", "alpaca-data"),
        ("chats.parquet", "chats"),
        ("sums.csv.zst", "sums"),
        ("SUMS.CSV", "SUMS"),
        ("ünsinn", "ünsinn"),
        ("data/\u0075\u0308nsinn.json", "ünsinn"),  # as some file systems spell it
        ("指令.jsonl", "指令"),
        ("c/Данные v2.csv", "Данные-v2"),
        ("หนังสือ.json", "หนังสือ"),
        ("a:b'c", "a-b-c"),
        ("!?.json", "unnamed"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-7B-Instruct@main", "Qwen2.5-7B-Instruct"),
        ("toy-long + 0.7 toy-short inverted", "toy-long-0.7-toy-short-inverted"),
    ],
)
def test_short_name_suits_a_registered_model(name, expected):
    assert short_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../data/mine.jsonl", "mine.jsonl"),
        ("/data/mine two.csv.gz", "mine two.csv.gz"),
        ("data/mine.jsonl", "mine.jsonl"),
        ("C:/x/folder/", "folder"),
        ("toy-short", "toy-short"),
        ("AlpacaData", "AlpacaData"),
        ("tatsu-lab/alpaca", "tatsu-lab/alpaca"),
        ("meta-llama/Llama-2-7b-hf@01c7f73", "meta-llama/Llama-2-7b-hf@01c7f73"),
        ("./model", "model"),
    ],
)
def test_tables_name_a_file_without_its_folders(name, expected):
    assert shown_name(name) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a/long.json"),
        ({"invert": True}, "a/long.json inverted"),
        ({"mix": "b/short.csv", "mix_share": 0.7}, "a/long.json + 0.7 b/short.csv"),
        ({"mix": "a/long.json", "mix_invert": True}, "a/long.json + 0.5 a/long.json inverted"),
    ],
)
def test_a_data_set_is_named_by_what_is_done_to_it(options, expected):
    assert data_name("a/long.json", DataOptions(**options)) == expected
    short = expected.replace("a/long.json", "long").replace("b/short.csv", "short")
    assert data_name("a/long.json", DataOptions(**options), short_name) == short


@pytest.mark.parametrize("change", [{"mix_share": 0.3}, {"mix_invert": True}])
def test_what_concerns_a_second_data_set_needs_one(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name.replace('_', '-')} is .* there is no second data set"):
        PrepareConfig(**change)
    PrepareConfig(mix="toy-long", **change)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "full"}, "merged"),
        ({"method": "lora"}, "adapter"),
        ({"method": "dora"}, "adapter"),
        ({"method": "qlora"}, "merged"),
        ({"method": "lora", "add_pad_token": True}, "merged"),
        ({"method": "lora", "log_model": "merged"}, "merged"),
        ({"method": "full", "log_model": "none"}, "none"),
    ],
)
def test_what_mlflow_keeps_of_a_model_follows_the_method(values, expected):
    assert TrainConfig(**values).logged() == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"method": "full"}, "method full trains all weights"),
        ({"method": "qlora"}, "rounded to 4 bits"),
        ({"method": "lora", "add_pad_token": True}, "the token that add-pad-token gives"),
    ],
)
def test_an_adapter_that_would_not_be_the_model_is_refused(values, reason):
    with pytest.raises(
        ValueError, match=rf"^log-model adapter cannot be had: .*{reason}.*; use --log-model merged, or none$"
    ):
        TrainConfig(log_model="adapter", **values)


def test_names_say_first_what_differs():
    sweep = SweepConfig(plw="0.1,0", dataset="mine.jsonl", learning_rate="0.1,0.2", seed="2,3", invert="true,false")
    assert sweep.differing() == ["plw", "seed", "dataset", "learning_rate"]
    names = [cell.cell_name(sweep.differing()) for cell in sweep.cells()]
    assert names[0].startswith("plw 0.1 seed 2 mine inverted learning-rate 0.1 toy full")
    assert len(set(names)) == len(names) == 16
    assert sweep.sweep_name() == "mine inverted, mine plw 0,0.1"
    assert SweepConfig().sweep_name() == "toy-short, toy-long plw 0 to 1 (10)"
    assert MainConfig(plw=0.5).cell_name() == "plw 0.5 toy-short toy full seed 1234"
