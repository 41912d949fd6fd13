"""Does any string, given as any option, end in one line or in a config, and touch nothing but the folders it names?

Here, every string is tried with some of the options, and every option with some of the strings, as far as a command
goes before its work. All pairs are tried by `PLW_TEST_ALL=1`, in some minutes.
"""

import functools
import hashlib
import os
import random
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest

from plw_mlflow import drawing
from plw_mlflow.analysis import analyze, report, score_table
from plw_mlflow.command_line import checks
from plw_mlflow.command_line.options import Command, options
from plw_mlflow.config import CONFIGS, DataOptions
from plw_mlflow.data import prepare
from plw_mlflow.errors import UserError
from tests.conftest import byte_tokenizer

ODD = [
    "",
    " ",
    "-",
    "--",
    "--plw=0.9",
    ".",
    "..",
    "../..",
    "../outside/precious.txt",
    "~",
    "~root",
    "*",
    "?",
    "%s",
    "{0}",
]
ODD += [
    "a\x00b",
    "a\nb",
    "a\rb",
    "\t",
    "\x1b[2J",
    "\u202ecod.exe",
    "\ud800",
    "\ufdd05\ufdd1",
    "💥",
    "日本語",
    "１２",
    "é" * 300,
]
ODD += [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "| touch pwned",
    "'",
    '"',
    "''",
    "\\",
    "a b",
    "=1+1",
    "@",
    "@x",
]
ODD += [
    "x@y",
    "a/b",
    "a/b/c",
    "a/b@",
    "/etc/passwd",
    "/dev/null",
    "/dev/zero/x",
    "/proc/self/mem",
    "CON",
    "x" * 300,
    "x" * 5000,
]
ODD += [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "0x10",
    "1_000",
    "9" * 400,
    "True",
    "none",
    "null",
    ",",
    ",,a,,",
    "a=b",
    "toy",
]
ODD += [
    "http://me:secret@host/x",
    "file:///etc/passwd",
    "sqlite:///x.db",
    "models:/",
    "models:/X/1",
    "s3://x/y",
    "toy.jsonl",
]
ODD += ["given.jsonl", "given.json", "given.csv", "given.jinja", "link", "loop", "fifo", "folder", "unreadable"]
FOLDERS = {"output", "checkpoint_dir", "cache_dir"}  # options that name folders to be made
PAIRS = [(name, field.name, odd) for name, kind in CONFIGS.items() for field in fields(kind) for odd in ODD]
# What a command needs beside the option that is tried, so that it gets beyond its own demands.
BESIDE = {"evaluate": {"run_id": "r"}, "analyze": {"experiment": "e"}, "advise": {"ratio": "1"}}
BESIDE["verify"] = {"run_id": "r"}


