"""Does what `pip install .` would install fit what the project is tested with, and does `plw` run its commands?"""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from plw_mlflow.config import CONFIGS
from tests.stores import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["study"], *EXTRAS["lora"]]]


def used():
    """The packages that the package uses and their versions, as conda.yaml has them."""
    part = re.search(r"# what the package uses\n(.*?)# what checks", (ROOT / "conda.yaml").read_text(), re.DOTALL)
    return dict(re.findall(r"- ([\w.-]+)==(\S+)", part[1]))


def test_each_package_that_is_used_is_required_in_a_range_that_has_the_version_tested():
    versions = used()
    assert {requirement.name for requirement in REQUIRED} == versions.keys()
    assert [str(each) for each in REQUIRED if not each.specifier.contains(versions[each.name])] == []


def plw(*arguments):
    command = [sys.executable, "-m", "entrypoints", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_plw_lists_the_commands():
    listed = plw()
    assert re.findall(r"^  (\w+) +[A-Z]", listed.stdout, re.MULTILINE) == sorted(CONFIGS)
    assert listed.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [(("train", "--help"), 0, "--plw"), (("train", "--plv", "1"), 2, "--plw"), (("trian",), 2, "no command 'trian'")],
)
def test_plw_runs_a_command(arguments, status, told):
    done = plw(*arguments)
    assert (done.returncode, told in done.stdout + done.stderr) == (status, True)
