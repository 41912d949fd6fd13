"""Errors and their messages: in one line, without passwords, and without characters that drive a terminal."""

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
    """The same text with control characters as escapes such as \\x1b, so that it drives no terminal or page.

    Escaped are also characters that turn the direction of writing, halves of surrogate pairs, and characters that
    Unicode does not define. Newlines, tabs and joiners stay; words of some scripts and emoji need the latter.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(character: str) -> bool:
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return not is_control or character in "\n\t\u200c\u200d"


class PrintableStream:
    """A text stream that writes texts as `printable` returns them, but for this package's own colours."""

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        """Write a text."""
        parts = _COLOURS.split(text)  # texts and colours in turn
        cleaned = (part if number % 2 else printable(part) for number, part in enumerate(parts))
        return self.unfiltered.write("".join(cleaned))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


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
    for link in chain:
        if isinstance(original := getattr(link, "orig", None), BaseException):  # SQLAlchemy keeps the database's own
            return first_line(original)
    root = chain[-1]
    if isinstance(root, _NETWORK) or (isinstance(root, OSError) and root.errno in _UNREACHABLE):
        return without_passwords(root.strerror or first_line(root))
    if type(root).__module__.startswith("urllib3"):  # as in "too many 503 error responses"
        return first_line(root)
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    return without_passwords(lines[0].strip()) if lines else type(error).__name__


def not_installed(error: ModuleNotFoundError) -> str:
    """The message for a missing package. Most often the project's environment is not active in this shell.

    Raises the error again where the missing module is a part of this project, or has no name.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("plw_mlflow", "entrypoints", ""):
        raise error
    root = Path(__file__).resolve().parents[1]
    if not (root / "Makefile").exists():  # installed by pip, perhaps without what commands need
        return f"{sys.executable} has no package {package}; install the project again with pip install '.[study]'"
    folder, to_root = ("", "") if Path.cwd() == root else (f"{root}/", f"-C {root} ")
    return (
        f"{sys.executable} has no package {package}; activate the project's environment (source "
        f"{folder}.venv/bin/activate), or set it up first (make {to_root}setup)"
    )


def did_you_mean(name: str, known: Iterable[str] = (), *, folders: Iterable[Path] | None = None) -> str:
    """The end of a message about an unknown name: " (did you mean 'toy-short'?)", or "" if no known name is near.

    folders: if the name may be a path, folders beside its own in which files may lie; the names of their files count as
        known. The hint then says what a relative path is relative to, as `mlflow run` changes the folder.
    """
    path, near, hints = Path(name), _nearest(name, known), []
    for folder in dict.fromkeys([path.parent, *folders] if folders is not None else []):
        with suppress(OSError):  # the folder does not exist, or may not be read
            files = sorted(os.listdir(folder))
            with_ending = [file for file in files if path.name and file.lower().startswith(path.name.lower() + ".")]
            near += [str(folder / file) for file in [*with_ending, *_nearest(path.name, files)]]
    if near := [candidate for candidate in dict.fromkeys(near) if candidate != name]:
        hints.append(f"did you mean {' or '.join(map(repr, near[:3]))}?")
    if folders is not None and not path.is_absolute() and (path.suffix or os.sep in name):
        hints.append(f"paths are relative to {Path.cwd()}")
    return f" ({' '.join(hints)})" if hints else ""


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that are spelt like a name, in upper or lower case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)]
