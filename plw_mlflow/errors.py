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
    return _opening(str(error).strip() or type(error).__name__)


def _opening(message: str) -> str:
    """The first line; where that ends in a colon, and so announces the next one, that one too."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    count = next((number for number, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count]).removesuffix(":")


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


def did_you_mean(name: str, known: Iterable[str] = (), *, folders: Iterable[Path] | None = None) -> str:
    """The end of a message about a name that means nothing: " (did you mean 'toy-short'?)", or "" if none is near.

    folders: where files may lie, if the name may be a path: those in its own folder and in these count as well. A
        relative path is then said to be one, since `mlflow run` does not start where the caller is.
    """
    path, near, hints = Path(name), _nearest(name, known), []
    for folder in dict.fromkeys([path.parent, *folders] if folders is not None else []):
        with suppress(OSError):  # there is no such folder, or it may not be read
            names = sorted(os.listdir(folder))
            begun = [one for one in names if path.name and one.lower().startswith(path.name.lower() + ".")]
            near += [str(folder / one) for one in [*begun, *_nearest(path.name, names)]]
    if near := [one for one in dict.fromkeys(near) if one != name]:
        hints.append(f"did you mean {' or '.join(map(repr, near[:3]))}?")
    if folders is not None and not path.is_absolute() and (path.suffix or os.sep in name):
        hints.append(f"paths are relative to {Path.cwd()}")
    return f" ({' '.join(hints)})" if hints else ""


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that are spelt like a name, whatever their case."""
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)]
