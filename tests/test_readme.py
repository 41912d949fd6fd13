"""Is what README and docs/ say true? Their commands are run, or at least checked, and the names in them are looked up.

A fence of commands (sh) or of code (python) is run, unless a comment right above it says otherwise:

    <!-- run by make test-slow -->    it takes seconds to a minute
    <!-- not run: REASON, REASON -->  it cannot be run here, for these of REASONS

The fences of a page run in order, in a copy of the project with a tracking store and with a reader's own files in it.
`RUN` in a fence stands for the id of the run that was printed last in a fence before. Every command, run or not, is
checked: its options, values, targets and modules must exist, and it must be of a program that is known here.
"""

import functools
import importlib
import itertools
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import click
import pytest
import yaml

import plw_mlflow
from plw_mlflow.command_line.options import options
from plw_mlflow.config import CONFIGS
from tests.stores import ROOT, Place

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {
    "cloud": "needs a server, a registry or a cluster",
    "Docker": "needs a Docker engine",
    "GPU": "needs one or more GPUs",
    "hub": "downloads models, data sets or benchmarks",
    "long": "takes half a minute or more of processor time",
    "server": "serves until it is stopped",
    "yours": "reads files or runs of the reader's",
}
SLOW = "run by make test-slow"
LANGUAGES = {"sh", "python", "text"}  # of which text is what a command prints
COPIED = ("Makefile", "README.md", "benchmarks", "conda.yaml", "docs", "entrypoints", "local", "paper", "plw_mlflow")
COPIED += ("replication",)
# Programs of others, whose options are not checked here.
OTHERS = {"curl", "docker", "export", "kubectl", "lm_eval", "pip", "python3", "source", "~/mlflow/bin/pip"}
MAKE = 'make() { if [ "$1" = test ]; then command make --dry-run test; else command make -o setup "$@"; fi; }\n'
OTHERS_OPTIONS = {"--allowed-hosts", "--build-image", "--env-manager", "--no-serve-artifacts", "--node-rank"}
OTHERS_OPTIONS |= {"--help", "--rdzv-backend"}
OTHERS_FOLDERS = {"mlruns", "checkpoints", ".cache", "output", "tags", "harness"}  # made by commands


@dataclass(frozen=True)
class Fence:
    """A block of a page between ``` and ```."""

    page: str
    line: int
    language: str
    marker: str  # of the comment above it; empty where there is none
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and not self.marker.startswith("not run: ")

    def commands(self) -> list[list[str]]:
        """The words of each command."""
        lines = self.text.replace("\\\n", "").splitlines() if self.language == "sh" else []
        return [words for line in lines if (words := shlex.split(line, comments=True))]


FENCE = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
FENCES = [
    Fence(page, text[: found.start()].count("\n") + 1, found[2], found[1] or "", found[3])
    for page, text in TEXTS.items()
    for found in FENCE.finditer(text)
]
PROSE = {page: FENCE.sub("", text) for page, text in TEXTS.items()}
CODE = {page: [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)] for page, text in PROSE.items()}


def fences_to_run(page: str, *, are_slow_wanted: bool) -> list[Fence]:
    return [f for f in FENCES if f.page == page and f.is_run and (are_slow_wanted or f.marker != SLOW)]


