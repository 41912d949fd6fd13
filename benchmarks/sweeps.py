"""What becomes of a sweep when things go wrong, and of many at once:  python -m benchmarks.sweeps --json FILE

A small sweep (the toy model, two cells at a time) is killed at random moments with all its processes and started again;
its tracking server is killed and started again while it runs; many sweeps of one grid are started at the same moment on
a store that does not exist yet, with SQLite and with PostgreSQL; it is interrupted, killed alone, and given a cell that
dies; a node of its Ray cluster is killed; and of its SLURM jobs, one is killed and one makes way for another job.
Afterwards the store is read: each cell has to be finished by one run, no run may look as if it went on, no claim may be
left, and the scores have to be those of a sweep that nothing disturbed, to the bit. Moments are drawn from a seed,
evenly over what an undisturbed sweep takes; where they find the sweep is up to the machine.

`benchmarks.services` starts PostgreSQL, Ray and SLURM. Where one is not installed, a line says so, and the rest is
done; a part that --parts names is an error then. The exit status is 1 where something is not as it has to be.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import click
import mlflow
from mlflow.entities import Run

from benchmarks import services
from benchmarks.faults import MlflowServer, Outcome, Server
from plw_mlflow.environment import processes
from plw_mlflow.tracking.claims import PREFIX

ROOT = Path(__file__).resolve().parents[1]
PLWS = ("0", "0.1", "0.5", "1")
TINY = ("--dataset", "toy-short", "--max-records", "60", "--epochs", "1", "--limit", "4")
LONG = ("--dataset", "toy-short", "--limit", "4", "--save-every", "2")  # long enough to be interrupted while it trains
SAVING = ("--save-every", "2")
AWAY_SECONDS = (2.0, 8.0)  # for which a server is away
PATIENCE_SECONDS = 900  # in which everything that is waited for has to come, on any machine


class Place:
    """A folder with a tracking store in it, and sweeps that are run there in processes of their own."""

    def __init__(
        self, folder: Path, uri: str | None = None, variables: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.uri = uri or f"sqlite:///{folder}/mlflow.db"
        self._variables = variables  # of the sweeps' environments
        self._started = 0

    @property
    def client(self) -> mlflow.MlflowClient:
        """A client of the store."""
        return mlflow.MlflowClient(self.uri)

    def start(self, plws: Sequence[str], *options: str) -> Sweep:
        """Begin a sweep, as the first process of a new session."""
        self._started += 1
        output = self.folder / f"output-{self._started}"
        command = [sys.executable, "-m", "entrypoints.sweep", "--plw", ",".join(plws), *options]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"MLFLOW_TRACKING_URI": self.uri, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= self._variables
        environment.pop("MLFLOW_RUN_ID", None)
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        return Sweep(process, output)

    def cells(self) -> dict[str, list[Run]]:
        """The runs of each cell by its identity."""
        by_identity = defaultdict(list)
        for run in self._runs():
            if "plw.identity" in run.data.tags:
                by_identity[run.data.tags["plw.identity"]].append(run)
        return by_identity

    def sweeps(self) -> list[Run]:
        """The runs of sweeps."""
        return [run for run in self._runs() if "plw.grid" in run.data.tags]

    def claims(self) -> list[str]:
        """The claims that are there."""
        return [model.name for model in self.client.search_registered_models(f"name LIKE '{PREFIX}-%'")]

    def scores(self) -> dict[str, tuple[float, ...]]:
        """All scores of each cell that is finished, by its identity."""
        return {
            identity: tuple(value for name, value in sorted(run.data.metrics.items()) if _is_score(name))
            for identity, runs in self.cells().items()
            for run in runs
            if run.info.status == "FINISHED"
        }

    def trains(self) -> bool:
        """Whether a cell that saves checkpoints in this folder has saved one."""
        return any(self.folder.glob("checkpoints/*/step-*"))

    def _runs(self) -> list[Run]:
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, max_results=1000))


@dataclass(frozen=True)
class Sweep:
    """A sweep that was started, and the file of what it says."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        """What it has said so far."""
        return self.output.read_text(errors="replace")

    def wait(self, status: int | None = 0) -> float:
        """Return when it has ended, with the seconds that took. Raises RuntimeError where the status is another."""
        started = time.monotonic()
        found = self.process.wait(PATIENCE_SECONDS)
        if status is not None and found != status:
            raise RuntimeError(f"a sweep has ended with status {found}, not {status}:\n{self.said()}")
        return time.monotonic() - started

    def await_that(self, holds: Callable[[], bool]) -> None:
        """Return when something holds. Raises RuntimeError where the sweep ends before."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"a sweep has ended too early, or says nothing more:\n{self.said()}")
            time.sleep(0.1)

    def cells(self) -> dict[str, int]:
        """The process ids of its cells by their PLW."""
        found = {}
        own = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            words = command.decode().split("\0")
            if "--plw" in words and command != own:  # until it is a program of its own, it has the sweep's command
                found[f"{float(words[words.index('--plw') + 1]):g}"] = int(pid)  # it is given as 0.0, say
        return found

    def kill_all(self) -> None:
        """Kill all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _is_score(name: str) -> bool:
    return not name.startswith(("train/", "eval/", "system/"))


def undisturbed(folder: Path, plws: Sequence[str] = PLWS) -> tuple[dict[str, tuple[float, ...]], float]:
    """The scores of a sweep that nothing disturbs, by the cell's identity, and the seconds that it took."""
    place = Place(folder)
    seconds = place.start(plws, *TINY, "--jobs", "2").wait()
    return place.scores(), seconds


