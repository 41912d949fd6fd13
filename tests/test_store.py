"""Is what was stored read back whole, once, whatever happens to the processes that store it?"""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow.store import COUNTS, Examples, once
from tests.conftest import make_example
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
            writer.add(numbers, keys, [n % 2 == 0 for n in numbers], bare, examples)
            number += len(batch)
        return {"said": "of them"}

    return build


@given(st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 9))
def test_examples_come_back_as_they_were_stored(tmp_path_factory, batches, max_tokens):
    store = once(tmp_path_factory.mktemp("cache") / "store", build_from(batches))
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
        return once(tmp_path / name, build_from(batches)).about["digest"]

    assert digest("a", [[[1, 3]], [[0, 3]]]) == digest("b", [[[1, 3]], [[0, 3]]])
    assert len({digest(f"c{n}", [batch]) for n, batch in enumerate([[[1, 3]], [[0, 3]], [[1], [3]], [[1, 3, 3]]])}) == 4


def test_examples_cannot_be_written_to(tmp_path):
    store = once(tmp_path / "store", build_from([[[1, 3]]]))
    with pytest.raises(ValueError, match="read-only"):
        store[0].tokens[0] = 5


def test_a_file_is_stored_once(tmp_path):
    def never(writer):
        raise AssertionError("stored twice")

    once(tmp_path / "store", build_from([[[1, 3]]]))
    assert once(tmp_path / "store", never).about["said"] == "of them"


def test_what_could_not_be_finished_leaves_nothing_behind(tmp_path):
    def broken(writer):
        build_from([[[1, 3]]])(writer)
        raise ValueError("a bad record")

    with pytest.raises(ValueError, match="a bad record"):
        once(tmp_path / "store", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["store.lock"]
    assert once(tmp_path / "store", build_from([[[1, 3]]])).about["said"] == "of them"


def test_a_damaged_file_is_told_with_the_way_out(tmp_path):
    once(tmp_path / "store", build_from([[[1, 3]]]))
    content = (tmp_path / "store" / "examples.arrow").read_bytes()
    for damaged in (b"", content[:-20], b"{}"):
        (tmp_path / "store" / "examples.arrow").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"store cannot be read .*remove that folder"):
            once(tmp_path / "store", build_from([]))


PREPARE = """
import sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from plw_mlflow import formats, prepare
from plw_mlflow.config import DataOptions

read = formats.rows
def slowly(path):  # and saying so
    for row in read(path):
        print("row", flush=True)
        time.sleep(0.02)
        yield row
formats.rows = slowly

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
    assert sorted(lines.count("row") for lines in said) == [0, 0, 40]
    assert len({lines[-1] for lines in said}) == 1


def test_a_process_that_is_killed_is_in_nobodys_way(preparing, tmp_path):
    (process,) = preparing(1)
    for _ in range(5):
        assert process.stdout.readline() == "row\n"
    process.kill()
    process.communicate()
    assert list((tmp_path / "cache" / "examples").glob("*.unfinished"))
    (process,) = preparing(1)
    assert process.communicate(timeout=120)[0].count("row") == 40
    assert not list((tmp_path / "cache" / "examples").glob("*.unfinished"))
