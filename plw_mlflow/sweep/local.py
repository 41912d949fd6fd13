"""Local: the engine that runs cells on this machine, as many at a time as are asked for, each in its own process."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from plw_mlflow import tracking
from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import progress
from plw_mlflow.environment.processes import SWEEP
from plw_mlflow.environment.provenance import ROOT
from plw_mlflow.errors import UserError
from plw_mlflow.sweep.account import Begun
from plw_mlflow.sweep.running import PROGRESS, Ended

# Beginnings of the names of environment variables that cells on other machines get: addresses, keys, and our own.
CARRIED = ("MLFLOW_", "PLW_", "HF_", "AWS_", "AZURE_", "GOOGLE_")


@dataclass(frozen=True)
class Place:
    """The part of the machine that one cell at a time has."""

    gpus: tuple[str, ...] | None  # as CUDA_VISIBLE_DEVICES names them; None: all
    cores: tuple[int, ...] | None  # None: all

    def environment(self) -> dict[str, str]:
        """The environment variables that keep a process and its children to this part."""
        variables = {}
        if self.gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        if self.cores is not None:
            variables["OMP_NUM_THREADS"] = str(len(self.cores))
        return variables


@dataclass(frozen=True)
class _Running:
    begun: Begun
    process: subprocess.Popen[bytes]
    place: Place
    log: Path
    stream: IO[bytes]


class Local:
    """Runs cells on this machine. Raises UserError where it has fewer GPUs or cores than the cells are to have."""

    poll_seconds = 0.2

    def __init__(self, config: SweepConfig) -> None:
        self._free = places(config)
        self._running: list[_Running] = []

    def room(self, running: int) -> int:
        """How many cells may be started: one for each place that is free."""
        return len(self._free)

    def start(self, cells: Sequence[Begun], folder: Path) -> None:
        """Start a process for each cell, in a place of its own."""
        for begun in cells:  # one by one, so that an interrupt finds those that were started
            self._running.append(_start(begun, self._free.pop(), folder))

    def ended(self) -> list[Ended]:
        """The cells whose processes have ended since the last call; their places are free again."""
        gone = [one for one in self._running if one.process.poll() is not None]
        for one in gone:
            one.stream.close()
            self._running.remove(one)
            self._free.append(one.place)
        return [Ended(one.begun, one.process.returncode, one.log) for one in gone]

    def end(self, patience: float) -> None:
        """Return when all processes have ended; they are asked to after so many seconds, and may save a checkpoint."""
        processes, until = [one.process for one in self._running], time.monotonic() + patience
        while processes:
            with suppress(KeyboardInterrupt):  # a second one changes nothing
                while any(process.poll() is None for process in processes) and time.monotonic() < until:
                    time.sleep(self.poll_seconds)
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait()
                return


def places(config: SweepConfig) -> list[Place]:
    """The part of the machine of each cell that runs at the same time as others."""
    gpus, cores = _gpus(config), sorted(os.sched_getaffinity(0))
    need = config.gpus_per_cell, config.cores_per_cell
    for what, wanted, there in (("GPUs", need[0], len(gpus)), ("cores", need[1], len(cores))):
        if wanted is not None and wanted * config.jobs > there:
            raise UserError(f"{config.jobs} cells at a time with {wanted} {what} each need more than the {there} here")
    return [
        Place(
            None if need[0] is None else tuple(gpus[job * need[0] : (job + 1) * need[0]]),
            None if need[1] is None else tuple(cores[job * need[1] : (job + 1) * need[1]]),
        )
        for job in range(config.jobs)
    ]


def command(begun: Begun) -> list[str]:
    """The command of a cell's process."""
    return [sys.executable, "-m", "entrypoints.main", *begun.cell.arguments()]


def python_path(before: str | None) -> str:
    """The environment variable PYTHONPATH with which a process finds this package. before: what it was."""
    return os.pathsep.join(filter(None, [str(ROOT), before]))


def carried(begun: Begun) -> dict[str, str]:
    """The environment variables that a cell's process on another machine gets from this one."""
    environment = tracking.child_environment(begun.run_id) | {tracking.CLAIM: begun.claim}
    return {name: value for name, value in environment.items() if name.startswith(CARRIED)} | {
        "PYTHONPATH": python_path(environment.get("PYTHONPATH"))
    }


def extra(name: str) -> Any:
    """An optional package. Raises UserError that says how to get it where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        version = re.search(rf"^# *- ({name}==\S+)$", (ROOT / "conda.yaml").read_text(), re.MULTILINE)
        wanted = version[1] if version else name
        raise UserError(f"the package {name} is missing; get it with: pip install {wanted}") from None


def _gpus(config: SweepConfig) -> list[str]:
    if config.gpus_per_cell is None:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part for part in visible.split(",") if part]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _start(begun: Begun, place: Place, folder: Path) -> _Running:
    environment = tracking.child_environment(begun.run_id) | place.environment() | {SWEEP: str(os.getpid())}
    environment["PYTHONPATH"] = python_path(environment.get("PYTHONPATH"))
    words = command(begun)
    if place.cores is not None:
        words = ["taskset", "--cpu-list", ",".join(map(str, place.cores)), *words]
    log = folder / begun.run_id / "log.txt"
    environment[progress.FILE] = str(log.with_name(PROGRESS))
    log.parent.mkdir(exist_ok=True)
    stream = log.open("wb")
    process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    return _Running(begun, process, place, log, stream)
