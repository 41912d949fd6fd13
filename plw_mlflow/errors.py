"""Messages a person reads: errors as one line, no passwords in them, and nothing that drives a terminal."""

from __future__ import annotations

import difflib
import errno
import os
import re
import socket
import ssl
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

# The names of parameters in an address whose values are secrets, such as ?password=, &access_token=, X-Amz-Signature=.
_SECRET_PARAMETER = (
    r"[\w.%-]*(?:password|passwd|pwd|passphrase|secret|token(?!s)|signature|credential|api[-_]?key|access[-_]?key)"
    r"[\w.-]*|sig|key|auth|pass|AWSAccessKeyId|odbc_connect"
)
_SECRETS = (
    # scheme://user:SECRET@host. A secret may itself hold an @, and in a database's address a slash; a port is none.
    (re.compile(r"((?<!https)(?<!http)://[^\s/?#:@\[]*):[^\s'\"<>]*@", re.IGNORECASE), r"\1:***@"),
    (re.compile(r"((?<!https)(?<!http)://[^\s/?#:@\[]*):[^@\n'\"<>]{1,80}@", re.IGNORECASE), r"\1:***@"),
    (re.compile(r"(\bBearer\s+)[^\s'\",]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(://[^\s/?#:@\[]*):(?:[^\s/?#]*|(?!\d+[/?#])[^\s@]*)@"), r"\1:***@"),
    # https://SECRET@host: a user alone may be a token. Other schemes have names there, as in abfss://container@account.
    (re.compile(r"(https?://)[^\s/?#:@]+@", re.IGNORECASE), r"\1***@"),
    (re.compile(rf"([?&;#](?:{_SECRET_PARAMETER})=)[^\s&#;'\"<>)]+", re.IGNORECASE), r"\1***"),
)
_COLOURS = re.compile(r"(\x1b\[(?:0|32|34|36|90)m)")  # those of show.py
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


class ExpectedError(Exception):
    """An error whose message tells the caller everything: a command shows it in one line and exits with `status`.

    Raise one of the classes below wherever a message is meant for the caller. Any other exception is a fault in this
    package or in a library, and commands show its traceback.
    """

    status = 1


class UserError(ExpectedError, ValueError):
    """The caller has given something that cannot be used: an option, a file, a model, a data set."""

    status = 2


class Refused(UserError):
    """A service has answered that it will not do what was asked of it, however often that is asked again."""


class RunError(ExpectedError, RuntimeError):
    """The work cannot be finished: the loss is not finite, memory or disk is full, cells of a sweep have failed."""


class Unreachable(ExpectedError, ConnectionError):
    """A service does not answer, and may do so later."""


def without_passwords(text: str) -> str:
    """The same text, with `***` for every password, token and signature in the addresses it holds."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """The same text with control characters spelled out, so that what a stranger wrote drives no terminal or page.

    Newlines and tabs stay. Spelled out are also what turns the direction of writing, halves of surrogate pairs, and
    characters that Unicode does not define; joiners, which words of some scripts and emoji need, stay.
    """
    if text.isprintable():
        return text
    return "".join(one if _is_shown(one) else one.encode("unicode_escape").decode() for one in text)


def _is_shown(character: str) -> bool:
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return not is_control or character in "\n\t\u200c\u200d"


class PrintableStream:
    """A text stream that writes what it is given as `printable` has it; colours stay."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        parts = _COLOURS.split(text)  # every other one is a colour
        cleaned = (part if number % 2 else printable(part) for number, part in enumerate(parts))
        return self._stream.write("".join(cleaned))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; passwords in addresses are left out."""
    return without_passwords(_opening(str(error).strip() or type(error).__name__))


def _opening(message: str) -> str:
    """The first line; where that ends in a colon, and so announces the next one, that one too."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    count = next((number for number, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count]).removesuffix(":")


def reason(error: BaseException) -> str:
    """Why a service cannot be used, in a few words: what the network says at the root of it, else the first line.

    Libraries wrap "Connection refused" into half a page, and a database's error into a note about autoflush.
    """
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for one in chain:
        if isinstance(said := getattr(one, "orig", None), BaseException):  # SQLAlchemy's: what the database has said
            return first_line(said)
    root = chain[-1]
    if isinstance(root, _NETWORK) or (isinstance(root, OSError) and root.errno in _UNREACHABLE):
        return without_passwords(root.strerror or first_line(root))
    if type(root).__module__.startswith("urllib3"):  # as in "too many 503 error responses"
        return first_line(root)
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    return without_passwords(lines[0].strip()) if lines else type(error).__name__


def not_installed(error: ModuleNotFoundError) -> str:
    """What to do where a package is missing: most often the project's environment is not active in this shell.

    Raises the error again where what is missing is a part of this project, or has no name.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("plw_mlflow", "entrypoints", ""):
        raise error
    root = Path(__file__).resolve().parents[1]
    folder, to_root = ("", "") if Path.cwd() == root else (f"{root}/", f"-C {root} ")
    return (
        f"{sys.executable} has no package {package}; activate the project's environment (source "
        f"{folder}.venv/bin/activate), or set it up first (make {to_root}setup)"
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
