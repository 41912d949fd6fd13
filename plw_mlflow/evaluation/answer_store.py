"""Answer store: what a model has said to requests, kept so that a killed evaluation does none of them twice.

A file has a line per batch of requests, written in one piece when the batch is done; whatever a killed process left of
its last line is no JSON and is passed over.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class AnswerStore:
    """Answers by their requests' keys: those of earlier processes, where there is a file, and what is added."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, Any] = {}
        self.kept = 0  # how many earlier processes have left
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        for line in content.split(b"\n"):
            try:
                self._known.update(json.loads(line))
            except ValueError:
                continue
        self.kept = len(self._known)
        if not content.endswith(b"\n") and content:
            self._append(b"\n")  # so that the next line does not go on from the torn one

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Keep a batch's answers: numbers, texts and lists of them."""
        self._known.update(answers)
        if self._file is not None:
            self._append(json.dumps(answers).encode() + b"\n")

    def _append(self, content: bytes) -> None:
        assert self._file is not None
        with self._file.open("ab", buffering=0) as file:  # once written it is the system's, whoever kills the process
            file.write(content)


def key(*parts: bytes | str | int) -> str:
    """A request's key: 128 bits of a SHA-256 of its parts."""
    found = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        found.update(len(content).to_bytes(8) + content)  # with its length: no two lists of parts read alike
    return found.hexdigest()[:32]
