"""Is every usual file read row by row, its format found out, and each unusable record named by its number?"""

import csv
import gzip
import io
import itertools
import json
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from plw_mlflow.data import formats
from plw_mlflow.data.records import Fault, Message, Record
from plw_mlflow.environment import bounded

GOOD = {"instruction": "Add.", "input": "2 2", "output": "4"}
CHAT = [{"role": "user", "content": "Add 2 2."}, {"role": "assistant", "content": "4"}]


def gz(content):
    return gzip.compress(content, mtime=0)  # without the time of day, which would be in the names of the tests


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


def read(path, content):
    path.write_bytes(content)
    return list(formats.rows(path))


def as_list(rows):
    return json.dumps(rows).encode()


def as_lines(rows):
    return "\n".join(map(json.dumps, rows)).encode()


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, zstd, lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:])]
)
@pytest.mark.parametrize(("name", "write"), [("a.json", as_list), ("a.jsonl", as_lines), ("a.csv.gz", as_csv)])
def test_a_file_is_read_whole_whatever_it_is_packed_in(tmp_path, name, write, pack):
    rows = [GOOD, GOOD | {"instruction": 'Say "a,\nb".', "input": "", "output": "é 🦔\u2028 \x85"}]
    assert read(tmp_path / name, pack(write(rows))) == rows


def test_parquet_is_known_by_its_content(tmp_path):
    rows = [{"messages": CHAT, "source": "a"}, {"messages": CHAT * 2, "source": None}] * 700
    assert read(tmp_path / "data", as_parquet(rows)) == rows


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5), st.integers(1, 9))
def test_a_list_is_read_the_same_in_parts_of_any_size(tmp_path_factory, rows, chunk):
    path = tmp_path_factory.mktemp("parts") / "data.json"
    for text in (json.dumps(rows, indent=1), json.dumps(rows, ensure_ascii=False), json.dumps([rows, 12345, "x\\"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "CHUNK", chunk)
            path.write_bytes(text.encode())
            assert list(formats.rows(path)) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + json.dumps([GOOD]),
        "\ufeff" + json.dumps(GOOD),
        "\n\n" + json.dumps(GOOD) + "\r\n\r\n",
        " \n" + json.dumps([GOOD], indent=2) + "\n",
        " " * 9000 + json.dumps([GOOD]),
    ],
)
def test_byte_order_marks_and_blank_lines_are_no_rows(tmp_path, text):
    assert read(tmp_path / "data", text.encode()) == [GOOD]


def test_a_field_or_column_that_is_there_twice_is_refused(tmp_path):
    twice = b'{"instruction": "Add.", "output": "4", "output": "5"}'
    expected = [Fault("has the field 'output' twice"), GOOD]
    for content in (b"[" + twice + b"," + as_lines([GOOD]) + b"]", twice + b"\n" + as_lines([GOOD])):
        assert read(tmp_path / "data", content) == expected
    (row,) = read(tmp_path / "data", b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}')
    assert formats.record(row, "f:1", "chat") == Fault("has the field 'content' twice in turn 1")
    with pytest.raises(ValueError, match=r"data.csv has the column 'output' twice; rename or remove one"):
        read(tmp_path / "data.csv", b"instruction,output,output\nAdd.,4,5\n")

    for name, columns in (("x", ["x", "x"]), ("messages", ["messages"])):
        values = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
        lists = pa.ListArray.from_arrays([0, 1], values)
        arrays = [pa.array(["a"]), pa.array(["b"])] if name == "x" else [lists]
        file = io.BytesIO()
        parquet.write_table(pa.Table.from_arrays(arrays, names=columns), file)
        with pytest.raises(ValueError, match=r"data has the column 'x' twice; rename or remove one"):
            read(tmp_path / "data", file.getvalue())


def test_an_object_over_several_lines_is_a_row(tmp_path):
    """As jq writes them, one after another."""
    rows = [GOOD, GOOD | {"input": "3 3"}]
    for some in (rows[:1], rows):
        for pack in (bytes, gzip.compress):
            content = "\n".join(json.dumps(row, indent=2) for row in some)
            assert read(tmp_path / "data.json", pack(content.encode())) == some
            assert read(tmp_path / "data.json", pack(("\ufeff\n" + content + "\n\n").encode())) == some
    with pytest.raises(ValueError, match="record 2 is not JSON"):
        read(tmp_path / "data.json", json.dumps(GOOD, indent=1).encode() + b"\n{")


