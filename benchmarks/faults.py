"""What becomes of a training when things go wrong:  python -m benchmarks.faults --json FILE

A small training (the toy model, in full and by LoRA with dropout, a checkpoint after every step) is killed at random
moments, told to end, and written onto a full disk, and the same is started again until it is done; its final weights
are then those of a training that nothing disturbed, to the bit, or they are not. Moments are drawn evenly over the time
an undisturbed training takes from its first step on, from a seed; where that finds it is up to the machine. A full disk
is a limit on the size of files (RLIMIT_FSIZE), which fails a write as a full disk does, and needs no special rights.

The same is done with two processes, of which both or one of them is killed: with FSDP2, where each saves its shards,
and with DDP. Gone on with by two processes, they have to end in the bits of an undisturbed training. Some are gone on
with by one process and by two in turn. They may differ from a training by one process by as much as an undisturbed
training by two differs from it, since two processes add up in another order. No checkpoint may be set aside as damaged.

Then a training with an MLflow server: that is killed while the training goes on, the training is killed too, both are
started again, and the server is lost once more. Every step has to be in every curve once.

One training costs little, as each is forked from a process that has imported everything; the server's cost most.
"""

from __future__ import annotations

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
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, Protocol
from urllib.request import urlopen

import click

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.models import pretrained
from plw_mlflow.training import checkpoints, train

ROOT = Path(__file__).resolve().parents[1]
STEPS_TO_FILL = (3, 6)  # the disk is full from the first of these steps to the second
WEIGHTS = "weights.safetensors"  # of a training that is done
FULL_BYTES = 20_000  # of a file that a full disk still takes: any metadata, no checkpoint
PATIENCE_SECONDS = 60  # so long a process may outlive the first one of its training that has ended


@dataclass(frozen=True)
class Recipe:
    """A way to train."""

    method: Literal["full", "lora"]
    processes: int = 1
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    lora_dropout: float = 0.3


ALONE = (Recipe("full"), Recipe("lora"))
SHARED = (Recipe("full", 2, "fsdp2"), Recipe("lora", 2, "fsdp2"), Recipe("full", 2, "ddp"))
# Processes draw dropout each for itself, so without it.
IN_TURN = (Recipe("full", 2, "fsdp2"), Recipe("lora", 2, "fsdp2", lora_dropout=0.0), Recipe("full", 2, "ddp"))


@dataclass
class Training:
    """The processes of a training, and the exit statuses of those that have ended (a signal's is negative)."""

    pids: tuple[int, ...]
    statuses: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How often something came out as it should, or how far from it; `whole` is what it is held against."""

    fault: str
    what: str
    count: float
    of: str
    whole: float

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

    def start(self, recipe: Recipe, folder: Path, log: Callable[[int], None] = lambda step: None) -> Training:
        """Begin a training, or go on with the one in `folder`.

        log: called in its first process after each step.
        """
        self._shared[:] = bytes(2)
        sys.stdout.flush()
        sys.stderr.flush()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return Training(tuple(self._fork(recipe, rank, port, folder, log) for rank in range(recipe.processes)))

    def _fork(self, recipe: Recipe, rank: int, port: int, folder: Path, log: Callable[[int], None]) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as every entry point does
            if recipe.processes > 1:  # as torchrun does
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(recipe.processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(recipe.processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = self._train(recipe, rank, folder, log)
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

    def _train(self, recipe: Recipe, rank: int, folder: Path, log: Callable[[int], None]) -> int:
        import torch
        from safetensors.torch import save_file

        torch.set_num_threads(1)
        config = replace(self.config, method=recipe.method, parallel=recipe.parallel, lora_dropout=recipe.lora_dropout)
        model = pretrained.load(config.model)
        if rank > 0:
            train.run(config, self._prepared, model, folder)
            return 0

        def begin() -> None:
            self._shared[0] = 1

        def end(saved: Path) -> None:
            self._shared[0] = 0

        def tell(_: object, step: int) -> None:
            self._shared[1] = 1
            log(step)

        with checkpoints.reserve(folder):
            done = train.run(config, self._prepared, model, folder, tell, begin, end)
        weights = {name: parameter.detach() for name, parameter in done.model.named_parameters()}
        save_file(weights, folder / "unfinished.safetensors")
        os.replace(folder / "unfinished.safetensors", folder / WEIGHTS)
        return 0

    def wait(self, training: Training, seconds: float = float("inf")) -> int | None:
        """The status of a training's end; None where it still runs so many seconds after it began.

        It has begun when it has taken a step. The status is 0, or that of the first of its processes that ended badly.

        Raises RuntimeError where one process waits for ever for another one that has ended.
        """
        deadline = patience = float("inf")
        while True:
            for pid in set(training.pids).difference(training.statuses):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    training.statuses[pid] = os.waitstatus_to_exitcode(status)
                    patience = min(patience, time.monotonic() + PATIENCE_SECONDS)
            if len(training.statuses) == len(training.pids):
                return next(filter(None, training.statuses.values()), 0)
            if self.has_begun and deadline == float("inf"):
                deadline = time.monotonic() + seconds
            if time.monotonic() >= deadline:
                return None
            if time.monotonic() >= patience:
                for pid in set(training.pids).difference(training.statuses):
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"a process outlives another one of its training by {PATIENCE_SECONDS} s")
            time.sleep(0.0005)

    def finish(self, recipe: Recipe, folder: Path, log: Callable[[int], None] = lambda step: None) -> bytes:
        """Start a training and see it to its end; the file of its weights. Raises RuntimeError where it fails."""
        status = self.wait(self.start(recipe, folder, log))
        if status != 0:
            raise RuntimeError(f"a training ended with status {status}:\n{(folder / 'output').read_text()}")
        return (folder / WEIGHTS).read_bytes()


def fresh_process() -> ProcessPoolExecutor:
    """Runs functions in a process of its own, in which torch has done nothing yet."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def disturb(folder: Path, kills: int, terms: int, seed: int, recipes: Sequence[Recipe] = ALONE) -> list[Outcome]:
    """SIGKILLs, SIGTERMs and full disks, in this process, a fresh one."""
    trainer, rng = Trainer(folder), random.Random(seed)
    undisturbed, seconds = _undisturbed(trainer, recipes)
    outcomes = []
    for number, name, message in ((kills, "SIGKILL", signal.SIGKILL), (terms, "SIGTERM", signal.SIGTERM)):
        count = _interrupt(trainer, undisturbed, seconds, number, message, rng)
        outcomes += _report(f"{number} {name}s", count)
        if message == signal.SIGTERM:
            ended = count["130"] + count["0"]  # 0 where the training was done when the signal came
            outcomes.append(
                Outcome(f"{number} {name}s", "end with status 130, or were done", ended, name + "s", number)
            )
    same = [_fill_the_disk(trainer, recipe) == undisturbed[recipe] for recipe in recipes]
    fault = f"disk full, steps {STEPS_TO_FILL[0]} to {STEPS_TO_FILL[1]}"
    outcomes.append(Outcome(fault, "trainings that end in the undisturbed bits", sum(same), "trainings", len(same)))
    same = [_kill_on_a_full_disk(trainer, recipe) == undisturbed[recipe] for recipe in recipes]
    fault = "disk full to the end, then SIGKILL"
    outcomes.append(Outcome(fault, "trainings that end in the undisturbed bits", sum(same), "trainings", len(same)))
    return outcomes


