"""Batches: which examples make up each optimiser step, and the tensors they become.

The examples of a step depend on seed, step and batch size alone, not on how the step is cut into micro-batches
or spread over devices: that is what makes a loss comparable between machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plw_mlflow import seeding
from plw_mlflow.config import PrepareConfig, TrainConfig
from plw_mlflow.templates import Segment
from plw_mlflow.tokens import Example


@dataclass(frozen=True)
class Weights:
    """Loss weight of a token, by the segment it belongs to."""

    prompt: float  # the PLW
    template: float
    completion: float

    def of(self, segment: Tensor) -> Tensor:
        """float32 weights for a tensor of segments, of the same shape."""
        by_segment = torch.empty(len(Segment))
        by_segment[Segment.TEMPLATE] = self.template
        by_segment[Segment.INSTRUCTION] = by_segment[Segment.INPUT] = self.prompt
        by_segment[Segment.COMPLETION] = self.completion
        return by_segment[segment]

    @classmethod
    def told_by(cls, config: TrainConfig | PrepareConfig) -> Weights:
        """What a config says: the template weighs as the prompt, unless it is told otherwise."""
        template = config.plw if config.template_weight is None else config.template_weight
        return cls(prompt=config.plw, template=template, completion=config.completion_weight)


@dataclass(frozen=True)
class Batch:
    """Examples as rows, padded on the right; B rows, T positions."""

    tokens: Tensor  # [B, T] int64, padding 0
    attention: Tensor  # [B, T] int64, 1 where there is a token, 0 on padding
    weights: Tensor  # [B, T] float32, weight with which each token is predicted; 0 on first tokens and padding
    is_completion: Tensor  # [B, T] bool, false on padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def collate(examples: Sequence[Example], weights: Weights) -> Batch:
    """Pad examples to the longest of them."""
    shape = (len(examples), max(len(example.tokens) for example in examples))
    tokens, attention, segment = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.from_numpy(example.tokens.astype(np.int64))
        segment[row, :length] = torch.from_numpy(example.segment.astype(np.int64))
        attention[row, :length] = 1
    # The first token of an example is never predicted: nothing stands before it.
    predicted = attention.clone()
    predicted[:, 0] = 0
    return Batch(tokens, attention, weights.of(segment) * predicted, (segment == Segment.COMPLETION) & (attention == 1))


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
