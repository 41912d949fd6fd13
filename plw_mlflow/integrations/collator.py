"""Batches whose tokens have weights, of rows that say which of their tokens belong to a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plw_mlflow.errors import UserError
from plw_mlflow.integrations.own_loop import check_plw, token_weights

IGNORED = -100  # a label that is no token
MASKS = ("completion_mask", "assistant_masks")  # as TRL and transformers name them
OF_OTHER_KINDS = ("pixel_values", "pixel_values_videos", "input_features")  # columns of images and sounds


@dataclass(frozen=True)
class PLWCollator:
    """Makes a batch of tokenised rows: padded, or packed into one row in which each text attends to itself alone.

    plw: the weight of tokens that belong to no completion.
    max_tokens: of a text, which is cut at its end; None: it is not cut. A text whose completion is cut away is kept,
        with its prompt's weights.
    packing: whether texts stand behind one another in one row, without padding.

    A row has `input_ids` and says by one of these what weighs 1, and so what has the PLW:

        labels             of transformers and TRL: -100 outside completions
        completion_mask    of TRL: 1 in completions
        assistant_masks    of `apply_chat_template(..., return_assistant_tokens_mask=True)`: 1 in the assistant's turns
        weights            the weights themselves, as many as tokens, where two do not suffice

    Where there are several of the first three, a token belongs to a completion if all say so. Padding that
    `attention_mask` shows is taken out; without that column, a row is taken to have none.

    Raises UserError for a row without any of these, with another number of them than of tokens, or of images or sounds.

    >>> row = {"input_ids": [2, 5, 6, 7, 1], "completion_mask": [0, 0, 0, 1, 1]}
    >>> batch = PLWCollator(plw=0.1, max_tokens=4, packing=True)([row, row])
    >>> batch["input_ids"]
    tensor([[2, 5, 6, 7, 2, 5, 6, 7]])
    >>> batch["weights"]
    tensor([[0.0000, 0.1000, 0.1000, 1.0000, 0.0000, 0.1000, 0.1000, 1.0000]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    """

    plw: float
    max_tokens: int | None = None
    packing: bool = False

    def __post_init__(self) -> None:
        check_plw(self.plw)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, or None for no limit, got {self.max_tokens}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `labels` and `weights`, and what the model has to know of padding or borders."""
        parts = [self._parts(row) for row in rows]
        columns = {name: [part[name] for part in parts] for name in ("input_ids", "labels", "weights")}
        lengths = torch.tensor([len(tokens) for tokens in columns["input_ids"]])
        if self.packing:
            batch: dict[str, Any] = {name: torch.cat(column).unsqueeze(0) for name, column in columns.items()}
            borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()]).unsqueeze(0)
            # As FlashAttention has them, which would otherwise look for them in every layer.
            batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            return batch | {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
        filling = {"input_ids": 0, "labels": IGNORED, "weights": 0.0}
        batch = {name: pad_sequence(column, True, filling[name]) for name, column in columns.items()}
        is_token = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        return batch | {"attention_mask": is_token.long()}

    def _parts(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tokens, labels and weights of one text [T]."""
        if others := [name for name in OF_OTHER_KINDS if row.get(name) is not None]:
            raise UserError(f"a row has {others[0]}, and the default collator carries text alone; give a data_collator")
        tokens = torch.as_tensor(row["input_ids"]).long()
        if row.get("weights") is not None:
            weights = torch.as_tensor(row["weights"], dtype=torch.float32)
            is_trained = weights != 0
        else:
            is_trained = completions(row)
            weights = torch.where(is_trained, 1.0, self.plw)
        if weights.shape != tokens.shape:
            raise UserError(f"a row has {len(tokens)} tokens, but weights or marks for {len(weights)}")
        parts = {"input_ids": tokens, "labels": tokens.masked_fill(~is_trained, IGNORED), "weights": weights}
        if row.get("attention_mask") is not None:
            is_token = torch.as_tensor(row["attention_mask"]).bool()
            parts = {name: part[is_token] for name, part in parts.items()}
        parts = {name: part[: self.max_tokens] for name, part in parts.items()}
        parts["weights"] = parts["weights"].index_fill(0, torch.tensor([0]), 0)  # nothing predicts it
        return parts


@dataclass(frozen=True)
class Weighing:
    """A collator whose batches get weights, by their labels, if they have none.

    Where the other collator truncates or packs, labels are what carries the weights through.
    """

    collator: Any
    plw: float

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator(rows))
        if "weights" not in batch:
            if "labels" not in batch:
                raise UserError("the data collator gives neither labels nor weights; leave it out, or have it give one")
            is_marked, position_ids = batch["labels"] != IGNORED, batch.get("position_ids")
            if batch.get("attention_mask") is not None:
                # Where texts are padded with what ends them, a mask may leave out the end, which has a label.
                is_token = batch["attention_mask"].bool() | is_marked
            elif position_ids is None and (~is_marked & ~_stands_before(is_marked)).any():
                raise UserError(
                    "the data collator ends rows with labels of -100 and gives no attention_mask, so that padding "
                    "cannot be told from prompts; have it give one"
                )
            else:
                is_token = None
            batch["weights"] = token_weights(is_marked, self.plw, attention_mask=is_token, position_ids=position_ids)
        return batch


def _stands_before(is_marked: Tensor) -> Tensor:
    """Which positions [..., T] have a marked one behind them."""
    return is_marked.flip(-1).cumsum(-1).flip(-1) > is_marked


def prompts(labels: Tensor) -> Tensor:
    """Which tokens [..., T] labels leave out though others that they mark follow: prompts, and no ends or padding."""
    is_marked = labels != IGNORED
    return ~is_marked & _stands_before(is_marked)


def completions(row: Mapping[str, Any]) -> Tensor:
    """Which tokens of a row belong to a completion, bool [T]. Raises UserError where it does not say so."""
    marks = [torch.as_tensor(row[name]).bool() for name in MASKS if row.get(name) is not None]
    if row.get("labels") is not None:
        marks.append(torch.as_tensor(row["labels"]) != IGNORED)
    if not marks:
        raise UserError(
            f"a row has the columns {', '.join(row)}, but none that tells its completion from its prompt: labels, "
            f"{', '.join(MASKS)} or weights"
        )
    if len({len(mark) for mark in marks}) > 1:
        raise UserError(f"a row has marks for {' and for '.join(str(len(mark)) for mark in marks)} tokens")
    return torch.stack(marks).all(0)
