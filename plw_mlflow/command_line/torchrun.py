"""torchrun, which runs a command in several processes, with an end like that of the command in one process.

torchrun itself ends with a traceback of its own and with status 1, whatever the reason was. This ends with the status
of the process that failed first, or says in one line that the command was interrupted. `cli.restart_in_processes` runs
it, with torchrun's own options.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from plw_mlflow.command_line.cli import finish
from plw_mlflow.environment import processes
from plw_mlflow.errors import RunError


def run(options: list[str]) -> None:
    """Run torchrun to its end.

    Raises KeyboardInterrupt where it or one of its processes was interrupted, SystemExit with the status of the process
    that failed first, and RunError where a signal has ended that one.
    """
    from torch.distributed import run as torchrun  # slow to import
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signals = ["SIGTERM", "SIGINT", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it, which torchrun would undo
        signals.append("SIGHUP")
    logging.disable(logging.ERROR)  # torchrun's own account of how its processes end
    try:
        torchrun.main([f"--signals-to-handle={','.join(signals)}", *options])
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if processes.was_interrupted(failure.exitcode):
            raise KeyboardInterrupt from None
        if failure.exitcode < 0:
            raise RunError(
                f"process {failure.local_rank} of this command was ended by {signal.Signals(-failure.exitcode).name}, "
                f"as happens where memory runs out; the same command goes on from the last checkpoint"
            ) from None
        sys.exit(failure.exitcode)


def _main() -> None:
    is_to_report = processes.reports_interrupts()
    os.environ[processes.PARENT_REPORTS] = "true"  # to the processes
    try:
        run(sys.argv[1:])
    finally:
        if is_to_report:
            del os.environ[processes.PARENT_REPORTS]


if __name__ == "__main__":
    finish(_main)
