"""Formats: how a file's bytes become rows, and a row a record, whatever its fields are called.

A file is unpacked, decoded and cut into rows as a stream, and a row has at most as many characters as the caller
allows, so that a file of any size is read in the same memory. JSON is read by Python's own scanner: faster stream
parsers replace half a surrogate pair by a question mark and say nothing.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from plw_mlflow.data.records import Fault, Message, Record
from plw_mlflow.environment import bounded
from plw_mlflow.errors import UserError, first_line

FIELDS = {  # of each format: what must be there, and, for those of three texts, what holds the input
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "prompt-completion": ("prompt", None, "completion"),
}
OWN = {format: frozenset(field for field in fields if field) for format, fields in FIELDS.items()}
CONVERSATIONS = ("messages", "conversations")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
INPUTS = ("input", "context")
# Fields that hold text of a prompt or an answer. Where the format does not say how such a field belongs to a record, it
# is not left out unasked. A `prompt` beside an instruction or a conversation is no such field: it repeats them.
TEXTS = (
    *("instruction", *INPUTS, "output", "response", "completion", "history", *CONVERSATIONS),
    *("reasoning_content", "reasoning", "thinking"),
)
# Marks by which trainers choose what to train on: OpenAI's and OpenChat's, axolotl's (two), ms-swift's.
MARKS = ("weight", "train", "train_on_turn", "loss")
RECORD_MARKS = ("weight", "train")
TOKEN_MARKS = ("loss_mask", "train_detail")
READ = {  # fields, by format
    format: {*fields, *SYSTEMS, "history", *TOOLS, *RECORD_MARKS, *TOKEN_MARKS} for format, fields in FIELDS.items()
}
READ["chat"] = {*CONVERSATIONS, *SYSTEMS, *TOOLS, *RECORD_MARKS, *TOKEN_MARKS}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TURN = (("role", "from"), ("content", "value"))  # the fields of a turn, by both of their names
REFUSED = {  # other fields of a turn, and why a turn that has one cannot be used
    **dict.fromkeys(("tool_calls", "function_call", *TOOLS), "which no template here is given"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "refusal"),
        "which is text of the turn outside its content; put it into the content or remove it",
    ),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "which is no text"),
    **dict.fromkeys(TOKEN_MARKS, "but an answer is trained on as a whole or not at all"),
}
PLAIN = {*itertools.chain.from_iterable(TURN)}  # fields of a turn that are always read

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


# Rows: what a file holds, as dicts if all is well.


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
        elif parting := delimiter(path):
            if _LIKE_JSON.match(start):
                raise UserError(f"{path} is JSON by its content, but CSV or TSV by its name; rename it")
            yield from _csv(path, stream, parting, most)
        else:
            yield from _json(path, stream, most)


def too_long(most: int) -> Fault:
    """The fault of a row that has more characters than it may have."""
    return Fault(f"{_TOO_LONG} {most:,} characters (--max-characters)")


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
    bounded.Refusal for a fault beyond which nothing can be read.
    """
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if twice := _repeated_column(file.schema_arrow):
                raise bounded.Refusal(f"{path} has the column {twice!r} twice; rename or remove one")
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                for row in _converted(batch):
                    yield row if isinstance(row, Fault) or characters(row) <= most else too_long(most)
    except (bounded.Refusal, MemoryError):
        raise
    except Exception as error:  # what damage makes of a file is told by many kinds of errors
        raise bounded.Refusal(
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


def _csv(path: Path, stream: io.BufferedReader, parting: str, most: int) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # characters; the lines are bounded
    number = 0
    try:
        lines = _Lines(path, stream, parting, most)
        found = lines.rows()
        header, is_long = next(found, ([], False))
        if is_long:
            raise UserError(f"{path}: its first line {too_long(most).text}; it must name the columns")
        if len(header) == 1 and (other := next((one for one in ";\t," if one in header[0]), None)):
            must = "a tab, as the file is called TSV" if parting == "\t" else "a comma"
            must += "; call it .tsv" if other == "\t" else ""
            raise UserError(
                f"{path}: its first line is a single field, which holds {other!r}; the delimiter must be {must}"
            )
        if repeated := [name for name in header if header.count(name) > 1]:
            raise UserError(f"{path} has the column {repeated[0]!r} twice; rename or remove one")
        for number, (texts, is_long) in enumerate(found, start=1):  # noqa: B007 (named by what is raised below)
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
        raise UserError(f"{path}: record {number + 1} is not {'CSV' if parting == ',' else 'TSV'}: {error}") from None


class _Lines:
    """The lines of a CSV file; of a record with too many characters, only what parts its fields and lines.

    So the CSV reader still finds where such a record ends, and need not hold it.
    """

    def __init__(self, path: Path, stream: io.BufferedReader, parting: str, most: int) -> None:
        self._path, self._most = path, most
        self._text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        self._reader = csv.reader(self, strict=True, delimiter=parting)
        self._content = re.compile(f'[^"\r\n{re.escape(parting)}]+')
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
        found = self.next()
        if found != expected:
            found = f"followed by {found!r}" if found else "the last thing in the file"
            raise UserError(f"{self.path} is not JSON: record {self._values} is {found}, not followed by {expected!r}")
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
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    return Fault(f"has the field {next(name for name in names if names.count(name) > 1)!r} twice")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


# Records: what a row says.


def detect(first: Iterable[Any], name: str) -> str:
    """The format most of the first rows have. Raises UserError where none has any, or two are equally likely.

    A field that holds nothing is none: Parquet has every field in every row.
    """
    found: Counter[str] = Counter()
    seen: list[str] = []
    faults = []
    for row in first:
        if isinstance(row, dict):
            fields = [field for field, value in row.items() if value is not None]
            seen = seen or fields
            found.update(format for format in [*FIELDS, "chat"] if _has(fields, format))
        faults.append(_not_an_object(row))
    if not faults:
        raise UserError(f"{name} holds no record")
    if faults[0] and all(faults):
        kind = "" if delimiter(Path(name)) else _OTHER_KINDS
        kind *= faults[0].text.startswith(_NO_JSON)
        if len(faults) == 1 and faults[0].text.startswith(_TOO_LONG):
            kind = "; if it is an object around all the records, write the list of them into a file of its own"
        raise UserError(f"{name}: record 1 {faults[0].text}{kind}")
    if not found:
        if len(faults) == 1 and (wrapped := _wrapped(row)):
            raise UserError(
                f"{name} is one JSON object, which holds its records in the list {wrapped!r}; a file must hold the "
                "list itself: write it into a file of its own"
            )
        raise UserError(
            f"{name} has records of no known format (the first has the fields {_listed(seen)}): "
            + "; ".join(f"{format} needs {' and '.join(map(repr, _needed(format)))}" for format in FIELDS)
            + f"; chat needs {' or '.join(map(repr, CONVERSATIONS))}. Rename the fields"
        )
    (best, count), *others = found.most_common()
    if others and others[0][1] == count:
        raise UserError(f"{name} could be of format {best} or {others[0][0]}; say which with --format")
    return best


def record(
    row: Any,
    id: str,
    format: str,
    *,
    is_given: bool = False,
    keep_empty: bool = False,
) -> Record | Fault:
    """A row as a record, or what makes it unusable as one.

    is_given: the caller has chosen the format, so that text in fields of other formats is left out.
    keep_empty: an empty completion is no fault.
    """
    if fault := _not_an_object(row):
        return fault
    if not _has(row, format):
        lacking = next((field for field in _needed(format) if field not in row), None)
        lacking = "messages" if lacking is None else lacking
        return Fault(f"lacks the field {lacking!r} (it has {_listed(row)})")
    has_more = not _is_plain(row, format)  # most rows have not, which saves most of the time that looking takes
    if has_more and (fault := _unusable_fields(row)):
        return fault
    found = _chat(row, id) if format == "chat" else _three_texts(row, id, format)
    if isinstance(found, Fault):
        return found
    if has_more and not is_given and (field := _left_out(row, found, format)):
        return Fault(
            f"has text in the field {field!r}, and how it belongs to a record of format {format} is not certain "
            f"(--format {format} leaves it out and counts it)"
        )
    empty = _empty_answer(found, format)
    if empty and not keep_empty:
        return Fault(f"has an empty completion ({empty})")
    if not found.instruction.strip():
        return Fault("has an empty instruction")
    return found


def unread(row: dict[str, Any], format: str, completion_turns: Literal["last", "every"] = "last") -> list[str]:
    """The fields of a usable row that hold something and are not read; those of its turns as `messages[].NAME`."""
    names: list[str] = []
    if not _is_plain(row, format):
        read = READ[format] if format == "chat" else READ[format] | {_input_field(row, format)}
        names += [field for field, value in row.items() if value is not None and field not in read]
    if format == "chat":
        field = _conversation_field(row)
        names += dict.fromkeys(f"{field}[].{name}" for name in _unread_of_turns(row[field], completion_turns))
    return names


def _unread_of_turns(turns: list[dict[str, Any]], completion_turns: str) -> Iterator[str]:
    for number, turn in enumerate(turns, start=1):
        content = _either(turn, "content", "value")
        if turn.keys() <= PLAIN and isinstance(content, str):
            continue
        is_answer = ROLES[_either(turn, "role", "from")] == "assistant"
        is_completion = is_answer and (completion_turns == "every" or number == len(turns))
        for name, value in turn.items():
            # The mark of an earlier answer, by which it would be trained on, is not followed if only the last one is.
            is_followed = name in MARKS and is_answer and (is_completion or not _mark(value))
            if value is not None and name not in PLAIN and name not in REFUSED and not is_followed:
                yield name
        for part in content if isinstance(content, list) else ():
            yield from (f"content[].{name}" for name, value in part.items() if value and name not in ("type", "text"))


def _not_an_object(row: Any) -> Fault | None:
    if isinstance(row, dict | Fault):
        return row if isinstance(row, Fault) else None
    return Fault(f"is a JSON {type(row).__name__}, not an object")


def _listed(fields: Iterable[str]) -> str:
    """The first of some names, as they are listed in a message."""
    names = [repr(field if len(field) <= 100 else field[:97] + "...") for field in itertools.islice(fields, 21)]
    return ", ".join([*names[:20], "..."] if len(names) > 20 else names) or "none"


def _wrapped(row: Any) -> str | None:
    """The field of a file's only row that holds a list of records."""
    for field, value in row.items() if isinstance(row, dict) else ():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and any(_has(first, format) for format in (*FIELDS, "chat")):
            return str(field)
    return None


def _needed(format: str) -> list[str]:
    """The fields a row of a format must have; of a chat, one of two is enough."""
    if format == "chat":
        return []
    instruction, _, output = FIELDS[format]
    return [str(instruction), str(output)]


def _has(fields: Container[str], format: str) -> bool:
    if format == "chat":
        return any(field in fields for field in CONVERSATIONS)
    return all(field in fields for field in _needed(format))


def _is_plain(row: dict[str, Any], format: str) -> bool:
    """Whether a row has its format's own texts and no other field."""
    return len(row) == 1 if format == "chat" else row.keys() <= OWN[format]


def _holds(value: Any) -> bool:
    """Whether a field's value is anything but nothing."""
    return bool(value.strip() if isinstance(value, str) else value)


def _holds_any(value: Any) -> bool:
    """The same of a list or an object, which may be spelled as text."""
    return _holds(value) and value not in ("[]", "{}")


def _either(row: dict[str, Any], name: str, other: str) -> Any:
    """The value of the first of two fields that has one."""
    value = row.get(name)
    return row.get(other) if value is None else value


def _mark(value: Any) -> bool | None:
    """What a mark says of training on something; None if it is neither 0 and 1 nor false and true."""
    if isinstance(value, str):
        return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(value.lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _marked(fields: dict[str, Any], names: Iterable[str], where: str = "") -> bool | Fault:
    """Whether something is to be trained on by its marks, of those called `names`."""
    marks = {name: fields[name] for name in names if fields.get(name) not in (None, "")}
    says = {_mark(value) for value in marks.values()}
    for name, value in marks.items():
        if _mark(value) is None:
            return Fault(
                f"has the {name} {value!r}{where}, where only 0 and 1 (or false and true) can be followed; change it, "
                f"or rename the field if it means something else"
            )
    if len(says) > 1:
        return Fault(f"has marks that contradict each other{where}: {', '.join(marks)}")
    return says != {False}


def _unusable_fields(row: dict[str, Any]) -> Fault | None:
    """What in the fields beside the texts makes a row unusable."""
    if any(_holds_any(row.get(field)) for field in TOOLS):
        return Fault("has tools, which no template here is given")
    masks = [*TOKEN_MARKS, *(["labels"] if _holds_any(row.get("input_ids")) else [])]
    if field := next((field for field in masks if _holds_any(row.get(field))), None):
        return Fault(f"has {field}, by which parts of a text are chosen to be trained on; nothing here follows it")
    systems = {field: row[field] for field in SYSTEMS if row.get(field)}
    for field, text in systems.items():
        if not isinstance(text, str):
            return Fault(f"has something other than text as its {field}")
    if len({*systems.values()}) > 1:
        return Fault(f"has two system texts ({' and '.join(systems)}), which differ; remove one")
    is_trained = _marked(row, RECORD_MARKS)
    if isinstance(is_trained, Fault):
        return is_trained
    return None if is_trained else Fault("is marked as not to be trained on (by its weight, or train)")


def _input_field(row: dict[str, Any], format: str) -> str | None:
    """The field that holds a row's input: the format's own, or, where that has nothing, the one of another format.

    In the format prompt-completion there is none, as a prompt may have its input within.
    """
    own = FIELDS[format][1]
    if own is None or _holds(row.get(own)):
        return own
    return next((field for field in INPUTS if _holds(row.get(field))), own)


def _left_out(row: dict[str, Any], found: Record, format: str) -> str | None:
    """A field with text of a prompt or an answer that a row's record does not have, in whatever place."""
    texts = {found.instruction, found.input, found.output, *(message.content for message in found.messages)}
    read = READ[format] if format == "chat" else {*FIELDS[format], _input_field(row, format), "history"}
    for field in TEXTS:
        value = row.get(field)
        if value and field not in read and _holds(value) and (not isinstance(value, str) or value not in texts):
            return field
    return None


def _empty_answer(found: Record, format: str) -> str | None:
    """What a record calls the first of its answers that is empty, but for those marked as not to be trained on."""
    for number, message in enumerate(found.messages[:-1], start=1):
        if message.role == "assistant" and message.is_trained and not message.content.strip():
            return f"turn {number}"
    if found.output.strip():
        return None
    return str(FIELDS[format][2]) if format in FIELDS else "last assistant turn"


def _three_texts(row: dict[str, Any], id: str, format: str) -> Record | Fault:
    texts = []
    instruction_field, _, output_field = FIELDS[format]
    for field in (instruction_field, _input_field(row, format), output_field):
        text = row.get(field) if field else None
        if text is not None and not isinstance(text, str):
            return Fault(f"has something other than text as its {field}")
        if text and not _is_text(text):
            return Fault(f"has half a surrogate pair in its {field}, which is no character")
        texts.append(text or "")
    instruction, input, output = texts
    system, history = _system(row), row.get("history") or []
    if not (system or history):
        return Record(id, instruction, input, output)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return Fault("has something other than a list of pairs, question and answer, as its history")
    asked = f"{instruction}\n{input}" if input else instruction
    turns = [{"role": "system", "content": system}] if system else []
    for pair in [*history, [asked, output]]:
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _conversation(turns, id)


def _system(row: dict[str, Any]) -> str:
    """The system text beside the other fields of a row; empty if there is none."""
    return next((row[field] for field in SYSTEMS if row.get(field)), "")


def _conversation_field(row: dict[str, Any]) -> str:
    """The field that holds a row's conversation: one that has any turn, if there is one."""
    fields = sorted(CONVERSATIONS, key=lambda field: (not row.get(field), row.get(field) is None))
    return fields[0]


def _chat(row: dict[str, Any], id: str) -> Record | Fault:
    if all(row.get(field) for field in CONVERSATIONS) and row[CONVERSATIONS[0]] != row[CONVERSATIONS[1]]:
        return Fault(f"has both {' and '.join(CONVERSATIONS)}, which differ; remove one")
    turns = row[_conversation_field(row)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict | Fault) for turn in turns):
        return Fault("has something other than a list of turns as its conversation")
    found = _conversation(turns, id)
    if isinstance(found, Fault) or not (system := _system(row)):
        return found
    own = [message.content for message in found.messages if message.role == "system"]
    if not own:
        return _conversation([{"role": "system", "content": system}, *turns], id)
    return found if own == [system] else Fault("has a system text beside a system turn that differs; remove one")


def _conversation(turns: list[dict[str, Any]], id: str) -> Record | Fault:
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _message(turn, number)
        if isinstance(message, Fault):
            return message
        messages.append(message)
    if not messages or messages[-1].role != "assistant":
        return Fault("does not end with a turn of the assistant")
    if not messages[-1].is_trained:
        return Fault("ends with an answer that is marked as not to be trained on; end it with one that is")
    asked = [message.content for message in messages if message.role == "user"]
    if not asked:
        return Fault("has no turn of the user")
    return Record(id, asked[-1], "", messages[-1].content, tuple(messages))


def _message(turn: dict[str, Any] | Fault, number: int) -> Message | Fault:
    """One turn, or what makes it unusable; number: of the turn, from 1."""
    if isinstance(turn, Fault):
        return Fault(f"{turn.text} in turn {number}")
    role = _either(turn, "role", "from")
    if not isinstance(role, str) or role not in ROLES:
        return Fault(f"has the role {role!r} in turn {number}, where only {', '.join(ROLES)} are known")
    is_trained: bool | Fault = True
    if not turn.keys() <= PLAIN:
        for name, why in REFUSED.items():
            if _holds_any(turn.get(name)):
                return Fault(f"has {name} in turn {number}, {why}")
        if ROLES[role] == "assistant":
            is_trained = _marked(turn, MARKS, f" in turn {number}")
    if isinstance(is_trained, Fault):
        return is_trained
    content = _content(_either(turn, "content", "value"), number)
    if isinstance(content, Fault):
        return content
    if not _is_text(content):
        return Fault(f"has half a surrogate pair in its turn {number}, which is no character")
    for one, other in TURN if len(turn) > 2 else ():
        values = [turn[name] for name in (one, other) if turn.get(name) is not None]
        values = [ROLES.get(value, value) if one == "role" and isinstance(value, str) else value for value in values]
        if len(values) == 2 and values[0] != values[1]:
            return Fault(f"has both {one} and {other} in turn {number}, which differ")
    return Message(ROLES[role], content, is_trained)  # type: ignore[arg-type]


def _content(content: Any, number: int) -> str | Fault:
    """The text of a turn's content, whose parts follow one another without a space, as chat templates write them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        for part in content:
            if not isinstance(part, dict):
                break
            if part.get("type") != "text":
                return Fault(f"has a part of type {part.get('type')!r} in turn {number}, where only text can be read")
            if not isinstance(part.get("text"), str):
                break
        else:
            return "".join(part["text"] for part in content)
    return Fault(f"has something other than text as its turn {number}")


def _is_text(text: str) -> bool:
    """Whether a string can be written down: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_TOO_LONG = "has more than"
_NO_JSON = ("is not JSON", "is not UTF-8")
_OTHER_KINDS = " (a file is read as JSON unless its name ends in .csv or .tsv, or its content is Parquet's)"
