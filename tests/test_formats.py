"""Is every usual file read row by row, its format found out, and each unusable record named by its number?"""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from plw_mlflow import formats
from plw_mlflow.records import Fault, Message, Record

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


@pytest.mark.parametrize("write", [as_list, as_lines, as_csv])
def test_a_line_of_a_megabyte_is_a_row(tmp_path, write):
    long = GOOD | {"output": "ä" * 1_000_000}
    assert read(tmp_path / "data.csv" if write is as_csv else tmp_path / "data", write([GOOD, long, GOOD])) == [
        GOOD,
        long,
        GOOD,
    ]


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
        (b"a\tb\n1\t2\n", r"holds '\\t'; the delimiter must be a comma"),
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
        ([Fault("is not JSON: a"), Fault("is not JSON: b")], "data: record 1 is not JSON: a"),
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


def test_a_system_text_beside_a_conversation_opens_it_unless_it_has_its_own():
    found = formats.record({"messages": CHAT, "system": "Be brief."}, "f:1", "chat")
    assert said(found) == [("s", "Be brief."), ("u", "Add 2 2."), ("a", "4")]
    own = formats.record({"messages": [turn("system", "Sing."), *CHAT], "system": "Be brief."}, "f:1", "chat")
    assert said(own)[0] == ("s", "Sing.")


def test_what_is_not_read_is_known():
    row = ROWS["dolly"][0] | {"system": "", "tools": None, "source": None}
    assert formats.unread(row, "dolly") == ["category"]
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
]


@pytest.mark.parametrize(("row", "format", "fault"), BAD)
def test_an_unusable_record_is_told_what_it_lacks(row, format, fault):
    found = formats.record(row, "f:1", format)
    assert isinstance(found, Fault)
    assert found.text.startswith(fault)


def test_an_empty_completion_may_be_kept():
    assert formats.record(GOOD | {"output": ""}, "f:1", "alpaca", keep_empty=True) == Record("f:1", "Add.", "2 2", "")
    assert isinstance(formats.record(GOOD | {"instruction": ""}, "f:1", "alpaca", keep_empty=True), Fault)
