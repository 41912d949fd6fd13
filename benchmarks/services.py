"""Services for benchmarks: PostgreSQL, a Ray cluster and SLURM, each in a folder of its own and on free ports.

PostgreSQL needs its programs and a driver that Python finds, psycopg or psycopg2; Ray needs its package; SLURM needs
its programs, munge and the package submitit. On Debian, the programs are in postgresql, slurm-wlm and munge, and
`.ci/services` installs all of it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

START_SECONDS = 120  # in which a service has to answer, on any machine
CELL = "entrypoints.main"  # in the command of a cell's process
RAY_MEMORY = 80_000_000  # bytes of a Ray node's store of objects, nearly the least that Ray takes


class Service(Protocol):
    """A service that this process starts and ends."""

    needs: str  # what a machine must have

    def __init__(self, folder: Path) -> None: ...

    @classmethod
    def is_there(cls) -> bool:
        """Whether this machine has what it needs."""

    def start(self) -> None:
        """Start it."""

    def close(self) -> None:
        """End all its processes, however far it was started."""


AService = TypeVar("AService", bound=Service)


@contextmanager
def running(service: type[AService]) -> Iterator[AService]:
    """A service that runs within the block. Raises RuntimeError where the machine has not got what it needs."""
    if not service.is_there():
        raise RuntimeError(f"this machine has not got {service.needs}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.chmod(scratch, 0o755)
        folder = Path(scratch) / "s"  # the names of sockets in it may not be long
        folder.mkdir()
        server = service(folder)
        try:
            server.start()
            yield server
        finally:
            server.close()


class Postgres:
    """A PostgreSQL."""

    needs = "PostgreSQL's programs and its driver psycopg or psycopg2"

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, _free_port()
        self._user = "postgres" if os.getuid() == 0 else None  # it refuses to be run by root

    @classmethod
    def is_there(cls) -> bool:
        """Whether this machine has what it needs."""
        return bool(_postgres_drivers() and _postgres_programs())

    def start(self) -> None:
        """Start it."""
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        data = self._folder / "data"
        self._run("initdb", "-D", str(data), "-U", "postgres", "--auth", "trust", "-E", "UTF8", "--no-sync")
        settings = ("listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}", "fsync=off")
        options = " ".join(f"-c {setting}" for setting in (f"port={self._port}", *settings))
        self._run("pg_ctl", "-D", str(data), "-o", options, "-l", str(self._folder / "log"), "-w", "start")

    def database(self, name: str) -> str:
        """The address of a new database without a table."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres", name)
        return f"postgresql+{_postgres_drivers()[0]}://postgres@127.0.0.1:{self._port}/{name}"

    def close(self) -> None:
        """End it."""
        with suppress(subprocess.CalledProcessError):  # it does not run
            self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [_postgres_programs()[-1].with_name(program), *arguments],
            check=True,
            cwd="/",
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else (),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )


def _postgres_drivers() -> list[str]:
    """The drivers that Python finds."""
    return [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name) is not None]


def _postgres_programs() -> list[Path]:
    """The programs initdb of the PostgreSQLs that are installed, the newest last."""
    found = shutil.which("initdb")
    return [Path(found).resolve()] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


class RayCluster:
    """A Ray cluster of three nodes on this machine, each with one CPU. The first is its head."""

    needs = "the package ray"

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, _free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._address = f"127.0.0.1:{self._port}"
        self.environment = dict[str, str]()  # that a sweep needs beside its own, here nothing
        self.options = ("--engine", "ray", "--ray-address", self._address)  # of a sweep

    @classmethod
    def is_there(cls) -> bool:
        """Whether this machine has what it needs."""
        return importlib.util.find_spec("ray") is not None

    def start(self) -> None:
        """Start it, and return when all its nodes have come to it."""
        self._node("--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._folder}")
        _await(lambda: _answers(self._port), self._nodes, self._folder)
        for _ in range(2):  # one after the other, as one of two that start at the same time may not come up
            self._node(f"--address={self._address}")
            _await(lambda: self._alive() == len(self._nodes), self._nodes, self._folder)

    def _alive(self) -> int:
        """How many nodes it has, as a process of its own is told: one process can connect to one cluster alone."""
        ask = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); "
        ask += "print(sum(node['Alive'] for node in ray.nodes()))"
        asked = [sys.executable, "-c", ask, self._address]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        return int(answer[-1]) if answer else 0

    def cells(self) -> list[int]:
        """The process ids of cells at work."""
        return [cell.pid for node in self._nodes for cell in _cells(_tree(node))]

    def at_work(self) -> list[int]:
        """The nodes but for the head that have a cell at work, by their numbers."""
        return [number for number, node in enumerate(self._nodes) if number > 0 and _cells(_tree(node))]

    def kill_node(self, number: int) -> int:
        """Kill all processes of a node, as the end of its machine would; returns how many cells were among them."""
        node = self._nodes[number]
        processes = _tree(node)
        cells = len(_cells(processes))
        _kill(processes)
        node.wait()
        return cells

    def close(self) -> None:
        """End it."""
        for number in reversed(range(len(self._nodes))):
            self.kill_node(number)

    def _node(self, *options: str) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        size = ["--num-cpus=1", f"--object-store-memory={RAY_MEMORY}", "--disable-usage-stats"]
        log = self._folder / f"node-{len(self._nodes)}.log"
        patience = {"RAY_raylet_start_wait_time_s": str(START_SECONDS)}
        self._nodes.append(_start([*ray, *size, *options], log, patience))


