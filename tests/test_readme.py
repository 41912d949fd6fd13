"""Do README and the pages with commands tell of what is there?  (CI itself runs those of README's first block.)"""

import importlib
import re
import shlex

import pytest

from plw_mlflow.command_line.options import options
from plw_mlflow.config import CONFIGS
from tests.stores import ROOT

README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "docs" / page).read_text() for page in ("cloud.md", "power.md"))
COMMANDS = re.findall(
    r"^(?:make|python -m|mlflow run|source|mlflow ui)[^\n#]*", PAGES.replace("\\\n", ""), re.MULTILINE
)
ENTRY_POINTS = [command for command in COMMANDS if command.startswith("python -m entrypoints.")]


@pytest.mark.parametrize("command", ENTRY_POINTS)
def test_a_command_has_the_options_it_is_given(command):
    name, *given = shlex.split(command)[2:]
    name = name.removeprefix("entrypoints.")
    importlib.import_module(f"entrypoints.{name}")
    known = {flag for decorate in options(CONFIGS[name]) for flag in decorate(lambda: None).__click_params__[0].opts}
    assert {part for part in given if part.startswith("--")} <= known


@pytest.mark.parametrize("target", [command.split()[1] for command in COMMANDS if command.startswith("make")])
def test_a_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("parameter", re.findall(r"-P (\w+)=", PAGES))
def test_a_parameter_of_mlflow_run_exists(parameter):
    assert parameter in CONFIGS["main"].__dataclass_fields__


def test_there_are_commands_to_look_at():
    assert len(ENTRY_POINTS) >= 3
    assert {"make run", "make test"} <= {command.strip() for command in COMMANDS}


def test_every_file_it_names_exists():
    linked = re.findall(r"\]\((?!http)([^)]+)\)", README)
    mapped = re.findall(r"`([^`]+)`", README.partition("## Map")[2])
    modules = [name if "/" in name else f"plw_mlflow/{name}" for name in mapped if name.endswith((".py", "/"))]
    missing = [
        name for name in [*linked, *modules] if not (ROOT / name).exists() and not (ROOT / "plw_mlflow" / name).exists()
    ]
    assert linked
    assert modules
    assert missing == []


def test_it_has_no_gap_left_to_fill():
    assert not re.findall(r"@[A-Z]{3,}@", README)
