"""Precision: the type of the arithmetic that `--precision` comes to on this machine, in training and in scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from plw_mlflow.errors import UserError

Precision = Literal["float32", "bfloat16"]
CPU_FLAGS = Path("/proc/cpuinfo")  # in which Linux lists the instructions of each core


def resolve(precision: str, model: str) -> Precision:
    """The type of the arithmetic.

    precision: float32, bfloat16 or auto. model: the base model's name.

    `auto` is bfloat16 where the device multiplies matrices of it faster than of float32, except for the toy model,
    whose published numbers are float32's.

    Raises UserError for bfloat16 on a GPU that has none. A CPU without it is slow at it, but right.
    """
    if precision == "float32" or (precision == "auto" and model == "toy"):
        return "float32"
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16() else "float32"
    import torch

    if torch.cuda.is_available() and not _gpu_has_bfloat16():
        raise UserError(f"bfloat16 is not to be had on this GPU ({torch.cuda.get_device_name()}); choose float32")
    return "bfloat16"


def saved(save_precision: str, precision: str, model: str) -> Precision:
    """The type in which a trained model's weights are saved: where `save_precision` is auto, the arithmetic's."""
    return resolve(precision, model) if save_precision == "auto" else save_precision  # type: ignore[return-value]


def has_fast_bfloat16() -> bool:
    """Whether this process's device has instructions for products of bfloat16 matrices."""
    import torch

    if torch.cuda.is_available():
        return _gpu_has_bfloat16()
    # What torch knows of AMX and AVX512-BF16 is private to it and has changed between its versions.
    try:
        flags = set(CPU_FLAGS.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool({"amx_bf16", "avx512_bf16"} & flags) and torch.backends.mkldnn.is_available()


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)