def test_an_object_around_the_records_is_told_with_its_field():
    assert formats.detect([{"data": GOOD["output"], **GOOD}], "data") == "alpaca"
    for rows in ([GOOD], [{"messages": CHAT}]):
        with pytest.raises(
            ValueError, match=r"is one JSON object, which holds its records in the list 'train'; .* its own$"
        ):
            formats.detect([{"version": 1, "train": rows}], "data.json")
    with pytest.raises(ValueError, match="of no known format"):
        formats.detect([{"data": [{"question": "a"}]}], "data.json")


def test_many_fields_are_not_all_told():
    with pytest.raises(ValueError, match=r"'19', \.\.\.\)") as raised:
        formats.detect([{str(number): GOOD for number in range(1000)}], "data.json")
    assert len(str(raised.value)) < 600


def test_what_parts_columns_is_told_by_the_last_ending_before_that_of_the_packing(tmp_path):
    tabs = as_csv([GOOD]).replace(b",", b"\t")
    for name in ("a.tsv", "a.json.TSV", "a.tsv.gz"):
        assert read(tmp_path / name, gz(tabs) if name.endswith("gz") else tabs) == [GOOD]
    for name in ("export.csv.json", "export.csv", "export.csv.gz", "export.jsonl.csv.zst"):
        write = as_list if name.endswith("json") else as_csv
        assert read(tmp_path / name, write([GOOD])) == [GOOD]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PK\x03\x04 and so on", "is a ZIP archive, as Excel's .xlsx files are; unpack it"),
        (b"BZh9 and so on", "is packed by bzip2; unpack it"),
        (b"ARROW1 and so on", "is an Arrow file; save it as Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer that Git LFS has left"),
        (b"<!DOCTYPE html>", "is a web page; download the file itself"),
        (b"\0" * 257 + b"ustar", "is a tar archive; unpack it"),
        (gz(b"\0" * 257 + b"ustar" + b"\0" * 9), "is a tar archive; unpack it"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, expected):
    for name in ("data.jsonl", "data.csv"):
        with pytest.raises(ValueError, match=rf"{name} {expected}"):
            read(tmp_path / name, content)


@pytest.mark.parametrize("write", [as_list, as_lines])
def test_json_that_is_called_csv_is_told(tmp_path, write):
    with pytest.raises(ValueError, match=r"data.csv is JSON by its content, but CSV or TSV by its name; rename it"):
        read(tmp_path / "data.csv", write([GOOD]))


@pytest.mark.parametrize("write", [as_list, as_lines, as_csv])
def test_a_line_of_a_megabyte_is_a_row(tmp_path, write):
    long = GOOD | {"output": "ä" * 1_000_000}
    path = tmp_path / "data.csv" if write is as_csv else tmp_path / "data"
    assert bounded_rows(path, write([GOOD, long, GOOD]), 10_000_000) == [GOOD, long, GOOD]


def test_rows_come_before_the_file_has_been_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(as_list([GOOD])[:-1] + b"," + as_list([GOOD] * 100_000)[1:] + b"broken")
    assert next(formats.rows(path)) == GOOD


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (gz(b""), "is empty"),
        (b"[{]", "record 1 is not JSON: Expecting property name"),
        (b'[{"a": "b}, {"a": "b"}]', "record 1 is not JSON: Expecting ',' delimiter"),
        (b'[{"a": 1}', "record 1 is the last thing in the file"),
        (b'[{"a": 1}, {"a": "x', "record 2 is not JSON: Unterminated string"),
        (b'[{"a": 1} {"a": 1}]', "record 1 is followed by '{'"),
        (b'[{"a": 1},]', "record 2 is not JSON"),
        (b"[] []", "something follows the end"),
        (b"[" * 100_000, "record 1 is not JSON"),
        (b"[" + b"9" * 5000 + b"]", "record 1 is not JSON"),
        (b'[{"a": "\xff"}]', "is not UTF-8 text: byte 8"),
        (b'[{"a": "\xc3', "is not UTF-8 text: byte 8"),
        (gz(b"[]" * 99)[:-9], "is a damaged gzip file"),
        (gz(b"[]" * 99)[:12] + b"\xff" * 20, "is a damaged gzip file"),
        (b"\x1f\x8b", "is a damaged gzip file"),
        (zstd(b"[]" * 99)[:-3], "is a damaged zstd file"),
        (gz(b"[]" * 99)[:-9], "; get it again$"),
        (b'[{"a": "\xff"}]', "; save it as UTF-8$"),
        (b"PAR1 and no more", "is a damaged Parquet file .*; get it again$"),
        (gz(b"PAR1 and more"), "Parquet is not read packed; unpack it"),
    ],
)
def test_what_cannot_be_read_on_is_refused_by_name(tmp_path, content, expected):
    with pytest.raises(ValueError, match=expected) as raised:
        read(tmp_path / "data", content)
    assert str(tmp_path / "data") in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'a,b\n1,2\n"3,4\n', "record 2 is not CSV"),
        (b"a,b\n\xff,2\n", "is not UTF-8 text, soon after record 0 .*; save it as UTF-8"),
        (b"a;b\n1;2\n", "holds ';'; the delimiter must be a comma"),
        (b"a\tb\n1\t2\n", r"holds '\\t'; the delimiter must be a comma; call it .tsv"),
    ],
)
def test_so_is_a_broken_csv(tmp_path, content, expected):
    with pytest.raises(ValueError, match=expected):
        read(tmp_path / "data.csv", content)


