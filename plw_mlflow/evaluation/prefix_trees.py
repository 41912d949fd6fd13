"""Prefix trees: token sequences laid out so that a model computes every prefix they share once.

Sorted by their tokens, sequences that begin alike are neighbours. A row takes neighbours up as long as it has room,
each as what it adds to the one before; its places are then a forest in depth-first order. A place attends to itself and
to the places it descends from, whatever lies between them, and its position is its depth: so a model whose only way of
mixing places is attention computes for each place what it computes where the place's sequence stands alone.

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
    """Some sequences laid out in one row."""

    tokens: Array  # [T]
    depths: Array  # [T] how many places of its sequence come before this one
    subtree_ends: Array  # [T] the first place after those that descend from this one
    paths: dict[int, Array]  # of each sequence, by its number: where its tokens lie

    def __len__(self) -> int:
        return len(self.tokens)


def rows(sequences: Sequence[Array], room: int, most: int) -> list[TreeRow]:
    """Lay sequences of tokens out in rows of about `room` places, the longest row first.

    A row is longer where a sequence is, and may have twice the places of a sequence that it holds half of already, up
    to `most`: what that spares outweighs the attention to other sequences, which is computed and thrown away.
    """
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]  # bytes sort as the tokens do, and fast
    found, row = [], _OpenTreeRow()
    for number in sorted(range(len(sequences)), key=keys.__getitem__):
        array = sequences[number]
        shared = row.shares(array)
        limit = max(room, min(2 * len(array), most)) if 2 * shared >= len(array) else room
        if len(row) and len(row) + len(array) - shared > limit:
            found.append(row.close())
            row, shared = _OpenTreeRow(), 0
        row.add(number, array, shared)
    if len(row):
        found.append(row.close())
    return sorted(found, key=len, reverse=True)


def batches(laid_out: Sequence[TreeRow], tokens: int) -> list[list[TreeRow]]:
    """Rows, the longest first, in batches of at most `tokens` places with the padding; a longer row is one alone."""
    found: list[list[TreeRow]] = []
    for row in laid_out:
        if found and len(found[-1][0]) * (len(found[-1]) + 1) <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def inputs(batch: Sequence[TreeRow], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], positions [B, T] and what is added to attention scores [B, 1, T, T]: 0, or the lowest number.

    Padding attends to itself.
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
    """A row while it is filled."""

    def __init__(self) -> None:
        self._added: list[tuple[Array, int]] = []
        self._paths: dict[int, Array] = {}
        self._path = self._last = np.empty(0, dtype=np.int64)  # of the sequence added last
        self._ends: list[tuple[Array, int]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def shares(self, sequence: Array) -> int:
        """With how many of the last sequence's tokens this one begins."""
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
        end = np.empty(self._length, dtype=np.int64)
        for places, first_after in [*self._ends, (self._path, self._length)]:
            end[places] = first_after
        tokens = np.concatenate([new for new, _ in self._added])
        depth = np.concatenate([np.arange(shared, shared + len(new)) for new, shared in self._added])
        return TreeRow(tokens, depth, end, self._paths)