def tree(folder):
    """Every path of a folder, with its kind, and its content or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        content = os.readlink(path) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path] = (kind, content)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, beside one that nobody has named."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious.txt").write_text("precious")
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "folder/scores.csv").write_text("mine")
    (here / "given.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (here / "given.json").write_text('{"prompt_input": 3}')
    (here / "given.csv").write_text("model,dataset\n")
    (here / "given.jinja").write_text("{% for %}")
    (here / "unreadable").write_bytes(b"\xff\xfe\x00")
    (here / "link").symlink_to(tmp_path / "outside")
    (here / "loop").symlink_to(here / "loop")
    os.mkfifo(here / "fifo")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/.cache"))
    (tmp_path / "home/.cache/plw_mlflow").mkdir(parents=True)
    return tmp_path


@functools.cache
def command(name):
    """A command up to its work."""

    @click.command(cls=Command)
    def parsed(**values):
        config = CONFIGS[name](**values)
        checks.check(config)
        with checks.reserved_output(config):
            pass

    for option in options(CONFIGS[name]):
        parsed = option(parsed)
    return parsed


def start(name, given):
    """Returns what a person would be told of a command, None if it would begin to work."""
    try:
        command(name).main(
            [f"--{key.replace('_', '-')}={value}" for key, value in given.items()], standalone_mode=False
        )
    except click.ClickException as error:
        return error.format_message()
    except UserError as error:
        return str(error)
    return None


def chosen():
    """All pairs, or some strings for every option."""
    if os.environ.get("PLW_TEST_ALL") == "1":
        return PAIRS
    draw = random.Random(0)
    return [
        (name, field.name, odd)
        for name, kind in CONFIGS.items()
        for field in fields(kind)
        # An unknown task costs a search of all of the harness's files.
        for odd in draw.sample(ODD, 1 if field.name == "tasks" else 3)
    ]


@pytest.mark.filterwarnings("ignore")
def test_no_string_as_any_option_ends_in_a_traceback_or_touches_what_it_does_not_name(place):
    before = tree(place)
    tried = chosen()
    assert {odd for *_, odd in tried} == {*ODD}
    told = 0
    for name, option, odd in tried:
        if option in FOLDERS and odd.startswith("/"):
            continue  # which names a folder outside the place
        what = f"{name} --{option}={odd!r}"
        try:
            message = start(name, BESIDE.get(name, {}) | {option: odd})
        except Exception as error:
            raise AssertionError(what) from error
        told += message is not None
        assert message is None or len(message) < 20_000, what
        after = tree(place)
        named = [place / "here/checkpoints"]  # by default
        if option in FOLDERS and odd and "\x00" not in odd:
            named += [Path(os.path.abspath(odd)), Path(os.path.realpath(odd))]  # a link stands for where it leads
        for path in before.keys() | after.keys():
            if before.get(path) != after.get(path):
                assert path not in before, f"{what} changed {path}"
                assert any(path.is_relative_to(one) or one.is_relative_to(path) for one in named), f"{what} made {path}"
        for path in sorted(after.keys() - before.keys(), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert told > len(tried) / 4
    assert not (place / "here/pwned").exists()


def test_no_name_of_a_file_ends_in_a_traceback_or_touches_another(place, monkeypatch):
    """Its records are prepared, or it is refused; only the cache, which is named, gets anything."""
    tokenizer = byte_tokenizer()
    content = "".join(f'{{"instruction": "Say {number}.", "output": "{number}"}}\n' for number in range(3))
    read = 0
    for odd in ODD:
        path = place / "here/names" / f"{odd}.jsonl"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        except (OSError, ValueError):  # no name of a file
            continue
        monkeypatch.chdir(path.parent)
        cache = place / "cache"
        before = {one: kept for one, kept in tree(place).items() if not one.is_relative_to(cache)}
        with suppress(UserError):
            found = prepare.run(os.path.relpath(path), tokenizer, DataOptions(cache_dir=cache, validation_share=0.5))
            read += found.profile.records == 3
        assert {one: kept for one, kept in tree(place).items() if not one.is_relative_to(cache)} == before, odd
        path.unlink()
    assert read > 30


@pytest.mark.slow
def test_no_name_of_a_task_or_data_set_ends_in_a_traceback_or_touches_another(place, monkeypatch):
    """Each is in a score table, and in the report of it."""
    for draw in ("svg", "png"):
        monkeypatch.setattr(drawing, draw, lambda figure: b"")
    names = [odd for odd in ODD if odd.strip() and len(odd) < 400 and odd.isprintable()]
    rows = [("m", names[plw % 2], plw / 10, 1, task, "acc", 0.5 + 0.01 * plw) for plw in range(16) for task in names]
    table = pd.DataFrame(rows, columns=["model", "dataset", "plw", "seed", "task", "metric", "score"])
    table["score"] += np.random.default_rng(0).normal(0, 0.01, len(table))
    table.to_csv(place / "here/scores.csv", index=False)
    before = tree(place)
    found = analyze.analyze(score_table.read_scores(place / "here/scores.csv"), draws=0)
    written = report.write(found, table, place / "here/report", "python -m entrypoints.analyze")
    assert {path.parent for path in written} == {place / "here/report"}
    after = tree(place)
    assert {path: kept for path, kept in after.items() if not path.is_relative_to(place / "here/report")} == before
    assert len(after) - len(before) == len(written) + 2  # the folder, and the list of what was written there