def kill(
    folder: Path,
    scores: dict[str, tuple[float, ...]],
    seconds: float,
    kills: int,
    seed: int,
    plws: Sequence[str] = PLWS,
) -> list[Outcome]:
    """SIGKILLs of all processes of a sweep at random moments, each time started again, and in the end left alone."""
    place, rng = Place(folder), random.Random(seed)
    at_work = 0
    for _ in range(kills):
        sweep = place.start(plws, *TINY, "--jobs", "2")
        until = time.monotonic() + rng.uniform(0, seconds / 2)  # over all of them, the work would be done too early
        while time.monotonic() < until and sweep.process.poll() is None:
            time.sleep(0.01)
        at_work += bool(sweep.process.poll() is None and sweep.cells())
        sweep.kill_all()
    place.start(plws, *TINY, "--jobs", "2").wait()
    fault = f"{kills} SIGKILLs of all processes"
    return [Outcome(fault, "sent while cells ran", at_work, "kills", kills), *check(fault, place, scores)]


def lose_server(
    server: Server,
    folder: Path,
    scores: dict[str, tuple[float, ...]],
    seconds: float,
    losses: int,
    seed: int,
    plws: Sequence[str] = PLWS,
) -> list[Outcome]:
    """A tracking server that is killed at random moments of a sweep, and started again some seconds later."""
    server.start()
    place, rng = Place(folder, server.uri), random.Random(seed)
    sweep = place.start(plws, *TINY, "--jobs", "2")
    sweep.await_that(lambda: "cells are finished already" in sweep.said())  # without a server, no sweep begins
    lost = 0
    for _ in range(losses):
        until = time.monotonic() + rng.uniform(0, seconds / (losses + 1))
        while time.monotonic() < until and sweep.process.poll() is None:
            time.sleep(0.01)
        lost += sweep.process.poll() is None
        server.kill()
        time.sleep(rng.uniform(*AWAY_SECONDS))
        server.start()
    sweep.wait()
    fault = f"server killed {losses} times"
    return [
        Outcome(fault, "while the sweep ran", lost, "losses", losses),
        *check(fault, place, scores),
        *_once(fault, place),
    ]


