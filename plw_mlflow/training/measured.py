"""Measured: how fast a training is, what part of the device's peak that comes to, and how much memory it takes.

All of it is counted on the host, from batches that are on the CPU anyway, so a GPU is never waited for.

MFU (model FLOPs utilisation) is the arithmetic that a step needs, divided by what the device could have done meanwhile.
Conventions differ by a third; this is the strict one. A product of a token with N weights is 2 N operations forward,
2 N for the gradient of its input and, for trained weights, 2 N for theirs: 6 N when all are trained, 4 N where an
adapter leaves them frozen, and 6 N for the adapter's own. The embedding table is no product. The head counts for the
tokens that bear loss. Attention counts for the tokens that a token sees (its own example's, up to itself), three times
the forward pass. What is computed again (`--activation-checkpointing`) does not count, and padding neither.
"""

from __future__ import annotations

import math
import re
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plw_mlflow.data.batches import Batch
from plw_mlflow.models import causal

# TFLOP/s of dense products (without sparsity) in bfloat16 and in float32 without TF32, as NVIDIA's data sheets have
# them, and the white papers of Ampere GA102 and Ada. The names are the whole of those by which torch knows the devices,
# as what has a longer one is slower (H200 NVL, a laptop's RTX 4090, or a part of a device by MIG).
GPU_PEAKS = {
    r"H200": (989.4, 66.9),
    r"H100 80GB HBM3": (989.4, 66.9),
    r"H100 PCIe": (756.0, 51.2),
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": (312.0, 19.5),
    r"L40S": (362.05, 91.6),
    r"L4": (121.0, 30.3),
    r"RTX A6000": (154.8, 38.7),
    r"RTX 4090": (165.2, 82.6),
}
PEAK_SIZE = 1024  # rows and columns of the matrices by which a CPU's peak is measured
PEAK_SECONDS = 0.15  # for which it is measured


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    flops: float | None  # a second; None where it is not known, or the model's arithmetic is not
    named: str  # what it is the peak of and where it is from, or why there is none


@dataclass(frozen=True)
class Work:
    """Operations of a training step, forward and backward."""

    per_token: int  # products with weights, without the head
    per_loss_token: int  # the head's
    per_pair: int  # of a token and one that it attends to, itself included

    @classmethod
    def of(cls, model: Any) -> Work:
        """Of a model with its adapters, whose parameters say by `requires_grad` whether they are trained."""
        unwrapped = causal.unwrap(model)
        settings = unwrapped.config.get_text_config()
        head = causal.head(unwrapped).weight
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables and p is not head]
        head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        width = settings.num_attention_heads * head_dim
        return cls(
            sum(_per_token(matrix) for matrix in matrices),
            _per_token(head),
            3 * 2 * 2 * width * settings.num_hidden_layers,
        )

    def of_step(self, batches: Sequence[Batch]) -> int:
        """Of the batches of a step, whose tensors are on the CPU."""
        lengths = torch.cat([_lengths(batch) for batch in batches])
        tokens, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
        loss_tokens = sum(len(batch.rows) for batch in batches)
        return self.per_token * tokens + self.per_loss_token * loss_tokens + self.per_pair * pairs


class Meter:
    """Gives the metrics of each step that say how fast it was, and how much memory the training has taken so far."""

    def __init__(self, model: Any, device: torch.device, peak: Peak | None) -> None:
        """model: with its adapters. peak: of this process's device; without one, there is no MFU."""
        self._device = device
        self._peak_flops = peak.flops if peak is not None else None
        self._work = None if self._peak_flops is None else Work.of(model)

    def metrics(self, own: Sequence[Batch], tokens: int, seconds: float) -> dict[str, float]:
        """The metrics of a step.

        own: this process's batches, for whose device padding, MFU and memory are given. tokens: of all processes.
        """
        real = sum(int(_lengths(batch).sum()) for batch in own)
        metrics = {
            "train/tokens_per_second": tokens / seconds,
            "train/padding_share": 1 - real / sum(batch.tokens.numel() for batch in own),
            "train/peak_memory_mib": peak_memory_mib(self._device),
        }
        if self._work is not None and self._peak_flops is not None:
            metrics["train/mfu"] = self._work.of_step(own) / seconds / self._peak_flops
        return metrics


def find_peak(model: Any, arithmetic: str, max_tokens: int) -> Peak:
    """The peak of this process's device in a type of arithmetic (float32 or bfloat16), for the MFU of a model.

    A GPU's is from a table. A CPU's is measured by a bare product with the threads that torch uses, within about
    PEAK_SECONDS.
    """
    if reason := _uncountable(model, max_tokens):
        return Peak(None, f"none: {reason}")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = [
            peaks for pattern, peaks in GPU_PEAKS.items() if re.fullmatch(rf"(NVIDIA )?(GeForce )?({pattern})", name)
        ]
        if not known:
            return Peak(None, f"none: the peak of {name} is not known")
        tera = known[0][arithmetic == "float32"]
        return Peak(tera * 1e12, f"{tera:g} TFLOP/s, {name}, dense {arithmetic}, by NVIDIA's data sheet")
    flops, threads = _cpu_peak(getattr(torch, arithmetic)), torch.get_num_threads()
    return Peak(flops, f"{flops / 1e9:.0f} GFLOP/s, bare {arithmetic} products on this CPU with {threads} threads")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory so far: of a GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, StopIteration):  # of Linux alone
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    # Includes what the parent had when it started this process; bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _per_token(weight: Any) -> int:
    """Operations for each token of a product with a weight, forward and backward."""
    packed = getattr(weight, "quant_state", None)  # of a weight in 4 bits, whose own shape is that of its bytes
    count = math.prod(weight.shape if packed is None else packed.shape)
    return (6 if weight.requires_grad else 4) * count


def _lengths(batch: Batch) -> torch.Tensor:
    """The tokens of each of a batch's examples."""
    if batch.borders is not None:
        return batch.borders.diff()
    assert batch.attention is not None
    return batch.attention.sum(1)


def _uncountable(model: Any, max_tokens: int) -> str:
    """Why a model's operations cannot be counted by its matrices and its attention; empty if they can."""
    unwrapped = causal.unwrap(model)
    settings = unwrapped.config.get_text_config()
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        return f"{settings.model_type} has other products than with matrices (of experts or convolutions)"
    if getattr(settings, "kv_lora_rank", None) or not hasattr(settings, "num_attention_heads"):
        return f"the attention of {settings.model_type} is not counted"
    window = getattr(settings, "sliding_window", None) if getattr(settings, "use_sliding_window", True) else None
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"])
    if "sliding_attention" in kinds and (window or 0) < max_tokens:
        return f"attention within a window of {window} tokens is not counted"
    others = kinds - {"full_attention", "sliding_attention"}
    return f"layers of {', '.join(sorted(others))} are not counted" if others else ""


def _cpu_peak(kind: torch.dtype) -> float:
    """Operations a second of a product of two large matrices: of the fastest of several."""
    left = right = torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=kind)
    fastest, ends = math.inf, time.perf_counter() + PEAK_SECONDS
    for attempt in range(100):
        started = time.perf_counter()
        torch.mm(left, right)
        now = time.perf_counter()
        fastest = min(fastest, now - started) if attempt else fastest  # the first one makes room
        if attempt and now > ends:
            break
    return 2 * PEAK_SIZE**3 / fastest
