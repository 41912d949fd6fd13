"""Checkpoints on disk: FOLDER/step-NNNNNN, complete from the moment it has that name.

A thread of its own writes each checkpoint from copies of the tensors, so that training does not wait for a slow disk or
store. Older checkpoints are removed only after that. Nothing is pickled, as a checkpoint may come from another
machine's store.

A checkpoint has one file of weights and one of the optimiser's state, by parameter name. Where processes share the
weights (fsdp2), it has one of each from every process, with the shards that this process holds. The files are
safetensors whose headers say where in the whole tensor each shard begins, as torch's distributed checkpoint has them
(`HuggingFaceStorageWriter`), and that reads them: every process its own slices, whichever number of processes it was.

Each file names its cell and its step in its metadata. A checkpoint of another cell or step, or with other tensors than
the training's, is set aside like a damaged one. This guards against mistakes and damage. It does not guard against
somebody who can write to the folder or the store and gives false weights a true label.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plw_mlflow.environment import disk
from plw_mlflow.errors import UserError, first_line

T = TypeVar("T")

PARTS = ("weights", "optimizer")  # a file each, or one each of every process
UNUSABLE = (OSError, SafetensorError, ValueError)  # how a checkpoint shows that training cannot go on from it


@dataclass(frozen=True)
class Checkpoint:
    """What a process saves of what training goes on from: copies of tensors or of their shards, on the CPU."""

    step: int  # optimiser steps taken
    weights: dict[str, Tensor]  # trained parameters by name
    optimizer: dict[str, Tensor]  # its state, as KIND/NAME of the parameter
    offsets: dict[str, list[int]] | None = None  # by either name, where in the whole tensor a shard begins; None: at 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk, its headers read and found sound."""

    place: Path
    step: int
    shapes: dict[str, tuple[list[int], torch.dtype]]  # of whole tensors, by the names of `Checkpoint`

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor or shard with its name, one at a time; the files are mapped, so that none stays in memory."""
        for path in _files(self.place):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, as these files are no mappings
                    yield name, file.get_tensor(name)

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors by their names; of one that is sharded (a DTensor), only this process's shard is read."""
        from torch.distributed import checkpoint as distributed

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which `no_dist` asks for
            distributed.load(tensors, storage_reader=_reader(self.place), no_dist=True)


@dataclass(frozen=True)
class Writers:
    """The processes that write a checkpoint together."""

    number: int = 0  # of this process; the first one gives the checkpoint its name
    count: int = 1
    agree: Callable[[bool], bool] = bool  # called by the writing threads of all: whether every one has said yes


class Writer:
    """Writes the checkpoints of one training, one at a time."""

    def __init__(
        self, folder: Path, cell: str, keep: int, after_save: Callable[[Path], None], writers: Writers | None = None
    ) -> None:
        """cell: what identifies the training. keep: how many checkpoints to keep.

        after_save: called by the first process's thread with the folder of each checkpoint, once that is complete.
        writers: of several processes that each write their shards into `folder`, which all of them must see.
        """
        self._folder, self._cell, self._keep, self._after_save = folder, cell, keep, after_save
        self._writers = writers or Writers()
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
        is_first = self._writers.number == 0
        finished = self._folder / _name(checkpoint.step)
        unfinished = self._folder / "unfinished"
        fault: str | None = None
        # What the processes do one after the other; a fault of one ends it for all.
        for act in (self._begin, lambda to: self._write_files(checkpoint, to), lambda to: self._name_it(to, finished)):
            try:
                act(unfinished)
            except (OSError, SafetensorError) as error:
                fault = first_line(error)
            if not self._writers.agree(fault is None):
                fault = fault or "another process could not write its part"
                break
        if not is_first:
            return
        if fault is not None:
            with suppress(OSError):
                disk.remove(unfinished)
            size = sum(t.nbytes for part in (checkpoint.weights, checkpoint.optimizer) for t in part.values())
            warnings.warn(
                f"the checkpoint of step {checkpoint.step}, of {size * self._writers.count / 2**20:.0f} MiB, cannot be "
                f"written to {self._folder} ({fault}); training goes on, and that of step "
                f"{newest_step(self._folder)} is kept",
                stacklevel=1,
            )
            return
        for older in _checkpoints(self._folder)[: -self._keep]:
            shutil.rmtree(older, ignore_errors=True)
        self._after_save(finished)

    def _begin(self, unfinished: Path) -> None:
        if self._writers.number == 0:
            disk.remove(unfinished)
            unfinished.mkdir(parents=True)

    def _write_files(self, checkpoint: Checkpoint, unfinished: Path) -> None:
        label = {"cell": self._cell, "step": str(checkpoint.step)}
        for part in PARTS:
            tensors, own = getattr(checkpoint, part), label
            if checkpoint.offsets is not None:
                places = {name: {"saved_offsets": checkpoint.offsets[name]} for name in tensors}
                own = label | {"DCP_SHARDING_INFO": json.dumps(places)}
            path = unfinished / _file_name(part, self._writers.number, self._writers.count)
            save_file(tensors, path, own)
            _sync(path)

    def _name_it(self, unfinished: Path, finished: Path) -> None:
        if self._writers.number == 0:
            _sync(unfinished)
            os.replace(unfinished, finished)
            _sync(self._folder)


