"""Prepare: a data set's examples, split into training and validation, and their length profile.

Reading, inverting and tokenising are done once and stored (`store.py`), in batches, so that memory does not grow with
the data. Everything that merely chooses among the examples is done here, on their columns of counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from plw_mlflow.config import DataOptions, cache_folder, data_name, digest, short_name
from plw_mlflow.data import formats, inversion, profile, sources, templates
from plw_mlflow.data.profile import Contents, Profile, SourceContents
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.sources import Source
from plw_mlflow.data.store import BARE, BY_SEGMENT, COUNTS, Examples, Store, Writer, once
from plw_mlflow.data.templates import Segment
from plw_mlflow.data.tokens import Encoder, Example
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError

BATCH_RECORDS = 1000
BATCH_CHARACTERS = 250_000  # beyond which no further record is taken; a token takes some 200 bytes meanwhile
DETECTION_RECORDS = 100
LISTED = 100  # records that are named in a profile
FAULT_CHARACTERS = 500  # of what is said of a record, as it may name a field or a value of any length
COUNTED_FIELDS = 10_000  # names of fields that are counted; data of more has names that are data themselves
KEPT = {"completion_kept": Segment.COMPLETION, "template_kept": Segment.TEMPLATE}  # tokens within max_tokens
# What decides which tokens a text becomes; a change here makes stored examples out of date.
CODE = (
    "study",
    "environment/bounded",
    "data/records",
    "data/formats",
    "data/sources",
    "data/inversion",
    "data/templates",
    "data/tokens",
    "data/store",
    "data/prepare",
)


@dataclass(frozen=True)
class Prepared:
    """What training reads."""

    sources: tuple[Source, ...]  # the data set's, and the second one's where two are mixed
    training: Examples
    validation: Examples
    profile: Profile
    digest: str  # of all stored tokens and segments, from which the options choose
    largest_token: int


def run(
    dataset: str,
    tokenizer: Any,
    options: DataOptions,
    *,
    template_weight: float | None = None,
    completion_weight: float = 1.0,
) -> Prepared:
    """Read, invert, tokenise, mix and split a data set, and measure it; the two weights are for the measuring alone.

    Raises UserError where a record is unusable, or where no example is left to train on; Unreachable where a
    data set has to be downloaded and cannot be.
    """
    cache = cache_dir(options)
    template = templates.load(options.template, tokenizer, completion_turns=options.completion_turns)
    encoder = Encoder(tokenizer, template, prompt_border=options.prompt_border)
    found = tuple(sources.find(name, cache, options.data_dir) for name in (dataset, options.mix) if name is not None)
    inverted = [
        source.inverted or told for source, told in zip(found, (options.invert, options.mix_invert), strict=False)
    ]
    stores = [once(*_stored(*each, encoder, options, cache)) for each in zip(found, inverted, strict=True)]

    columns = {name: np.concatenate([store.columns[name] for store in stores]) for name in stores[0].columns}
    which = np.repeat(np.arange(len(stores)), [len(store.columns["number"]) for store in stores])
    rows = np.concatenate([np.arange(len(store.columns["number"])) for store in stores])
    is_repeated = _repeated(columns)
    chosen = ~is_repeated if options.drop_duplicates else np.ones(len(rows), bool)
    if options.mix is not None:
        if not chosen[which == 1].any():
            raise UserError(
                f"drop-duplicates leaves no record of {options.mix}, as {dataset} has them all; mix in another set, or "
                "keep the duplicates"
            )
        chosen &= blend(columns["key"], which == 1, chosen, options.mix_share)
        for number, source in enumerate(found):
            if not chosen[which == number].any():
                raise UserError(
                    f"mix-share={options.mix_share:g} with so few records leaves no record of {source.name}; change it"
                )
    chosen = np.flatnonzero(chosen)
    duplicates = int(is_repeated.sum() if options.drop_duplicates else is_repeated[chosen].sum())
    columns = {name: column[chosen] for name, column in columns.items()}
    which, rows = which[chosen], rows[chosen]

    is_long = columns["length"] > options.max_tokens
    for name, segment in KEPT.items():
        columns[name] = columns[BY_SEGMENT[segment]].copy()
    for index in np.flatnonzero(is_long):
        kept = stores[which[index]][int(rows[index])].segment[: options.max_tokens]
        for name, segment in KEPT.items():
            columns[name][index] = np.count_nonzero(kept == segment)
    is_dropped = is_long & (options.on_long == "drop")
    place = _fraction(columns["key"][:, :6])
    share = options.validation_share
    if len(np.unique(place[~is_dropped])) > 1:  # a few may all lie beyond the share; the curves need one all the same
        share = max(share, math.nextafter(place[~is_dropped].min(), 1))
    is_training, is_validation = ~is_dropped & (place >= share), ~is_dropped & (place < share)
    is_lost = ~is_dropped & (columns["completion_kept"] == 0)
    if not (is_training & ~is_lost).any():
        raise UserError(
            f"no example of {dataset} is left to train on: of {len(rows)} records {is_dropped.sum()} were dropped and "
            f"{is_lost.sum()} lost their whole completion at max-tokens={options.max_tokens} (raise --max-tokens), and "
            f"{is_validation.sum()} are kept for validation"
        )
    prefixes = [source.prefix for source in found]
    training, validation, dropped = (
        Examples(stores, prefixes, which[part], rows[part], options.max_tokens)
        for part in (is_training, is_validation, is_dropped)
    )
    contents = Contents(
        dataset=dataset,
        name=data_name(dataset, options, short_name),
        sources=[_source_contents(*both, which == n) for n, both in enumerate(zip(found, stores, strict=True))],
        template=options.template,
        records=len(rows),
        inverted=int(columns["inverted"].sum()),
        duplicates=duplicates,
        duplicates_dropped=options.drop_duplicates,
        dropped_as_too_long=len(dropped),
        first_dropped_as_too_long=[dropped.id(index) for index in range(min(LISTED, len(dropped)))],
        truncated=int((is_long & ~is_dropped).sum()),
        lost_whole_completion=int(is_lost.sum()),
        training_examples=int(is_training.sum()),
        validation_examples=int(is_validation.sum()),
    )
    measured = profile.measure(
        contents,
        {name: columns[name] for name in (*COUNTS, "first", *KEPT)},
        options.max_tokens,
        options.on_long,
        template_weight=template_weight,
        completion_weight=completion_weight,
    )
    digest_of_all = hashlib.sha256("".join(store.about["digest"] for store in stores).encode()).hexdigest()
    largest = max(store.about["largest_token"] for store in stores)
    return Prepared(found, training, validation, measured, digest_of_all, largest)


def cache_dir(options: DataOptions) -> Path:
    """The folder for downloads and stored examples, which is there now. Raises UserError where it cannot be made."""
    folder = cache_folder(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache {folder} cannot be made ({error.strerror}); name another: --cache-dir") from None
    return folder


def blend(keys: np.ndarray, is_second: np.ndarray, usable: np.ndarray, share: float) -> np.ndarray:
    """Which records make a mixture: bool [N], true for `share` of them from the second set, the rest from the first.

    keys: uint8 [N, 16] of all records, of which `usable` ones (bool [N]) may be taken.

    As many as there can be without repeating any. A hash of their text ranks the records of a set, so that the same
    ones are taken wherever they stand; other bits of it than those that place a record in training or validation.
    """
    sides = [np.flatnonzero(usable & ~is_second), np.flatnonzero(usable & is_second)]
    total = min(len(sides[0]) / (1 - share), len(sides[1]) / share)
    taken = np.zeros(len(keys), bool)
    for side, part in zip(sides, (1 - share, share), strict=True):
        rank = np.argsort(_fraction(keys[side, 6:12]), kind="stable")
        taken[side[rank[: round(total * part)]]] = True
    return taken


def _repeated(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Which records have occurred before, text for text; bool [N]. An inverted one is not the one it was made of."""
    identity = np.column_stack([columns["key"], columns["inverted"].astype(np.uint8)])
    _, first = np.unique(np.ascontiguousarray(identity).view("V17").ravel(), return_index=True)
    is_repeated = np.ones(len(identity), bool)
    is_repeated[first] = False
    return is_repeated


