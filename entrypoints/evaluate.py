"""Score the model of a cell, or any other model:  python -m entrypoints.evaluate --run-id RUN"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command, importing
from plw_mlflow.config import EvaluateConfig


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    scored = f"run {config.run_id}" if config.model is None else f"model {config.model}"
    print(f"scoring {scored} on {config.tasks}", flush=True)
    with importing():
        from plw_mlflow import cell

    cell.score_model(config)


if __name__ == "__main__":
    main()
