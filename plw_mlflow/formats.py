"""Formats: how a file's bytes become rows, and a row a record, whatever its fields are called.

A file is unpacked, decoded and cut into rows as a stream, so that one of any size is read in the same memory. JSON is
read by Python's own scanner: faster stream parsers replace half a surrogate pair by a question mark and say nothing.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plw_mlflow.records import Fault, Message, Record

FIELDS = {  # of each format: what must be there, and, for those of three texts, what holds the input
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "prompt-completion": ("prompt", None, "completion"),
}
CONVERSATIONS = ("messages", "conversations")
TOOLS = ("tools", "functions")
READ = {format: {*fields, "system", "history", *TOOLS} for format, fields in FIELDS.items()}  # fields, by format
READ["chat"] = {*CONVERSATIONS, "system", *TOOLS}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
CHUNK = 1 << 20  # bytes read at a time


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
            raise ValueError(f"{path} is a damaged {kind} file ({error}); get it again") from None


def is_csv(path: Path) -> bool:
    """Whether a file is CSV, which its name alone can say."""
    return ".csv" in map(str.lower, path.suffixes)


def rows(path: Path) -> Iterator[Any]:
    """A file's rows, a Fault in place of a line that cannot be read.

    Parquet is known by its first bytes, CSV by the file's name; anything else is JSON: a list, or one value a line.
    Raises ValueError for a fault beyond which nothing can be read.
    """
    with unpacked(path) as stream:
        if stream.peek(4)[:4] == b"PAR1":
            with path.open("rb") as file:
                if file.read(4) != b"PAR1":
                    raise ValueError(f"{path}: Parquet is not read packed; unpack it")
            yield from _parquet(path)
        elif is_csv(path):
            yield from _csv(path, stream)
        else:
            yield from _json(path, stream)


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a damaged Parquet file ({error}); get it again") from None


def _csv(path: Path, stream: io.BufferedReader) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # characters; a text may be long
    number = 0
    try:
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        header = next(reader, [])
        if len(header) == 1 and (delimiter := next((one for one in ";\t" if one in header[0]), None)):
            raise ValueError(
                f"{path}: its first line is a single field, which holds {delimiter!r}; the delimiter must be a comma"
            )
        for number, texts in enumerate(filter(None, reader), start=1):  # noqa: B007 (named by what is raised below)
            if len(texts) == len(header):
                yield dict(zip(header, texts, strict=True))
            else:
                yield Fault(f"has {len(texts)} columns, where the first line names {len(header)}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text, soon after record {number} ({error.reason}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise ValueError(f"{path}: record {number + 1} is not CSV: {error}") from None


def _json(path: Path, stream: io.BufferedReader) -> Iterator[Any]:
    offset = len(stream.read(3)) if stream.peek(3).startswith(codecs.BOM_UTF8) else 0
    while (ahead := stream.peek()) and not ahead.strip():
        offset += len(stream.read(len(ahead)))
    if not ahead:
        raise ValueError(f"{path} is empty")
    if ahead.lstrip().startswith(b"["):
        yield from _json_list(_Text(path, stream, offset))
        return
    for line in stream:  # of bytes, which a newline alone ends: JSON strings may hold U+2028 and the like
        if line.strip():
            try:
                yield json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield Fault(f"is not UTF-8 text: its byte {error.start} cannot be read")
            except (ValueError, RecursionError) as error:
                yield Fault(f"is not JSON: {error}")


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
        raise ValueError(f"{text.path} is not JSON: something follows the end of its list")


class _Text:
    """A JSON text, of which the part that is being read is in memory."""

    def __init__(self, path: Path, stream: io.BufferedReader, offset: int) -> None:
        """offset: bytes of the file that stand before the stream."""
        self.path = path
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
        """Step over a character. Raises ValueError if it is not the expected one."""
        found = self.next()
        if found != expected:
            found = f"followed by {found!r}" if found else "the last thing in the file"
            raise ValueError(f"{self.path} is not JSON: record {self._values} is {found}, not followed by {expected!r}")
        self._position += 1

    def value(self) -> Any:
        """The JSON value that starts here. Raises ValueError where there is none."""
        self.next()
        self._values += 1
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._part, self._position)
                if end < len(self._part) or self._ended:  # otherwise a number could go on
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                # A value cut off by the end of the part fails there, or is a string that is said to fail at its start.
                is_cut_off = error.pos > len(self._part) - 12 or error.msg.startswith("Unterminated string")
                if self._ended or not is_cut_off:
                    raise ValueError(f"{self.path}: record {self._values} is not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}: record {self._values} is not JSON: {error}") from None
            self._read(size)
            size *= 2  # a long value is then scanned a few times only

    def _read(self, size: int) -> None:
        content = self._stream.read(size)
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            byte = self._offset - waiting + error.start
            raise ValueError(f"{self.path} is not UTF-8 text: byte {byte} cannot be read; save it as UTF-8") from None
        self._offset += len(content)
        self._part = self._part[self._position :] + text
        self._position = 0
        self._ended = not content


_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


# Records: what a row says.


def detect(first: Iterable[Any], name: str) -> str:
    """The format most of the first rows have. Raises ValueError where none has any, or two are equally likely.

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
        raise ValueError(f"{name} holds no record")
    if faults[0] and all(faults):
        raise ValueError(f"{name}: record 1 {faults[0].text}")
    if not found:
        raise ValueError(
            f"{name} has records of no known format (the first has the fields {', '.join(map(repr, seen)) or 'none'}): "
            + "; ".join(f"{format} needs {' and '.join(map(repr, _needed(format)))}" for format in FIELDS)
            + f"; chat needs {' or '.join(map(repr, CONVERSATIONS))}. Rename the fields"
        )
    (best, count), *others = found.most_common()
    if others and others[0][1] == count:
        raise ValueError(f"{name} could be of format {best} or {others[0][0]}; say which with --format")
    return best