def test_the_lines_after_a_broken_one_are_read(tmp_path):
    rows = read(tmp_path / "data.jsonl", b'{"a": 1}\n{\n\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    assert [row for row in rows if not isinstance(row, Fault)] == [{"a": 1}, {"a": 2}]
    assert [row.text[:20] for row in rows[1:4]] == [
        "is not JSON: Expecti",
        "is not UTF-8 text: i",
        "is not JSON: maximum",
    ]


def test_so_are_those_after_a_csv_line_of_another_width(tmp_path):
    rows = read(tmp_path / "data.csv", b"a,b\n1,2\n\n1\n1,2,3\n3,4\n")
    assert rows == [
        {"a": "1", "b": "2"},
        Fault("has 1 columns, where the first line names 2"),
        Fault("has 3 columns, where the first line names 2"),
        {"a": "3", "b": "4"},
    ]


ROWS = {
    "alpaca": [GOOD, {"instruction": "Add.", "output": "4"}, GOOD | {"input": None}],
    "dolly": [{"instruction": "Add.", "context": "2 2", "response": "4", "category": "sums"}],
    "prompt-completion": [{"prompt": "Add 2 2.", "completion": "4"}],
    "chat": [{"messages": CHAT}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
}


@pytest.mark.parametrize(("format", "rows"), ROWS.items())
def test_a_format_is_known_by_its_fields(format, rows):
    for row in rows:
        assert formats.detect([{}, row, row, None, {"prompt": "other"}], "data") == format


def test_blank_lines_before_the_names_of_columns_are_no_names(tmp_path):
    assert read(tmp_path / "data.csv", b"\n\r\n" + as_csv([GOOD])) == [GOOD]


def test_a_file_whose_name_shouts_is_csv_too(tmp_path):
    assert read(tmp_path / "DATA.CSV", as_csv([GOOD])) == [GOOD]


def test_a_field_without_a_value_says_nothing_of_the_format():
    """Parquet files made of several kinds of rows have the fields of all in each."""
    row = dict.fromkeys(["instruction", "output", "messages"]) | {"conversations": CHAT}
    assert formats.detect([row], "data") == "chat"
    assert formats.record(row, "f:1", "chat") == formats.record({"messages": CHAT}, "f:1", "chat")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data holds no record"),
        (
            [Fault("is not JSON: a"), Fault("is not JSON: b")],
            r"data: record 1 is not JSON: a \(a file is read as JSON unless its name ends in .csv or .tsv, .*\)",
        ),
        (["a", Fault("is not JSON: b")], "data: record 1 is a JSON str, not an object"),
    ],
)
def test_a_file_without_a_single_object_is_not_blamed_on_its_fields(rows, expected):
    with pytest.raises(ValueError, match=f"^{expected}$"):
        formats.detect(rows, "data")


def test_an_unknown_format_is_told_with_its_fields_and_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)data .*'question', 'answer'.*alpaca needs 'instruction' and 'output'"):
        formats.detect([{"question": "a", "answer": "b"}], "data")


def test_of_two_formats_neither_is_guessed():
    with pytest.raises(ValueError, match=r"alpaca or dolly.*--format"):
        formats.detect([GOOD | {"response": "four"}], "data")


def test_each_format_gives_the_same_record():
    assert formats.record(GOOD, "f:1", "alpaca") == Record("f:1", "Add.", "2 2", "4")
    assert formats.record(ROWS["dolly"][0], "f:1", "dolly") == Record("f:1", "Add.", "2 2", "4")
    found = formats.record(ROWS["prompt-completion"][0], "f:1", "prompt-completion")
    assert found == Record("f:1", "Add 2 2.", "", "4")


