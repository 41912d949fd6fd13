"""Is what was stored read back whole, once, whatever happens to the processes that store it?"""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow.config import DataOptions, PrepareConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.store import COUNTS, Examples, open_or_build
from plw_mlflow.environment import disk
from tests.conftest import byte_tokenizer, make_example
from tests.stores import ROOT

segments = st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=9)


def build_from(batches):
    """A function that stores batches of segment lists, with tokens that are all different."""

    def build(writer):
        number = 0
        for batch in batches:
            numbers = list(range(number + 1, number + 1 + len(batch)))
            examples = [make_example(np.arange(len(one)) + 100 * n, one) for n, one in zip(numbers, batch, strict=True)]
            bare = np.array([[n, 2 * n, 3 * n] for n in numbers])
            keys = [n.to_bytes(16) for n in numbers]
            writer.add(numbers, keys, [n % 2 == 0 for n in numbers], bare, examples, np.array(numbers))
            number += len(batch)
        return {"said": "of them"}

    return build


@given(st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 9))
def test_examples_come_back_as_they_were_stored(tmp_path_factory, batches, max_tokens):
    store = open_or_build(tmp_path_factory.mktemp("cache") / "store", build_from(batches))
    stored = [one for batch in batches for one in batch]
    rows = np.arange(len(stored))[::-1]
    examples = Examples([store], ["file"], np.zeros(len(rows), int), rows, max_tokens)
    assert len(examples) == len(stored)
    for index, row in enumerate(rows):
        assert examples.id(index) == f"file:{row + 1}"
        assert store[int(row)].segment.tolist() == stored[row]
        assert examples[index].segment.tolist() == stored[row][:max_tokens]
        assert examples[index].tokens.tolist() == [100 * (row + 1) + n for n in range(len(stored[row]))][:max_tokens]
    for name, expected in {
        "number": rows[::-1] + 1,
        "inverted": rows[::-1] % 2 == 1,
        "completion": 3 * (rows[::-1] + 1),
        "input_tokens": [one.count(2) for one in stored],
        "completion_tokens": [one.count(3) for one in stored],
        "length": [len(one) for one in stored],
    }.items():
        assert store.columns[name].tolist() == list(expected)
    assert store.columns["key"][-1].tobytes() == len(stored).to_bytes(16)
    assert all(store.columns[name].dtype == np.int32 for name in COUNTS)
    assert store.about["said"] == "of them"
    assert store.about["largest_token"] == max(100 * (row + 1) + len(stored[row]) - 1 for row in rows)


def test_the_digest_is_of_the_examples_and_not_of_how_they_were_written(tmp_path):
    def digest(name, batches):
        return open_or_build(tmp_path / name, build_from(batches)).about["digest"]

    assert digest("a", [[[1, 3]], [[0, 3]]]) == digest("b", [[[1, 3]], [[0, 3]]])
    assert len({digest(f"c{n}", [batch]) for n, batch in enumerate([[[1, 3]], [[0, 3]], [[1], [3]], [[1, 3, 3]]])}) == 4


def test_examples_cannot_be_written_to(tmp_path):
    store = open_or_build(tmp_path / "store", build_from([[[1, 3]]]))
    with pytest.raises(ValueError, match="read-only"):
        store[0].tokens[0] = 5


def test_a_file_is_stored_once(tmp_path):
    def never(writer):
        raise AssertionError("stored twice")

    open_or_build(tmp_path / "store", build_from([[[1, 3]]]))
    assert open_or_build(tmp_path / "store", never).about["said"] == "of them"


def test_what_could_not_be_finished_leaves_nothing_behind(tmp_path):
    def broken(writer):
        build_from([[[1, 3]]])(writer)
        raise ValueError("a bad record")

    with pytest.raises(ValueError, match="a bad record"):
        open_or_build(tmp_path / "store", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["store.lock"]
    assert open_or_build(tmp_path / "store", build_from([[[1, 3]]])).about["said"] == "of them"


def tree(folder):
    """Every name in a folder and below, with a file's content and a link's target."""

    def what(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): what(path) for path in sorted(folder.rglob("*"))}


BATCHES = [[[1, 3], [2, 2, 3]], [[1, 3, 3]]]


