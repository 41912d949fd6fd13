"""Records: one instruction as text, read from a file or from the toy laboratory.

A record's `id` is where it stood in its source, so that every later message can name it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

TOY = ("toy-short", "toy-long")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Record:
    """One instruction as text, or a conversation that ends with the assistant."""

    id: str  # "FILE:NUMBER" counted from 1, "toy-short:NUMBER" or "HUB-ID:NUMBER"
    instruction: str  # of a conversation: the last user turn
    input: str  # may be empty
    output: str  # the completion; of a conversation: the last assistant turn
    messages: tuple[Message, ...] = ()  # the whole conversation, where the record came as one


@dataclass(frozen=True)
class Source:
    """The records of one data set, and what identifies them."""

    name: str  # as the caller gave it
    location: str  # the file's path, or "generated"
    sha256: str  # of the unpacked file, or of the generated records as JSON
    records: list[Record]
    skipped: list[str]  # what was wrong with each record that was left out


def load(dataset: str, *, max_records: int | None = None, on_bad_record: Literal["error", "skip"] = "error") -> Source:
    """The records of a data set: a toy one by name, or a .json or .jsonl file, also .gz.

    A record needs `instruction` and `output`, and may have `input`. Raises ValueError for a data set that does
    not exist, a file that holds no records, and (unless skipped) the first record that is unusable.
    """
    if dataset in TOY:
        from plw_mlflow import toy

        records = toy.records(dataset)
        text = json.dumps([asdict(record) for record in records]).encode()
        return Source(dataset, "generated", hashlib.sha256(text).hexdigest(), records[:max_records], [])
    path = Path(dataset)
    if not path.is_file():
        raise ValueError(f"data set {dataset!r} is neither a file nor one of {', '.join(TOY)}")
    content = _unpacked(path)
    kept: list[Record] = []
    skipped: list[str] = []
    for number, row in enumerate(_rows(path, content), start=1):
        if len(kept) == max_records:
            break
        fault = _fault(row)
        if fault is None:
            kept.append(Record(f"{path.name}:{number}", row["instruction"], row.get("input") or "", row["output"]))
        elif on_bad_record == "skip":
            skipped.append(f"record {number} {fault}")
        else:
            raise ValueError(
                f"{path}: record {number} {fault}; mend it, or leave such records out with --on-bad-record skip"
            )
    if not kept:
        raise ValueError(f"{path} holds no usable record" + (f" ({skipped[0]})" if skipped else ""))
    return Source(dataset, str(path.resolve()), hashlib.sha256(content).hexdigest(), kept, skipped)


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":  # gzip's magic number
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from None


def _rows(path: Path, content: bytes) -> Iterator[Any]:
    """The file's records: the items of a JSON list, or one JSON value a line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        yield from rows
        return
    number = 0
    for line in text.split("\n"):  # not splitlines: JSON strings may hold U+2028 and the like
        if line.strip():
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: record {number} is not JSON: {error}") from None
            yield row


def _fault(row: Any) -> str | None:
    """What makes a row unusable as a record, if anything."""
    if not isinstance(row, dict):
        return f"is a JSON {type(row).__name__}, not an object"
    for field in ("instruction", "output"):
        if field not in row:
            return f"lacks the field {field!r} (it has {', '.join(map(repr, row)) or 'none'})"
    for field in ("instruction", "input", "output"):
        text = row.get(field)
        if text is not None and not isinstance(text, str):
            return f"has something other than text as its {field}"
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            return f"has half a surrogate pair in its {field}, which is no character"
    if not (row["output"] or "").strip():
        return "has an empty completion (output)"
    if not (row["instruction"] or "").strip():
        return "has an empty instruction"
    return None
