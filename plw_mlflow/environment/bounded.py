"""Work on untrusted input in a process of its own, whose memory and computing time are bounded.

Arrow unpacks a page of a Parquet file whole, however long that says it is, and a Jinja template computes what it likes.
Neither library can be given a bound, but a process can. Work that exceeds it, or crashes, ends that process alone, and
is an error in the process that asked for it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from plw_mlflow.errors import UserError, first_line

MEBIBYTES = 768  # of memory beyond what the process has when it starts; bounded on Linux alone
SECONDS = 10  # of computing time for one result; time spent waiting, for the disk say, does not count


class Exhausted(ValueError):
    """The work could not be done within the bounds, or failed; the message is a predicate, such as "fails with ..."."""


class Worker:
    """A process that runs one function. It is started when it is first needed, and again after it has failed."""

    def __init__(self, function: Callable[..., Iterator[Any]]) -> None:
        """function: a generator function at the top of a module. Its arguments and results are pickled."""
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that has started it; a fork of that one must not write into its pipes
        self._lock = threading.Lock()

    def results(self, *arguments: Any) -> Generator[Any, None, None]:
        """What the function yields. Raises UserError where the function does, Exhausted for anything else it raises."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            process, is_done = self._process, False
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                pickle.dump(arguments, process.stdin)
                process.stdin.flush()
                while (reply := pickle.load(process.stdout))[0] == "result":
                    yield reply[1]
                is_done = True
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                raise Exhausted(_cause(process.wait())) from None
            finally:
                if not is_done:  # the work has failed, or the caller wants no more of its results
                    self.close()
        kind, text = reply
        if kind == "refused":
            raise UserError(text)
        if kind == "failed":
            self.close()  # the process may still hold what it had no memory for
            raise Exhausted(text)

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._owner == os.getpid():
            _end(self._process)
        self._process = None

    def _start(self) -> None:
        package = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            # Memory that is reserved for further threads would count.
            "MALLOC_ARENA_MAX": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from plw_mlflow.environment import bounded; bounded.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._process, self._owner)
        assert self._process.stdin is not None
        pickle.dump(self._function, self._process.stdin)


def _end(process: subprocess.Popen[bytes], owner: int | None = None) -> None:
    if owner is None or owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _cause(status: int) -> str:
    """What has ended a process, told by its exit status."""
    if status == -signal.SIGPROF:
        return f"takes more than {SECONDS} seconds to compute"
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"ends the process that works on it ({name}): it is damaged, or needs more than {MEBIBYTES} MiB of memory"


def serve() -> None:
    """Run in the worker process: call the function with whatever arguments come in, until no more come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one takes it, and ends this one
    replies = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)  # what a library prints must not get between the replies
    function = pickle.load(sys.stdin.buffer)
    _bound_memory()
    with contextlib.suppress(EOFError):
        while True:
            arguments = pickle.load(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            pickle.dump(_reply(function, arguments, replies), replies)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.flush()


def _reply(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], replies: Any) -> tuple[str, str]:
    """Send what a function yields; returns how it has ended, and the message if it has failed."""
    try:
        for result in function(*arguments):
            pickle.dump(("result", result), replies)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
    except UserError as error:
        return "refused", str(error)
    except MemoryError:
        return "failed", f"needs more than {MEBIBYTES} MiB of memory"
    except Exception as error:
        return "failed", f"fails with {type(error).__name__}: {first_line(error)}"
    return "done", ""


def _bound_memory() -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # this is not Linux; other systems do not enforce such bounds
        return
    limit = pages * resource.getpagesize() + (MEBIBYTES << 20)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
