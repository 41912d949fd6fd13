"""Selection: which of the stored examples are used, and which of these for training and for validation.

All of it is decided on columns of numbers, without reading an example that is not cut. Where it is a matter of chance,
a hash of the record's text decides, so that the same text is taken, and placed, alike wherever it stands: the first
six bytes of its key say whether it is for validation, the next six which records a mixture takes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from plw_mlflow.config import DataOptions
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.store import BY_SEGMENT, Store
from plw_mlflow.errors import UserError

KEPT = {"completion_kept": Segment.COMPLETION, "template_kept": Segment.TEMPLATE}  # tokens within max_tokens


@dataclass(frozen=True)
class Rows:
    """N rows of several stores."""

    store: np.ndarray  # int [N], the number of the store
    row: np.ndarray  # int [N], in that store
    columns: Mapping[str, np.ndarray]  # [N] or [N, ...] each: those of the stores, and what is added here

    def __len__(self) -> int:
        return len(self.row)

    def where(self, is_kept: np.ndarray) -> Rows:
        """The rows for which `is_kept`, bool [N], is true."""
        columns = {name: column[is_kept] for name, column in self.columns.items()}
        return Rows(self.store[is_kept], self.row[is_kept], columns)


@dataclass(frozen=True)
class Split:
    """What becomes of N rows; bool [N] each."""

    is_long: np.ndarray  # longer than max_tokens
    is_dropped: np.ndarray  # those of them that are not cut but left out
    is_training: np.ndarray
    is_validation: np.ndarray
    is_without_completion: np.ndarray  # not dropped, but with no token of the completion left


def join(stores: Sequence[Store]) -> Rows:
    """All rows of some stores."""
    lengths = [len(store.columns["number"]) for store in stores]
    return Rows(
        np.repeat(np.arange(len(stores)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        {name: np.concatenate([store.columns[name] for store in stores]) for name in stores[0].columns},
    )


def choose(rows: Rows, names: Sequence[str], options: DataOptions) -> tuple[Rows, int]:
    """The rows that are used, and how many duplicates there are: those left out, or else those among the used rows.

    names: of the data sets, one a store.

    Raises UserError where a data set of a mixture has no part in it.
    """
    is_repeated = _is_repeated(rows.columns)
    is_chosen = ~is_repeated if options.drop_duplicates else np.ones(len(rows), bool)
    if options.mix is not None:
        is_second = rows.store == 1
        if not is_chosen[is_second].any():
            raise UserError(
                f"drop-duplicates leaves no record of {names[1]}, as {names[0]} has them all; mix in another set, or "
                "keep the duplicates"
            )
        is_chosen = blend(rows.columns["key"], is_second, is_chosen, options.mix_share)
        for number, name in enumerate(names):
            if not is_chosen[rows.store == number].any():
                raise UserError(
                    f"mix-share={options.mix_share:g} with so few records leaves no record of {name}; change it"
                )
    duplicates = is_repeated if options.drop_duplicates else is_repeated[is_chosen]
    return rows.where(is_chosen), int(duplicates.sum())


def blend(keys: np.ndarray, is_second: np.ndarray, is_usable: np.ndarray, share: float) -> np.ndarray:
    """Which records make a mixture: bool [N], true for `share` of them from the second set, the rest from the first.

    keys: uint8 [N, 16] of all records, of which usable ones may be taken.

    As many as there can be without repeating any. A hash of their text ranks the records of a set, so that the same
    ones are taken wherever they stand; other bits of it than those that place a record in training or validation.
    """
    sides = [np.flatnonzero(is_usable & ~is_second), np.flatnonzero(is_usable & is_second)]
    total = min(len(sides[0]) / (1 - share), len(sides[1]) / share)
    is_taken = np.zeros(len(keys), bool)
    for side, part in zip(sides, (1 - share, share), strict=True):
        rank = np.argsort(_fraction(keys[side, 6:12]), kind="stable")
        is_taken[side[rank[: round(total * part)]]] = True
    return is_taken


def with_kept_tokens(rows: Rows, stores: Sequence[Store], max_tokens: int) -> Rows:
    """The rows with the columns KEPT: how many tokens of a segment lie within the first `max_tokens`."""
    kept = {name: rows.columns[BY_SEGMENT[segment]].copy() for name, segment in KEPT.items()}
    for index in np.flatnonzero(rows.columns["length"] > max_tokens):
        segments = stores[rows.store[index]][int(rows.row[index])].segment[:max_tokens]
        for name, segment in KEPT.items():
            kept[name][index] = np.count_nonzero(segments == segment)
    return replace(rows, columns={**rows.columns, **kept})


def split(rows: Rows, options: DataOptions) -> Split:
    """Which rows (`with_kept_tokens`) are dropped as too long, and which of the others are kept for validation."""
    is_long = rows.columns["length"] > options.max_tokens
    is_dropped = is_long & (options.on_long == "drop")
    place = _fraction(rows.columns["key"][:, :6])
    share = options.validation_share
    if len(np.unique(place[~is_dropped])) > 1:  # a few may all lie beyond the share; the curves need one all the same
        share = max(share, math.nextafter(place[~is_dropped].min(), 1))
    return Split(
        is_long,
        is_dropped,
        is_training=~is_dropped & (place >= share),
        is_validation=~is_dropped & (place < share),
        is_without_completion=~is_dropped & (rows.columns["completion_kept"] == 0),
    )


def _is_repeated(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which records have occurred before, text for text; bool [N]. An inverted one is not the one it was made of."""
    identity = np.column_stack([columns["key"], columns["inverted"].astype(np.uint8)])
    _, first = np.unique(np.ascontiguousarray(identity).view("V17").ravel(), return_index=True)
    is_repeated = np.ones(len(identity), bool)
    is_repeated[first] = False
    return is_repeated


def _fraction(six_bytes: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 from uint8 [N, 6]; as hashes are evenly spread, so are they."""
    return six_bytes.astype(np.float64) @ (256.0 ** np.arange(5, -1, -1)) / 2**48