def disturb_shared(
    folder: Path, kills: int, seed: int, shared: Sequence[Recipe] = SHARED, in_turn: Sequence[Recipe] = IN_TURN
) -> list[Outcome]:
    """SIGKILLs of trainings by several processes, in this process, a fresh one; `kills` for each way to train."""
    trainer, rng = Trainer(folder), random.Random(seed)
    undisturbed, seconds = _undisturbed(trainer, list(dict.fromkeys([*shared, *in_turn])))
    outcomes = []
    for recipe in shared:
        count = _interrupt(trainer, {recipe: undisturbed[recipe]}, seconds, kills, signal.SIGKILL, rng)
        outcomes += _report(f"{_name(recipe)}: {kills} SIGKILLs", count)
    for recipe in in_turn:
        alone = trainer.finish(replace(recipe, processes=1), trainer.new_folder())
        found: list[bytes] = []
        count = _interrupt(trainer, {recipe: b""}, seconds, kills, signal.SIGKILL, rng, found)
        fault = f"{_name(recipe)}, then 1 and 2 in turn: {kills} SIGKILLs"
        outcomes += _report(fault, count)[1:]
        outcomes.append(
            Outcome(
                fault,
                f"distance of {len(found)} from 1 process",
                max(_distance(weights, alone) for weights in found),
                "2 processes, undisturbed",
                _distance(undisturbed[recipe], alone),
            )
        )
    return outcomes


def _name(recipe: Recipe) -> str:
    return f"{recipe.processes} processes, {recipe.parallel}, {recipe.method}"


def _distance(weights: bytes, expected: bytes) -> float:
    """The relative distance of all weights of a training from those of another one."""
    from safetensors.torch import load

    found, true = load(weights), load(expected)
    squares = {name: float((found[name].double() - true[name].double()).square().sum()) for name in true}
    return float((sum(squares.values()) / sum(float(each.double().square().sum()) for each in true.values())) ** 0.5)


def _undisturbed(trainer: Trainer, recipes: Sequence[Recipe]) -> tuple[dict[Recipe, bytes], dict[Recipe, float]]:
    """The weights of trainings that nothing disturbs, and the seconds from their first step to their end."""
    weights, seconds = {}, {}
    for recipe in recipes:
        training = trainer.start(recipe, folder := trainer.new_folder())
        begun = trainer.wait(training, 0)
        started = time.monotonic()
        if begun is not None or trainer.wait(training) != 0:
            raise RuntimeError(f"an undisturbed training has failed:\n{(folder / 'output').read_text()}")
        seconds[recipe] = time.monotonic() - started
        weights[recipe] = (folder / WEIGHTS).read_bytes()
    return weights, seconds


