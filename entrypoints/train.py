"""Fine-tune one model at one prompt loss weight:  python -m entrypoints.train --plw 0.1"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command, importing, note_idle_options, restart_in_processes
from plw_mlflow.config import TrainConfig


@command(TrainConfig)
def main(config: TrainConfig) -> None:
    restart_in_processes(config.processes)
    print(f"{config.cell_name()}: training", flush=True)
    note_idle_options(config)
    with importing():
        from plw_mlflow import cell

    cell.run(config)


if __name__ == "__main__":
    main()
