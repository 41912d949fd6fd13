"""Prefix trees: token sequences laid out in rows so that a model computes every prefix that they share once.

Sequences are sorted by their tokens, so that those that begin alike are neighbours. Neighbours share a row as long as
there is room: of each, the row has only the tokens that follow what the one before begins with, too. For example, the
sequences `a b c` and `a b d e` become

    place      0  1  2  3  4
    token      a  b  c  d  e
    depth      0  1  2  2  3

The places of a row are a forest in depth-first order. A place attends to itself and to the places that it descends from
(e to d, b and a), and its position is its depth. A model in which tokens meet only in attention then computes for each
place what it would compute if the sequence stood alone.

Letters: B rows, T places of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TreeRow:
    """Sequences in one row."""

    tokens: Array  # [T]
    depths: Array  # [T] how many tokens of its sequences come before this one
    subtree_ends: Array  # [T] the first place after this one that does not descend from it
    paths: dict[int, Array]  # the places of each sequence's tokens, by the sequence's number

    def __len__(self) -> int:
        return len(self.tokens)


def rows(sequences: Sequence[Array], places: int, max_places: int) -> list[TreeRow]:
    """Rows of about so many places for sequences of tokens, the longest row first.

    A sequence that is longer than that has a longer row. A row also grows for a sequence of which it has half already,
    up to twice the sequence's length and to `max_places`: what this saves outweighs the attention between different
    sequences, which is computed and thrown away.
    """
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]  # bytes sort as the tokens do, and fast
    closed, row = [], _OpenTreeRow()
    for number in sorted(range(len(sequences)), key=keys.__getitem__):
        sequence = sequences[number]
        shared = row.shared_with(sequence)
        limit = max(places, min(2 * len(sequence), max_places)) if 2 * shared >= len(sequence) else places
        if len(row) and len(row) + len(sequence) - shared > limit:
            closed.append(row.close())
            row, shared = _OpenTreeRow(), 0
        row.add(number, sequence, shared)
    if len(row):
        closed.append(row.close())
    return sorted(closed, key=len, reverse=True)


def batches(tree_rows: Sequence[TreeRow], max_places: int) -> list[list[TreeRow]]:
    """Rows, the longest first, in batches of at most so many places, padding included; a longer row is alone."""
    grouped: list[list[TreeRow]] = []
    for row in tree_rows:
        if grouped and len(grouped[-1][0]) * (len(grouped[-1]) + 1) <= max_places:
            grouped[-1].append(row)
        else:
            grouped.append([row])
    return grouped


def inputs(batch: Sequence[TreeRow], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], positions [B, T] and the mask [B, 1, T, T], which is added to attention scores.

    The mask is 0 where a place attends and the lowest number elsewhere. Padding attends to itself.
    """
    longest = max(map(len, batch))
    padded = np.zeros((3, len(batch), longest), dtype=np.int64)
    padded[2] = np.arange(1, longest + 1)
    for number, row in enumerate(batch):
        padded[:, number, : len(row)] = row.tokens, row.depths, row.subtree_ends
    tokens, depth, end = torch.from_numpy(padded).to(device)
    place = torch.arange(longest, device=device)
    descends = (place <= place.unsqueeze(1)) & (place.unsqueeze(1) < end.unsqueeze(1))
    mask = torch.zeros(descends.shape, dtype=dtype, device=device).masked_fill_(~descends, torch.finfo(dtype).min)
    return tokens, depth, mask.unsqueeze(1)


class _OpenTreeRow:
    """A row while sequences are added to it, in the order of their tokens."""

    def __init__(self) -> None:
        self._added: list[tuple[Array, int]] = []  # the new tokens of each sequence, and the depth at which they begin
        self._paths: dict[int, Array] = {}
        self._last = self._path = np.empty(0, dtype=np.int64)  # the sequence that was added last, and its path
        self._ends: list[tuple[Array, int]] = []  # places, and the first place after all that descend from them
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def shared_with(self, sequence: Array) -> int:
        """How many tokens a sequence has in common with the beginning of the one that was added last."""
        both = min(len(self._last), len(sequence))
        differs = self._last[:both] != sequence[:both]
        return int(differs.argmax()) if differs.any() else both

    def add(self, number: int, sequence: Array, shared: int) -> None:
        self._ends.append((self._path[shared:], self._length))
        new = len(sequence) - shared
        self._added.append((sequence[shared:], shared))
        self._path = np.concatenate((self._path[:shared], np.arange(self._length, self._length + new)))
        self._paths[number], self._last = self._path, sequence
        self._length += new

    def close(self) -> TreeRow:
        subtree_ends = np.empty(self._length, dtype=np.int64)
        for places, first_after in [*self._ends, (self._path, self._length)]:
            subtree_ends[places] = first_after
        tokens = np.concatenate([new for new, _ in self._added])
        depths = np.concatenate([np.arange(shared, shared + len(new)) for new, shared in self._added])
        return TreeRow(tokens, depths, subtree_ends, self._paths)
