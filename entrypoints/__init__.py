"""The commands. Each takes `command` from here, so that a Python that cannot run them says so in one line."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (whatever python3 is on PATH may be what starts a command)
    sys.exit("error: Python 3.11 or later is needed; activate the project's environment (source .venv/bin/activate)")

from plw_mlflow.errors import not_installed

try:
    from plw_mlflow.command_line.cli import (  # noqa: F401
        command,
        importing,
        note_idle_options,
        restart_in_processes,
    )
except ModuleNotFoundError as error:
    print(f"error: {not_installed(error)}", file=sys.stderr)
    sys.exit(2)
