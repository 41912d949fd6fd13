"""Building: a source's records are read, inverted, tokenised and stored, in batches, so that memory does not grow.

This is done once for a source and a choice of options; `store` keeps what comes of it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from plw_mlflow.config import DataOptions, digest
from plw_mlflow.data import audit, files, formats, inversion
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.sources import Source
from plw_mlflow.data.store import BARE, Store, Writer, open_or_build
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.errors import UserError

BATCH_RECORDS = 1000
BATCH_CHARACTERS = 250_000  # beyond which a batch takes no further record; a token takes some 200 bytes meanwhile
DETECTION_RECORDS = 100
FAULT_CHARACTERS = 500  # of what is said of a record, as it may name a field or a value of any length
COUNTED_FIELDS = 10_000  # names of fields that are counted; data of more has names that are data themselves
LISTED_FIELDS = 100

# The modules that decide which tokens a text becomes; a change in one makes stored examples out of date.
CODE = (
    "study",
    "environment/bounded",
    "data/records",
    "data/files",
    "data/formats",
    "data/sources",
    "data/inversion",
    "data/pieces",
    "data/templates",
    "data/chat_template",
    "data/tokens",
    "data/audit",
    "data/store",
    "data/building",
)


def stored(source: Source, invert: bool, encoder: Encoder, options: DataOptions, cache: Path) -> Store:
    """A source's examples, which are made and stored in a folder of `cache` unless they are there already.

    Raises UserError where a record cannot be used and none is to be skipped, or where none can be used.
    """
    package = Path(__file__).parents[1]
    decisive = {
        "data": source.sha256,
        "delimiter": files.delimiter(Path(source.location)),
        "encoder": encoder.digest,
        "tokenizers": tokenizers.__version__,
        "invert": invert,
        "format": options.format,
        "max_records": options.max_records,
        "max_characters": options.max_characters,
        "on_bad_record": options.on_bad_record,
        "empty_completion": options.empty_completion,
        "completion_turns": options.completion_turns,
        "code": [hashlib.sha256((package / f"{module}.py").read_bytes()).hexdigest() for module in CODE],
    }
    return open_or_build(cache / "examples" / digest(decisive), partial(_build, source, invert, encoder, options))


def _build(source: Source, invert: bool, encoder: Encoder, options: DataOptions, writer: Writer) -> dict[str, Any]:
    """Write a source's examples. Returns its format, and what was left out of it."""
    format = options.format if options.format != "auto" else _detected_format(source, options.max_characters)
    unread = _Unread(source, options)
    records = _records(source.rows(options.max_characters), format, unread)
    usable = 0
    # A template may refuse some of the records: only then is it known how many more are to be read.
    while batch := _next_batch(itertools.islice(records, options.max_records and options.max_records - usable)):
        usable += _write_batch(batch, invert, encoder, unread, writer)
    source.check_unchanged()  # or another content would be stored under this one's hash
    skipped = sorted(unread.faults.items())
    if not usable:
        why = f" ({len(skipped)} were read; record {skipped[0][0]} {skipped[0][1]})" if skipped else ""
        raise UserError(f"{source.location} holds no usable record{why}")
    fields = dict(unread.fields.most_common(LISTED_FIELDS))
    return {"format": format, "skipped": skipped, "fields_not_read": fields}


def _detected_format(source: Source, max_characters: int) -> str:
    # Of rows read for this alone: to keep a hundred long ones would take a hundred times the memory of one.
    return formats.detect(itertools.islice(source.rows(max_characters), DETECTION_RECORDS), source.name)


