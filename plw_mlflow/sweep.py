"""Sweep: a cell for every combination of values, each in a process of its own, and an account of them all.

A crash takes one cell, and the device's memory is clean each time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from plw_mlflow import cell, tracking
from plw_mlflow.analysis import analyze, report, wording
from plw_mlflow.config import MainConfig, SweepConfig, spell
from plw_mlflow.environment import outputs
from plw_mlflow.errors import RunError
from plw_mlflow.models import adapters

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # exit status of a cell that was interrupted alone
PATIENCE_SECONDS = 10  # for a cell that was interrupted at the terminal to end by itself


@dataclass(frozen=True)
class Outcome:
    """What became of one cell."""

    config: MainConfig
    run_id: str
    exit_status: int  # of its process; 0 is a finished cell


def run(config: SweepConfig) -> None:
    """Run every cell, analyse what finished, and raise RunError if any did not, naming it."""
    cells = config.cells()
    for method in {one.method for one in cells}:
        adapters.check(method)
    with tracking.open_sweep(config) as (parent, open_child):
        outcomes = []
        for number, one in enumerate(cells, start=1):
            run_id = open_child(cell.name(one))
            print(f"\ncell {number} of {len(cells)}: {cell.name(one)} (run {run_id})", flush=True)
            outcomes.append(Outcome(one, run_id, _process(one, run_id)))
        failed = [outcome for outcome in outcomes if outcome.exit_status != 0]
        print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} cells finished")
        if len(failed) < len(outcomes):
            print("\n".join(tracking.mark_best(parent.id, len(outcomes))))
            _analyse(config, parent)
        print(f"\nrun {parent.id}\n{parent.address()}")
        if failed:
            listed = "; ".join(f"{cell.name(o.config)} (exit status {o.exit_status}, run {o.run_id})" for o in failed)
            raise RunError(f"{len(failed)} of {len(outcomes)} cells did not finish: {listed}")


def arguments(config: MainConfig) -> list[str]:
    """The command line that gives a config back."""
    return [
        part
        for field in fields(config)
        for part in ("--" + field.name.replace("_", "-"), spell(getattr(config, field.name)))
    ]


def _process(one: MainConfig, run_id: str) -> int:
    environment = tracking.child_environment(run_id)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "entrypoints.main", *arguments(one)]
    try:
        status = _wait(command, environment)
    except KeyboardInterrupt:
        tracking.kill(run_id)
        raise
    if status not in (0, INTERRUPTED):  # an interrupted one has said so on its run
        tracking.fail(run_id)
    return status


def _wait(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; gives its exit status. Raises KeyboardInterrupt where this process is interrupted."""
    with subprocess.Popen(command, env=environment) as process:
        heard: list[int] = []

        def pass_on(number: int, _: object) -> None:
            heard.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the cell has heard of it too, if it came from the terminal
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if heard:
        raise KeyboardInterrupt
    return status


def _analyse(config: SweepConfig, parent: tracking.Run) -> None:
    """Fit the finished cells; a table that cannot be fitted (two PLWs, say) is said, not fatal."""
    try:
        table = tracking.score_table(sweep=parent.id)
    except ValueError as error:
        print(f"the scores are not analysed: {error}")
        return
    for note in table.attrs["notes"]:
        print(f"note: {note}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.output or Path(scratch)
        parent.log_files(outputs.write(folder, {"scores.csv": outputs.table(table)}))
        try:
            found = analyze.analyze(table)
        except ValueError as error:
            print(f"the scores are not analysed: {error}")
            return
        command = f"python -m entrypoints.analyze --run-id {parent.id}"
        parent.log_files(report.write(found, table, folder, command))
        tracking.log_regression(folder / "fit.json")
        print("\n" + wording.table_text(found))