@pytest.mark.parametrize("roles", [("system", "user", "assistant"), ("system", "human", "gpt")])
@pytest.mark.parametrize(
    ("field", "role", "content"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_a_conversation_keeps_all_its_turns(field, role, content, roles):
    order = [(0, "Be brief."), (1, "Hi"), (2, "Hello"), (1, "Add 2 2."), (2, "4")]
    row = {field: [{role: roles[who], content: text} for who, text in order]}
    known = ("system", "user", "assistant")
    messages = tuple(Message(known[who], text) for who, text in order)
    assert formats.record(row, "f:1", "chat") == Record("f:1", "Add 2 2.", "", "4", messages)


def turn(role, content):
    return {"role": role, "content": content}


def said(found):
    return [(message.role[0], message.content) for message in found.messages]


def test_system_and_history_make_a_conversation_of_a_record():
    row = GOOD | {"system": "Be brief.", "history": [["Hi", "Hello"], ["Bye", "So long"]], "tools": [], "functions": ""}
    found = formats.record(row, "f:1", "alpaca")
    earlier = [("s", "Be brief."), ("u", "Hi"), ("a", "Hello"), ("u", "Bye"), ("a", "So long")]
    assert said(found) == [*earlier, ("u", "Add.\n2 2"), ("a", "4")]
    assert (found.instruction, found.input, found.output) == ("Add.\n2 2", "", "4")
    only = formats.record({"prompt": "Hi", "completion": "Hello", "system": "Be brief."}, "f:1", "prompt-completion")
    assert said(only) == [("s", "Be brief."), ("u", "Hi"), ("a", "Hello")]
    assert formats.record(GOOD | {"system": "", "history": []}, "f:1", "alpaca").messages == ()


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_text_beside_a_conversation_opens_it(field):
    expected = [("s", "Be brief."), ("u", "Add 2 2."), ("a", "4")]
    assert said(formats.record({"messages": CHAT, field: "Be brief."}, "f:1", "chat")) == expected
    own = {"messages": [turn("system", "Be brief."), *CHAT], field: "Be brief."}
    assert said(formats.record(own, "f:1", "chat")) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn("system", "Sing."), *CHAT], "system": "Be brief."},
        {"messages": CHAT, "system": "Be brief.", "system_prompt": "Sing."},
        GOOD | {"system": "Be brief.", "system_prompt": "Sing."},
    ],
)
def test_of_two_system_texts_neither_wins(row):
    found = formats.record(row, "f:1", "chat" if "messages" in row else "alpaca")
    assert isinstance(found, Fault)
    assert "system" in found.text
    assert "remove one" in found.text


INPUT_OF_ANOTHER_FORMAT = [
    ({"instruction": "Add.", "input": "2 2", "response": "4"}, "dolly"),
    ({"instruction": "Add.", "context": "2 2", "output": "4"}, "alpaca"),
    ({"instruction": "Add.", "context": "2 2", "input": " ", "output": "4"}, "alpaca"),
    ({"instruction": "Add.", "context": None, "input": "2 2", "response": "4"}, "dolly"),
]


@pytest.mark.parametrize(("row", "format"), INPUT_OF_ANOTHER_FORMAT)
def test_an_input_is_read_under_the_name_it_has_in_another_format(row, format):
    assert formats.detect([row], "data") == format
    assert formats.record(row, "f:1", format) == Record("f:1", "Add.", "2 2", "4")
    assert formats.unread(row, format) == []


TEXT_BESIDE = [
    (GOOD | {"context": "3 3"}, "alpaca", "context"),
    (GOOD | {"response": "four"}, "alpaca", "response"),
    (GOOD | {"completion": "four"}, "alpaca", "completion"),
    (GOOD | {"thinking": "2 and 2 are 4."}, "alpaca", "thinking"),
    (GOOD | {"messages": CHAT}, "alpaca", "messages"),
    ({"prompt": "Add.", "input": "2 2", "completion": "4"}, "prompt-completion", "input"),
    ({"prompt": "2 2", "instruction": "Add.", "completion": "4"}, "prompt-completion", "instruction"),
    ({"messages": CHAT, "context": "3 3"}, "chat", "context"),
    ({"messages": CHAT, "output": "four"}, "chat", "output"),
    ({"messages": CHAT, "history": [["Hi", "Hello"]]}, "chat", "history"),
]


@pytest.mark.parametrize(("row", "format", "field"), TEXT_BESIDE)
def test_text_whose_place_is_not_certain_stops_the_reading_unless_the_format_was_chosen(row, format, field):
    found = formats.record(row, "f:1", format)
    assert isinstance(found, Fault)
    assert found.text.startswith(f"has text in the field {field!r}")
    assert f"--format {format}" in found.text
    assert isinstance(formats.record(row, "f:1", format, is_given=True), Record)
    assert field in formats.unread(row, format)


