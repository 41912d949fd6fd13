"""Attention in packed rows: each token sees the tokens of its own example alone.

transformers would build a mask over the whole row from positions, and so compute every pair of tokens of different
examples. Here the attention function itself is given the borders of the examples. On CUDA it calls torch's kernel for
sequences of varying length (FlashAttention 3 where that is installed, torch's own FlashAttention 2 otherwise).
Elsewhere it attends to one example after the other.

Tokens may depend on earlier ones by other ways than attention (in a state-space model), and a model may need arguments
that are not passed here. So whether packing is right for a model is tried on that model, not looked up. A window of
thousands of tokens does not show in a trial of a few. Therefore the trial also compares the windows of the masks that
the model asks for with those that its attention functions are given: packed rows have no masks, so a window that is
only in a mask would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import activate_flash_attention_impl
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from plw_mlflow.data.batches import pack
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import UserError
from plw_mlflow.models import causal, held

# Among transformers' attention functions; the second is for the trial alone, the third for compiled layers.
NAME, WATCHED, APART = "packed", "packed_watched", "packed_apart"
KERNEL_TYPES = (torch.bfloat16, torch.float16)  # which torch's kernel for sequences of varying length takes


@contextmanager
def over_examples(model: Any, name: str = NAME) -> Iterator[None]:
    """Have a transformers model take packed rows within the block; afterwards it is as it was."""
    if torch.cuda.is_available() and find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def why_not(model: Any) -> str | None:
    """Why packing is wrong for a transformers model; None where two packed examples give what they give alone."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would warn of what is tried here
    try:
        return _compare(model)
    finally:
        logging.set_verbosity(verbosity)


def is_one_kernel(settings: Any, arithmetic: torch.dtype) -> bool:
    """Whether one kernel attends to a whole packed row of a model with these settings, here and in this arithmetic."""
    dropout, softcap = (getattr(settings, name, None) for name in ("attention_dropout", "attn_logit_softcapping"))
    return torch.cuda.is_available() and arithmetic in KERNEL_TYPES and not dropout and not softcap


def apart() -> str:
    """The name of an attention function like `NAME` that no compiled program takes in.

    A program would be made for each number of examples where they are attended to by a call each.
    """
    AttentionInterface.register(APART, torch.compiler.disable(_attend))  # not below, as it imports torch's compiler
    return APART


def _compare(model: Any) -> str | None:
    lengths = [7, 5]
    texts = np.split(np.arange(12, dtype=np.int32), lengths[:1])  # any tokens do
    examples = [Example(tokens, np.full(len(tokens), Segment.COMPLETION)) for tokens in texts]
    row = pack(examples, Weights(plw=1.0)).to(model.device)
    windows: dict[str, set[int | None]] = {"masks": set(), "attention": set()}
    watching = _windows.set(windows)
    body = causal.body(model)
    with torch.no_grad(), held.in_float32():
        alone = [body(part, use_cache=False).last_hidden_state for part in row.tokens.split(lengths, 1)]
        try:
            with over_examples(model, WATCHED):
                packed = body(row.tokens, use_cache=False, **row.context).last_hidden_state
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"it takes no packed rows ({type(error).__name__})"
        finally:
            _windows.reset(watching)
    expected = torch.cat(alone, 1)
    # A difference that matters is a good part of the numbers themselves; a base in 4 bits computes in bfloat16.
    tolerance = 2e-2 if getattr(model, "is_quantized", False) else 1e-3
    if not (packed - expected).abs().max() <= tolerance * expected.abs().max():  # NaN is not <= either
        return "an example packed behind another gives something else than alone"
    if lost := {window for window in windows["masks"] - windows["attention"] if window}:
        return f"it attends to {min(lost)} tokens at most by its masks alone, and packed rows have no masks"
    return None


# What the trial records: the windows of the masks that a model asks for, and those that its attention is given.
_windows: ContextVar[dict[str, set[int | None]]] = ContextVar("windows")


def _watch_mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
    _windows.get()["masks"].add(local_size)


def _watch_attention(*args: Any, sliding_window: int | None = None, **context: Any) -> tuple[Tensor, None]:
    _windows.get()["attention"].add(sliding_window)
    return _attend(*args, sliding_window=sliding_window, **context)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a packed row, as transformers calls it.

    query: [1, heads, T, D]; key, value: [1, key heads, T, D]. Returns [1, T, heads, D], and no attention weights.

    Raises UserError for a mask of the model's own making (such as Doge's), as it would have no effect.
    """
    if attention_mask is not None:
        raise UserError("the model makes attention masks of its own, which packed rows do not have")
    if query.device.type == "cuda":
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        if kind in KERNEL_TYPES and not dropout and not softcap:
            # Autocast does not know the kernel.
            query, key, value = (part.squeeze(0).transpose(0, 1).to(kind) for part in (query, key, value))
            return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window).unsqueeze(0), None
    kind = query.dtype
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # torch's kernel is 1.5 to 4 times as slow in bfloat16, for its backward pass, and the products are small.
        kind = torch.get_autocast_dtype("cpu")
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # SDPA's own handling of grouped heads is slow on a CPU
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    with torch.autocast("cpu", enabled=False):
        outputs = [_attend_one(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in parts]
    # Some models change its shape by a view.
    return torch.cat(outputs, 2).transpose(1, 2).contiguous().to(kind), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """The same as `_attend`, by torch's kernel; all [T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1  # transformers counts the token itself
    attended = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention within one example, all [1, heads, length, D]."""
    length = query.shape[2]
    is_windowed = window is not None and window < length
    if not is_windowed and not softcap:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    distance = torch.arange(length, device=query.device)
    distance = distance.unsqueeze(1) - distance
    is_seen = (distance >= 0) & (distance < (window if is_windowed else length))  # type: ignore[operator]
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, is_seen, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    shares = scores.masked_fill(~is_seen, -torch.inf).softmax(3, dtype=torch.float32).to(query.dtype)
    return F.dropout(shares, dropout) @ value


AttentionInterface.register(NAME, _attend)
AttentionInterface.register(WATCHED, _watch_attention)
AttentionMaskInterface.register(WATCHED, _watch_mask)
