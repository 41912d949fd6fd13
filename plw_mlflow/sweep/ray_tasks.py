"""Ray tasks: the engine that runs each cell as a task of a Ray cluster, with its CPUs and GPUs.

Its machines need this package at the same place (the same image, or a common disk), and the tracking server. Ray itself
is not asked to retry: a cell whose machine is lost is the account's again, and goes on from its stored checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import elsewhere
from plw_mlflow.errors import UserError
from plw_mlflow.sweep import local
from plw_mlflow.sweep.account import Begun
from plw_mlflow.sweep.running import Ended

CONNECT_SECONDS = 5.0
STATUS_SECONDS = 40.0  # in which a cluster tells its state, however busy it is
END_SECONDS = 120.0  # in which cells that are interrupted save a checkpoint


class Ray:
    """Runs cells as Ray tasks. Raises UserError where the cluster is not there, or has no machine that fits a cell."""

    poll_seconds = 0.5

    def __init__(self, config: SweepConfig) -> None:
        self._jobs = config.jobs
        cpus, gpus = config.cores_per_cell or 1, config.gpus_per_cell or 0
        self._ray = ray = local.extra("ray")
        _connect(ray, config.ray_address)
        fitting = [
            node
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
        ]
        if not fitting:
            raise UserError(f"no machine of the Ray cluster has the {cpus} CPUs and {gpus} GPUs that a cell is to have")
        ray.cloudpickle.register_pickle_by_value(elsewhere)  # Ray's own processes do not find this package
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(elsewhere.run)
        self._running: dict[Any, tuple[Begun, Path]] = {}  # by the reference to the task's result

    def room(self, running: int) -> int:
        """How many cells may be started while so many run."""
        return self._jobs - running

    def start(self, cells: Sequence[Begun], folder: Path) -> None:
        """Hand cells to Ray, which starts each when a machine has the CPUs and GPUs for it."""
        for begun in cells:
            reference = self._task.remote(local.command(begun), local.carried(begun), os.getcwd())
            self._running[reference] = begun, folder / begun.run_id / "log.txt"

    def ended(self) -> list[Ended]:
        """The cells whose tasks have ended since the last call."""
        if not self._running:
            return []
        done, _ = self._ray.wait([*self._running], num_returns=len(self._running), timeout=0)
        return [self._ended(reference) for reference in done]

    def end(self, patience: float) -> None:
        """Interrupt all tasks, and return when they have ended."""
        until = time.monotonic() + END_SECONDS
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        running = [*self._running]
        while running and time.monotonic() < until:
            with suppress(KeyboardInterrupt):  # a second one changes nothing
                _, running = self._ray.wait(running, num_returns=len(running), timeout=1)

    def _ended(self, reference: Any) -> Ended:
        begun, log = self._running.pop(reference)
        exceptions = self._ray.exceptions
        try:
            exit_status, printed = self._ray.get(reference)
        except exceptions.OutOfMemoryError as error:
            exit_status, printed = -9, str(error).encode()
        except exceptions.RayTaskError as error:  # such as a folder that is not there
            exit_status, printed = 1, str(error).encode()
        except exceptions.RayError:  # the machine, or Ray's process on it, is gone
            return Ended(begun, None, log)
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(printed)
        return Ended(begun, exit_status, log)


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a Ray cluster. Ray itself would try for two minutes where nobody answers, and then exit."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and address != "auto":
        host, _, port = address.rpartition("://")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            if "://" not in address:
                command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
                subprocess.run(command, timeout=STATUS_SECONDS, check=True, capture_output=True)
        except ValueError:
            raise UserError(f"ray-address must be HOST:PORT, ray://HOST:PORT or auto, got {address}") from None
        except (OSError, subprocess.SubprocessError) as error:
            why = error.strerror or error if isinstance(error, OSError) else "what answers there is no Ray cluster"
            raise UserError(f"there is no Ray cluster at {address}: {why}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster can be used at {address or 'this machine'}: {error}") from None
