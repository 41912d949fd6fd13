"""Checkpoints on disk: FOLDER/step-NNNNNN, complete from the moment it has that name.

A thread of its own writes each checkpoint from copies of the tensors, so that training does not wait for a slow disk or
store. Older checkpoints are removed only after that. A checkpoint holds whole tensors by parameter name, however many
processes they were spread over, so any number of processes can go on from it. Nothing is pickled, as a checkpoint may
come from another machine's store.

Each file names its cell and its step in its metadata. A checkpoint of another cell or step, or with other tensors than
the training's, is set aside like a damaged one. This guards against mistakes and damage. It does not guard against
somebody who can write to the folder or the store and gives false weights a true label.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plw_mlflow.environment import disk
from plw_mlflow.errors import UserError, first_line

T = TypeVar("T")

PARTS = ("weights", "optimizer")  # a file each
UNUSABLE = (OSError, SafetensorError, ValueError)  # how a checkpoint shows that training cannot go on from it


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from; tensors on the CPU."""

    step: int  # optimiser steps taken
    weights: dict[str, Tensor]  # trained parameters by name
    optimizer: dict[str, Tensor]  # its state, as KIND/NAME of the parameter


class Writer:
    """Writes the checkpoints of one training, one at a time."""

    def __init__(self, folder: Path, cell: str, keep: int, after_save: Callable[[Path], None]) -> None:
        """cell: what identifies the training. keep: how many checkpoints to keep.

        after_save: called by the thread with the folder of each checkpoint, once that is complete.
        """
        self._folder, self._cell, self._keep, self._after_save = folder, cell, keep, after_save
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint once the one before is written. Nobody may change its tensors from now on."""
        self.wait()
        self._last = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Return once nothing is being written; raises what `after_save` raised."""
        if self._last is not None:
            self._last.result()

    def _write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, or warn that it failed; a full disk may have room for the next, so training goes on."""
        finished = self._folder / _name(checkpoint.step)
        unfinished = self._folder / "unfinished"
        label = {"cell": self._cell, "step": str(checkpoint.step)}
        try:
            disk.remove(unfinished)
            unfinished.mkdir(parents=True)
            for part in PARTS:
                save_file(getattr(checkpoint, part), unfinished / f"{part}.safetensors", label)
                _sync(unfinished / f"{part}.safetensors")
            _sync(unfinished)
            os.replace(unfinished, finished)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                disk.remove(unfinished)
            size = sum(t.nbytes for part in (checkpoint.weights, checkpoint.optimizer) for t in part.values())
            warnings.warn(
                f"the checkpoint of step {checkpoint.step}, of {size / 2**20:.0f} MiB, cannot be written to "
                f"{self._folder} ({first_line(error)}); training goes on, and that of step "
                f"{newest_step(self._folder)} is kept",
                stacklevel=1,
            )
            return
        for older in _checkpoints(self._folder)[: -self._keep]:
            shutil.rmtree(older, ignore_errors=True)
        self._after_save(finished)


def load(folder: Path, cell: str, check_fit: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """The newest checkpoint in a folder that training can go on from, None if there is none.

    check_fit: raises UserError where a checkpoint of the cell is not what the training expects. The files are mapped,
        not read, so it can look at tensors of any size.

    Newer checkpoints, from which training cannot go on, are set aside with a warning that says why.
    """

    def read(place: Path) -> Checkpoint:
        parts = []
        for part in PARTS:
            with _opened(place, part, cell) as file:
                parts.append(file.get_tensors())
        checkpoint = Checkpoint(_step(place), *parts)
        check_fit(checkpoint)
        return checkpoint

    return _newest(folder, read)


def set_aside_unusable(folder: Path, cell: str) -> None:
    """Set aside what is damaged or of another cell or step, as `load` would; reads only the headers of the files."""
    _newest(folder, lambda place: check(place, cell))


def check(place: Path, cell: str) -> None:
    """Raise one of UNUSABLE unless a folder is a whole checkpoint of a cell, and of the step in the folder's name."""
    for part in PARTS:
        with _opened(place, part, cell):
            pass


def _newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` gives of the newest checkpoint that it can read; newer ones are set aside, with a warning."""
    for place in reversed(_checkpoints(folder)):
        try:
            return read(place)
        except UNUSABLE as error:
            # Under a name that no later checkpoint is given, and that nobody takes for the newest checkpoint.
            aside = place.with_name(f"damaged-{place.name}")
            disk.remove(aside)
            place.rename(aside)
            message = f"checkpoint {place} cannot be used ({first_line(error)}); it is set aside as {aside.name}"
            warnings.warn(message, stacklevel=3)
    return None


@contextmanager
def _opened(place: Path, part: str, cell: str) -> Iterator[Any]:
    """Open one of a checkpoint's files and check its label; only the header is read. Raises one of UNUSABLE."""
    path = place / f"{part}.safetensors"
    # A link could lead anywhere, and opening a pipe would wait for ever.
    if not stat.S_ISDIR(place.lstat().st_mode) or not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"its {path.name}, or it itself, is a link or of another kind than it must be")
    with safe_open(path, framework="pt") as file:
        label = file.metadata() or {}
        for name, expected in (("cell", cell), ("step", str(_step(place)))):
            if name not in label:
                raise UserError(f"{path.name} names no {name}: an earlier version or another program has written it")
            if label[name] != expected:
                raise UserError(f"{path.name} is of the {name} {label[name][:80]!r}, and not {expected!r}")
        yield file


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in a folder, 0 if there is none."""
    return max(map(_step, _checkpoints(folder)), default=0)


@contextmanager
def reserve(folder: Path) -> Iterator[None]:
    """Keep every other process from working in `folder` within the block; the lock ends with its process.

    Raises UserError if another process holds it, or if the folder or its lock cannot be made or is a link.
    """
    if folder.is_symlink():  # what is in it is removed at the end
        raise UserError(f"{folder} is a link, but must be a folder of its own; remove it, or change --checkpoint-dir")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = (
                f"another process is training or scoring this very cell or model in {folder}; wait for it, or end it"
            )
            stack.enter_context(disk.held(folder / "lock", taken))
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used ({first_line(error)}); mend it, or change --checkpoint-dir"
            ) from None
        yield


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for a name that `Writer` does not give."""
    digits = name.removeprefix("step-")
    is_step = re.fullmatch("[0-9]{6,18}", digits) is not None and int(digits) > 0 and name == _name(int(digits))
    return int(digits) if is_step else None


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if step_of(path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    step = step_of(checkpoint.name)
    assert step is not None
    return step


def _sync(path: Path) -> None:
    """Have the disk hold a file or the names in a folder, before anything is written that relies on it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
