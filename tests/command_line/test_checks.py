"""Is what can be known to be wrong said at the start, in one line, before anything is imported, loaded or opened?"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plw_mlflow.advice import exports
from plw_mlflow.command_line import checks
from plw_mlflow.config import (
    CONFIGS,
    AdviseConfig,
    AnalyzeConfig,
    EvaluateConfig,
    MainConfig,
    PrepareConfig,
    SweepConfig,
    TrainConfig,
)
from plw_mlflow.data import sources
from plw_mlflow.environment import outputs
from plw_mlflow.errors import did_you_mean
from plw_mlflow.evaluation import task_sets
from tests.stores import ROOT

HEAVY = ("torch", "mlflow", "transformers", "lm_eval", "datasets", "numpy", "pandas", "pyarrow")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with files of all kinds in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "scores.csv").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"prompt_input": ')
    (tmp_path / "list.json").write_text('["prompt_input"]')
    (tmp_path / "half.json").write_text(json.dumps({"prompt_input": "{instruction}{input}"}))
    (tmp_path / "latin.jinja").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "broken.jinja").write_text("{% for message in %}")
    (tmp_path / "tagged.jinja").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PrepareConfig(dataset="toy-shrt"), r"data set 'toy-shrt' is neither a file, .*did you mean '?toy-short"),
        (PrepareConfig(dataset="alpacadata"), r"did you mean '?AlpacaData"),
        (TrainConfig(dataset="recrods.jsonl"), r"did you mean '?records.jsonl"),
        (MainConfig(dataset="taken"), r"taken'? is a folder"),
        (MainConfig(mix="toy-lnog"), r"data set 'toy-lnog' is .*did you mean '?toy-long"),
        (SweepConfig(dataset="toy-short,toy-logn"), r"data set 'toy-logn' is"),
        (AdviseConfig(dataset="gone.csv"), r"data set 'gone.csv' is"),
        (MainConfig(model="tooy"), r"model 'tooy' is .*did you mean 'toy'\?"),
        (SweepConfig(model="toy,llama-2-7"), r"model 'llama-2-7' is .*'llama-2-7b'"),
        (
            MainConfig(model="./modle"),
            r"model './modle' is not a folder on this machine, .*'model'\? paths are relative to /",
        ),
        (MainConfig(model="taken"), r"folder taken holds no model: it has no config.json"),
        (MainConfig(model="model"), r"folder model holds no weights: .*; folder model holds no tokenizer"),
        (MainConfig(model="records.jsonl"), r"model records.jsonl is a file"),
        (MainConfig(model="adapter"), r"folder adapter holds no model"),
        (EvaluateConfig(model="taken"), r"folder taken holds no model"),
        (EvaluateConfig(model="m", endpoint="http://h/v1", tokenizer="taken"), r"folder taken holds no tokenizer"),
        (PrepareConfig(tokenizer="a/b/c"), r"tokenizer 'a/b/c' is not a folder"),
        (TrainConfig(template="alpaka"), r"there is no template 'alpaka'.*did you mean 'alpaca'"),
        (TrainConfig(template="borken.json"), r"there is no template .*did you mean 'broken.json'"),
        (TrainConfig(template="taken"), r"template taken is a folder"),
        (SweepConfig(template="broken.json"), r"template broken.json cannot be used: Expecting value"),
        (TrainConfig(template="list.json"), r"template list.json cannot be used: it must be one JSON object"),
        (TrainConfig(template="half.json"), r"template half.json lacks the field 'prompt_no_input'"),
        (TrainConfig(template="latin.jinja"), r"template latin.jinja cannot be used: 'utf-8'"),
        (TrainConfig(template="broken.jinja"), r"template broken.jinja is no Jinja: line 1"),
        (TrainConfig(template="chat"), r"tokenizer toy has no chat template"),
        (PrepareConfig(template="chat", tokenizer="adapter"), r"tokenizer adapter has no chat template"),
        (MainConfig(tasks="toy,toy_choise"), r"there is no task 'toy_choise'; the nearest are toy_choice.* lm_eval ls"),
        (MainConfig(tasks="xqzzy"), r"there is no task 'xqzzy'; the sets are toy, .*docs/evaluation.md"),
        (
            SweepConfig(tasks="xqzzy,hellaswagg"),
            r"no task 'xqzzy'; there is no task 'hellaswagg'; the nearest are hell",
        ),
        (EvaluateConfig(run_id="r", tasks="toy:toy_shrt"), r"set toy has no task 'toy_shrt'"),
        (EvaluateConfig(run_id="r", tasks="huerta2024-v1:truthfulqa_mc1"), r"counts in its set's score"),
        (MainConfig(tasks="piqa", data_dir=ROOT / "docs"), r"task piqa reads .*docs/piqa_valid.jsonl"),
        (AnalyzeConfig(scores=Path("records.csv")), r"scores records.csv is not a file \(did you mean 'records.jsonl'"),
        (AnalyzeConfig(scores=Path("taken")), r"scores taken is a folder"),
        (AdviseConfig(ratio=1.0, scores=Path("gone.csv")), r"scores gone.csv is not a file"),
        (MainConfig(dataset="x" * 300), r"xxx'?.*: File name too long"),
        (MainConfig(output=Path("records.jsonl")), r"output records.jsonl is not a folder"),
        (
            PrepareConfig(output=Path("records.jsonl/below")),
            r"output records.jsonl/below cannot be written to: Not a dir",
        ),
        (AnalyzeConfig(run_id="r", output=Path("/proc/new")), r"output /proc/new cannot be written to"),
        (
            EvaluateConfig(run_id="r", checkpoint_dir=Path("records.jsonl")),
            r"checkpoint-dir records.jsonl is not a fol",
        ),
        (SweepConfig(checkpoint_dir=Path("records.jsonl/c")), r"checkpoint-dir records.jsonl/c cannot be written to"),
        (AdviseConfig(dataset="toy-short", cache_dir=Path("/proc/c")), r"cache-dir /proc/c cannot be written to"),
    ],
)
def test_what_a_command_names_is_checked_at_its_start(folder, config, expected):
    with pytest.raises(ValueError, match=expected) as told:
        checks.check(config)
    assert "\n" not in str(told.value)


def test_everything_that_is_missing_is_said_at_once(folder):
    with pytest.raises(ValueError, match=r"toy-shrt.*alpaka.*tooy.*toy_choise"):
        checks.check(MainConfig(dataset="toy-shrt", model="tooy", template="alpaka", tasks="toy_choise"))
    assert not Path("checkpoints").exists()  # nothing is made for a command that cannot run


@pytest.mark.parametrize(
    "config",
    [
        MainConfig(),
        SweepConfig(model="toy,llama-7b,gpt2", tasks="toy,huerta2024-v4,arc_challenge"),
        SweepConfig(method="lora,qlora", engine="slurm"),  # whose machines may have GPUs
        MainConfig(dataset="records.jsonl", mix="owner/name@main", model="owner/name@main", output=Path("a/b")),
        TrainConfig(template="tagged.jinja", model="owner/name", tokenizer="toy"),
        PrepareConfig(template="chat", tokenizer="owner/name"),
        EvaluateConfig(model="adapter"),
        EvaluateConfig(model="models:/plw-toy/1"),
        EvaluateConfig(model="served", endpoint="http://h/v1"),
        AdviseConfig(ratio=1.0, dataset="a name"),
        AnalyzeConfig(experiment="e", output=Path("taken/report")),
    ],
)
def test_what_may_be_well_passes(folder, config):
    """Names that only the hub or a tracking server knows are not refused before they are looked for."""
    checks.check(config)


def test_a_file_that_may_not_be_read_is_said(folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ValueError, match=r"data set '?records.jsonl'? cannot be read: Permission denied"):
        sources.check("records.jsonl", None)
    for config in (AnalyzeConfig(scores=Path("records.jsonl")), TrainConfig(template="half.json")):
        with pytest.raises(ValueError, match="Permission denied"):
            checks.check(config)


def test_a_search_of_the_files_finds_every_task_that_the_harness_knows():
    """Of some folders: all of it takes seconds, and was compared once, with nothing missing of 14,683 names."""
    from lm_eval import tasks as harness

    folder = Path(harness.__file__).parent
    some = [folder / name for name in ("arc", "mmlu", "truthfulqa-multi", "translation", "paloma", "egymmlu")]
    manager = harness.TaskManager(include_path=[*some, task_sets.OWN_TASKS], include_defaults=False)
    assert len(manager.task_index) > 100
    assert set(manager.task_index) <= task_sets._names_in(*some, task_sets.OWN_TASKS)


def test_what_is_written_twice_is_the_same():
    assert checks.OUTPUTS[AdviseConfig] == exports.FILES
    assert checks.OUTPUTS.keys() == set(CONFIGS.values())


def test_what_a_command_reads_and_what_is_not_ours_is_not_replaced(folder):
    Path("out/model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out/model is there, and was not written by plw_mlflow"):
        checks.reserved_output(TrainConfig(output=Path("out"))).__enter__()
    shutil.copy("records.jsonl", "tasks.csv")
    with pytest.raises(ValueError, match=r"tasks.csv is there, and was not written by plw_mlflow"):
        checks.reserved_output(AnalyzeConfig(scores=Path("tasks.csv"), output=Path())).__enter__()
    outputs.write(Path("ours"), {"tasks.csv": b"x"})
    with pytest.raises(ValueError, match=r"ours/tasks.csv is read by this command, which would replace it"):
        checks.reserved_output(AnalyzeConfig(scores=Path("ours/tasks.csv"), output=Path("ours"))).__enter__()
    with checks.reserved_output(EvaluateConfig(model="toy", output=Path("ours"))):
        assert Path("ours/tasks.csv").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("dolly", ["Dolly", "AlpacaData"], " (did you mean 'Dolly'?)"),
        ("zzz", ["Dolly"], ""),
        ("toy", ["toy"], ""),  # what has the very name is not what is meant
    ],
)
def test_near_names_are_proposed(name, known, expected):
    assert did_you_mean(name, known) == expected


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_a_misspelt_name_costs_no_heavy_import(tmp_path):
    script = (
        "import sys, runpy\n"
        "sys.argv[1:] = ['--dataset', 'typo.jsonl', '--tasks', 'toy,hellaswagg', '--model', 'tooy']\n"
        "try:\n"
        "    runpy.run_module('entrypoints.main', run_name='__main__')\n"
        "finally:\n"
        f"    print(*[name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = start("-c", script, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.returncode, done.stdout) == (2, "\n")
    assert done.stderr.startswith("error: data set 'typo.jsonl' is neither a file")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "folder", "expected"),
    [
        (["-m", "entrypoints.main"], ROOT, "(source .venv/bin/activate), or set it up first (make setup)"),
        ([str(ROOT / "entrypoints/main.py")], ROOT, "(source .venv/bin/activate), or set it up first (make setup)"),
        (
            [str(ROOT / "entrypoints/main.py")],
            ROOT / "docs",
            f"(source {ROOT}/.venv/bin/activate), or set it up first (make -C {ROOT} setup)",
        ),
    ],
)
def test_a_python_without_the_packages_is_told_in_one_line(monkeypatch, command, folder, expected):
    monkeypatch.chdir(folder)
    done = start("-S", *command, PYTHONPATH="")  # without its site-packages
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no package" in done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_command_runs_as_a_file_too(tmp_path):
    done = start(str(ROOT / "entrypoints" / "evaluate.py"), "--model", "tooy", PYTHONPATH="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'toy'" in done.stderr
