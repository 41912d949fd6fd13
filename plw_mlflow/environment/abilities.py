"""Abilities: whether this machine can do what options ask for, as far as that is known without importing torch.

Where a GPU may be there, torch is asked, which takes more than a second to import and is needed then anyway.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from plw_mlflow.errors import UserError

AMD_DRIVER = Path("/dev/kfd")


def has_gpu() -> bool:
    """Whether torch can compute on a GPU here. Without a driver it cannot, and is not imported to be asked."""
    if not AMD_DRIVER.exists():
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return False
    import torch

    return torch.cuda.is_available()


def check_method(method: str) -> None:
    """Raise UserError where this machine cannot train by a method."""
    if method != "qlora":
        return
    if not has_gpu():
        raise UserError(
            "method qlora holds the base model in 4 bits on an NVIDIA GPU, and this machine has none; use --method lora"
        )
    _check_bitsandbytes("method qlora")


def check_optimizer(optimizer: str) -> None:
    """Raise UserError where an optimiser's package is missing. `training.optimizers` tries whether it can step."""
    if optimizer == "adamw8bit":
        _check_bitsandbytes("optimizer adamw8bit")


def check_compilers() -> None:
    """Raise UserError where this machine cannot compile a model."""
    if has_gpu():
        if find_spec("triton") is None:
            raise UserError("compile needs the package triton on a GPU, which is not installed; leave --compile out")
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            raise UserError(
                "compile needs a C compiler, and there is none; install gcc, set CC, or leave --compile out"
            )
    elif shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        raise UserError(
            f"compile needs a C++ compiler, and there is no {compiler}; install g++, set CXX, or leave --compile out"
        )


def _check_bitsandbytes(what: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes, in the version of conda.yaml")
