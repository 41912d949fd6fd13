"""Files: how a file's bytes become rows.

A file is unpacked, decoded and cut into rows as a stream, and a row has at most as many characters as the caller
allows, so that a file of any size is read in the same memory. JSON is read by Python's own scanner: faster stream
parsers replace half a surrogate pair by a question mark and say nothing.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plw_mlflow.data.records import Fault
from plw_mlflow.environment import bounded
from plw_mlflow.errors import UserError, first_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PACKED = (".gz", ".zst")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
UNREADABLE = {  # what a file is that begins like this, and what to do
    b"PK\x03\x04": "a ZIP archive, as Excel's .xlsx files are; unpack it, or save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file; save the table as CSV",
    b"BZh": "packed by bzip2; unpack it, or pack it by gzip or zstd",
    b"\xfd7zXZ": "packed by xz; unpack it, or pack it by gzip or zstd",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"ARROW1": "an Arrow file; save it as Parquet or JSON Lines",
    b"\xff\xff\xff\xff": "an Arrow stream, as the library datasets saves; write it by to_parquet or to_json",
    b"SQLite format 3": "an SQLite database; write the table out as CSV",
    b"version https://git-lfs": "a pointer that Git LFS has left in place of the file; get the file by git lfs pull",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
CHUNK = 1 << 20  # bytes read at a time
MOST_CHARACTERS = 1_000_000  # of a row, as its file spells it
PARQUET_ROWS = 16  # read at a time: each may hold as many characters as a row may
# How the texts of some faults begin.
TOO_LONG = "has more than"
NOT_TEXT = ("is not JSON", "is not UTF-8")


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where it begins as gzip or Zstandard does, whatever it is called."""
    import pyarrow as pa

    with path.open("rb") as file:
        start = file.read(4)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    with path.open("rb") if kind is None else pa.CompressedInputStream(pa.OSFile(str(path)), kind) as stream:
        try:
            yield io.BufferedReader(stream, CHUNK)
        except OSError as error:
            if kind is None:
                raise
            raise UserError(f"{path} is a damaged {kind} file ({error}); get it again") from None


def delimiter(path: Path) -> str | None:
    """What parts the columns of a CSV or TSV file, which its name alone can tell; None for a file of another kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return DELIMITERS.get(suffixes[-1]) if suffixes else None


def check_kind(path: Path, start: bytes) -> None:
    """Raise UserError for a file that begins (`start`) as one that cannot be read begins."""
    kind = next((kind for magic, kind in UNREADABLE.items() if start.startswith(magic)), None)
    if start[257:262] == b"ustar":
        kind = "a tar archive; unpack it"
    if kind:
        raise UserError(f"{path} is {kind}")


def rows(path: Path, most: int = MOST_CHARACTERS) -> Iterator[Any]:
    """A file's rows, a Fault in place of a line that cannot be read or a JSON object that has a field twice.

    most: characters of a row, as the file spells it; a Fault stands in place of a longer one.

    Parquet is known by its first bytes, CSV and TSV by the file's name; anything else is JSON: a list, or one value
    after another. Raises UserError for a fault beyond which nothing can be read.
    """
    with unpacked(path) as stream:
        start = stream.peek(512)
        check_kind(path, start)
        if start[:4] == b"PAR1":
            with path.open("rb") as file:
                if file.read(4) != b"PAR1":
                    raise UserError(f"{path}: Parquet is not read packed; unpack it")
            yield from _parquet(path, most)
        elif separator := delimiter(path):
            if _LIKE_JSON.match(start):
                raise UserError(f"{path} is JSON by its content, but CSV or TSV by its name; rename it")
            yield from _csv(path, stream, separator, most)
        else:
            yield from _json(path, stream, most)


def too_long(most: int) -> Fault:
    """The fault of a row that has more characters than it may have."""
    return Fault(f"{TOO_LONG} {most:,} characters (--max-characters)")


def characters(value: Any) -> int:
    """The characters of a row's texts; any other value of it counts as one."""
    count, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        count += len(value) if isinstance(value, str | bytes) else 1
    return count


def _parquet(path: Path, most: int) -> Iterator[Any]:
    worker = bounded.Worker(parquet_rows)
    try:
        yield from worker.results(path, most)
    except bounded.Exhausted as error:
        raise UserError(
            f"{path} is a Parquet file that {error}; get it again, or write it with shorter rows and smaller pages"
        ) from None
    finally:
        worker.close()


def parquet_rows(path: Path, most: int) -> Iterator[Any]:
    """The rows of a Parquet file, a Fault in place of one that cannot be read or has more characters than `most`.

    It is for a process with bounded memory, as a few bytes of such a file can stand for any number of values. Raises
    UserError for a fault beyond which nothing can be read.
    """
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if twice := _repeated_column(file.schema_arrow):
                raise UserError(f"{path} has the column {twice!r} twice; rename or remove one")
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                for row in _converted(batch):
                    yield row if isinstance(row, Fault) or characters(row) <= most else too_long(most)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damage shows in errors of many kinds
        raise UserError(
            f"{path} is a damaged Parquet file ({type(error).__name__}: {first_line(error)}); get it again"
        ) from None