@pytest.fixture
def place(tmp_path):
    """A copy of the project with a tracking store and a reader's own files in it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    records = [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}"} for n in range(50)]
    (tmp_path / "my_instructions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Place(tmp_path)


def run(place: Place, fences: list[Fence]) -> None:
    """Run fences in order. make does not set up the environment, in which this runs, nor start the tests again."""
    run_id = "RUN"
    for fence in fences:
        text = re.sub(r"\bRUN\b", run_id, fence.text)
        if fence.language == "python":
            command = [sys.executable, "-c", text]
        else:
            command = ["bash", "-euo", "pipefail", "-c", MAKE + text]
        as_a_person_has_it = place.environment(PYTHONPATH="")
        del as_a_person_has_it["MLFLOW_EXPERIMENT_NAME"]
        done = subprocess.run(
            command, cwd=place.folder, env=as_a_person_has_it, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{fence.page}, line {fence.line}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        run_id = next(reversed(re.findall(r"^run (\w{32})$", done.stdout, re.MULTILINE)), run_id)


@pytest.mark.parametrize("page", [page for page in TEXTS if fences_to_run(page, are_slow_wanted=False)])
def test_quick_commands_run(page, place):
    run(place, fences_to_run(page, are_slow_wanted=False))


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({fence.page for fence in FENCES if fence.marker == SLOW}))
def test_all_commands_that_can_be_run_here_run(page, place):
    run(place, fences_to_run(page, are_slow_wanted=True))


@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: f"{fence.page}:{fence.line}")
def test_a_fence_is_run_or_says_why_not(fence):
    assert fence.language in LANGUAGES
    if fence.marker.startswith("not run: "):
        assert set(fence.marker.removeprefix("not run: ").split(", ")) <= REASONS.keys()
    elif fence.language == "text":
        assert fence.marker == ""
    else:
        assert fence.marker in ("", SLOW)


@pytest.mark.parametrize("page", TEXTS)
def test_code_stands_in_fences(page):
    """Commands in an indented block, or in a fence that is not closed, would escape the tests."""
    assert "```" not in PROSE[page]
    assert not re.findall(r"^(?: {4}|\t)(?! *[-*])", PROSE[page], re.MULTILINE)


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "sh"], ids=lambda f: f"{f.page}:{f.line}")
def test_commands_are_what_the_project_has(fence):
    for words in fence.commands():
        check(words)
        assert [word for word in words if is_missing_file(word)] == []


INLINE = [
    pytest.param(shlex.split(code), id=f"{page}: {code}")
    for page, codes in CODE.items()
    for code in dict.fromkeys(codes)
    if re.match(r"(OMP_NUM_THREADS=1 )?(python|make|mlflow|torchrun) |accelerate launch -m", code)
]


@pytest.mark.parametrize("words", INLINE)
def test_a_command_in_a_sentence_is_what_the_project_has(words):
    check(words, is_whole=False)


def check(words: list[str], *, is_whole: bool = True) -> None:
    """Fail where a command is of an unknown program or module, or has options, values or targets that are not there.

    is_whole: its values are there too, and not only names such as FILE in their place.
    """
    if "=" in words[0]:  # of the environment
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= {*targets}
    elif program in ("python", "torchrun", "accelerate"):
        module, *arguments = rest[rest.index("-m") + 1 :]
        check_module(module, arguments, is_whole)
    elif words[:2] == ["mlflow", "run"]:
        entry_point = rest[rest.index("-e") + 1] if "-e" in rest else "main"
        given = [value.partition("=") for flag, value in itertools.pairwise(rest) if flag == "-P"]
        arguments = [part for name, _, value in given for part in ("--" + name.replace("_", "-"), value)]
        check_module(f"entrypoints.{entry_point}", arguments, is_whole)
    else:
        assert program in {"mlflow", *OTHERS}, f"nothing is known of {program}"


@pytest.mark.parametrize(
    "command",
    [
        "frobnicate now",
        "make tset",
        "python -m entrypoints.main --plv 0.1",
        "python -m entrypoints.main --method nora",
        "python -m benchmarks.study --wrote docs",
        "mlflow run . -P plv=0.1",
        "mlflow run . -e prepare -P epochs=1",
        "torchrun --nnodes 2 -m entrypoints.train --plv 0.1",
    ],
)
def test_a_command_that_the_project_does_not_have_is_found(command):
    with pytest.raises((AssertionError, ValueError, click.ClickException)):
        check(shlex.split(command))


def check_module(module: str, arguments: list[str], is_whole: bool) -> None:
    package, _, name = module.partition(".")
    assert package in ("entrypoints", "benchmarks"), f"nothing is known of {module}"
    if name == "NAME":
        return
    known = options_of_benchmark(name) if package == "benchmarks" else options_of_entry_point(name)
    assert {word for word in arguments if word.startswith("--")} <= known | {"--help"}
    if is_whole and package == "entrypoints" and "--help" not in arguments:
        CONFIGS[name](**entry_point_command(name).make_context(name, list(arguments)).params)  # which checks the values


@functools.cache
def entry_point_command(name: str) -> click.Command:
    def nothing(**_):
        pass

    importlib.import_module(f"entrypoints.{name}")
    for option in options(CONFIGS[name]):
        nothing = option(nothing)
    return click.command()(nothing)


def options_of_entry_point(name: str) -> set[str]:
    return {flag for parameter in entry_point_command(name).params for flag in parameter.opts}


def options_of_benchmark(name: str) -> set[str]:
    """Read off its source, since importing a benchmark takes seconds."""
    return set(re.findall(r'"(--[a-z-]+)', (ROOT / f"benchmarks/{name}.py").read_text()))


@pytest.mark.parametrize("page", PROSE)
def test_an_option_in_a_sentence_exists(page):
    benchmarks = [path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")]
    known = OTHERS_OPTIONS.union(*map(options_of_entry_point, CONFIGS), *map(options_of_benchmark, benchmarks))
    assert {code.split()[0] for code in CODE[page] if code.startswith("--")} <= known


@pytest.mark.parametrize("page", PROSE)
def test_every_link_leads_somewhere(page):
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", PROSE[page])
    assert [name for name in linked if not (ROOT / page).parent.joinpath(name).exists()] == []


@pytest.mark.parametrize("page", PROSE)
def test_every_file_and_name_in_a_sentence_exists(page):
    assert [code for code in CODE[page] if is_missing_file(code) or is_missing_name(code)] == []


def is_missing_file(text: str) -> bool:
    """Whether a text is the path of a file or folder of the project, or a test's name, and there is none."""
    if re.fullmatch(r"test_\w+\.py", text):
        return not any((ROOT / "tests").rglob(text))
    folder = text.partition("/")[0]
    is_path = re.fullmatch(r"[\w-][\w.-]*/[\w./-]*", text) and (ROOT / folder).is_dir() and folder not in OTHERS_FOLDERS
    return bool(is_path) and not (ROOT / text).exists()


