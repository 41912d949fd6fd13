"""Prepare: a data set's examples, split into training and validation, and their length profile.

Reading, inverting and tokenising are done once and stored (`building`, `store`). Everything that merely chooses among
the examples is done here, on their columns of counts (`selection`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from plw_mlflow.config import DataOptions, cache_folder, data_name, short_name
from plw_mlflow.data import building, profile, selection, sources, templates, weights
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.profile import Contents, Profile, SourceContents
from plw_mlflow.data.selection import Rows, Split
from plw_mlflow.data.sources import Source
from plw_mlflow.data.store import Examples, Store
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.data.weights import Weights
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError

LISTED = 100  # records that are named in a profile
USUAL = Weights(plw=1.0)


@dataclass(frozen=True)
class Prepared:
    """What training reads."""

    sources: tuple[Source, ...]  # the data set's, and the second one's where two are mixed
    training: Examples
    validation: Examples
    profile: Profile
    digest: str  # of all stored tokens and segments, from which the options choose
    largest_token: int
    predicted: weights.Counts = field(default_factory=lambda: np.zeros((0, len(Segment)), np.int64))  # in training

    def prompt_share(self, loss: Weights) -> float | None:
        """The share that prompt tokens have in the weight of the loss that is trained on; None where none has any."""
        return weights.prompt_share(self.predicted, loss)

    @cached_property
    def figure(self) -> bytes:
        """A PNG of the profile, drawn once for the run and for the output folder."""
        from plw_mlflow.data import profile_figure  # matplotlib takes a while to import

        return profile_figure.draw_profile(self.profile)


def run(
    dataset: str,
    tokenizer: Any,
    options: DataOptions,
    loss: Weights = USUAL,
) -> Prepared:
    """Read, invert, tokenise, mix and split a data set, and measure it; the weights are for the measuring alone.

    Raises UserError where a record is unusable, or where no example is left to train on; ConnectionError where a
    data set has to be downloaded and cannot be.
    """
    cache = cache_dir(options)
    template = templates.load(options.template, tokenizer, completion_turns=options.completion_turns)
    encoder = Encoder(tokenizer, template, prompt_border=options.prompt_border)
    names = [dataset] if options.mix is None else [dataset, options.mix]
    data_sources = tuple(sources.find(name, cache, options.data_dir) for name in names)
    inversions = (options.invert, options.mix_invert)[: len(names)]
    stores = [
        building.stored(source, source.inverted or is_asked_for, encoder, options, cache)
        for source, is_asked_for in zip(data_sources, inversions, strict=True)
    ]

    rows, duplicates = selection.choose(selection.join(stores), names, options)
    rows = selection.with_kept_tokens(rows, stores, options.max_tokens)
    split = selection.split(rows, options)
    if not (split.is_training & ~split.is_without_completion).any():
        raise UserError(
            f"no example of {dataset} is left to train on: of {len(rows)} records {split.is_dropped.sum()} were "
            f"dropped and {split.is_without_completion.sum()} lost their whole completion at "
            f"max-tokens={options.max_tokens} (raise --max-tokens), and {split.is_validation.sum()} are kept for "
            "validation"
        )
    prefixes = [source.prefix for source in data_sources]
    training, validation, dropped = (
        Examples(stores, prefixes, rows.store[is_in], rows.row[is_in], options.max_tokens)
        for is_in in (split.is_training, split.is_validation, split.is_dropped)
    )
    contents = _contents(
        dataset, options, list(zip(data_sources, stores, strict=True)), rows, split, dropped, duplicates
    )
    predicted = profile.predicted_counts(rows.columns, options.max_tokens)
    counted = profile.count_faults(
        rows.columns,
        ~split.is_dropped,
        predicted,
        loss,
        max_tokens=options.max_tokens,
        left_out=sum(len(store.about["skipped"]) for store in stores),
        too_long=len(dropped),
        duplicates=duplicates,
    )
    predicted = predicted[split.is_training]
    measured = profile.measure(contents, rows.columns, options.max_tokens, predicted, loss, counted)
    digest = hashlib.sha256("".join(store.about["digest"] for store in stores).encode()).hexdigest()
    largest_token = max(store.about["largest_token"] for store in stores)
    return Prepared(data_sources, training, validation, measured, digest, largest_token, predicted)


def cache_dir(options: DataOptions) -> Path:
    """The folder for downloads and stored examples, which is there now. Raises UserError where it cannot be made."""
    folder = cache_folder(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache {folder} cannot be made ({error.strerror}); name another: --cache-dir") from None
    return folder


def _contents(
    dataset: str,
    options: DataOptions,
    stored: Sequence[tuple[Source, Store]],
    rows: Rows,
    split: Split,
    dropped: Examples,
    duplicates: int,
) -> Contents:
    return Contents(
        dataset=dataset,
        name=data_name(dataset, options, short_name),
        sources=[
            _source_contents(source, store, records=int((rows.store == number).sum()))
            for number, (source, store) in enumerate(stored)
        ],
        template=options.template,
        records=len(rows),
        inverted=int(rows.columns["inverted"].sum()),
        duplicates=duplicates,
        duplicates_dropped=options.drop_duplicates,
        dropped_as_too_long=len(dropped),
        first_dropped_as_too_long=[dropped.id(index) for index in range(min(LISTED, len(dropped)))],
        truncated=int((split.is_long & ~split.is_dropped).sum()),
        lost_whole_completion=int(split.is_without_completion.sum()),
        training_examples=int(split.is_training.sum()),
        validation_examples=int(split.is_validation.sum()),
    )


def _source_contents(source: Source, store: Store, records: int) -> SourceContents:
    return SourceContents(
        name=source.name,
        location=source.location,
        sha256=source.sha256,
        licence=source.licence,
        noncommercial=source.is_noncommercial,
        format=store.about["format"],
        records=records,
        fields_not_read=store.about["fields_not_read"],
        skipped=[f"record {number} {fault}" for number, fault in store.about["skipped"]],
    )


def write(prepared: Prepared, folder: Path | None) -> None:
    """Write the profile to FOLDER/profile.json and profile.png, if there is a folder."""
    if folder is not None:
        as_json = (json.dumps(asdict(prepared.profile), indent=2) + "\n").encode()
        outputs.write(folder, {"profile.png": prepared.figure, "profile.json": as_json})
