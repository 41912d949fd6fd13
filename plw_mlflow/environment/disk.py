"""Disk: what this package does in its folders, where others may have left names, or no room, or no leave to write."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from plw_mlflow.errors import UserError, first_line


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but not what it points at; there may be nothing.

    Raises OSError where that fails.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a UserError that names a folder of the cache, and says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be written to ({first_line(error)}); mend that, or name another: --cache-dir"
        ) from None


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Within the block, no other process is in such a block of the same lock; one that wants to be waits.

    Raises UserError where the lock cannot be made, or something else than a file is at its place.
    """
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def held(lock: Path, taken: str) -> Iterator[None]:
    """Keep every other process out of such a block of the same lock; it dies with its process.

    taken: what to say where another process has it. Raises UserError with that, and OSError where the lock cannot be
    made or is a link.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        yield
    finally:
        os.close(descriptor)
