"""How soon a command says something, and what a toy cell costs in all:  python -m benchmarks.startup --json FILE

Each command is a process of its own. Its processor seconds are user and system time, its own and those of processes
that it started. The first line is the first one of standard output; it is measured where the process has come to when
the line can be read. A toy cell is prepared, trained, scored and logged into a store that does not exist before, unless
the case says otherwise: MLflow then makes its tables, in some sixty migrations. An unknown model is asked for at a hub
on this machine, which has none.

With `--before DIR`, a folder that holds another commit of this project, its commands are run in turn with ours, and
are the peer of the rows. Without it the rows have no peer.
"""

from __future__ import annotations

import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil

ROOT = Path(__file__).resolve().parents[1]
CELL = ("main", "--plw", "0.242")
CASES: dict[str, tuple[Sequence[str], int]] = {  # arguments and exit status
    "help": (("main", "--help"), 0),
    "help of analyze": (("analyze", "--help"), 0),
    "bad value": (("main", "--plw", "-1"), 2),
    "unknown option": (("main", "--plv", "1"), 2),
    "options that exclude others": (("main", "--optimizer", "adamw8bit", "--parallel", "fsdp2"), 2),
    "missing data file": (("main", "--dataset", "no-such-file.jsonl"), 2),
    "unknown model": (("main", "--model", "no-such-model"), 2),
    "qlora without a GPU": (("main", "--method", "qlora"), 2),
    "toy cell, new store": (CELL, 0),
    "toy cell, store exists": (CELL, 0),
}
LIMITS = {case: 1.0 for case, (arguments, _) in CASES.items() if arguments != CELL} | {"toy cell, new store": 15.0}
FIRST_LINE_LIMIT = 4.0


@dataclass(frozen=True)
class Cost:
    """What a command took, in seconds."""

    first_line: float | None  # processor seconds until the first line of standard output; None where there is none
    processor: float
    wall: float


class EmptyHub(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_HEAD(self) -> None:
        """Answer as the hub does where it has no such model."""
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def run(project: Path, arguments: Sequence[str], status: int, folder: Path, hub: str) -> Cost:
    """Run an entry point of the project in a folder, in which it leaves all that it writes."""
    name, *options = arguments
    command = [sys.executable, "-m", f"entrypoints.{name}", *options]
    environment = os.environ | {
        "PYTHONPATH": str(project),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub,
    }
    started, first_line = time.monotonic(), None
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if first_line is None and line.strip():
            spent = psutil.Process(process.pid).cpu_times()
            first_line = spent.user + spent.system
    _, ended, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise SystemExit(f"{' '.join(command)} in {project} ended with {process.returncode} in place of {status}")
    return Cost(first_line, usage.ru_utime + usage.ru_stime, time.monotonic() - started)


def measure(projects: Sequence[Path], repeats: int, cases: Sequence[str]) -> dict[str, list[list[Cost]]]:
    """By case and project, what each repetition took; the projects take turns."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{hub.server_port}"
    costs: dict[str, list[list[Cost]]] = {case: [[] for _ in projects] for case in cases}
    for _ in range(repeats):
        folders = [Path(tempfile.mkdtemp(prefix="startup-")) for _ in projects]
        if "toy cell, store exists" in cases and "toy cell, new store" not in cases:
            for project, folder in zip(projects, folders, strict=True):
                run(project, CELL, 0, folder, address)
        for case in cases:
            arguments, status = CASES[case]
            for project, folder, found in zip(projects, folders, costs[case], strict=True):
                found.append(run(project, arguments, status, folder, address))
    return costs


def rows(costs: dict[str, list[list[Cost]]]) -> list[dict[str, Any]]:
    """The medians of each case as rows; a ratio above 1 is for ours."""
    found = []
    for case, of_projects in costs.items():
        for metric in ("first_line", "processor", "wall"):
            values = [[getattr(cost, metric) for cost in each] for each in of_projects]
            if metric == "first_line" and not case.startswith("toy cell"):
                continue
            ours, *others = (statistics.median(each) for each in values)
            limit = FIRST_LINE_LIMIT if metric == "first_line" else LIMITS.get(case) if metric == "processor" else None
            found.append(
                {
                    "case": case,
                    "metric": "wall_s"
                    if metric == "wall"
                    else "processor_s"
                    if metric == "processor"
                    else "first_line_processor_s",
                    "ours": round(ours, 2),
                    "peer": "before" if others else None,
                    "peer_value": round(others[0], 2) if others else None,
                    "ratio": round(others[0] / ours, 2) if others else None,
                    "limit": limit,
                }
            )
    return found


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for the rows.")
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Folder with another commit to compare.")
@click.option("--repeats", default=3, show_default=True, help="Times that each command is run.")
@click.option("--case", "cases", type=click.Choice([*CASES]), multiple=True, help="Case to measure (by default all).")
def main(file: Path | None, before: Path | None, repeats: int, cases: tuple[str, ...]) -> None:
    """Measure and print."""
    projects = [ROOT] if before is None else [ROOT, before.resolve()]
    found = rows(measure(projects, repeats, [case for case in CASES if not cases or case in cases]))
    print(f"{'case':<30}{'metric':<28}{'ours':>8}{'before':>8}{'ratio':>8}{'limit':>8}")
    for row in found:
        numbers = (f"{'' if row[key] is None else row[key]:>8}" for key in ("ours", "peer_value", "ratio", "limit"))
        print(f"{row['case']:<30}{row['metric']:<28}{''.join(numbers)}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
