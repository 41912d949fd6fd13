"""Answers that a model has given, kept in a file so that a scoring that was killed computes none of them again.

The file has one line of JSON for each batch, written in one piece when the batch is done. If a process is killed while
it writes, the rest of its last line is not JSON, and readers skip it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class AnswerStore:
    """Answers by key: those that earlier processes have left in the file, if one is given, and those that are added."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._answers: dict[str, Any] = {}
        self.kept = 0  # answers that earlier processes have left
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        for line in content.split(b"\n"):
            try:
                self._answers.update(json.loads(line))
            except ValueError:
                continue
        self.kept = len(self._answers)
        if not content.endswith(b"\n") and content:
            self._append(b"\n")  # so that the next line does not continue the torn one

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Keep the answers of a batch, by key: numbers, texts and lists of them."""
        self._answers.update(answers)
        if self._file is not None:
            self._append(json.dumps(answers).encode() + b"\n")

    def _append(self, content: bytes) -> None:
        assert self._file is not None
        with self._file.open("ab", buffering=0) as file:  # unbuffered: a kill loses no written line
            file.write(content)


def key(*parts: bytes | str | int) -> str:
    """The key of a request's answer: 128 bits of a SHA-256 of the request's parts."""
    sha256 = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        sha256.update(len(content).to_bytes(8) + content)  # with lengths, so that no two lists of parts read alike
    return sha256.hexdigest()[:32]
