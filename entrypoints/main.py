"""Prepare, train and evaluate one cell in one MLflow run:  python -m entrypoints.main --plw 0.242"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command, importing, note_idle_options, restart_in_processes
from plw_mlflow.config import MainConfig


@command(MainConfig)
def main(config: MainConfig) -> None:
    restart_in_processes(config.processes)
    print(f"{config.cell_name()}: training, then scoring on {config.tasks}", flush=True)
    note_idle_options(config)
    with importing():
        from plw_mlflow import cell

    cell.run(config)


if __name__ == "__main__":
    main()
