"""Batches: which examples make up each optimiser step, and the tensors they become.

The examples of a step depend on seed, step and batch size alone, not on how the step is cut into micro-batches
or spread over devices: that is what makes a loss comparable between machines.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from plw_mlflow import seeding
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import UserError

# [examples, 2] by what the weights of each example's prompt and completion are multiplied (`weights.factors`), if so.
Factors = NDArray[np.float64] | None


@dataclass(frozen=True)
class Batch:
    """Examples as B padded rows, or as one packed row of all of them; T positions."""

    tokens: Tensor  # [B, T] int64, padding 0
    weights: Tensor  # [B, T] float32, weight with which each token is predicted; 0 on first tokens and padding
    is_completion: Tensor  # [B, T] bool, false on padding
    # The positions before the tokens that weigh something, flat (b T + t) and in order: those of all such tokens, of
    # the prompt's and of the completion's. A GPU that had to look for them itself would make its host wait.
    rows: Tensor  # [N] int64
    prompt_rows: Tensor  # int64
    completion_rows: Tensor  # int64
    attention: Tensor | None = None  # padded: [B, T] int64, 1 where there is a token, 0 on padding
    positions: Tensor | None = None  # packed: [1, T] int64, from 0 in each example
    borders: Tensor | None = None  # packed: [D + 1] int32, from 0, where the D examples begin and end
    longest: int = 0  # packed: tokens of the longest example

    @property
    def context(self) -> dict[str, Any]:
        """The arguments of a transformers model's forward pass beside the tokens, by the names that it has for them."""
        if self.borders is None:
            return {"attention_mask": self.attention}
        borders_and_longest = {"cu_seq_lens_q": self.borders, "max_length_q": self.longest}
        borders_and_longest |= {"cu_seq_lens_k": self.borders, "max_length_k": self.longest}
        return {"position_ids": self.positions, "attention_mask": None} | borders_and_longest

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._with_each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in pages from which a GPU copies while its host goes on."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        parts |= {name: change(part) for name, part in parts.items() if isinstance(part, Tensor)}
        return Batch(**parts)


def collate(examples: Sequence[Example], weights: Weights, factors: Factors = None) -> Batch:
    """Pad examples to the longest of them."""
    shape = (len(examples), max(len(example.tokens) for example in examples))
    tokens, is_token, segment = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.from_numpy(example.tokens.astype(np.int64))
        segment[row, :length] = torch.from_numpy(example.segment.astype(np.int64))
        is_token[row, :length] = 1
    # The first token of an example is never predicted: nothing stands before it.
    predicted = is_token.clone()
    predicted[:, 0] = 0
    is_completion = (segment == Segment.COMPLETION) & (is_token == 1)
    weight = by_segment(weights, segment) * predicted
    if factors is not None:
        weight *= torch.from_numpy(factors).float()[torch.arange(len(examples)).unsqueeze(1), is_completion.long()]
    return _batch(tokens, weight, is_completion, attention=is_token)