def _report(fault: str, count: Counter[str]) -> list[Outcome]:
    """The outcomes that all interruptions have."""
    return [
        Outcome(fault, "trainings that end in the undisturbed bits", count["same"], "trainings", count["all"]),
        Outcome(fault, "sent while a checkpoint was written", count["saving"], fault.split()[-1], count["sent"]),
        Outcome(fault, "trainings that set no checkpoint aside", count["sound"], "trainings", count["all"]),
    ]


def _interrupt(
    trainer: Trainer,
    undisturbed: dict[Recipe, bytes],
    seconds: dict[Recipe, float],
    number: int,
    message: signal.Signals,
    rng: random.Random,
    found: list[bytes] | None = None,
) -> Counter[str]:
    """Send a signal so many times, over as many trainings as that takes, each started again until it is done.

    Of several processes, both or one of the two get it.

    found: gets the weights of each training. With it, a training that is started again is so by one process and by as
    many as its recipe has in turn.
    """
    count: Counter[str] = Counter()
    while count["sent"] < number:
        recipes = list(undisturbed)
        recipe = recipes[count["all"] % len(recipes)]
        folder, starts = trainer.new_folder(), 0
        while not (folder / WEIGHTS).exists():
            is_alone = found is not None and starts % 2 == 1
            training = trainer.start(replace(recipe, processes=1) if is_alone else recipe, folder)
            starts += 1
            is_last = count["sent"] == number
            status = trainer.wait(training, float("inf") if is_last else rng.uniform(0, seconds[recipe]))
            if status is None:
                pids = training.pids
                for pid in pids if len(pids) == 1 else rng.choice([pids, pids[:1], pids[1:]]):
                    if pid not in training.statuses:
                        os.kill(pid, message)
                count["sent"] += 1
                count["saving"] += trainer.is_saving
                count[str(trainer.wait(training))] += 1
            elif status != 0:
                raise RuntimeError(f"a training started again has failed:\n{(folder / 'output').read_text()}")
        count["all"] += 1
        count["sound"] += not list(folder.glob("damaged-*"))
        weights = (folder / WEIGHTS).read_bytes()
        count["same"] += weights == undisturbed[recipe]
        if found is not None:
            found.append(weights)
    return count


def _limit(size: int) -> None:
    """Make this process write no file longer than so many bytes; any may be made again by RLIM_INFINITY."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _fill_the_disk(trainer: Trainer, recipe: Recipe) -> bytes:
    """A disk that is full for some steps, and has room again."""

    def log(step: int) -> None:
        if step == STEPS_TO_FILL[0]:
            _limit(FULL_BYTES)
        if step == STEPS_TO_FILL[1]:
            _limit(resource.RLIM_INFINITY)

    folder = trainer.new_folder()
    weights = trainer.finish(recipe, folder, log)
    _expect("cannot be written", folder)
    return weights


def _kill_on_a_full_disk(trainer: Trainer, recipe: Recipe) -> bytes:
    """A disk that is full until the training is killed, and started again with room."""

    def log(step: int) -> None:
        if step == STEPS_TO_FILL[0]:
            _limit(FULL_BYTES)
        if step == STEPS_TO_FILL[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = trainer.new_folder()
    trainer.wait(trainer.start(recipe, folder, log))
    _expect("cannot be written", folder)
    return trainer.finish(recipe, folder)


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
@click.option(
    "--shared-kills", default=15, show_default=True, help="SIGKILLs of each kind of training by two processes."
)
@click.option("--terms", default=10, show_default=True, help="SIGTERMs.")
@click.option("--seed", default=1234, show_default=True, help="Seeds the moments.")
@click.option("--server/--no-server", default=True, show_default=True, help="Lose a tracking server too.")
def main(file: Path, kills: int, shared_kills: int, terms: int, seed: int, server: bool) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "trainings").mkdir()
        with fresh_process() as process:
            outcomes = process.submit(disturb, Path(scratch) / "trainings", kills, terms, seed).result()
        (Path(scratch) / "shared").mkdir()
        with fresh_process() as process:
            outcomes += process.submit(disturb_shared, Path(scratch) / "shared", shared_kills, seed).result()
        if server:
            mlflow_server = MlflowServer(Path(scratch))
            try:
                outcomes += lose_server(mlflow_server, Path(scratch))
            finally:
                mlflow_server.kill()
    for outcome in outcomes:
        print(f"{outcome.fault:<60}{outcome.what:<45}{outcome.count:>5.4g} of {outcome.whole:.4g} {outcome.of}")
    print(f"{time.monotonic() - started:.0f} s")
    file.write_text(json.dumps([outcome.row() for outcome in outcomes], indent=2) + "\n")


if __name__ == "__main__":
    main()