def load(folder: Path, cell: str, check_fit: Callable[[Saved], None]) -> Saved | None:
    """The newest checkpoint in a folder that training can go on from, None if there is none.

    check_fit: raises UserError where a checkpoint of the cell is not what the training expects.

    Newer checkpoints, from which training cannot go on, are set aside with a warning that says why.
    """

    def read(place: Path) -> Saved:
        check(place, cell)
        saved = Saved(place, _step(place), _shapes(place))
        check_fit(saved)
        return saved

    return _newest(folder, read)


def set_aside_unusable(folder: Path, cell: str) -> None:
    """Set aside what is damaged or of another cell or step, as `load` would; reads only the headers of the files."""
    _newest(folder, lambda place: check(place, cell))


def check(place: Path, cell: str) -> None:
    """Raise one of UNUSABLE unless a folder is a whole checkpoint of a cell, and of the step in the folder's name."""
    if not stat.S_ISDIR(place.lstat().st_mode):  # a link could lead anywhere
        raise UserError("it is a link or of another kind than it must be")
    for path in _files(place):
        _check_label(path, {"cell": cell, "step": str(_step(place))})


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


def _files(place: Path) -> list[Path]:
    """The files that a checkpoint must have, whether or not they are there.

    Raises UserError where there are others of their kind, since torch reads all that lie there.
    """
    found = {path.name for path in place.iterdir() if path.suffix == ".safetensors"}
    counts = {int(match[1]) for name in found if (match := re.fullmatch(r"[a-z]+-[0-9]+-of-([0-9]+)[.].*", name))}
    count = max(counts, default=1)
    if count > len(found):  # before names are made, of which somebody could want a million
        raise UserError(f"it has {len(found)} of the files of {count} processes")
    expected = [_file_name(part, number, count) for number in range(count) for part in PARTS]
    if others := sorted(found.difference(expected)):
        raise UserError(f"it has files of another checkpoint, among them {others[0][:80]!r}")
    return [place / name for name in expected]


def _file_name(part: str, number: int, count: int) -> str:
    return f"{part}.safetensors" if count == 1 else f"{part}-{number + 1}-of-{count}.safetensors"


def _check_label(path: Path, expected: dict[str, str]) -> None:
    """Raise one of UNUSABLE where a checkpoint's file has not the label it must have; only its header is read."""
    if not stat.S_ISREG(path.lstat().st_mode):  # a link could lead anywhere, and opening a pipe would wait for ever
        raise UserError(f"its {path.name} is a link or of another kind than it must be")
    with safe_open(path, framework="pt") as file:
        label = file.metadata() or {}
    for name, value in expected.items():
        if name not in label:
            raise UserError(f"{path.name} names no {name}: an earlier version or another program has written it")
        if label[name] != value:
            raise UserError(f"{path.name} is of the {name} {label[name][:80]!r}, and not {value!r}")


def _reader(place: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(place))


def _shapes(place: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and types of a checkpoint's whole tensors. Raises UserError where their shards do not make up a whole."""
    try:
        metadata = _reader(place).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a header makes torch stumble over
        raise UserError(f"its headers cannot be read: {type(error).__name__} {first_line(error)}") from None
    for name, tensor in metadata.items():
        if not _make_up(tensor.size, tensor.chunks):
            raise UserError(f"the shards of its {name[:80]} do not make up a whole")
    return {name: (list(tensor.size), tensor.properties.dtype) for name, tensor in metadata.items()}


def _make_up(shape: Sequence[int], shards: Sequence[Any]) -> bool:
    """Whether shards that were cut along the first dimension cover a tensor, and no part of it twice."""
    if not shape:
        return len(shards) == 1
    end = 0
    for shard in sorted(shards, key=lambda shard: tuple(shard.offsets)):
        if [*shard.offsets] != [end, *[0] * (len(shape) - 1)] or shard.sizes[1:] != shape[1:]:
            return False
        end += shard.sizes[0]
    return end == shape[0]


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


def remove(folder: Path) -> None:
    """Remove a folder that this process has reserved. Where another process begins to use it just now, it stays."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


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
