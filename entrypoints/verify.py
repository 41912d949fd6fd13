"""Run a recorded cell again and say what differs:  python -m entrypoints.verify --run-id RUN"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command, importing
from plw_mlflow.config import VerifyConfig


@command(VerifyConfig)
def main(config: VerifyConfig) -> None:
    print(f"verifying run {config.run_id}", flush=True)
    with importing():
        from plw_mlflow import verification

    verification.run(config)


if __name__ == "__main__":
    main()