def is_missing_name(text: str) -> bool:
    """Whether a text is the dotted name of a module or function of the package, and there is none."""
    name = re.match(r"plw_mlflow(?:\.\w+)+", text)
    try:
        return name is not None and not pkgutil.resolve_name(name[0])
    except (ImportError, AttributeError):
        return True


def test_readme_lists_every_page():
    listed = re.findall(r"^\| \[(docs/[\w.]+)\]", TEXTS["README.md"], re.MULTILINE)
    assert sorted(listed) == sorted(TEXTS.keys() - {"README.md"})


def test_the_map_has_every_package_and_what_it_names_is_there():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", TEXTS["README.md"].partition("## Map")[2], re.MULTILINE)
    listed = {name for places, _ in rows for name in re.findall(r"`([^`]+)`", places)}
    assert [name for name in listed if not (ROOT / name).exists()] == []
    packages = {f"plw_mlflow/{path.parent.name}/" for path in (ROOT / "plw_mlflow").glob("*/__init__.py")}
    assert packages <= listed
    for places, words in rows:
        folder = ROOT / re.findall(r"`([^`]+)`", places)[0]
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", words):
            assert (folder / name).exists() or (ROOT / name).exists(), f"{name} is not in {folder}"


def test_readme_is_short():
    assert TEXTS["README.md"].count("\n") <= 145


def test_no_page_has_a_gap_left_to_fill():
    assert {page: found for page, text in TEXTS.items() if (found := re.findall(r"@[A-Z]{3,}@", text))} == {}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == plw_mlflow.__version__
    assert {"cff-version", "message", "title", "authors", "references"} <= citation.keys()
