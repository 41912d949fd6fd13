"""What becomes of a training when things go wrong:  python -m benchmarks.faults --json FILE

A small training (the toy model, in full and by LoRA with dropout, a checkpoint after every step) is killed at random
moments, told to end, and written onto a full disk, and the same is started again until it is done; its final weights
are then those of a training that nothing disturbed, to the bit, or they are not. Moments are drawn evenly over the time
an undisturbed training takes from its first step on, from a seed; where that finds it is up to the machine. A full disk
is a limit on the size of files (RLIMIT_FSIZE), which fails a write as a full disk does, and needs no special rights.

Then a training with an MLflow server: that is killed while the training goes on, the training is killed too, both are
started again, and the server is lost once more. Every step has to be in every curve once.

One training costs little, as each is forked from a process that has imported everything; the server's cost most.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol
from urllib.request import urlopen

import click

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.models import pretrained
from plw_mlflow.training import checkpoints, train

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full", "lora")
STEPS_TO_FILL = (3, 6)  # the disk is full from the first of these steps to the second
FULL_BYTES = 20_000  # of a file that a full disk still takes: any metadata, no checkpoint


@dataclass(frozen=True)
class Outcome:
    """How often something came out as it should."""

    fault: str
    what: str
    count: int
    of: str
    whole: int

    def row(self) -> dict[str, str | float]:
        """As all benchmarks write it; the ratio is 1 where nothing was lost."""
        return {
            "case": self.fault,
            "metric": self.what,
            "ours": self.count,
            "peer": self.of,
            "peer_value": self.whole,
            "ratio": self.count / self.whole,
        }


class Trainer:
    """Starts small trainings as processes, forked from this one, in which torch has done nothing yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shared = mmap.mmap(-1, 2)  # is a checkpoint being written, and has a step been taken: 0 or 1
        self.config = TrainConfig(
            max_records=32,
            batch_examples=2,  # steps so short that much of the time goes into checkpoints
            micro_batch_examples=2,
            epochs=1,
            save_every=1,
            eval_every=1000,
            lora_dropout=0.3,
            precision="float32",
            cache_dir=folder / "cache",
        )
        tokenizer = pretrained.load_tokenizer(self.config.model)
        self._prepared = prepare.run(self.config.dataset, tokenizer, self.config)
        self._made = 0

    @property
    def is_saving(self) -> bool:
        """Whether the training at hand was writing a checkpoint when it was last heard of."""
        return self._shared[0] == 1

    @property
    def has_begun(self) -> bool:
        """Whether the training at hand has taken a step since it was started."""
        return self._shared[1] == 1

    def new_folder(self) -> Path:
        """A folder for a training of its own."""
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        return folder

    def start(self, method: str, folder: Path, log: Callable[[int], None] = lambda step: None) -> int:
        """Begin a training, or go on with the one in `folder`; gives the process's id.

        log: called in that process after each step.
        """
        self._shared[:] = bytes(2)
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        status = 1
        try:
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as every entry point does
            status = self._train(method, folder, log)
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:  # whatever comes, this process must not return into what its parent does
            try:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                sys.stderr.flush()
            finally:
                os._exit(status)

    def _train(self, method: str, folder: Path, log: Callable[[int], None]) -> int:
        import torch

        torch.set_num_threads(1)
        config = replace(self.config, method=method)  # type: ignore[arg-type]

        def begin() -> None:
            self._shared[0] = 1

        def end(saved: Path) -> None:
            self._shared[0] = 0

        def tell(_: object, step: int) -> None:
            self._shared[1] = 1
            log(step)

        with checkpoints.reserve(folder):
            model = pretrained.load(config.model)
            done = train.run(config, self._prepared, model, folder, tell, begin, end)
        digest = hashlib.sha256()
        for name, parameter in sorted(done.model.named_parameters()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        (folder / "unfinished.digest").write_text(digest.hexdigest())
        os.replace(folder / "unfinished.digest", folder / "digest")
        return 0

    def wait(self, pid: int, seconds: float = float("inf")) -> int | None:
        """A training's exit status (a signal's is negative), None where it still runs so many seconds after it began.

        It has begun when it has taken a step.
        """
        deadline = float("inf")
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if self.has_begun and deadline == float("inf"):
                deadline = time.monotonic() + seconds
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.0005)

    def finish(self, method: str, folder: Path, log: Callable[[int], None] = lambda step: None) -> str:
        """Start a training and see it to its end; a digest of the weights. Raises RuntimeError where it fails."""
        status = self.wait(self.start(method, folder, log))
        if status != 0:
            raise RuntimeError(f"a training ended with status {status}:\n{(folder / 'output').read_text()}")
        return (folder / "digest").read_text()