def test_text_that_the_record_has_anyway_is_not_lost():
    for row in ({"messages": CHAT, "response": "4", "prompt": "Add 2 2."}, {"messages": CHAT, "context": ""}):
        assert isinstance(formats.record(row, "f:1", "chat"), Record)
    assert isinstance(formats.record(GOOD | {"context": "2 2", "response": "4"}, "f:1", "alpaca"), Record)


def answers(*marks):
    """A conversation whose answers have these marks."""
    turns = [[turn("user", "Hi"), turn("assistant", f"{number}") | mark] for number, mark in enumerate(marks)]
    return {"messages": [one for pair in turns for one in pair]}


@pytest.mark.parametrize(
    ("mark", "is_trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train_on_turn": False}, False),
        ({"loss": "false"}, False),
        ({"weight": 0, "train": False}, False),
    ],
)
def test_the_mark_of_an_answer_says_whether_it_is_trained_on(mark, is_trained):
    row = answers(mark, {})
    found = formats.record(row, "f:1", "chat")
    assert [message.is_trained for message in found.messages] == [True, is_trained, True, True]
    assert formats.unread(row, "chat", "every") == []


def test_marks_that_are_not_followed_are_known():
    """The mark of a prompt, whose weight is PLW, and one by which an earlier answer is trained on, where only the last
    is."""
    row = answers({"weight": 1}, {"weight": 1})
    assert formats.unread(row, "chat", "every") == []
    assert formats.unread(row, "chat", "last") == ["messages[].weight"]
    row["messages"][0]["train"] = False
    assert formats.unread(row, "chat", "every") == ["messages[].train"]


def test_what_is_not_read_of_turns_is_known_by_the_name_of_the_list():
    row = {"conversations": [turn("user", "Hi") | {"name": "Ann", "id": None}, turn("assistant", "4") | {"name": "B"}]}
    assert formats.unread(row, "chat") == ["conversations[].name"]
    cached = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "image": None}]
    row = {"messages": [turn("user", cached), CHAT[1]], "topic": "sums"}
    assert formats.unread(row, "chat") == ["topic", "messages[].content[].cache_control"]


def test_content_in_parts_is_read_where_all_are_text():
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "2 2.", "image": None}]
    found = formats.record({"messages": [turn("user", parts), CHAT[1]]}, "f:1", "chat")
    assert found == formats.record({"messages": CHAT}, "f:1", "chat")


def test_a_turn_may_have_both_names_of_a_field_if_they_say_the_same():
    both = [one | {"from": {"user": "human"}.get(one["role"], "gpt"), "value": one["content"]} for one in CHAT]
    for turns in (both, [dict.fromkeys(("from", "value")) | one for one in CHAT]):
        assert formats.record({"messages": turns}, "f:1", "chat") == formats.record({"messages": CHAT}, "f:1", "chat")


def test_of_two_conversations_neither_wins():
    row = {"messages": CHAT, "conversations": [turn("user", "Hi"), turn("assistant", "Hello")]}
    assert formats.record(row, "f:1", "chat").text.startswith("has both messages and conversations, which differ")
    for empty in ([], None):
        assert said(formats.record(row | {"messages": empty}, "f:1", "chat")) == [("u", "Hi"), ("a", "Hello")]


def test_an_empty_answer_is_a_fault_wherever_it_stands():
    for blank in ("", " \n"):
        turns = [turn("user", "Hi"), turn("assistant", blank), *CHAT]
        found = formats.record({"messages": turns}, "f:1", "chat")
        assert found == Fault("has an empty completion (turn 2)")
        assert said(formats.record({"messages": turns}, "f:1", "chat", keep_empty=True))[1] == ("a", blank)
        turns[1]["weight"] = 0
        assert isinstance(formats.record({"messages": turns}, "f:1", "chat"), Record)


def test_what_is_not_read_is_known():
    row = ROWS["dolly"][0] | {"system": "", "tools": None, "source": None, "weight": 1, "text": "Add. 2 2 4"}
    assert formats.unread(row, "dolly") == ["category", "text"]
    assert formats.unread({"messages": CHAT, "history": [], "prompt": ""}, "chat") == ["history", "prompt"]