def _fraction(six_bytes: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 from uint8 [N, 6]; as hashes are even, so are they."""
    return six_bytes.astype(np.float64) @ (256.0 ** np.arange(5, -1, -1)) / 2**48


def _source_contents(source: Source, store: Store, is_its: np.ndarray) -> SourceContents:
    """is_its: of each chosen record, whether it is of this source."""
    return SourceContents(
        name=source.name,
        location=source.location,
        sha256=source.sha256,
        licence=source.licence,
        noncommercial=source.is_noncommercial,
        format=store.about["format"],
        records=int(is_its.sum()),
        fields_not_read=store.about["fields_not_read"],
        skipped=[f"record {number} {fault}" for number, fault in store.about["skipped"]],
    )


# Storing.


def _stored(source: Source, invert: bool, encoder: Encoder, options: DataOptions, cache: Path) -> tuple[Path, Any]:
    """Where a source's examples are stored, and what stores them."""
    here = Path(__file__).parents[1]
    decides = {
        "data": source.sha256,
        "delimiter": formats.delimiter(Path(source.location)),
        "encoder": encoder.digest,
        "tokenizers": tokenizers.__version__,
        "invert": invert,
        "format": options.format,
        "max_records": options.max_records,
        "max_characters": options.max_characters,
        "on_bad_record": options.on_bad_record,
        "empty_completion": options.empty_completion,
        "completion_turns": options.completion_turns,
        "code": [hashlib.sha256((here / f"{module}.py").read_bytes()).hexdigest() for module in CODE],
    }
    return cache / "examples" / digest(decides), partial(_tokenise, source, invert, encoder, options)


def _tokenise(source: Source, invert: bool, encoder: Encoder, options: DataOptions, writer: Writer) -> dict[str, Any]:
    """Write a source's examples; returns its format and what was wrong with each record that was left out."""
    format: str = options.format
    if format == "auto":
        # Of rows read for this alone: to keep a hundred long ones would take a hundred times the memory of one.
        first = itertools.islice(source.rows(options.max_characters), DETECTION_RECORDS)
        format = formats.detect(first, source.name)
        del first  # which ends what has read them
    unread = _Unread(source, options)
    records = _records(source.rows(options.max_characters), format, unread)
    usable = 0
    # A template may refuse some of the records: only then is it known how many more are to be read.
    while batch := _batch(itertools.islice(records, options.max_records and options.max_records - usable)):
        numbers, as_read = zip(*batch, strict=True)
        known: dict[str, int] = {}
        bare = _bare(as_read, encoder, known)
        chosen = as_read
        if invert:
            chosen = tuple(inversion.invert(r, n[0] + n[1], n[2]) for r, n in zip(as_read, bare.tolist(), strict=True))
            bare = _bare(chosen, encoder, known)
        examples = encoder.encode(chosen)
        kept = []
        for index, example in enumerate(examples):
            if isinstance(example, Fault):
                unread.add(numbers[index], example)
            else:
                kept.append(index)
        if kept:
            usable += len(kept)
            writer.add(
                [numbers[index] for index in kept],
                [as_read[index].key() for index in kept],
                [chosen[index] is not as_read[index] for index in kept],
                bare[kept],
                [example for example in examples if isinstance(example, Example)],
            )
    source.check_unchanged()  # or another content would be stored under this one's hash
    skipped = sorted(unread.faults.items())
    if not usable:
        why = f" ({len(skipped)} were read; record {skipped[0][0]} {skipped[0][1]})" if skipped else ""
        raise UserError(f"{source.location} holds no usable record{why}")
    return {"format": format, "skipped": skipped, "fields_not_read": dict(unread.fields.most_common(100))}


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
    """The records with their numbers."""
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


def _batch(records: Iterable[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """The first of the records, as many as are tokenised together; none at their end."""
    batch: list[tuple[int, Record]] = []
    characters = 0
    for number, record in records:
        batch.append((number, record))
        characters += len(record.instruction) + len(record.input) + len(record.output)
        characters += sum(len(message.content) for message in record.messages)
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            break
    return batch


def _bare(records: Sequence[Record], encoder: Encoder, known: dict[str, int]) -> np.ndarray:
    """Tokens of the records' own texts, each text alone: int [N, 3] by instruction, input, completion.

    known: counts of texts that were counted before; added to.
    """
    contents = [encoder.contents(record) for record in records]
    new = list(dict.fromkeys(text for parts in contents for text, _ in parts if text not in known))
    known.update(zip(new, encoder.count(new), strict=True))
    counts = np.zeros((len(records), len(BARE)), np.int64)
    column = {Segment.INSTRUCTION: 0, Segment.INPUT: 1, Segment.COMPLETION: 2}
    for row, parts in enumerate(contents):
        for text, segment in parts:
            counts[row, column[segment]] += known[text]
    return counts


def write(prepared: Prepared, folder: Path | None) -> None:
    """Write the profile to FOLDER/profile.json and profile.png, if there is a folder."""
    if folder is not None:
        from plw_mlflow.data import profile_figure  # matplotlib takes a while to import

        as_json = (json.dumps(asdict(prepared.profile), indent=2) + "\n").encode()
        outputs.write(folder, {"profile.png": profile_figure.draw_profile(prepared.profile), "profile.json": as_json})