def crowd(
    name: str,
    place: Place,
    number: int,
    scores: dict[str, tuple[float, ...]],
    plws: Sequence[str] = PLWS,
    options: Sequence[str] = (),
) -> list[Outcome]:
    """Many sweeps of one grid that are started at the same moment."""
    sweeps = [place.start(plws, *TINY, *options) for _ in range(number)]
    statuses = [sweep.process.wait(PATIENCE_SECONDS) for sweep in sweeps]
    for sweep, status in zip(sweeps, statuses, strict=True):
        if status != 0:
            print(sweep.said(), file=sys.stderr)
    complete = f"{len(plws)} of {len(plws)} cells finished"
    results = [_result(sweep.said()) for sweep in sweeps]
    fault = f"{number} sweeps at once, {name}"
    shown = sum(complete in result and "PLW" in result for result in results)
    return [
        Outcome(fault, "ended with status 0", statuses.count(0), "sweeps", number),
        Outcome(fault, "showed the complete result", shown, "sweeps", number),
        Outcome(fault, "results that differ", len(set(results)), "result", 1),
        *check(fault, place, scores),
        *_once(fault, place),
    ]


def _result(said: str) -> str:
    """The tables and verdicts that a sweep has shown when its cells had ended."""
    by_one_alone = ("best:", "the alias", "note:", "Successfully registered", "Created version")  # who analyses
    on_the_way = r"\d\d:\d\d:\d\d |sweep of |.* are finished already|waiting for |🏃|🧪"
    lines = [line for line in said.splitlines() if line and not re.match(on_the_way, line)]
    return "\n".join(line for line in lines if not line.startswith(by_one_alone))


def _once(fault: str, place: Place) -> list[Outcome]:
    """Whether no cell was begun a second time, and there is one sweep with one analysis."""
    cells, sweeps = place.cells(), place.sweeps()
    fits = [version.name for version in place.client.search_model_versions() if "regression" in version.name]
    analysed = sum("plw.analysed" in run.data.tags for run in sweeps)
    return [
        Outcome(fault, "cells with one run", sum(len(runs) == 1 for runs in cells.values()), "cells", len(cells)),
        Outcome(fault, "runs of sweeps", len(sweeps), "run", 1),
        Outcome(fault, "sweeps that are analysed", analysed, "sweep", 1),
        Outcome(fault, "regressions registered", len(fits), "regression", int(len(cells) > 2)),  # a curve needs 3 PLWs
    ]


def check(fault: str, place: Place, scores: dict[str, tuple[float, ...]]) -> list[Outcome]:
    """What the store has to be like when a sweep is complete, whatever has happened before."""
    cells = place.cells()
    runs = [run for of_cell in cells.values() for run in of_cell] + place.sweeps()
    finished = [run for of_cell in cells.values() for run in of_cell if run.info.status == "FINISHED"]
    once = Counter(run.data.tags["plw.identity"] for run in finished)
    ended = sum(run.info.status not in ("RUNNING", "SCHEDULED") for run in runs)
    found = place.scores()
    curves = [_is_whole(place.client, run) for run in finished]
    return [
        Outcome(fault, "cells finished by one run", sum(once[cell] == 1 for cell in scores), "cells", len(scores)),
        Outcome(fault, "runs that have ended", ended, "runs", len(runs)),
        Outcome(fault, "stores without a claim", not place.claims(), "store", 1),
        Outcome(
            fault,
            "cells with the undisturbed scores",
            sum(found.get(c) == scores[c] for c in scores),
            "cells",
            len(scores),
        ),
        Outcome(fault, "finished runs with every step once", sum(curves), "runs", len(finished)),
    ]


def _is_whole(client: mlflow.MlflowClient, run: Run) -> bool:
    """Whether the curve of a run's loss has every step once."""
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    return sorted(steps) == list(range(1, len(steps) + 1)) and len(steps) > 0


@dataclass(frozen=True)
class Way:
    """A way to end a sweep."""

    name: str
    message: signal.Signals
    to_all: bool = False  # to its cells too, as a terminal sends it


