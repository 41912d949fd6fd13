"""Run a cell for every combination of values, then analyse them:  python -m entrypoints.sweep --plw 0,0.1,1"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command, importing, note_idle_options
from plw_mlflow.config import SweepConfig, counted


@command(SweepConfig)
def main(config: SweepConfig) -> None:
    print(f"sweep of {counted(len(config.cells()), 'cell')}", flush=True)
    note_idle_options(config)
    with importing():
        from plw_mlflow import sweep

    sweep.run(config)


if __name__ == "__main__":
    main()
