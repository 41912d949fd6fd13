"""Local: the cells of a sweep on this machine, as many at a time as are asked for, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plw_mlflow import tracking
from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import progress
from plw_mlflow.environment.processes import SWEEP
from plw_mlflow.environment.provenance import ROOT
from plw_mlflow.errors import UserError
from plw_mlflow.sweep.account import Account, Begun
from plw_mlflow.sweep.display import Lines

PATIENCE_SECONDS = 10  # in which cells that were interrupted at the terminal may end by themselves
POLL_SECONDS = 0.2
PROGRESS = "progress.txt"  # beside a cell's log: how far it is
LOOK_SECONDS = 3.0  # between two looks into the store while other processes are at work on cells


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


def run(account: Account, config: SweepConfig, shown: Lines) -> None:
    """Run cells until none is left. Raises KeyboardInterrupt where that was asked for, once the cells have ended.

    Raises UserError where the machine has fewer GPUs or cores than the cells are to have.
    """
    free = places(config)
    running: list[_Running] = []
    with tempfile.TemporaryDirectory() as folder, _interrupting(running, account):
        while True:
            while free:
                if (begun := account.begin_next()) is None:
                    if account.left and not running:
                        shown.waiting()
                    break
                running.append(_start(begun, free.pop(), Path(folder)))
                shown.begun(begun)
            for one in [one for one in running if one.process.poll() is not None]:
                one.stream.close()
                account.end(one.begun, one.process.returncode, one.log)
                shown.ended(one.begun)
                running.remove(one)
                free.append(one.place)
            shown.progressed(_progress(running))
            if not running and not account.left:
                return
            if free:
                account.look_again(LOOK_SECONDS)
            time.sleep(POLL_SECONDS)


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


def _gpus(config: SweepConfig) -> list[str]:
    if config.gpus_per_cell is None:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part for part in visible.split(",") if part]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _start(begun: Begun, place: Place, folder: Path) -> _Running:
    environment = tracking.child_environment(begun.run_id) | place.environment() | {SWEEP: str(os.getpid())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "entrypoints.main", *begun.cell.arguments()]
    if place.cores is not None:
        command = ["taskset", "--cpu-list", ",".join(map(str, place.cores)), *command]
    log = folder / begun.run_id / "log.txt"
    log.parent.mkdir()
    environment[progress.FILE] = str(log.with_name(PROGRESS))
    stream = log.open("wb")
    process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    return _Running(begun, process, place, log, stream)


def _progress(running: Sequence[_Running]) -> dict[str, str]:
    """How far the cells that run are, by their identities, as their processes wrote last."""
    texts = {}
    for one in running:
        with suppress(OSError):  # it has not begun to train
            texts[one.begun.cell.identity] = one.log.with_name(PROGRESS).read_text(encoding="utf-8")
    return texts


@contextmanager
def _interrupting(running: list[_Running], account: Account) -> Iterator[None]:
    """Within the block, an interrupt reaches the cells; it is raised once they have ended, and their runs are marked.

    From the terminal, it has reached them already. SIGTERM comes to this process alone, and is passed on at once. So it
    is after an error of the sweep itself.
    """
    was_terminated = False

    def terminate(*_: object) -> None:
        nonlocal was_terminated
        was_terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        came_from_terminal = isinstance(error, KeyboardInterrupt) and not was_terminated
        _end([one.process for one in running], PATIENCE_SECONDS if came_from_terminal else 0)
        account.interrupt()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Return when processes have ended; they are asked to after so many seconds, and may save a checkpoint then."""
    until = time.monotonic() + patience
    while processes:
        with suppress(KeyboardInterrupt):  # a second one changes nothing
            while any(process.poll() is None for process in processes) and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            return