def _converted(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; a Fault in place of one that holds what Python has nothing for."""
    try:
        return list(batch.to_pylist())
    except MemoryError:
        raise
    except Exception as error:  # dates beyond the year 9999, bytes that are no UTF-8, and so on
        if batch.num_rows == 1:
            return [Fault(f"cannot be read ({type(error).__name__}: {first_line(error)})")]
    return [row for number in range(batch.num_rows) for row in _converted(batch.slice(number, 1))]


def _repeated_column(columns: Any) -> str | None:
    """A name that two columns of an Arrow schema, or two fields of a struct within it, have; None if there is none."""
    import pyarrow as pa

    children = list(columns)
    names = [child.name for child in children]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        return repeated
    for kind in (child.type for child in children):
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind) and (repeated := _repeated_column(kind)):
            return repeated
    return None


def _csv(path: Path, stream: io.BufferedReader, separator: str, most: int) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # characters; the lines are bounded
    number = 0
    try:
        lines = _Lines(path, stream, separator, most)
        records = lines.rows()
        header, is_long = next(records, ([], False))
        if is_long:
            raise UserError(f"{path}: its first line {too_long(most).text}; it must name the columns")
        if len(header) == 1 and (other := next((mark for mark in ";\t," if mark in header[0]), None)):
            must = "a tab, as the file is called TSV" if separator == "\t" else "a comma"
            must += "; call it .tsv" if other == "\t" else ""
            raise UserError(
                f"{path}: its first line is a single field, which holds {other!r}; the delimiter must be {must}"
            )
        if repeated := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path} has the column {repeated[0]!r} twice; rename or remove one")
        for number, (texts, is_long) in enumerate(records, start=1):  # noqa: B007 (named by what is raised below)
            if is_long:
                yield too_long(most)
            elif len(texts) == len(header):
                yield dict(zip(header, texts, strict=True))
            else:
                yield Fault(f"has {len(texts)} columns, where the first line names {len(header)}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text, soon after record {number} ({error.reason}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}: record {number + 1} is not {'CSV' if separator == ',' else 'TSV'}: {error}") from None


class _Lines:
    """The lines of a CSV file; of a record with too many characters, only what parts its fields and lines.

    So the CSV reader still finds where such a record ends, and need not hold it.
    """

    def __init__(self, path: Path, stream: io.BufferedReader, separator: str, most: int) -> None:
        self._path, self._most = path, most
        self._text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        self._reader = csv.reader(self, strict=True, delimiter=separator)
        self._content = re.compile(f'[^"\r\n{re.escape(separator)}]+')
        self._characters = self._kept = 0  # of the record that is being read

    def rows(self) -> Iterator[tuple[list[str], bool]]:
        """Each record's texts, and whether it has too many characters; then the texts are none of its own."""
        for texts in self._reader:
            if texts:
                yield texts, self._characters > self._most
            self._characters = self._kept = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = ""
        while not line.endswith(("\n", "\r")) and (part := self._text.readline(CHUNK)):
            self._characters += len(part)
            line += part
            if self._characters > self._most:
                line = self._content.sub("x", line)
                if self._kept + len(line) > self._most:
                    raise UserError(f"{self._path}: a record {too_long(self._most).text}, mostly quotes or delimiters")
        self._kept += len(line)
        if line:
            return line
        raise StopIteration


def _json(path: Path, stream: io.BufferedReader, most: int) -> Iterator[Any]:
    offset = len(stream.read(3)) if stream.peek(3).startswith(codecs.BOM_UTF8) else 0
    while (ahead := stream.peek()) and not ahead.strip():
        offset += len(stream.read(len(ahead)))
    if not ahead:
        raise UserError(f"{path} is empty")
    if ahead.lstrip().startswith(b"["):
        yield from _json_list(_Text(path, stream, offset, most))
        return
    if _is_over_lines(path, ahead, most):
        text = _Text(path, stream, offset, most)
        while text.next():
            yield text.value()
        return
    # Of bytes, which a newline alone ends: JSON strings may hold U+2028 and the like. A character has at most 4 bytes.
    while line := stream.readline(4 * most + 2):
        if len(line) == 4 * most + 2 and not line.endswith(b"\n"):
            while (part := stream.readline(CHUNK)) and not part.endswith(b"\n"):
                pass
            yield too_long(most)
        elif line.strip():
            try:
                spelled = line.decode().strip(" \t\r\n")
                yield _DECODER.decode(spelled) if len(spelled) <= most else too_long(most)
            except UnicodeDecodeError as error:
                yield Fault(f"is not UTF-8 text: its byte {error.start} cannot be read")
            except (ValueError, RecursionError) as error:
                yield Fault(f"is not JSON: {error}")


def _is_over_lines(path: Path, ahead: bytes, most: int) -> bool:
    """Whether a file that begins so begins with an object that goes on over several lines."""
    line, newline, _ = ahead.lstrip().partition(b"\n")
    if not (newline and line.startswith(b"{")):
        return False
    try:
        _DECODER.decode(line.decode())
        return False
    except (ValueError, RecursionError):
        pass
    with unpacked(path) as stream:
        if stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)
        try:
            _Text(path, stream, 0, most).value()
        except ValueError:
            return False
    return True


