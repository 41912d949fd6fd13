"""Both MLproject files pass on every option of every entry point, with the same names and defaults."""

import shlex
from dataclasses import fields
from pathlib import Path
from string import Formatter

import click
import pytest
import yaml

from plw_mlflow import __version__
from plw_mlflow.command_line.options import Command, options
from plw_mlflow.config import CONFIGS, TrainConfig, spell

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = {"MLproject": "", "local/MLproject": "cd .. && "}


def read(project):
    return yaml.safe_load((ROOT / project).read_text())


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(("name", "config_type"), CONFIGS.items())
def test_mlproject_passes_on_what_it_declares(project, name, config_type):
    entry = read(project)["entry_points"][name]
    flags = {field.name: f" --{field.name.replace('_', '-')}={{{field.name}}}" for field in fields(config_type)}
    passed_on = [field for _, field, _, _ in Formatter().parse(entry["command"]) if field]
    assert sorted(passed_on) == sorted(flags)
    assert all(flag in entry["command"] for flag in flags.values())
    defaults = {field: spec["default"] for field, spec in entry["parameters"].items()}
    assert defaults == {field.name: spell(field.default) for field in fields(config_type)}


@pytest.mark.parametrize("value", ["--plw=0.9", "-x", "", "yes --plw 0.9"])
def test_a_value_that_looks_like_an_option_is_none(value, capsys):
    """As `mlflow run -P invert=VALUE` has it run: the words of the command, as a shell makes them of a quoted value."""
    command = read("MLproject")["entry_points"]["train"]["command"].partition("entrypoints.train ")[2]
    given = {field.name: spell(field.default) for field in fields(TrainConfig)} | {"invert": value}
    words = shlex.split(command.format(**{name: shlex.quote(one) for name, one in given.items()}))

    @click.command(cls=Command)
    def parsed(**values):
        pytest.fail(f"was run with {values}")

    for option in options(TrainConfig):
        parsed = option(parsed)
    with pytest.raises(click.BadParameter, match=r"is not a valid boolean|a value is needed"):
        parsed.main(words, standalone_mode=False)


@pytest.mark.parametrize("project", PROJECTS)
def test_mlproject_has_the_entry_points(project):
    entries = read(project)["entry_points"]
    assert set(entries) == {"main", "prepare", "train", "evaluate", "analyze", "advise", "sweep", "verify"}
    for name, entry in entries.items():
        assert entry["command"].startswith(f"{PROJECTS[project]}python -m entrypoints.{name} ")


@pytest.mark.parametrize("config_type", CONFIGS.values())
def test_every_option_has_the_default_of_its_field(config_type):
    for field, decorate in zip(fields(config_type), options(config_type), strict=True):
        (option,) = decorate(lambda: None).__click_params__
        assert option.opts == [f"--{field.name.replace('_', '-')}"]
        assert (option.default or "") == spell(field.default)
        assert option.help.endswith((".", ")")), f"{field.name} has no line of help"


def test_docker_commands_hold_no_shell_operators():
    for entry in read("MLproject")["entry_points"].values():  # mlflow would run what follows one on the host
        assert not set("&|;<>$`") & set(entry["command"])


def test_the_image_is_tagged_with_the_version():
    assert read("MLproject")["docker_env"]["image"] == f"plw_mlflow:{__version__}"
    assert read("local/MLproject")["conda_env"] == "../conda.yaml"


def test_conda_yaml_gives_every_package_one_exact_version():
    (pip,) = (part["pip"] for part in read("conda.yaml")["dependencies"] if isinstance(part, dict))
    names = [line.split("==")[0].lower().replace("_", "-") for line in pip]
    assert all(line.count("==") == 1 for line in pip)
    assert len(names) == len(set(names))
    needed = {
        "torch",
        "transformers",
        "datasets",
        "peft",
        "accelerate",
        "mlflow",
        "lm-eval",
        "click",
        "docker",
        "scipy",
    }
    assert needed <= set(names)


def test_only_tracking_imports_mlflow():
    counts_what_stores_hold = ROOT / "benchmarks/sweeps.py"
    importers = {
        path.relative_to(ROOT).parent.as_posix()
        for folder in ("plw_mlflow", "entrypoints", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path != counts_what_stores_hold
        and any(line.strip().startswith(("import mlflow", "from mlflow")) for line in path.read_text().splitlines())
    }
    assert importers == {"plw_mlflow/tracking"}
