"""Batches whose tokens have weights, of rows that say which of their tokens belong to a completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.integrations.own_loop import check_plw, token_weights

IGNORED = -100  # a label that is no token
MASKS = ("completion_mask", "assistant_masks")  # as TRL and transformers name them
COLUMNS = ("input_ids", "labels", *MASKS, "weights", "attention_mask")  # that are read, each of one number a token
OF_OTHER_KINDS = ("pixel_values", "pixel_values_videos", "input_features")  # columns of images and sounds


@dataclass(frozen=True)
class PLWCollator:
    """Makes a batch of tokenised rows: padded, or packed into one row in which each text attends to itself alone.

    plw: the weight of tokens that belong to no completion.
    max_tokens: of a text, which is cut at its end; None: it is not cut. A text whose completion is cut away is kept,
        with its prompt's weights.
    packing: whether texts stand behind one another in one row, without padding.

    A row has `input_ids` and says by one of these what weighs 1, and so what has the PLW:

        labels             of transformers and TRL: -100 outside completions, and input_ids, unshifted, in them
        completion_mask    of TRL: 1 in completions
        assistant_masks    of `apply_chat_template(..., return_assistant_tokens_mask=True)`: 1 in the assistant's turns
        weights            the weights themselves, finite and not negative, where two do not suffice

    Where there are several of the first three, a token belongs to a completion if all say so. Padding that
    `attention_mask` shows is taken out; without that column, a row is taken to have none.

    Raises UserError for a row without any of these or without tokens, with another number of them than of tokens, with
    values other than these, or of images or sounds.

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
        if self.max_tokens is not None and not (isinstance(self.max_tokens, Integral) and self.max_tokens >= 1):
            limit = repr(self.max_tokens)
            raise UserError(f"max_tokens must be a whole number of at least 1, or None for no limit, got {limit}")

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
        row = _read(row)
        if others := [name for name in OF_OTHER_KINDS if row.get(name) is not None]:
            raise UserError(f"a row has {others[0]}, and the default collator carries text alone; give a data_collator")
        tokens = row["input_ids"].long()
        if row.get("labels") is not None:
            _check_labels(row["labels"], tokens)
        if row.get("weights") is not None:
            weights = row["weights"].float()
            _check_weights(weights)
            is_trained = weights != 0
        else:
            is_trained = completions(row)
            weights = torch.where(is_trained, 1.0, self.plw)
        parts = {"input_ids": tokens, "labels": tokens.masked_fill(~is_trained, IGNORED), "weights": weights}
        parts = {name: part[: self.max_tokens] for name, part in parts.items()}
        parts["weights"] = parts["weights"].index_fill(0, torch.tensor([0]), 0)  # nothing predicts it
        return parts


@dataclass(frozen=True)
class Weighing:
    """A collator whose batches get weights, by their labels, if they have none.

    Where the other collator truncates or packs, labels are what carries the weights through.

    vocabulary: the number of tokens that the model knows, if that is known.

    Raises UserError for batches from which the loss would not be what is asked for.
    """

    collator: Any
    plw: float
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator(rows))
        tokens = batch.get("input_ids")
        if tokens is not None and self.vocabulary is not None:
            _check_tokens(tokens, self.vocabulary)
        if "weights" in batch:
            _check_weights(batch["weights"])
        else:
            if "labels" not in batch:
                raise UserError("the data collator gives neither labels nor weights; leave it out, or have it give one")
            if tokens is not None:
                _check_labels(batch["labels"], tokens)
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


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its `COLUMNS` as tensors [T], without padding. Raises UserError where they are not of one length T."""
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        raise UserError("a row has no input_ids; tokenise its text first")
    columns = {name: _column(row, name) for name in COLUMNS if row.get(name) is not None}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UserError(f"the columns of a row have unequal lengths ({lengths}); each needs one value a token")
    if "attention_mask" in columns:
        is_token = columns["attention_mask"].bool()
        columns = {name: column[is_token] for name, column in columns.items()}
    if not len(columns["input_ids"]):
        raise UserError("a row has no tokens; leave it out")
    return {**row, **columns}


def _column(row: Mapping[str, Any], name: str) -> Tensor:
    try:
        column = torch.as_tensor(row[name])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} of a row must be one number a token ({first_line(error)})") from error
    if column.ndim != 1:
        raise UserError(f"{name} of a row must be one number a token, got the shape {list(column.shape)}")
    return column


def _check_labels(labels: Tensor, tokens: Tensor) -> None:
    """Raise UserError for labels that are neither -100 nor the token of `input_ids` at their place.

    The loss predicts `input_ids`. Labels only say which of them are completions, so other tokens in them would be lost.
    """
    if labels.shape != tokens.shape or ((labels != IGNORED) & (labels != tokens)).any():
        raise UserError(
            f"labels are shifted or of other tokens; each must be {IGNORED} or the token of input_ids at the same "
            "place, as the loss predicts input_ids and shifts them itself"
        )


def _check_weights(weights: Tensor) -> None:
    """Raise UserError for weights that are not finite numbers of at least 0."""
    is_weight = (weights >= 0) & (weights < math.inf)  # NaN is neither
    if not is_weight.all():
        raise UserError(f"weights must be finite numbers of at least 0, got {weights[~is_weight][0].item()}")


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise UserError for tokens that a model does not know. On a GPU they would end the program without saying why."""
    is_unknown = (tokens < 0) | (tokens >= vocabulary)
    if is_unknown.any():
        raise UserError(
            f"input_ids have the token {int(tokens[is_unknown][0])}, but the model knows 0 to {vocabulary - 1}; use "
            "its own tokenizer, or resize its embeddings"
        )


def _stands_before(is_marked: Tensor) -> Tensor:
    """Which positions [..., T] have a marked one behind them."""
    return is_marked.flip(-1).cumsum(-1).flip(-1) > is_marked


def prompts(labels: Tensor) -> Tensor:
    """Which tokens [..., T] labels leave out though others that they mark follow: prompts, and no ends or padding."""
    is_marked = labels != IGNORED
    return ~is_marked & _stands_before(is_marked)


def completions(row: Mapping[str, Any]) -> Tensor:
    """Which tokens of a row belong to a completion, bool [T]. Raises UserError where it does not say so."""
    marks = [_mark(row, name) for name in MASKS if row.get(name) is not None]
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


def _mark(row: Mapping[str, Any], name: str) -> Tensor:
    mark = torch.as_tensor(row[name])
    if ((mark != 0) & (mark != 1)).any():
        raise UserError(f"{name} of a row must be 1 in completions and 0 elsewhere; give other numbers as weights")
    return mark == 1
