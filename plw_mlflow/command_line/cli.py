"""Commands: an entry point's `main(config)` as a program, whose errors are messages that a person can read."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import click

from plw_mlflow.command_line import checks
from plw_mlflow.command_line.options import Command, groups, options
from plw_mlflow.config import SweepConfig, TrainConfig, idle_options
from plw_mlflow.environment.processes import INTERRUPTED, end_with_sweep, is_first_process, reports_interrupts
from plw_mlflow.environment.provenance import ROOT
from plw_mlflow.errors import ExpectedError, PrintableStream, not_installed, printable, without_passwords

# Errors of the operating system that say enough by themselves; of others, the traceback says more.
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
INTERRUPTION = "interrupted; the same command goes on from the last checkpoint of a model it was training, if any"


def command(config_type: type[Any]) -> Callable[[Callable[[Any], None]], Callable[[], NoReturn]]:
    """Turn `main(config)` into a command with one option per field of `config_type`.

    Exit status: 0 done; 2 the caller's mistake, one line on standard error; 130 interrupted; 1 anything else.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], NoReturn]:
        @click.command(
            cls=Command,
            groups=groups(config_type),
            takes_lists=config_type is SweepConfig,
            help=config_type.__doc__,
            context_settings={"show_default": True, "max_content_width": 120},
        )
        def parsed(**values: Any) -> None:
            config = config_type(**values)
            checks.check(config)
            if is_first_process():  # which reports for all
                checks.check_hub(config)
            with checks.reserved_output(config):
                main(config)

        for option in options(config_type):
            parsed = option(parsed)
        return lambda: finish(lambda: parsed.main(standalone_mode=False))

    return decorate


def restart_in_processes(processes: int) -> None:
    """Replace this process by torchrun, which runs the same command in so many; nothing if it runs in several already.

    It does nothing for one process either.
    """
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return
    module = sys.modules["__main__"].__spec__  # None where the command was run as a file, not by python -m
    name = f"entrypoints.{Path(sys.argv[0]).stem}" if module is None else module.name
    torchrun = [sys.executable, "-m", "plw_mlflow.command_line.torchrun"]
    torchrun += ["--standalone", f"--nproc-per-node={processes}"]
    torchrun.append("--shutdown-timeout=3600")  # its own 30 s are less than a large checkpoint takes after SIGTERM
    sys.stdout.flush()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [*torchrun, "-m", name, *sys.argv[1:]], os.environ | {"PYTHONPATH": path})


def note_idle_options(config: TrainConfig | SweepConfig) -> None:
    """Print a line on each option that was given and has no effect."""
    for line in idle_options(config):
        print(f"note: {line}", flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Within the block, nothing is garbage-collected, and what it leaves behind never is.

    It is for the imports of a command. They make some million objects that stay, through which the collector would
    search again and again: for a fifth of the processor time that importing PyTorch, Transformers and MLflow takes.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def finish(work: Callable[[], Any]) -> NoReturn:
    """Do the work of a command in this process, and exit with the status that says how it ended (see `command`)."""
    _prepare_process()
    try:
        work()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _stop(error.format_message().replace("\n", " "), 2)
    except (KeyboardInterrupt, click.Abort):
        # A scheduler may send several signals. The status stays the same, and one that comes late ends a hanging exit.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if reports_interrupts():
            _say(INTERRUPTION)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(INTERRUPTED))
        sys.exit(INTERRUPTED)
    except ExpectedError as error:
        _stop(" ".join(str(error).split()), error.status)
    except ModuleNotFoundError as error:
        _stop(not_installed(error), 2)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _stop(": ".join(str(part) for part in (error.filename, error.strerror) if part is not None), 1)
    sys.exit(0)


def _prepare_process() -> None:
    """Set how this process ends, how it takes signals, and what it lets out: printable text without passwords."""
    end_with_sweep()
    atexit.register(gc.freeze)  # or Python would search all modules for garbage as it ends, which takes 2 seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by which a scheduler interrupts
    # What is registered first is done last. From then on, a signal would otherwise change the status.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    # Processes that a library forks take SIGTERM as usual: a pool ends its workers by it, and one that is just about to
    # wait for a lock would take note of an interrupt too late.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if is_first_process():
        sys.stdout = PrintableStream(sys.stdout)
    else:  # the first prints for all of them; errors are each one's own
        sys.stdout = StringIO()
        warnings.simplefilter("ignore")
    warnings.showwarning = lambda message, *_: print(f"warning: {_safe(str(message))}", file=sys.stderr)
    sys.excepthook = lambda *error: _show_traceback(error[1])
    logging.setLogRecordFactory(_safe_record)
    _silence_libraries()


def _silence_libraries() -> None:
    """Keep out of the output what libraries say on import although nobody can do anything about it."""
    # bitsandbytes recommends a package for 4-bit products on CPUs, whatever it is imported for.
    of_kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    of_kernels.addFilter(lambda record: "kernels-community" not in record.getMessage())
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow's GitPython, where git is not installed


def _stop(message: str, status: int) -> NoReturn:
    _say(message)
    sys.exit(status)


def _say(message: str) -> None:
    print(f"error: {_safe(message)}", file=sys.stderr, flush=True)


def _safe(message: str) -> str:
    """A message without passwords, and without characters that would drive a terminal."""
    return printable(without_passwords(message))


def _show_traceback(error: BaseException) -> None:
    """Print what Python prints of an error that nobody caught, without the passwords that addresses may hold."""
    print(_safe("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """What a library logs, without the passwords that addresses may hold."""
    record = logging.LogRecord(*args, **kwargs)
    try:
        text = record.getMessage()
    except Exception:  # a library's mistake, which logging itself would only note
        text = str(record.msg)
    record.msg, record.args = _safe(text), ()
    if record.exc_info:
        record.exc_text = without_passwords(logging.Formatter().formatException(record.exc_info))
    return record
