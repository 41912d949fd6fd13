"""Disk: removal and locks in this package's folders, which may be full, read-only, or hold files of others."""

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
    """Remove a file, a folder with all that is in it, or a link without what it points at. The path need not exist.

    Raises OSError where it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a UserError that names the cache's folder and says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be written to ({first_line(error)}); mend that, or name another: --cache-dir"
        ) from None


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Only one process at a time is within such a block of the same lock; others wait for it.

    Raises UserError where the lock's file cannot be made, or its path is taken by something else.
    """
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file_lock = FileLock(lock)
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


@contextmanager
def held(lock: Path, message: str) -> Iterator[None]:
    """Only one process at a time is within such a block of the same lock; others get an error.

    message: of the UserError that is raised where another process has the lock. Raises OSError where the lock's file
    cannot be made or is a link. The lock ends with its process, however that ends.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(message) from None
        yield
    finally:
        os.close(descriptor)
