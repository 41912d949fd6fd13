"""Signs: the signs of life by which processes on other machines see that one is still at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGN_SECONDS = 15.0  # between two signs of life


@contextmanager
def giving(give: Callable[[], object], seconds: float) -> Iterator[None]:
    """Within the block, a thread calls a function every so many seconds, whatever else goes on.

    An error of the function does not end the thread, as a store may be away for a while.
    """
    ended = threading.Event()

    def give_signs() -> None:
        while not ended.wait(seconds):
            with suppress(Exception):
                give()

    thread = threading.Thread(target=give_signs, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(seconds)


def now() -> str:
    """The time as signs of life say it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
