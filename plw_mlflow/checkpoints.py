"""Checkpoints on disk: FOLDER/step-NNNNNN, complete from the moment it has that name.

One is written by a thread of its own from copies of the tensors, so that training and a slow disk or store do not wait
for each other; the one before it is removed only then. Whole tensors by parameter name are what is kept, whatever
processes they were spread over, so any number of processes can go on from them. Nothing is pickled: a checkpoint may
come from another machine's store.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plw_mlflow.errors import first_line


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from; tensors on the CPU."""

    step: int  # optimiser steps taken
    weights: dict[str, Tensor]  # trained parameters by name
    optimizer: dict[str, Tensor]  # its state, as KIND/NAME of the parameter


class Writer:
    """Writes the checkpoints of one training, one at a time."""

    def __init__(self, folder: Path, keep: int, after_save: Callable[[Path], None]) -> None:
        """keep: how many to keep. after_save: called with each one's own folder once it is complete, by the thread."""
        self._folder, self._keep, self._after_save = folder, keep, after_save
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, whose tensors nobody changes from here on, once the one before is written."""
        self.wait()
        self._last = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Return once nothing is being written; raises what `after_save` raised."""
        if self._last is not None:
            self._last.result()

    def _write(self, checkpoint: Checkpoint) -> None:
        """A disk that is full or fails now may be well at the next checkpoint, so training goes on."""
        finished = self._folder / f"step-{checkpoint.step:06d}"
        unfinished = self._folder / "unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name, tensors in (("weights", checkpoint.weights), ("optimizer", checkpoint.optimizer)):
                save_file(tensors, unfinished / f"{name}.safetensors")
                _sync(unfinished / f"{name}.safetensors")
            _sync(unfinished)
            os.replace(unfinished, finished)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            size = sum(t.nbytes for part in (checkpoint.weights, checkpoint.optimizer) for t in part.values())
            warnings.warn(
                f"the checkpoint of step {checkpoint.step}, of {size / 2**20:.0f} MiB, cannot be written to "
                f"{self._folder} ({first_line(error)}); training goes on, and that of step "
                f"{newest_step(self._folder)} is kept",
                stacklevel=1,
            )
            return
        for older in _found(self._folder)[: -self._keep]:
            shutil.rmtree(older, ignore_errors=True)
        self._after_save(finished)


def load(folder: Path) -> Checkpoint | None:
    """A folder's newest checkpoint that can be read, None if there is none; the damaged are set aside, and told."""
    for found in reversed(_found(folder)):
        try:
            weights, optimizer = (load_file(found / f"{name}.safetensors") for name in ("weights", "optimizer"))
        except (OSError, SafetensorError) as error:
            # Out of the way of the names that are given again, and of whoever looks for the newest.
            aside = found.with_name(f"damaged-{found.name}")
            shutil.rmtree(aside, ignore_errors=True)
            found.rename(aside)
            message = f"checkpoint {found} cannot be read ({first_line(error)}); it is set aside as {aside.name}"
            warnings.warn(message, stacklevel=2)
            continue
        return Checkpoint(_step(found), weights, optimizer)
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in a folder, 0 if there is none."""
    return max(map(_step, _found(folder)), default=0)


@contextmanager
def reserve(folder: Path) -> Iterator[None]:
    """Keep every other process from working in `folder` meanwhile; the lock dies with its process.

    Raises ValueError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training or scoring this very cell or model in {folder}; wait for it, or end it"
            ) from None
        yield


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names, before anything that relies on it is written."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