def fresh_process() -> ProcessPoolExecutor:
    """Runs functions in a process of its own, in which torch has done nothing yet."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def disturb(folder: Path, kills: int, terms: int, seed: int, methods: Sequence[str] = METHODS) -> list[Outcome]:
    """SIGKILLs, SIGTERMs and full disks, in this process, a fresh one."""
    trainer, rng = Trainer(folder), random.Random(seed)
    undisturbed, seconds = {}, {}
    for method in methods:
        pid = trainer.start(method, folder := trainer.new_folder())
        begun = trainer.wait(pid, 0)
        started = time.monotonic()
        if begun is not None or trainer.wait(pid) != 0:
            raise RuntimeError(f"an undisturbed training has failed:\n{(folder / 'output').read_text()}")
        seconds[method] = time.monotonic() - started
        undisturbed[method] = (folder / "digest").read_text()
    outcomes = []
    for number, name, message in ((kills, "SIGKILL", signal.SIGKILL), (terms, "SIGTERM", signal.SIGTERM)):
        count = _interrupt(trainer, undisturbed, seconds, number, message, rng)
        fault = f"{number} {name}s"
        outcomes.append(
            Outcome(fault, "trainings that end in the undisturbed bits", count["same"], "trainings", count["all"])
        )
        outcomes.append(Outcome(fault, "sent while a checkpoint was written", count["saving"], name + "s", number))
        if message == signal.SIGTERM:
            ended = count["130"] + count["0"]  # 0 where the training was done when the signal came
            outcomes.append(Outcome(fault, "end with status 130, or were done", ended, name + "s", number))
    same = [_fill_the_disk(trainer, method) == undisturbed[method] for method in methods]
    fault = f"disk full, steps {STEPS_TO_FILL[0]} to {STEPS_TO_FILL[1]}"
    outcomes.append(Outcome(fault, "trainings that end in the undisturbed bits", sum(same), "trainings", len(same)))
    same = [_kill_on_a_full_disk(trainer, method) == undisturbed[method] for method in methods]
    fault = "disk full to the end, then SIGKILL"
    outcomes.append(Outcome(fault, "trainings that end in the undisturbed bits", sum(same), "trainings", len(same)))
    return outcomes


def _interrupt(
    trainer: Trainer,
    undisturbed: dict[str, str],
    seconds: dict[str, float],
    number: int,
    message: signal.Signals,
    rng: random.Random,
) -> Counter[str]:
    """Send a signal so many times, over as many trainings as that takes, each started again until it is done."""
    count: Counter[str] = Counter()
    while count["sent"] < number:
        methods = list(undisturbed)
        method = methods[count["all"] % len(methods)]
        folder = trainer.new_folder()
        while not (folder / "digest").exists():
            pid = trainer.start(method, folder)
            is_last = count["sent"] == number
            status = trainer.wait(pid, float("inf") if is_last else rng.uniform(0, seconds[method]))
            if status is None:
                os.kill(pid, message)
                count["sent"] += 1
                count["saving"] += trainer.is_saving
                count[str(trainer.wait(pid))] += 1
            elif status != 0:
                raise RuntimeError(f"a training started again has failed:\n{(folder / 'output').read_text()}")
        count["all"] += 1
        count["same"] += (folder / "digest").read_text() == undisturbed[method]
    return count


def _limit(size: int) -> None:
    """Make this process write no file longer than so many bytes; any may be made again by RLIM_INFINITY."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _fill_the_disk(trainer: Trainer, method: str) -> str:
    """A disk that is full for some steps, and has room again."""

    def log(step: int) -> None:
        if step == STEPS_TO_FILL[0]:
            _limit(FULL_BYTES)
        if step == STEPS_TO_FILL[1]:
            _limit(resource.RLIM_INFINITY)

    folder = trainer.new_folder()
    digest = trainer.finish(method, folder, log)
    _expect("cannot be written", folder)
    return digest