BAD = [
    (Fault("is broken"), "alpaca", "is broken"),
    ({"instruction": "Add.", "response": "4"}, "alpaca", "lacks the field 'output' (it has 'instruction', 'response')"),
    ({}, "alpaca", "lacks the field 'instruction' (it has none)"),
    ({}, "chat", "lacks the field 'messages' (it has none)"),
    (["Add.", "4"], "alpaca", "is a JSON list, not an object"),
    (None, "chat", "is a JSON NoneType, not an object"),
    (GOOD | {"output": 4}, "alpaca", "has something other than text as its output"),
    (GOOD | {"input": 0}, "alpaca", "has something other than text as its input"),
    (GOOD | {"instruction": ["Add."]}, "alpaca", "has something other than text as its instruction"),
    (GOOD | {"output": ""}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"output": " \n\t"}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"output": None}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"instruction": " "}, "alpaca", "has an empty instruction"),
    (GOOD | {"system": ["Be brief."]}, "alpaca", "has something other than text as its system"),
    (GOOD | {"history": "Hi"}, "alpaca", "has something other than a list of pairs, question and answer"),
    (GOOD | {"history": [["Hi"]]}, "alpaca", "has something other than a list of pairs, question and answer"),
    (GOOD | {"history": [["Hi", 5]]}, "alpaca", "has something other than text as its turn 2"),
    (GOOD | {"tools": [{"name": "add"}]}, "alpaca", "has tools, which no template here is given"),
    ({"messages": CHAT, "functions": '[{"name": "add"}]'}, "chat", "has tools, which no template here is given"),
    ({"messages": CHAT, "system": 5}, "chat", "has something other than text as its system"),
    (GOOD | {"output": "\ud83d"}, "alpaca", "has half a surrogate pair in its output, which is no character"),
    ({"messages": "Hi"}, "chat", "has something other than a list of turns as its conversation"),
    ({"messages": ["Hi"]}, "chat", "has something other than a list of turns as its conversation"),
    ({"messages": []}, "chat", "does not end with a turn of the assistant"),
    ({"messages": [*CHAT, turn("user", "Why?")]}, "chat", "does not end with a turn of the assistant"),
    ({"messages": CHAT[1:]}, "chat", "has no turn of the user"),
    ({"messages": [turn("tool", "4"), *CHAT]}, "chat", "has the role 'tool' in turn 1, where only system, user, human"),
    ({"messages": [turn(["user"], "4"), *CHAT]}, "chat", "has the role ['user'] in turn 1"),
    ({"messages": [turn("user", None), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    ({"messages": [turn("user", "\udc00"), CHAT[1]]}, "chat", "has half a surrogate pair in its turn 1"),
    ({"messages": [CHAT[0], turn("assistant", "")]}, "chat", "has an empty completion (last assistant turn)"),
    (
        {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{"id": 1}]}]},
        "chat",
        "has tool_calls in turn 2, which no templ",
    ),
    (
        {"messages": [CHAT[0], turn("assistant", None) | {"function_call": {}, "tool_calls": [5]}]},
        "chat",
        "has tool_cal",
    ),
    (
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "Hm."}]},
        "chat",
        "has reasoning_content in turn 2, which ",
    ),
    ({"messages": [CHAT[0], CHAT[1] | {"thinking": "Hm."}]}, "chat", "has thinking in turn 2, which is text"),
    ({"messages": [CHAT[0] | {"images": ["a.png"]}, CHAT[1]]}, "chat", "has images in turn 1, which is no text"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]}, "chat", "has the weight 0.5 in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"train": "yes"}]}, "chat", "has the train 'yes' in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": [0]}]}, "chat", "has the weight [0] in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 1, "train": False}]}, "chat", "has marks that contradict each other"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "chat", "ends with an answer that is marked as not to be tr"),
    ({"messages": [CHAT[0], CHAT[1] | {"train_detail": [{"train": 0}]}]}, "chat", "has train_detail in turn 2, but"),
    (GOOD | {"weight": 0}, "alpaca", "is marked as not to be trained on"),
    (GOOD | {"weight": "0.5"}, "alpaca", "has the weight '0.5', where only 0 and 1"),
    (GOOD | {"loss_mask": [0, 1]}, "alpaca", "has loss_mask, by which parts of a text are chosen"),
    (GOOD | {"input_ids": [5, 6], "labels": [-100, 6]}, "alpaca", "has labels, by which parts of a text are chosen"),
    ({"messages": [CHAT[0] | {"from": "gpt"}, CHAT[1]]}, "chat", "has both role and from in turn 1, which differ"),
    ({"messages": [CHAT[0] | {"from": ["gpt"]}, CHAT[1]]}, "chat", "has both role and from in turn 1, which differ"),
    ({"messages": [CHAT[0], CHAT[1] | {"value": "5"}]}, "chat", "has both content and value in turn 2, which differ"),
    (
        {"messages": [turn("user", [{"type": "image_url"}]), CHAT[1]]},
        "chat",
        "has a part of type 'image_url' in turn 1",
    ),
    ({"messages": [turn("user", [{"type": "text"}]), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    ({"messages": [turn("user", []), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    (
        {"messages": [Fault("has the field 'content' twice"), CHAT[1]]},
        "chat",
        "has the field 'content' twice in turn 1",
    ),
]


@pytest.mark.parametrize(("row", "format", "fault"), BAD)
def test_an_unusable_record_is_told_what_it_lacks(row, format, fault):
    found = formats.record(row, "f:1", format)
    assert isinstance(found, Fault)
    assert found.text.startswith(fault)


def lost(row, format, is_given):
    """The fields with text that neither a row's record has nor is known to be unread; none where it has no record."""
    found = formats.record(row, "f:1", format, is_given=is_given)
    if isinstance(found, Fault):
        return []
    told = formats.unread(row, format)
    parts = [(field, value) for field, value in row.items() if field not in told]
    for field, turns in [part for part in parts if isinstance(part[1], list)]:
        of_turns = [one for turn in turns for one in turn.items() if one[1] not in formats.ROLES]
        parts += [(f"{field}[].{name}", value) for name, value in of_turns]
    return [name for name, value in parts if isinstance(value, str) and name not in told and value not in repr(found)]


BESIDE = [*formats.READ["alpaca"], *formats.TEXTS, "prompt", "question", "text", "rejected", "labels", "topic"]
BESIDE_IN_TURN = [*formats.PLAIN, *formats.REFUSED, *formats.MARKS, "name", "text", "topic"]


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize(("format", "rows"), ROWS.items())
def test_no_text_of_a_usable_row_is_lost_unsaid(format, rows, is_given):
    """With any two further fields, in the row or in a turn."""
    for names in itertools.combinations(BESIDE, 2):
        further = {
            name: [turn("user", "<u>"), turn("assistant", "<a>")] if name in formats.CONVERSATIONS else f"<{name}>"
            for name in names
        }
        for row in rows:
            assert lost(further | row, format, is_given) == []
    for names in itertools.combinations(BESIDE_IN_TURN, 2):
        for place in (0, 1):
            turns = [*CHAT]
            turns[place] = {name: f"<{name}>" for name in names} | turns[place]
            assert lost({"messages": turns}, "chat", is_given) == []


def test_an_empty_completion_may_be_kept():
    assert formats.record(GOOD | {"output": ""}, "f:1", "alpaca", keep_empty=True) == Record("f:1", "Add.", "2 2", "")
    assert isinstance(formats.record(GOOD | {"instruction": ""}, "f:1", "alpaca", keep_empty=True), Fault)


LONG = GOOD | {"output": "x" * 300}  # longer than the 200 characters that the tests below allow


def bounded_rows(path, content, most=200):
    path.write_bytes(content)
    return list(formats.rows(path, most))


@pytest.mark.parametrize("pack", [bytes, gz, zstd])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", as_list),
        ("a.jsonl", as_lines),
        ("b.json", lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode()),
        ("a.csv", as_csv),
        ("a.parquet", as_parquet),
    ],
)
def test_a_row_of_too_many_characters_is_a_fault_and_the_next_one_is_read(tmp_path, monkeypatch, name, write, pack):
    """Whatever is read at a time: the whole file, or less than the long row."""
    if name == "a.parquet" and pack is not bytes:
        pytest.skip("Parquet is not read packed")
    expected = [GOOD, formats.too_long(200), GOOD, formats.too_long(200)]
    for chunk in (1 << 20, 150, 7):
        monkeypatch.setattr(formats, "CHUNK", chunk)
        assert bounded_rows(tmp_path / name, pack(write([GOOD, LONG, GOOD, LONG]))) == expected


@pytest.mark.parametrize("write", [as_list, as_lines])
def test_a_row_of_just_so_many_characters_is_a_row(tmp_path, write):
    most = len(json.dumps(LONG))
    assert bounded_rows(tmp_path / "data", write([LONG, GOOD]), most) == [LONG, GOOD]
    assert bounded_rows(tmp_path / "data", write([LONG, GOOD]), most - 1) == [formats.too_long(most - 1), GOOD]
    hedgehogs = json.dumps({"a": "🦔" * 50}, ensure_ascii=False)  # of four bytes each
    assert bounded_rows(tmp_path / "data", hedgehogs.encode() + b"\r\n", len(hedgehogs)) == [{"a": "🦔" * 50}]


@given(st.lists(st.dictionaries(st.text(), st.text('"\\{}[],x\n', max_size=30), max_size=3), max_size=4), st.data())
def test_the_end_of_a_value_that_is_too_long_is_found_whatever_it_holds(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("long") / "data.json"
    most, chunk = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", chunk)
        expected = [row if len(json.dumps(row)) <= most else formats.too_long(most) for row in rows]
        assert bounded_rows(path, json.dumps(rows).encode(), most) == expected


@given(st.lists(st.text('",x\n', max_size=40), min_size=1, max_size=5), st.integers(12, 60), st.integers(1, 9))
def test_the_end_of_a_csv_record_that_is_too_long_is_found(tmp_path_factory, texts, most, chunk):
    path = tmp_path_factory.mktemp("long") / "data.csv"
    rows = [{"name": text, "other": "y"} for text in texts]
    spelled = [len(as_csv([row])) - len("name,other\r\n\r\n") for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", chunk)
        try:
            found = bounded_rows(path, as_csv(rows), most)
        except ValueError as error:  # what parts the fields of a record is too much by itself
            assert "mostly quotes or delimiters" in str(error)  # noqa: PT017
            assert max(2 * len(re.findall('[",\n]', text)) for text in texts) + len('"","",\r\n') > most / 2
            return
    assert len(found) == len(rows)
    for one, row, characters in zip(found, rows, spelled, strict=True):
        assert one in (row, formats.too_long(most))
        if not most - 2 < characters <= most:  # otherwise it depends on how many characters its line end has
            assert (one == row) == (characters <= most)


def test_blank_lines_add_nothing_to_the_record_after_them(tmp_path):
    assert bounded_rows(tmp_path / "data.csv", as_csv([GOOD]) + b"\n" * 300 + b"a,b,c\n") == [
        GOOD,
        {"instruction": "a", "input": "b", "output": "c"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b'a,b\n1,"' + b"x" * 900, "record 1 is not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1," + b'"' * 900, "more than 200 characters .*, mostly quotes or delimiters"),
        ("a.csv", b"a" * 900, "its first line has more than 200 characters .*; it must name the columns"),
        ("a.json", b'[{"a": "' + b"x" * 900, "record 1 is not JSON: it does not end"),
        ("a.json", b"[1." + b"0" * 900, "record 1 is not JSON: it is a number that does not end"),
    ],
)
def test_a_row_without_an_end_is_refused(tmp_path, name, content, expected):
    with pytest.raises(ValueError, match=expected):
        bounded_rows(tmp_path / name, content)


def test_an_object_around_all_the_records_is_told_even_where_it_is_too_long():
    with pytest.raises(
        ValueError, match=r"more than 9 characters .*; if it is an object around all the records, write"
    ):
        formats.detect([formats.too_long(9)], "data.json")


def references(count, text):
    """An Arrow array that holds a text once, and refers to it that often."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def test_a_few_bytes_of_parquet_are_unpacked_a_few_rows_at_a_time(tmp_path):
    """A gigabyte of text, which as a whole would be more than may be taken."""
    text, path = "x" * 900_000, tmp_path / "data"
    table = pa.table({"instruction": references(1000, text), "output": references(1000, "4")})
    parquet.write_table(table, path, store_schema=False)  # it would be read as references otherwise
    assert path.stat().st_size < 100_000
    found = formats.rows(path)
    assert next(found) == {"instruction": text, "output": "4"}
    found.close()


def test_parquet_that_needs_more_memory_than_it_may_take_is_refused_by_name(tmp_path):
    """One row of 16 GB. Its text is written once, and the list is of references."""
    history = pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), references(20_000, "x" * 800_000))
    parquet.write_table(pa.table({"instruction": ["a"], "output": ["b"], "history": history}), tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"data is a Parquet file that needs more than \d+ MiB of memory; get it again"
    ):
        list(formats.rows(tmp_path / "data"))


def test_damaged_parquet_is_refused_or_read_whatever_is_damaged(tmp_path):
    draw, whole = random.Random(0), as_parquet([{"messages": CHAT, "source": "a"}, {"messages": CHAT * 2}] * 9)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 2, 9])):
            content[draw.randrange(4, len(content))] = draw.randrange(256)
        (tmp_path / "data").write_bytes(content)
        try:
            list(formats.parquet_rows(tmp_path / "data", 1000))
        except bounded.Refusal as error:
            assert "data is a damaged Parquet file" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_a_row_of_parquet_that_python_cannot_hold_is_a_fault(tmp_path):
    columns = {"instruction": pa.array(["a", "b"]), "output": pa.array(["c", "d"])}
    for odd in (pa.array([0, 2**62], pa.timestamp("us")), pa.array([b"a", b"\xff"]).view(pa.string())):
        parquet.write_table(pa.table(columns | {"odd": odd}), tmp_path / "data")
        first, second = formats.rows(tmp_path / "data")
        assert (first["instruction"], second.text[:15]) == ("a", "cannot be read ")