def retell(folder, **said):
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | said))


def change_examples(folder, column, change):
    """Write the stored table anew with one column changed, which all its readers take for well-formed."""
    file = folder / "examples.arrow"
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    place = table.schema.get_field_index(column)
    values = pa.array([change(value) for value in table[column].to_pylist()], table.schema.field(column).type)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.set_column(place, table.schema.field(column), values).to_batches():
            writer.write_batch(batch)


def flip_last_token(folder):
    content = (folder / "examples.arrow").read_bytes()
    last = np.array([302], np.int32).tobytes()  # of the third example
    assert content.count(last) == 1
    (folder / "examples.arrow").write_bytes(content.replace(last, np.array([303], np.int32).tobytes()))


def cut(folder):
    (folder / "examples.arrow").write_bytes((folder / "examples.arrow").read_bytes()[:-20])


DAMAGES = {
    "a token": flip_last_token,
    "tokens": lambda folder: change_examples(folder, "tokens", lambda tokens: [t + 1 for t in tokens]),
    "segments": lambda folder: change_examples(folder, "segment", lambda segment: segment[::-1]),
    "numbers": lambda folder: change_examples(folder, "number", lambda number: number + 7),
    "keys, which decide the split": lambda folder: change_examples(folder, "key", lambda key: b"x" * 16),
    "what is inverted": lambda folder: change_examples(folder, "inverted", lambda inverted: not inverted),
    "counts": lambda folder: change_examples(folder, "length", lambda length: 1),
    "what is said of them": lambda folder: retell(folder, said="of others"),
    "their digest": lambda folder: retell(folder, digest="0" * 64),
    "the largest token": lambda folder: retell(folder, largest_token=1),
    "an end that is missing": cut,
    "an empty file": lambda folder: (folder / "examples.arrow").write_bytes(b""),
    "no examples": lambda folder: (folder / "examples.arrow").unlink(),
    "no sums, as in earlier versions": lambda folder: (folder / "SHA256SUMS").unlink(),
    "other sums": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff"),
    "no folder but a file": lambda folder: folder.rename(f"{folder}.old") and folder.write_text("a file"),
    "a link that leads nowhere": lambda folder: folder.rename(f"{folder}.old") and folder.symlink_to("nowhere"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_as_it_was_stored_is_made_anew(damage, tmp_path):
    folder = tmp_path / "store"
    whole = open_or_build(folder, build_from(BATCHES)).about
    expected = tree(folder)
    damage(folder)
    with pytest.warns(UserWarning, match=r"stored in .*store cannot be used \(.*\); it is made again") as told:
        assert open_or_build(folder, build_from(BATCHES)).about == whole
    assert len(told) == 1
    assert tree(folder) == expected
    assert open_or_build(folder, None).about == whole  # and now it is there


def test_the_sums_are_those_of_sha256sum(tmp_path):
    open_or_build(tmp_path / "store", build_from(BATCHES))
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "store" / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        name: hashlib.sha256((tmp_path / "store" / name).read_bytes()).hexdigest()
        for name in ("about.json", "examples.arrow")
    }


@pytest.mark.parametrize("is_damaged", [False, True])
def test_several_that_want_the_same_at_once_make_it_once(is_damaged, tmp_path, recwarn):
    if is_damaged:
        open_or_build(tmp_path / "store", build_from(BATCHES))
        cut(tmp_path / "store")
    builds = []

    def build(writer):
        builds.append(writer)
        time.sleep(0.1)
        return build_from(BATCHES)(writer)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: open_or_build(tmp_path / "store", build), range(4)))
    assert len(builds) == 1
    assert len({one.about["digest"] for one in found}) == 1
    assert len(recwarn) == is_damaged


