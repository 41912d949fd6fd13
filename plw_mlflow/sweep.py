"""Sweep: a cell for every combination of values, each in a process of its own, and an account of all of them.

A crash ends one cell only, and each cell finds the device's memory empty.
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

from plw_mlflow import tracking
from plw_mlflow.analysis import analyze, report, wording
from plw_mlflow.config import MainConfig, SweepConfig, spell, split_list
from plw_mlflow.environment import outputs
from plw_mlflow.errors import RunError
from plw_mlflow.training import optimizers

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # exit status of a cell that was interrupted
PATIENCE_SECONDS = 10  # in which a cell that was interrupted at the terminal may end by itself


@dataclass(frozen=True)
class CellResult:
    """How the process of one cell has ended."""

    config: MainConfig
    run_id: str
    exit_status: int  # 0 if the cell is finished


def run(config: SweepConfig) -> None:
    """Run every cell, and analyse those that finished. Raises RunError naming those that did not."""
    configs = config.cells()
    optimizers.check(config.optimizer)
    if config.activation_checkpointing:
        from plw_mlflow.models import pretrained  # these import transformers, which a sweep needs for nothing else
        from plw_mlflow.training import recomputation

        for model in split_list(config.model):
            recomputation.check(pretrained.load_config(model))
    with tracking.open_sweep(config) as (parent, open_child):
        results = []
        for number, cell_config in enumerate(configs, start=1):
            name = cell_config.cell_name()
            run_id = open_child(name)
            print(f"\ncell {number} of {len(configs)}: {name} (run {run_id})", flush=True)
            results.append(CellResult(cell_config, run_id, _run_cell(cell_config, run_id)))
        failed = [result for result in results if result.exit_status != 0]
        print(f"\n{len(results) - len(failed)} of {len(results)} cells finished")
        if len(failed) < len(results):
            print("\n".join(tracking.mark_best(parent.id, len(results))))
            _analyse(config, parent)
        print(f"\nrun {parent.id}\n{parent.address()}")
        if failed:
            raise RunError(f"{len(failed)} of {len(results)} cells did not finish: {'; '.join(map(_describe, failed))}")


def arguments(config: MainConfig) -> list[str]:
    """The command-line arguments of entrypoints.main that give a config."""
    return [
        part
        for field in fields(config)
        for part in ("--" + field.name.replace("_", "-"), spell(getattr(config, field.name)))
    ]


def _describe(result: CellResult) -> str:
    return f"{result.config.cell_name()} (exit status {result.exit_status}, run {result.run_id})"


def _run_cell(config: MainConfig, run_id: str) -> int:
    """Run a cell in a process of its own, which logs into `run_id`. Returns its exit status.

    Where the process could not say on the run that it has failed or was interrupted, this says so.
    """
    environment = tracking.child_environment(run_id)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "entrypoints.main", *arguments(config)]
    try:
        status = _run_to_end(command, environment)
    except KeyboardInterrupt:
        tracking.kill(run_id)
        raise
    if status not in (0, INTERRUPTED):  # an interrupted cell has marked its run itself
        tracking.fail(run_id)
    return status


def _run_to_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its exit status.

    SIGTERM to this process is passed on to the command. Raises KeyboardInterrupt once the command has ended after that,
    or after an interrupt.
    """
    with subprocess.Popen(command, env=environment) as process:
        signals: list[int] = []

        def pass_on(number: int, _: object) -> None:
            signals.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # if it came from the terminal, the cell has been interrupted, too
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if signals:
        raise KeyboardInterrupt
    return status


def _analyse(config: SweepConfig, parent: tracking.Run) -> None:
    """Fit the scores of the finished cells. If they cannot be fitted (with two PLWs, say), a line says why."""
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
            analysis = analyze.analyze(table)
        except ValueError as error:
            print(f"the scores are not analysed: {error}")
            return
        command = f"python -m entrypoints.analyze --run-id {parent.id}"
        parent.log_files(report.write(analysis, table, folder, command))
        tracking.log_regression(folder / "fit.json")
        print("\n" + wording.table_text(analysis))