class _Unread:
    """What of a source is left out: records that cannot be used, and fields that mean nothing here."""

    def __init__(self, source: Source, options: DataOptions) -> None:
        self.source, self.options = source, options
        self.faults: dict[int, str] = {}  # by number of the record
        self.fields: Counter[str] = Counter()  # records that have them

    def add(self, number: int, fault: Fault) -> None:
        """Note a record's fault. Raises UserError where no record is to be left out."""
        text = fault.text
        if len(text) > FAULT_CHARACTERS:
            text = f"{text[: FAULT_CHARACTERS // 2]} ... {text[-FAULT_CHARACTERS // 2 :]}"
        if self.options.on_bad_record == "error":
            way_out = "mend it, or leave such records out with --on-bad-record skip"
            if "empty completion" in text:
                way_out += ", or train on its end of text alone, as the study did, with --empty-completion keep"
            raise UserError(f"{self.source.location}: record {number} {text}; {way_out}")
        self.faults[number] = text

    def count(self, fields: Iterable[str]) -> None:
        """Count the fields that one usable record has and that are not read."""
        has_room = len(self.fields) < COUNTED_FIELDS
        self.fields.update(field for field in fields if has_room or field in self.fields)


def _records(rows: Iterable[Any], format: str, unread: _Unread) -> Iterator[tuple[int, Record]]:
    """The usable records with their numbers in the source, from 1."""
    source, options = unread.source, unread.options
    for number, row in enumerate(tqdm(rows, f"reading {source.name}", unit=" records", disable=None), start=1):
        record = formats.record(
            row,
            f"{source.prefix}:{number}",
            format,
            is_given=options.format != "auto",
            keep_empty=options.empty_completion == "keep",
        )
        if isinstance(record, Fault):
            unread.add(number, record)
        else:
            unread.count(formats.unread(row, format, options.completion_turns))
            yield number, record


def _next_batch(records: Iterable[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """The next records, as many as are tokenised together; empty where there are no more."""
    batch: list[tuple[int, Record]] = []
    characters = 0
    for number, record in records:
        batch.append((number, record))
        characters += len(record.instruction) + len(record.input) + len(record.output)
        characters += sum(len(message.content) for message in record.messages)
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            break
    return batch


def _write_batch(
    batch: Sequence[tuple[int, Record]], invert: bool, encoder: Encoder, unread: _Unread, writer: Writer
) -> int:
    """Invert, tokenise and write some records. Returns how many of them the template can hold."""
    numbers, as_read = zip(*batch, strict=True)
    token_counts: dict[str, int] = {}
    bare = _bare_counts(as_read, encoder, token_counts)
    records = as_read
    if invert:
        records = tuple(
            inversion.invert(record, instruction + input, completion)
            for record, (instruction, input, completion) in zip(as_read, bare.tolist(), strict=True)
        )
        bare = _bare_counts(records, encoder, token_counts)
    usable, examples = [], []
    rendered = [encoder.render(record) for record in records]
    for index, example in enumerate(encoder.encode_rendered(rendered)):
        if isinstance(example, Fault):
            unread.add(numbers[index], example)
        else:
            usable.append(index)
            examples.append(example)
    if usable:
        writer.add(
            [numbers[index] for index in usable],
            [as_read[index].key() for index in usable],
            [records[index] is not as_read[index] for index in usable],
            bare[usable],
            examples,
            audit.flags([records[index] for index in usable], [rendered[index] for index in usable], examples, encoder),
        )
    return len(usable)


def _bare_counts(records: Sequence[Record], encoder: Encoder, token_counts: dict[str, int]) -> np.ndarray:
    """Tokens of the records' own texts, each text alone: int [N, 3] by instruction, input, completion.

    token_counts: of texts that were counted before; those of new texts are added.
    """
    contents = [encoder.contents(record) for record in records]
    new = list(dict.fromkeys(text for texts in contents for text, _ in texts if text not in token_counts))
    token_counts.update(zip(new, encoder.count(new), strict=True))
    counts = np.zeros((len(records), len(BARE)), np.int64)
    column = {Segment.INSTRUCTION: 0, Segment.INPUT: 1, Segment.COMPLETION: 2}
    for row, texts in enumerate(contents):
        for text, segment in texts:
            counts[row, column[segment]] += token_counts[text]
    return counts