WAYS = (
    Way("SIGKILL of the sweep alone", signal.SIGKILL),
    Way("Ctrl-C: SIGINT to all", signal.SIGINT, to_all=True),
    Way("SIGINT to the sweep alone", signal.SIGINT),
    Way("SIGTERM to the sweep alone", signal.SIGTERM),
)


WAYS_ELSEWHERE = (WAYS[0], WAYS[1], WAYS[3])  # SIGINT to the sweep alone is the same there as to all


def interrupt(folder: Path, way: Way, cluster: services.RayCluster | services.Slurm | None = None) -> list[Outcome]:
    """A sweep that is killed or interrupted while two cells are at work, on this machine or on a cluster."""
    place = Place(folder, variables=cluster.environment if cluster else {})
    name, message = f"{type(cluster).__name__}: {way.name}" if cluster else way.name, way.message
    checkpoints = place.folder / "checkpoints"
    options = cluster.options if cluster else ()
    sweep = place.start(("0", "1"), *LONG, *options, "--jobs", "2", "--checkpoint-dir", str(checkpoints))
    try:
        sweep.await_that(lambda: len({path.parent for path in checkpoints.glob("*/step-*")}) == 2)
        at_work = cluster.cells() if cluster else sweep.cells().values()
        cells = {pid: processes.identity(pid) for pid in at_work}
        started = time.monotonic()
        (os.killpg if way.to_all else os.kill)(sweep.process.pid, message)
        status = sweep.process.wait(PATIENCE_SECONDS)
        at_end = [pid for pid, identity in cells.items() if processes.identity(pid) == identity]
        while any(processes.identity(pid) == identity for pid, identity in cells.items()):
            if time.monotonic() > started + PATIENCE_SECONDS:
                raise RuntimeError(f"a cell outlives its sweep:\n{sweep.said()}")
            time.sleep(0.01)
        seconds = round(time.monotonic() - started, 2)
    finally:
        sweep.kill_all()
    kept = len({path.parent for path in checkpoints.glob("*/step-*")})
    outcomes = [
        Outcome(name, "cells that were at work", len(cells), "cells", 2),
        Outcome(name, "cells with checkpoints afterwards", kept, "cells", 2),
        Outcome(name, "seconds until all had ended", seconds, "seconds (no goal)", seconds),
    ]
    if message == signal.SIGKILL:
        return [*outcomes, Outcome(name, "cells that have ended", 2, "cells", 2)]  # or the wait above had failed
    runs = [run for of_cell in place.cells().values() for run in of_cell] + place.sweeps()
    killed = sum(run.info.status == "KILLED" for run in runs)
    return [
        *outcomes,
        Outcome(name, "exit status", status, "status", processes.INTERRUPTED),
        Outcome(name, "cells that had ended before the sweep", 2 - len(at_end), "cells", 2),
        Outcome(name, "runs KILLED, of two cells and the sweep", killed, "runs", 3),
        Outcome(name, "stores without a claim", not place.claims(), "store", 1),
    ]


