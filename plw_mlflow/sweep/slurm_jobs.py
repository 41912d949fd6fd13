"""SLURM jobs: the engine that runs cells as an array of SLURM jobs, by submitit.

All cells that are left make one array, of which SLURM runs --jobs at a time. A job that is preempted, or lost with its
machine, is not put into the queue again by SLURM: its cell is the account's again, which submits it once more, and it
goes on from its checkpoint.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import elsewhere
from plw_mlflow.errors import UserError
from plw_mlflow.sweep import local
from plw_mlflow.sweep.account import Begun
from plw_mlflow.sweep.running import Ended

QUEUE_SECONDS = 5.0  # between two looks into the queue
GONE_SECONDS = 15.0  # after which a job that has left the queue without a result is lost: disks may show files late
SIGNAL_SECONDS = 120  # before a job's time is over, when its cell is interrupted, and may save a checkpoint
END_SECONDS = 120.0  # in which jobs that are cancelled leave the queue
FOREVER_MINUTES = 1_000_000


@dataclass
class _Running:
    begun: Begun
    job: Any  # of submitit
    log: Path
    gone_since: float | None = None  # by time.monotonic: since when it is not in the queue


class Slurm:
    """Runs cells as SLURM jobs. Raises UserError where SLURM does not take jobs with these options."""

    poll_seconds = 1.0

    def __init__(self, config: SweepConfig) -> None:
        submitit = local.extra("submitit")
        import cloudpickle

        self._jobs = config.jobs
        options = config.slurm_options()
        self._is_slurm = options.pop("cluster", "slurm") == "slurm"
        options.setdefault("no_requeue", True)
        if config.cores_per_cell is not None:
            options["cpus_per_task"] = config.cores_per_cell
        if config.gpus_per_cell is not None:
            options["gpus_per_node"] = config.gpus_per_cell
        if self._is_slurm:
            _check(options)
        # On a disk that the machines share; it holds the store's address, and is this user's alone.
        self._folder = tempfile.TemporaryDirectory(prefix="slurm-", dir=config.checkpoint_dir.resolve())
        if self._is_slurm:
            self._executor = submitit.SlurmExecutor(self._folder.name)
            self._executor.update_parameters(
                job_name="plw-cell",
                time=None,  # the queue's own limit, where none is given
                wckey=None,
                signal_delay_s=SIGNAL_SECONDS,
                stderr_to_stdout=True,
                array_parallelism=config.jobs,
                additional_parameters=options,
            )
        else:
            self._executor = submitit.LocalExecutor(self._folder.name)
            gpus = config.gpus_per_cell or 0
            self._executor.update_parameters(timeout_min=FOREVER_MINUTES, gpus_per_node=gpus, stderr_to_stdout=True)
        cloudpickle.register_pickle_by_value(elsewhere)
        self._running: list[_Running] = []
        self._queue, self._looked_at = set[str](), 0.0

    def room(self, running: int) -> int | None:
        """How many cells may be submitted: all that are left, and then as many as the array has fewer than --jobs."""
        return None if self._is_slurm and running == 0 else max(0, self._jobs - running)

    def start(self, cells: Sequence[Begun], folder: Path) -> None:
        """Submit cells as an array. Raises UserError where SLURM refuses it."""
        logs = [Path(self._folder.name) / begun.run_id / "log.txt" for begun in cells]
        for log in logs:
            log.parent.mkdir(exist_ok=True)
        try:
            jobs = self._executor.map_array(
                elsewhere.run,
                [local.command(begun) for begun in cells],
                [local.carried(begun) for begun in cells],
                [os.getcwd()] * len(cells),
                map(str, logs),
            )
        except Exception as error:  # submitit raises errors of several kinds
            raise UserError(f"SLURM does not take the cells: {' '.join(str(error).split())[-500:]}") from error
        self._running += [_Running(*one) for one in zip(cells, jobs, logs, strict=True)]

    def ended(self) -> list[Ended]:
        """The cells whose jobs have ended since the last call."""
        self._look()
        over = [one for one in self._running if self._has_result(one) or self._is_lost(one)]
        for one in over:
            self._running.remove(one)
        return [self._ended(one) for one in over]

    def end(self, patience: float) -> None:
        """Cancel all jobs, and return when they have ended; running ones are interrupted first, and may save."""
        until = time.monotonic() + END_SECONDS
        ids = [one.job.job_id for one in self._running if not self._has_result(one)]
        if self._is_slurm and ids:
            subprocess.run(["scancel", *ids], check=False, capture_output=True)
        for job_id in ids if not self._is_slurm else []:
            with suppress(ProcessLookupError):
                os.kill(int(job_id), signal.SIGTERM)
        while self._running and time.monotonic() < until:
            with suppress(KeyboardInterrupt):  # a second one changes nothing
                self._look()
                self._running = [one for one in self._running if not self._has_ended(one)]
                time.sleep(self.poll_seconds)

    def _has_result(self, one: _Running) -> bool:
        return bool(one.job.paths.result_pickle.exists())

    def _has_ended(self, one: _Running) -> bool:
        return one.job.job_id not in self._queue if self._is_slurm else bool(one.job.done())

    def _is_lost(self, one: _Running) -> bool:
        """Whether a job has ended for so long that there will be no result."""
        if not self._has_ended(one):
            one.gone_since = None
            return False
        one.gone_since = one.gone_since or time.monotonic()
        return time.monotonic() - one.gone_since > (GONE_SECONDS if self._is_slurm else 0)

    def _ended(self, one: _Running) -> Ended:
        if not self._has_result(one):
            return Ended(one.begun, None, one.log)
        try:
            exit_status, _ = one.job.result()
        except Exception as error:  # of the job itself, such as a folder that is not there
            one.log.write_text(str(error))
            return Ended(one.begun, 1, one.log)
        return Ended(one.begun, exit_status, one.log)

    def _look(self) -> None:
        """Ask SLURM which jobs are in its queue. Where it does not answer, the last answer stands.

        It is asked itself, as submitit would ask its accounting, which not every cluster has.
        """
        if not self._is_slurm or time.monotonic() - self._looked_at < QUEUE_SECONDS:
            return
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        self._looked_at = time.monotonic()
        if answer.returncode == 0:
            self._queue = set(answer.stdout.split())


def _check(options: dict[str, Any]) -> None:
    """Raise UserError where there is no SLURM, or it would not take a job with these options."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()]
    try:
        answer = subprocess.run(
            ["sbatch", "--test-only", *flags, "--wrap", "true"], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        raise UserError(
            "there is no SLURM here, as its command sbatch is missing; --slurm cluster=local runs the cells on this "
            "machine by submitit, for a trial"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError("SLURM does not answer sbatch within 60 s") from None
    if answer.returncode != 0:
        raise UserError(f"SLURM does not take a job: {' '.join(answer.stderr.split())}")