@contextmanager
def files_of_at_most(size):
    """Within the block, no file can be written beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WHOLE = [[[1, 3] * 500], [[2, 3] * 500]]


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("size", [0, 100, 4000, 12_000])  # within the head, a batch, another, and the end
def test_a_full_disk_is_said_in_one_line_and_nothing_is_left_half_written(size, is_damaged, tmp_path):
    if is_damaged:
        open_or_build(tmp_path / "store", build_from(WHOLE))
        assert size < (tmp_path / "store" / "examples.arrow").stat().st_size
        cut(tmp_path / "store")
    (tmp_path / "store.lock").touch()
    before = tree(tmp_path)
    told = pytest.raises(ValueError, match=r"^the cache .* cannot be written to \(.*--cache-dir$")
    with warnings.catch_warnings(action="ignore"), told as error, files_of_at_most(size):
        open_or_build(tmp_path / "store", build_from(WHOLE))
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_nor_where_the_disk_is_full_at_the_very_end(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"cannot be written to \(\[Errno 28\] No space left on device\)"):
        open_or_build(tmp_path / "store", build_from(BATCHES))
    assert list(tree(tmp_path)) == ["store.lock"]


def test_an_error_of_the_reading_stays_what_it_is(tmp_path):
    def build(writer):
        build_from(BATCHES)(writer)
        raise FileNotFoundError("the data set is gone")

    with pytest.raises(FileNotFoundError, match="the data set is gone"):
        open_or_build(tmp_path / "store", build)


@pytest.fixture
def read_only(monkeypatch):
    """A function after which nothing can be created or changed."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    def begin():
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        monkeypatch.setattr(disk, "FileLock", refuse)

    return begin


def test_what_is_stored_is_read_where_nobody_may_write(tmp_path, read_only):
    options = DataOptions(cache_dir=tmp_path, max_records=50)
    expected = prepare.run("toy-short", byte_tokenizer(), options)
    before = tree(tmp_path)
    read_only()
    found = prepare.run("toy-short", byte_tokenizer(), PrepareConfig(cache_dir=tmp_path, max_records=50))
    assert found.digest == expected.digest
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match=r"the cache .* cannot be written to .*Read-only file system.*--cache-dir"):
        prepare.run("toy-long", byte_tokenizer(), options)


def test_links_are_not_written_through(tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other"
    cache.mkdir()
    other.mkdir()
    (other / "examples.arrow").write_text("the user's")
    before = tree(other)
    (cache / "store.unfinished").symlink_to(other)
    open_or_build(cache / "store", build_from(BATCHES))
    (cache / "more.lock").symlink_to(other / "examples.arrow")
    with pytest.raises(ValueError, match="cannot be written to"):
        open_or_build(cache / "more", build_from(BATCHES))
    (cache / "most").symlink_to(other)  # where it is read, but is nothing of ours
    with pytest.warns(UserWarning, match="it is made again"):
        open_or_build(cache / "most", build_from(BATCHES))
    assert tree(other) == before


PREPARE = """
import sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from plw_mlflow.data import files, prepare
from plw_mlflow.config import DataOptions

read = files.rows
def slowly(*given):  # and saying so
    for row in read(*given):
        print("row", flush=True)
        time.sleep(0.02)
        yield row
files.rows = slowly

data, cache, tokenizer = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
print("ready", flush=True)
sys.stdin.readline()
found = prepare.run(data, tokenizer, DataOptions(cache_dir=Path(cache), validation_share=0.2))
print("digest", found.digest, len(found.training), sum(int(example.tokens.sum()) for example in found.training))
"""


@pytest.fixture
def preparing(tmp_path):
    """A function that gives so many processes which will prepare one data set, slowly, when they are told to."""
    data = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Add {number}.", "output": str(number)} for number in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-c", PREPARE, data, tmp_path / "cache", ROOT / "plw_mlflow" / "assets" / "toy"]

    def start(count):
        pipe = subprocess.PIPE
        processes = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return processes

    return start


def test_processes_that_want_the_same_at_once_make_it_once(preparing):
    processes = preparing(3)
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(lines.count("row") for lines in said) == [0, 0, 80]  # once to find out the format
    assert len({lines[-1] for lines in said}) == 1


def test_a_process_that_is_killed_is_in_nobodys_way(preparing, tmp_path):
    (process,) = preparing(1)
    for _ in range(5):
        assert process.stdout.readline() == "row\n"
    process.kill()
    process.communicate()
    assert list((tmp_path / "cache" / "examples").glob("*.unfinished"))
    (process,) = preparing(1)
    assert process.communicate(timeout=120)[0].count("row") == 80
    assert not list((tmp_path / "cache" / "examples").glob("*.unfinished"))