def pack(examples: Sequence[Example], weights: Weights, factors: Factors = None) -> Batch:
    """Put examples behind one another in one row without padding.

    Examples S1 (3 tokens), S2 (2) and S3 (4) make one row of 9 tokens:

        tokens      S1  S1  S1  S2  S2  S3  S3  S3  S3
        positions    0   1   2   0   1   0   1   2   3
        weights      0   w   w   0   w   0   w   w   w     nothing predicts the first token of an example
        borders      0           3       5              9

    `borders` stand for this attention mask, which is never made. Row by row, a token attends to itself and to the
    tokens before it in its own example (1), and to no others (0):

        S1   1 0 0 0 0 0 0 0 0
        S1   1 1 0 0 0 0 0 0 0
        S1   1 1 1 0 0 0 0 0 0
        S2   0 0 0 1 0 0 0 0 0
        S2   0 0 0 1 1 0 0 0 0
        S3   0 0 0 0 0 1 0 0 0
        S3   0 0 0 0 0 1 1 0 0
        S3   0 0 0 0 0 1 1 1 0
        S3   0 0 0 0 0 1 1 1 1
    """
    tokens, segment = (
        torch.from_numpy(np.concatenate([getattr(example, part) for example in examples]).astype(np.int64)).unsqueeze(0)
        for part in ("tokens", "segment")
    )
    lengths = [len(example.tokens) for example in examples]
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    weight = by_segment(weights, segment)
    weight[:, borders[:-1].long()] = 0
    is_completion = segment == Segment.COMPLETION
    if factors is not None:
        number = torch.arange(len(examples)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
        weight *= torch.from_numpy(factors).float()[number, is_completion.long()]
    return _batch(tokens, weight, is_completion, positions=positions, borders=borders, longest=max(lengths))


def by_segment(weights: Weights, segment: Tensor) -> Tensor:
    """float32 weights for a tensor of segments, of the same shape, before factors."""
    return torch.tensor(weights.by_segment, dtype=torch.float32)[segment]


def _batch(tokens: Tensor, weights: Tensor, is_completion: Tensor, **rest: Any) -> Batch:
    """A batch with the positions that stand before tokens that weigh something."""
    weighs, of_completion = (functional.pad(part[:, 1:], (0, 1)).flatten() for part in (weights != 0, is_completion))
    rows, prompt_rows, completion_rows = (
        mask.nonzero().squeeze(1) for mask in (weighs, weighs & ~of_completion, weighs & of_completion)
    )
    return Batch(tokens, weights, is_completion, rows, prompt_rows, completion_rows, **rest)


def count_steps(examples: int, batch_examples: int, epochs: float) -> int:
    """Optimiser steps in so many epochs; an epoch's last step may hold fewer examples."""
    # Rounded first: 10 steps an epoch and 1.1 epochs are 11 steps, though 10 * 1.1 is a little more in binary.
    return max(1, math.ceil(round(math.ceil(examples / batch_examples) * epochs, 6)))


def steps(examples: int, batch_examples: int, *, seed: int, first: int, total: int) -> Iterator[list[int]]:
    """The indices of each step's examples, from step `first` (counted from 0) up to `total`.

    Every epoch is a permutation of its own, so each example is seen once an epoch.
    """
    per_epoch = math.ceil(examples / batch_examples)
    order: list[int] = []
    for step in range(first, total):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or not order:
            order = torch.randperm(examples, generator=seeding.generator(seed, "order", epoch)).tolist()
        yield order[position * batch_examples : (position + 1) * batch_examples]


def split(step: Sequence[Example], micro_batch_examples: int, *, by_length: bool) -> list[list[Example]]:
    """Cut a step into micro-batches; by length, so that rows of one micro-batch need little padding."""
    ordered = sorted(step, key=lambda example: len(example.tokens)) if by_length else list(step)
    return [ordered[start : start + micro_batch_examples] for start in range(0, len(ordered), micro_batch_examples)]


def fill(step: Sequence[Example], row_tokens: int, *, multiple: int = 1) -> list[list[Example]]:
    """Divide a step among as few packed rows of at most `row_tokens` tokens as possible, all about equally long.

    multiple: the number of rows is a multiple of it (processes that work at the same time), unless there are fewer
        examples than rows.

    Within a row, examples keep their order.
    Raises UserError where one example alone is longer than a row.
    """
    lengths = [len(example.tokens) for example in step]
    if max(lengths) > row_tokens:
        raise UserError(f"an example has {max(lengths)} tokens, but a packed row only {row_tokens}")
    longest_first = sorted(range(len(step)), key=lambda index: -lengths[index])
    count = math.ceil(sum(lengths) / row_tokens / multiple) * multiple
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]  # a heap of tokens and row
        for index in longest_first:
            tokens, row = filled[0]  # the emptiest
            rows[row].append(index)
            heapq.heapreplace(filled, (tokens + lengths[index], row))
        if max(filled)[0] <= row_tokens:
            return [[step[index] for index in sorted(row)] for row in rows if row]
        count += multiple
