"""Is every usual file read row by row, whatever it is packed in, and is what cannot be read refused by name?"""

import csv
import gzip
import io
import json
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from plw_mlflow.data import files, formats
from plw_mlflow.data.records import Fault
from plw_mlflow.errors import UserError

GOOD = {"instruction": "Add.", "input": "2 2", "output": "4"}
CHAT = [{"role": "user", "content": "Add 2 2."}, {"role": "assistant", "content": "4"}]


def gz(content):
    return gzip.compress(content, mtime=0)  # without the time of day, which would be in the names of the tests


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


def read(path, content):
    path.write_bytes(content)
    return list(files.rows(path))


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
            patch.setattr(files, "CHUNK", chunk)
            path.write_bytes(text.encode())
            assert list(files.rows(path)) == json.loads(text)


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
    assert next(files.rows(path)) == GOOD


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


def test_blank_lines_before_the_names_of_columns_are_no_names(tmp_path):
    assert read(tmp_path / "data.csv", b"\n\r\n" + as_csv([GOOD])) == [GOOD]


def test_a_file_whose_name_shouts_is_csv_too(tmp_path):
    assert read(tmp_path / "DATA.CSV", as_csv([GOOD])) == [GOOD]


def turn(role, content):
    return {"role": role, "content": content}


LONG = GOOD | {"output": "x" * 300}  # longer than the 200 characters that the tests below allow


def bounded_rows(path, content, most=200):
    path.write_bytes(content)
    return list(files.rows(path, most))


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
    expected = [GOOD, files.too_long(200), GOOD, files.too_long(200)]
    for chunk in (1 << 20, 150, 7):
        monkeypatch.setattr(files, "CHUNK", chunk)
        assert bounded_rows(tmp_path / name, pack(write([GOOD, LONG, GOOD, LONG]))) == expected


@pytest.mark.parametrize("write", [as_list, as_lines])
def test_a_row_of_just_so_many_characters_is_a_row(tmp_path, write):
    most = len(json.dumps(LONG))
    assert bounded_rows(tmp_path / "data", write([LONG, GOOD]), most) == [LONG, GOOD]
    assert bounded_rows(tmp_path / "data", write([LONG, GOOD]), most - 1) == [files.too_long(most - 1), GOOD]
    hedgehogs = json.dumps({"a": "🦔" * 50}, ensure_ascii=False)  # of four bytes each
    assert bounded_rows(tmp_path / "data", hedgehogs.encode() + b"\r\n", len(hedgehogs)) == [{"a": "🦔" * 50}]


@given(st.lists(st.dictionaries(st.text(), st.text('"\\{}[],x\n', max_size=30), max_size=3), max_size=4), st.data())
def test_the_end_of_a_value_that_is_too_long_is_found_whatever_it_holds(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("long") / "data.json"
    most, chunk = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        expected = [row if len(json.dumps(row)) <= most else files.too_long(most) for row in rows]
        assert bounded_rows(path, json.dumps(rows).encode(), most) == expected


@given(st.lists(st.text('",x\n', max_size=40), min_size=1, max_size=5), st.integers(12, 60), st.integers(1, 9))
def test_the_end_of_a_csv_record_that_is_too_long_is_found(tmp_path_factory, texts, most, chunk):
    path = tmp_path_factory.mktemp("long") / "data.csv"
    rows = [{"name": text, "other": "y"} for text in texts]
    spelled = [len(as_csv([row])) - len("name,other\r\n\r\n") for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        try:
            found = bounded_rows(path, as_csv(rows), most)
        except ValueError as error:  # what parts the fields of a record is too much by itself
            assert "mostly quotes or delimiters" in str(error)  # noqa: PT017
            assert max(2 * len(re.findall('[",\n]', text)) for text in texts) + len('"","",\r\n') > most / 2
            return
    assert len(found) == len(rows)
    for one, row, characters in zip(found, rows, spelled, strict=True):
        assert one in (row, files.too_long(most))
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


def references(count, text):
    """An Arrow array that holds a text once, and refers to it that often."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def test_a_few_bytes_of_parquet_are_unpacked_a_few_rows_at_a_time(tmp_path):
    """A gigabyte of text, which as a whole would be more than may be taken."""
    text, path = "x" * 900_000, tmp_path / "data"
    table = pa.table({"instruction": references(1000, text), "output": references(1000, "4")})
    parquet.write_table(table, path, store_schema=False)  # it would be read as references otherwise
    assert path.stat().st_size < 100_000
    found = files.rows(path)
    assert next(found) == {"instruction": text, "output": "4"}
    found.close()


def test_parquet_that_needs_more_memory_than_it_may_take_is_refused_by_name(tmp_path):
    """One row of 16 GB. Its text is written once, and the list is of references."""
    history = pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), references(20_000, "x" * 800_000))
    parquet.write_table(pa.table({"instruction": ["a"], "output": ["b"], "history": history}), tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"data is a Parquet file that needs more than \d+ MiB of memory; get it again"
    ):
        list(files.rows(tmp_path / "data"))


def test_damaged_parquet_is_refused_or_read_whatever_is_damaged(tmp_path):
    draw, whole = random.Random(0), as_parquet([{"messages": CHAT, "source": "a"}, {"messages": CHAT * 2}] * 9)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 2, 9])):
            content[draw.randrange(4, len(content))] = draw.randrange(256)
        (tmp_path / "data").write_bytes(content)
        try:
            list(files.parquet_rows(tmp_path / "data", 1000))
        except UserError as error:
            assert "data is a damaged Parquet file" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_a_row_of_parquet_that_python_cannot_hold_is_a_fault(tmp_path):
    columns = {"instruction": pa.array(["a", "b"]), "output": pa.array(["c", "d"])}
    for odd in (pa.array([0, 2**62], pa.timestamp("us")), pa.array([b"a", b"\xff"]).view(pa.string())):
        parquet.write_table(pa.table(columns | {"odd": odd}), tmp_path / "data")
        first, second = files.rows(tmp_path / "data")
        assert (first["instruction"], second.text[:15]) == ("a", "cannot be read ")
