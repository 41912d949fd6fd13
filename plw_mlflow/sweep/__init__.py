"""Sweep: a cell for every combination of values, each in a process of its own, and an account of all of them.

`grid` says which cells there are and what identifies each; `adaptive` chooses some of them, where that is asked for;
`account` says which are finished, running, failed or left, by what the tracking store has; `running` has an engine run
them (`local`: on this machine, `ray_tasks` or `slurm_jobs`: on a cluster); `display` shows how far they are; and
`ending` says what came out. A crash ends one cell only, and each cell finds the device's memory empty.
"""

from __future__ import annotations

from plw_mlflow import tracking
from plw_mlflow.config import SweepConfig, counted
from plw_mlflow.errors import RunError
from plw_mlflow.sweep import adaptive, display, dry_run, ending, grid, local, running
from plw_mlflow.sweep.account import Account, states
from plw_mlflow.sweep.running import Engine


def run(config: SweepConfig) -> None:
    """Run every cell that is not finished yet, and analyse those that are. Raises RunError naming those that failed."""
    planned = grid.plan(config)
    if config.adaptive:
        adaptive.check(config, planned.cells)
    tracking.check_named(config, planned.identity)
    before = states(planned.cells, tracking.finished_before())
    if config.dry_run:
        print(dry_run.text(config, planned.cells, before, tracking.measured_before()))
        if config.adaptive:
            print(adaptive.foretell(config, planned.cells))
        return
    to_run = [cell for cell in planned.cells if before[cell.identity] != "finished"]
    grid.check(to_run, are_here=config.engine == "local")
    engine = _engine(config)
    with tracking.open_sweep(config, planned.identity, planned.contents) as sweep:
        chooser = adaptive.Chooser(config, planned.cells, sweep) if config.adaptive else None
        account = Account(chooser.cells if chooser else planned.cells, sweep, retries_failed=config.retry_failed)
        with display.shown(account) as shown:
            running.run(account, engine, shown)
            while chooser and (further := chooser.go_on(account)):
                account.add(further)
                running.run(account, engine, shown)
        account.clear()
        account.adopt()
        ending.end(config, account, chooser.told() if chooser else [])
        if account.failed:
            raise RunError(
                f"{len(account.failed)} of {counted(len(account.cells), 'cell')} did not finish: "
                f"{'; '.join(account.failure(cell) for cell in account.failed)}; --retry-failed runs them again"
            )


def _engine(config: SweepConfig) -> Engine:
    """The engine that a config names. Raises UserError where it cannot run cells as they are asked for."""
    if config.engine == "ray":
        from plw_mlflow.sweep.ray_tasks import Ray

        return Ray(config)
    if config.engine == "slurm":
        from plw_mlflow.sweep.slurm_jobs import Slurm

        return Slurm(config)
    return local.Local(config)