def fail(folder: Path, plws: Sequence[str] = PLWS[:3]) -> list[Outcome]:
    """A cell that is killed, as one that needs too much memory is; the sweep goes on, and runs it again if asked to."""
    place, fault = Place(folder), "a cell killed by SIGKILL"
    sweep = place.start(plws, *TINY, "--jobs", "2")
    try:
        sweep.await_that(lambda: plws[0] in sweep.cells())
        time.sleep(2)  # so that it is importing, and its run is there
        os.kill(sweep.cells()[plws[0]], signal.SIGKILL)
        status = sweep.process.wait(PATIENCE_SECONDS)
    finally:
        sweep.kill_all()
    statuses = Counter(run.info.status for runs in place.cells().values() for run in runs)
    (failed,) = [run for runs in place.cells().values() for run in runs if run.info.status == "FAILED"]
    files = [item.path for item in place.client.list_artifacts(failed.info.run_id)]
    again = place.start(plws, *TINY, "--jobs", "2")
    refused = again.process.wait(PATIENCE_SECONDS)
    retried = place.start(plws, *TINY, "--jobs", "2", "--retry-failed", "true")
    retried.wait()
    whole, last = len(plws), sweep.said().splitlines()[-1]
    return [
        Outcome(fault, "exit status", status, "status", 1),
        Outcome(fault, "other cells finished", statuses["FINISHED"], "cells", whole - 1),
        Outcome(fault, "runs FAILED", statuses["FAILED"], "run", 1),
        Outcome(fault, "with log.txt among its files", files.count("log.txt"), "file", 1),
        Outcome(fault, "said in a line with the reason", "FAILED after" in sweep.said(), "line", 1),
        Outcome(fault, "named in the last line", f"1 of {whole} cells did not finish: plw" in last, "line", 1),
        Outcome(fault, "same call again begins no cell", " begins (" not in again.said(), "call", 1),
        Outcome(fault, "exit status of that call", refused, "status", 1),
        Outcome(fault, "cells begun by --retry-failed", retried.said().count(" begins ("), "cell", 1),
        Outcome(fault, "cells finished then", len(place.scores()), "cells", whole),
    ]


def lose_node(
    folder: Path, cluster: services.RayCluster, scores: dict[str, tuple[float, ...]], plws: Sequence[str] = PLWS
) -> list[Outcome]:
    """A sweep on a Ray cluster, of which a node is killed while a cell is at work there."""
    place, fault = Place(folder), "Ray: a node of three killed"
    sweep = place.start(plws, *TINY, *SAVING, *cluster.options, "--jobs", "3")
    try:
        sweep.await_that(lambda: bool(cluster.at_work()) and place.trains())
        lost = cluster.kill_node(cluster.at_work()[0])
        sweep.wait()
    finally:
        sweep.kill_all()
    return [
        Outcome(fault, "cells that were lost with it", lost, "cell", 1),
        Outcome(fault, "cells begun", sweep.said().count(" begins ("), "cells", len(plws) + lost),
        *check(fault, place, scores),
        *_once(fault, place),
    ]