def _kill_on_a_full_disk(trainer: Trainer, method: str) -> str:
    """A disk that is full until the training is killed, and started again with room."""

    def log(step: int) -> None:
        if step == STEPS_TO_FILL[0]:
            _limit(FULL_BYTES)
        if step == STEPS_TO_FILL[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = trainer.new_folder()
    trainer.wait(trainer.start(method, folder, log))
    _expect("cannot be written", folder)
    return trainer.finish(method, folder)


def _expect(words: str, folder: Path) -> None:
    output = (folder / "output").read_text()
    if words not in output:
        raise RuntimeError(f"the training has not said that a checkpoint {words}:\n{output}")


# The lost server


class Server(Protocol):
    """A tracking server that can be lost."""

    uri: str

    def start(self) -> None:
        """Start it, and return when it answers."""

    def kill(self) -> None:
        """Kill it."""


class MlflowServer:
    """`mlflow server` on SQLite."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self._folder}/artifacts"]
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=quiet, stdout=log, stderr=log, start_new_session=True
            )
        while self._process.poll() is None:
            with suppress(OSError), urlopen(f"{self.uri}/health", timeout=60):
                return
            time.sleep(0.1)
        raise RuntimeError(f"mlflow server does not start:\n{(self._folder / 'server.log').read_text()}")

    def kill(self) -> None:
        """Kill it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def lose_server(server: Server, folder: Path) -> list[Outcome]:
    """Train with a server that is lost twice; in between, the training is killed while the server is away.

    folder: holds, or will hold, the server's mlflow.db.
    """
    command = [sys.executable, "-m", "entrypoints.train", "--max-records", "100", "--epochs", "2", "--save-every", "2"]
    command += [
        "--batch-examples",
        "2",
        "--store-checkpoints",
        "false",
        "--checkpoint-dir",
        str(folder / "checkpoints"),
    ]
    server.start()
    with _running(command, server, folder) as training:
        _await_step(folder, 4, training)
        server.kill()
        _await_step(folder, 20, training)
        training.kill()
    server.start()
    with _running(command, server, folder) as training:
        _await_step(folder, 30, training)
        server.kill()
        _await_step(folder, 40, training)
        while "takes no metrics" not in (folder / "output").read_text() and training.poll() is None:
            time.sleep(0.1)  # MLflow itself tries for 12 s, or however long it was told to
        server.start()
        if training.wait() != 0:
            raise RuntimeError(f"the training has failed:\n{(folder / 'output').read_text()}")
    return count_points(folder / "mlflow.db")


def count_points(store: Path) -> list[Outcome]:
    """How many points the curves of a store's newest run have once, and how many rows there are of them, of all."""
    with closing(sqlite3.connect(store)) as database:
        (run_id,) = database.execute("SELECT run_uuid FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
        rows = database.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
    points = Counter((name, step) for name, step in rows if name.startswith("train/"))
    names, total = {name for name, _ in points}, max(step for _, step in points)
    whole = len(names) * total
    once = sum(points[name, step] == 1 for name in names for step in range(1, total + 1))
    fault = "server and training lost, server lost again"
    return [
        Outcome(fault, f"points that {len(names)} curves have once", once, "points", whole),
        Outcome(fault, "rows of these curves in the store", points.total(), "points", whole),
    ]


@contextmanager
def _running(command: list[str], server: Server, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training under way, which does not outlive the block; FOLDER/output has what it alone says."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_RUN_ID", None)
    with (folder / "output").open("w") as output:
        training = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        yield training
    finally:
        training.kill()
        training.wait()


def _await_step(folder: Path, step: int, training: subprocess.Popen[bytes]) -> None:
    """Return when the training has a checkpoint of this step or a later one."""
    while max(map(checkpoints.newest_step, (folder / "checkpoints").glob("*")), default=0) < step:
        if training.poll() is not None:
            raise RuntimeError(f"the training has ended before step {step}:\n{(folder / 'output').read_text()}")
        time.sleep(0.02)


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--kills", default=50, show_default=True, help="SIGKILLs.")
@click.option("--terms", default=10, show_default=True, help="SIGTERMs.")
@click.option("--seed", default=1234, show_default=True, help="Seeds the moments.")
@click.option("--server/--no-server", default=True, show_default=True, help="Lose a tracking server too.")
def main(file: Path, kills: int, terms: int, seed: int, server: bool) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "trainings").mkdir()
        with fresh_process() as process:
            outcomes = process.submit(disturb, Path(scratch) / "trainings", kills, terms, seed).result()
        if server:
            mlflow_server = MlflowServer(Path(scratch))
            try:
                outcomes += lose_server(mlflow_server, Path(scratch))
            finally:
                mlflow_server.kill()
    for outcome in outcomes:
        print(f"{outcome.fault:<45}{outcome.what:<45}{outcome.count:>5} of {outcome.whole} {outcome.of}")
    print(f"{time.monotonic() - started:.0f} s")
    file.write_text(json.dumps([outcome.row() for outcome in outcomes], indent=2) + "\n")


if __name__ == "__main__":
    main()
