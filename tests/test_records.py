"""Are good records read from every kind of file, and is every unusable one named by file and number?"""

import gzip
import hashlib
import json

import pytest

from plw_mlflow import records
from plw_mlflow.records import Record

GOOD = {"instruction": "Add.", "input": "2 2", "output": "4"}


def write(path, rows):
    """Rows as a JSON list, or as one a line, packed or not, as the file's name says; returns what was packed."""
    text = "\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz"])
def test_a_file_is_read_whole(tmp_path, name):
    rows = [GOOD, {"instruction": "Greet.", "output": "Hi"}, {"instruction": "Go.", "input": None, "output": "Gone"}]
    content = write(tmp_path / name, rows)
    source = records.load(str(tmp_path / name))
    assert source.records == [
        Record(f"{name}:1", "Add.", "2 2", "4"),
        Record(f"{name}:2", "Greet.", "", "Hi"),
        Record(f"{name}:3", "Go.", "", "Gone"),
    ]
    assert source.sha256 == hashlib.sha256(content).hexdigest()  # of what was packed, not of the packing
    assert source.skipped == []


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + json.dumps([GOOD]),
        "\ufeff" + json.dumps(GOOD),
        "\n\n" + json.dumps(GOOD) + "\r\n\r\n",
        " \n" + json.dumps([GOOD], indent=2),
    ],
)
def test_byte_order_marks_and_blank_lines_are_no_records(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode())
    assert [record.instruction for record in records.load(str(path)).records] == ["Add."]


def test_only_a_newline_ends_a_line(tmp_path):
    odd = "one\u2028two\u2029three\x85four\x1dfive"
    path = tmp_path / "data.jsonl"
    # JSON must escape \x1d; the other three may stand in its strings as they are, and str.splitlines cuts at them.
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in [GOOD | {"output": odd}, GOOD])
    path.write_text(text, encoding="utf-8", newline="")
    assert [record.output for record in records.load(str(path)).records] == [odd, "4"]


BAD_ROWS = [
    ({"instruction": "Add.", "response": "4"}, "lacks the field 'output' (it has 'instruction', 'response')"),
    ({}, "lacks the field 'instruction' (it has none)"),
    (["Add.", "4"], "is a JSON list"),
    (None, "is a JSON NoneType"),
    (GOOD | {"output": 4}, "has something other than text as its output"),
    (GOOD | {"input": 0}, "has something other than text as its input"),
    (GOOD | {"instruction": ["Add."]}, "has something other than text as its instruction"),
    (GOOD | {"output": ""}, "has an empty completion"),
    (GOOD | {"output": " \n\t"}, "has an empty completion"),
    (GOOD | {"output": None}, "has an empty completion"),
    (GOOD | {"instruction": " "}, "has an empty instruction"),
    (GOOD | {"output": "\ud83d"}, "has half a surrogate pair in its output"),
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl.gz"])
@pytest.mark.parametrize(("row", "fault"), BAD_ROWS)
def test_an_unusable_record_is_named_by_file_and_number(tmp_path, name, row, fault):
    path = tmp_path / name
    write(path, [GOOD, row, GOOD])
    with pytest.raises(ValueError, match="record 2") as raised:
        records.load(str(path))
    assert str(raised.value).startswith(f"{path}: record 2 {fault}")

    source = records.load(str(path), on_bad_record="skip")
    assert [record.id for record in source.records] == [f"{name}:1", f"{name}:3"]  # the numbers of the file
    assert len(source.skipped) == 1
    assert source.skipped[0].startswith(f"record 2 {fault}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"[]", "holds no usable record"),
        (b"hello", "record 1 is not JSON"),
        (json.dumps(GOOD).encode() + b"\n{", "record 2 is not JSON"),
        (b"[{]", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b'{"instruction": "\xff"}', "is not UTF-8 text: byte 17"),
        ("[]".encode("utf-16"), "is not UTF-8 text"),
        (gzip.compress(b"[]" * 99)[:-9], "is a damaged gzip file"),
        (gzip.compress(b"[]" * 99)[:12] + b"\xff" * 20, "is a damaged gzip file"),
        (b"\x1f\x8b", "is a damaged gzip file"),
    ],
)
def test_a_file_that_holds_no_records_is_refused_by_name(tmp_path, content, expected):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as raised:
        records.load(str(path))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("dataset", ["toy-shorter", "no/such/file.json", "."])
def test_an_unknown_data_set_is_refused_by_name(dataset):
    with pytest.raises(ValueError, match="is neither a file nor one of toy-short, toy-long") as raised:
        records.load(dataset)
    assert repr(dataset) in str(raised.value)


def test_max_records_counts_usable_ones_and_reads_no_further(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, [{}, GOOD, {}, GOOD, {}, GOOD])
    source = records.load(str(path), max_records=2, on_bad_record="skip")
    assert [record.id for record in source.records] == ["data.jsonl:2", "data.jsonl:4"]
    assert len(source.skipped) == 2


def test_a_file_of_nothing_but_bad_records_is_refused_even_when_skipping(tmp_path):
    path = tmp_path / "data.json"
    write(path, [{}, {}])
    with pytest.raises(ValueError, match=r"holds no usable record.*record 1 lacks the field"):
        records.load(str(path), on_bad_record="skip")
