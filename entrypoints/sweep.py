"""Run a cell for every combination of values, then analyse them:  python -m entrypoints.sweep --plw 0,0.1,1"""

from plw_mlflow.cli import command
from plw_mlflow.config import SweepConfig


@command(SweepConfig)
def main(config: SweepConfig) -> None:
    from plw_mlflow import sweep

    sweep.run(config)


if __name__ == "__main__":
    main()
