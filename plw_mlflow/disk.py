"""Disk: what this package does in its folders without trusting the names that are there."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but not what it points at; there may be nothing.

    Raises OSError where that fails.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