def _json_list(text: _Text) -> Iterator[Any]:
    """The items of a JSON list, each as soon as it has been read."""
    text.skip("[")
    is_first = True
    while text.next() != "]":
        if not is_first:
            text.skip(",")
        is_first = False
        yield text.value()
    text.skip("]")
    if text.next():
        raise UserError(f"{text.path} is not JSON: something follows the end of its list")


class _Text:
    """A JSON text, of which the part that is being read is in memory."""

    def __init__(self, path: Path, stream: io.BufferedReader, offset: int, most: int) -> None:
        """offset: bytes of the file that stand before the stream. most: characters of a value."""
        self.path = path
        self._most = most
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = offset  # bytes of the file that have been read
        self._part = ""
        self._position = 0  # in that part
        self._ended = False
        self._values = 0

    def next(self) -> str:
        """The next character that is not blank; empty at the end of the text."""
        while True:
            self._position = _BLANK.match(self._part, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._part):
                return self._part[self._position]
            if self._ended:
                return ""
            self._read(CHUNK)

    def skip(self, expected: str) -> None:
        """Step over a character. Raises UserError if it is not the expected one."""
        character = self.next()
        if character != expected:
            place = f"followed by {character!r}" if character else "the last thing in the file"
            raise UserError(f"{self.path} is not JSON: record {self._values} is {place}, not followed by {expected!r}")
        self._position += 1

    def value(self) -> Any:
        """The JSON value that starts here; a Fault if it is too long. Raises UserError where there is none."""
        self.next()
        self._values += 1
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._part, self._position)
                if end < len(self._part) or self._ended:  # otherwise a number could go on
                    is_long = end - self._position > self._most
                    self._position = end
                    return too_long(self._most) if is_long else value
            except json.JSONDecodeError as error:
                # A value cut off by the end of the part fails there, or is a string that is said to fail at its start.
                is_cut_off = error.pos > len(self._part) - 12 or error.msg.startswith("Unterminated string")
                if self._ended or not is_cut_off:
                    raise UserError(f"{self.path}: record {self._values} is not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path}: record {self._values} is not JSON: {error}") from None
            if len(self._part) - self._position > self._most:
                self._pass_over()
                return too_long(self._most)
            self._read(size)
            size = min(2 * size, max(self._most, CHUNK))  # a long value is then scanned a few times only

    def _pass_over(self) -> None:
        """Step over the value that starts here, however long. Of its text, only where it ends is looked at."""
        if self._part[self._position] not in '"[{':
            raise UserError(f"{self.path}: record {self._values} is not JSON: it is a number that does not end")
        depth, in_string = 0, False
        while True:
            end = self._position
            for mark in _MARKS.finditer(self._part, self._position):
                sign, end = mark.group(), mark.end()
                if sign == '"':
                    in_string = not in_string
                elif not in_string:
                    depth += (sign in "[{") - (sign in "]}")
                if depth <= 0 and not in_string:
                    self._position = end
                    return
            # A backslash at the end waits for the character that belongs to it.
            self._position = len(self._part) - (self._part.endswith("\\") and end < len(self._part))
            self._read(CHUNK)
            if self._ended:
                raise UserError(f"{self.path}: record {self._values} is not JSON: it does not end")

    def _read(self, size: int) -> None:
        content = self._stream.read(size)
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            byte = self._offset - waiting + error.start
            raise UserError(f"{self.path} is not UTF-8 text: byte {byte} cannot be read; save it as UTF-8") from None
        self._offset += len(content)
        self._part = self._part[self._position :] + text
        self._position = 0
        self._ended = not content


_BLANK = re.compile(r"[ \t\n\r]*")
_MARKS = re.compile(r'["\[\]{}]|\\.', re.DOTALL)  # a backslash takes the character after it along
_LIKE_JSON = re.compile(rb'\s*(\[\s*)?\{\s*"')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    """A JSON object, or a Fault where a later value would take the place of an earlier one."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    return Fault(f"has the field {next(name for name in names if names.count(name) > 1)!r} twice")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