def lose_jobs(
    folder: Path, cluster: services.Slurm, scores: dict[str, tuple[float, ...]], plws: Sequence[str] = PLWS
) -> list[Outcome]:
    """A sweep as an array of SLURM jobs, of which one is killed, and one is cancelled to make way for another job."""
    place, fault = Place(folder, variables=cluster.environment), "SLURM: a job killed, a job preempted"
    sweep = place.start(plws, *TINY, *SAVING, *cluster.options, "--jobs", "2")
    try:
        sweep.await_that(lambda: len(cluster.at_work()) == 2 and place.trains())
        killed = cluster.at_work()[0]
        cluster.ask("scancel", "--signal=KILL", "--full", killed)
        sweep.await_that(lambda: len({*cluster.at_work()} - {killed}) == 2)
        at_work = {*cluster.at_work()}
        urgent = cluster.ask("sbatch", "--parsable", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 1")
        sweep.await_that(lambda: not cluster.ask("squeue", "--noheader", f"--jobs={urgent.strip()}"))
        preempted = len(at_work - {*cluster.at_work()})
        sweep.wait()
    finally:
        sweep.kill_all()
    return [
        Outcome(fault, "jobs that had to make way", preempted, "job", 1),
        Outcome(fault, "cells begun", sweep.said().count(" begins ("), "cells", len(plws) + 2),
        *check(fault, place, scores),
        *_once(fault, place),
    ]


SERVICES: dict[str, type[services.Service]] = {
    "postgresql": services.Postgres,
    "ray": services.RayCluster,
    "interrupt-ray": services.RayCluster,
    "slurm": services.Slurm,
    "interrupt-slurm": services.Slurm,
}
BY_LUCK = ("sent while cells ran", "while the sweep ran")  # what need not be as often as it can be


def _chosen(parts: str | None) -> list[str]:
    """The parts that are done. Raises UsageError where one that is asked for cannot be done."""
    chosen = [*PARTS] if parts is None else parts.split(",")
    if unknown := {*chosen} - {*PARTS}:
        raise click.UsageError(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    missing = {part: SERVICES[part].needs for part in chosen if part in SERVICES and not SERVICES[part].is_there()}
    for part, needs in missing.items():
        if parts is not None:
            raise click.UsageError(f"part {part} cannot be done, as this machine has not got {needs}")
        print(f"part {part} is left out, as this machine has not got {needs}", flush=True)
    return [part for part in chosen if part not in missing]


PARTS = (
    "kill",
    "server",
    "sqlite",
    "postgresql",
    "interrupt",
    "fail",
    "ray",
    "interrupt-ray",
    "slurm",
    "interrupt-slurm",
)


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--kills", default=5, show_default=True, help="SIGKILLs of all processes.")
@click.option("--losses", default=2, show_default=True, help="SIGKILLs of the server.")
@click.option("--crowds", default="2,8", show_default=True, help="How many sweeps are started at once.")
@click.option("--seed", default=1234, show_default=True, help="Seeds the moments.")
@click.option("--parts", help=f"What is done, of {','.join(PARTS)}; by default all that can be done here.")
def main(file: Path, kills: int, losses: int, crowds: str, seed: int, parts: str | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, and theirs, ignore
    chosen, outcomes = _chosen(parts), list[Outcome]()

    def tell(new: list[Outcome]) -> None:
        outcomes.extend(new)
        for outcome in new:
            whole = f"{outcome.whole:.4g} {outcome.of}"
            print(f"{outcome.fault:<34}{outcome.what:<42}{outcome.count:>7.4g} of {whole}", flush=True)
        file.write_text(json.dumps([outcome.row() for outcome in outcomes], indent=2) + "\n")

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scores, seconds = undisturbed(folder / "undisturbed")
        print(f"an undisturbed sweep of {len(scores)} cells takes {seconds:.0f} s", flush=True)
        if "kill" in chosen:
            tell(kill(folder / "kill", scores, seconds, kills, seed))
        if "server" in chosen:
            (folder / "server").mkdir()
            server = MlflowServer(folder / "server")
            try:
                tell(lose_server(server, folder / "lost", scores, seconds, losses, seed))
            finally:
                server.kill()
        numbers = [int(number) for number in crowds.split(",")]
        for number in numbers if "sqlite" in chosen else []:
            tell(crowd("SQLite", Place(folder / f"sqlite-{number}"), number, scores))
        if "postgresql" in chosen:
            with services.running(services.Postgres) as database:
                for number in numbers:
                    uri = database.database(f"crowd{number}")
                    tell(crowd("PostgreSQL", Place(folder / f"postgresql-{number}", uri), number, scores))
        if "interrupt" in chosen:
            for number, way in enumerate(WAYS):
                tell(interrupt(folder / f"interrupt-{number}", way))
        if "fail" in chosen:
            tell(fail(folder / "fail"))
        if "ray" in chosen:
            with services.running(services.RayCluster) as ray:
                tell(lose_node(folder / "ray", ray, scores))
        if "interrupt-ray" in chosen:
            for number, way in enumerate(WAYS_ELSEWHERE):
                with services.running(services.RayCluster) as ray:
                    tell(interrupt(folder / f"interrupt-ray-{number}", way, ray))
        if "slurm" in chosen:
            with services.running(services.Slurm) as slurm:
                tell(lose_jobs(folder / "slurm", slurm, scores))
        if "interrupt-slurm" in chosen:
            for number, way in enumerate(WAYS_ELSEWHERE):
                with services.running(services.Slurm) as slurm:
                    tell(interrupt(folder / f"interrupt-slurm-{number}", way, slurm))
    print(f"{time.monotonic() - started:.0f} s")
    if any(outcome.count != outcome.whole and outcome.what not in BY_LUCK for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