def record(row: Any, id: str, format: str, *, keep_empty: bool = False) -> Record | Fault:
    """A row as a record, or what makes it unusable as one.

    keep_empty: an empty completion is no fault.
    """
    if fault := _not_an_object(row):
        return fault
    if not _has(row, format):
        lacking = next((field for field in _needed(format) if field not in row), None)
        lacking = "messages" if lacking is None else lacking
        return Fault(f"lacks the field {lacking!r} (it has {', '.join(map(repr, row)) or 'none'})")
    if any((row.get(field) or "[]") != "[]" for field in TOOLS):
        return Fault("has tools, which no template here is given")
    if not isinstance(row.get("system") or "", str):
        return Fault("has something other than text as its system")
    found = _chat(row, id) if format == "chat" else _three_texts(row, id, format)
    if isinstance(found, Fault):
        return found
    completion = FIELDS[format][2] if format in FIELDS else "last assistant turn"
    if not keep_empty and not found.output.strip():
        return Fault(f"has an empty completion ({completion})")
    if not found.instruction.strip():
        return Fault("has an empty instruction")
    return found


def unread(row: dict[str, Any], format: str) -> list[str]:
    """The fields of a row that hold something and are not read."""
    return [field for field, value in row.items() if value is not None and field not in READ[format]]


def _not_an_object(row: Any) -> Fault | None:
    if isinstance(row, dict | Fault):
        return row if isinstance(row, Fault) else None
    return Fault(f"is a JSON {type(row).__name__}, not an object")


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


def _three_texts(row: dict[str, Any], id: str, format: str) -> Record | Fault:
    texts = []
    for field in FIELDS[format]:
        text = row.get(field) if field else None
        if text is not None and not isinstance(text, str):
            return Fault(f"has something other than text as its {field}")
        if text and not _is_text(text):
            return Fault(f"has half a surrogate pair in its {field}, which is no character")
        texts.append(text or "")
    instruction, input, output = texts
    system, history = row.get("system"), row.get("history") or []
    if not (system or history):
        return Record(id, instruction, input, output)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return Fault("has something other than a list of pairs, question and answer, as its history")
    asked = f"{instruction}\n{input}" if input else instruction
    turns = [{"role": "system", "content": system}] if system else []
    for pair in [*history, [asked, output]]:
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _conversation(turns, id)


def _chat(row: dict[str, Any], id: str) -> Record | Fault:
    turns = next((row[field] for field in CONVERSATIONS if row.get(field) is not None), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Fault("has something other than a list of turns as its conversation")
    found = _conversation(turns, id)
    if isinstance(found, Record) and row.get("system") and found.messages[0].role != "system":
        return _conversation([{"role": "system", "content": row["system"]}, *turns], id)
    return found


def _conversation(turns: list[dict[str, Any]], id: str) -> Record | Fault:
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            return Fault(f"has the role {role!r} in turn {number}, where only {', '.join(ROLES)} are known")
        if not isinstance(content, str):
            return Fault(f"has something other than text as its turn {number}")
        if not _is_text(content):
            return Fault(f"has half a surrogate pair in its turn {number}, which is no character")
        messages.append(Message(ROLES[role], content))  # type: ignore[arg-type]
    if not messages or messages[-1].role != "assistant":
        return Fault("does not end with a turn of the assistant")
    asked = [message.content for message in messages if message.role == "user"]
    if not asked:
        return Fault("has no turn of the user")
    return Record(id, asked[-1], "", messages[-1].content, tuple(messages))


def _is_text(text: str) -> bool:
    """Whether a string can be written down: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