class Slurm:
    """SLURM on this machine alone, with two CPUs. Jobs of its partition `urgent` make it cancel jobs of `main`."""

    needs = "slurmctld, slurmd, munged and the package submitit"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": f"{folder}/slurm.conf"}  # by which its commands find it
        self.options = ("--engine", "slurm", "--slurm", "partition=main")  # of a sweep

    @classmethod
    def is_there(cls) -> bool:
        """Whether this machine has what it needs."""
        programs = map(_program, ("munged", "slurmctld", "slurmd"))
        return all(programs) and importlib.util.find_spec("submitit") is not None

    def start(self) -> None:
        """Start it."""
        folder = self._folder
        key = folder / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        (folder / "slurm.conf").write_text(_slurm_configuration(folder))
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "seed")]
        self._daemon("munged", "--foreground", f"--socket={folder}/munge", f"--log-file={folder}/munged", *files)
        _await((folder / "munge").exists, self._daemons, folder)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        _await(lambda: self.ask("sinfo", "--noheader", "--format=%T").startswith("idle"), self._daemons, folder)

    def ask(self, *command: str) -> str:
        """What a command of SLURM's answers."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    def cells(self) -> list[int]:
        """The process ids of cells at work."""
        return [cell.pid for cell in _cells(self._processes())]

    def at_work(self) -> list[str]:
        """The jobs that have a cell at work."""
        return [cell.environ()["SLURM_JOB_ID"] for cell in _cells(self._processes())]

    def close(self) -> None:
        """End it, with all jobs."""
        self.ask("scancel", "--signal=KILL", "--full", "--user=root")
        for daemon in reversed(self._daemons):
            _kill(_tree(daemon))
            daemon.wait()
        _kill(self._processes())

    def _processes(self) -> list[psutil.Process]:
        """The processes of jobs, which are no children of slurmd."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self.environment.items() <= process.environ().items() and "SLURM_JOB_ID" in process.environ():
                    found.append(process)
        return found

    def _daemon(self, program: str, *options: str) -> None:
        log = self._folder / f"{program}.log"
        self._daemons.append(_start([str(_program(program)), *options], log, self.environment))


def _slurm_configuration(folder: Path) -> str:
    name = socket.gethostname().split(".")[0]
    settings = {
        "ClusterName": "trial",
        "SlurmctldHost": f"{name}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "SlurmdSpoolDir": folder / "spool",
        "StateSaveLocation": folder / "state",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SlurmdParameters": "config_overrides",  # two CPUs, however many there are
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "CANCEL",
        "KillWait": 60,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines.append(f"NodeName={name} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN")
    lines.append("PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP")
    lines.append("PartitionName=urgent Nodes=ALL PriorityTier=2 State=UP")
    return "\n".join(lines) + "\n"


def _program(name: str) -> str | None:
    """The path of a program, of which Debian has some where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def _start(command: Sequence[str], log: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        environment = os.environ | (variables or {})
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )


def _await(holds: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Return when something holds. Raises RuntimeError with what processes have printed where one ends before."""
    until = time.monotonic() + START_SECONDS
    while not holds():
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log"))
            raise RuntimeError(f"a service does not start:\n{logs}")
        time.sleep(0.2)


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process with all its descendants."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    return []


def _cells(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of some processes that are a cell's."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if CELL in process.cmdline():
                found.append(process)
    return found


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
