"""Errors as one line, which is how a person reads them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def not_installed(error: ModuleNotFoundError) -> str:
    """What to do where a package is missing: most often the project's environment is not active in this shell.

    Raises the error again where what is missing is a part of this project, or has no name.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("plw_mlflow", "entrypoints", ""):
        raise error
    return (
        f"{sys.executable} has no package {package}; activate the project's environment (source .venv/bin/activate), "
        "or set it up first (make run)"
    )


def did_you_mean(name: str, known: Iterable[str] = (), *, is_path: bool = False) -> str:
    """The end of a message about a name that means nothing: " (did you mean 'toy-short'?)", or "" if none is near.

    is_path: the name may be a path. The files beside the one it would be then count as well, and a relative path is
        said to be one, since `mlflow run` does not start where the caller is.
    """
    path, near, hints = Path(name), _nearest(name, known), []
    if is_path:
        with suppress(OSError):  # there is no such folder, or it may not be read
            near += [str(path.parent / one) for one in _nearest(path.name, os.listdir(path.parent))]
    if near := [one for one in dict.fromkeys(near) if one != name]:
        hints.append(f"did you mean {' or '.join(map(repr, near))}?")
    if is_path and not path.is_absolute() and (path.suffix or os.sep in name):
        hints.append(f"paths are relative to {Path.cwd()}")
    return f" ({' '.join(hints)})" if hints else ""


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that are spelt like a name, whatever their case."""
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)]
