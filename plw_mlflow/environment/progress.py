"""Progress: a bar for whoever watches a terminal, and a plain line a minute for whoever reads a log file later.

A sweep shows how far each of its cells is. The cell's process writes that into the file that PLW_PROGRESS names, where
the sweep runs on the same machine; and its signs of life in the tracking store (`tracking/resumption.py`) say `latest`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BEFORE_BAR = 2.0  # what takes less shows none
SECONDS_BETWEEN_WRITES = 1.0  # of the file
FILE = "PLW_PROGRESS"  # set in the environment of a sweep's cells: the file to write

latest = ""  # how far this process was when it counted last, such as: 50 of 150 steps, loss 1.234


class Progress:
    """Shows on standard error how much of some work is done, while the work goes on within its block."""

    def __init__(self, description: str, total: int, unit: str, *, done: int = 0, is_shown: bool = True) -> None:
        """unit: what is counted, in the plural. done: how many of them were done before, in another process, say."""
        self._description, self._total, self._unit, self._done = description, total, unit, done
        self._writes_lines = is_shown and not sys.stderr.isatty()
        self._is_shown, self._written_at = is_shown, 0.0
        self._line_at = time.monotonic()
        self._bar = tqdm(
            desc=description,
            total=total,
            initial=done,
            unit=f" {unit}",
            dynamic_ncols=True,
            delay=SECONDS_BEFORE_BAR,
            disable=not is_shown or self._writes_lines,
        )

    def __enter__(self) -> Progress:
        self._tell({})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def update(self, count: int, **numbers: str) -> None:
        """Count some more as done. numbers: shown beside the count, such as loss="0.281"."""
        self._done += count
        self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(count)
        self._tell(numbers)
        if self._writes_lines and time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            parts = [f"{self._done} of {self._total} {self._unit}", *(f"{key} {text}" for key, text in numbers.items())]
            print(f"{self._description}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def _tell(self, numbers: Mapping[str, str]) -> None:
        """Say how far this process is, in `latest` and in the file for the sweep, if there is one."""
        global latest
        if not self._is_shown:
            return
        latest = f"{self._done} of {self._total} {self._unit}"
        if "loss" in numbers:
            latest += f", loss {numbers['loss']}"
        file = os.environ.get(FILE)
        is_due = time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES or self._done == self._total
        if file is not None and is_due:
            self._written_at = time.monotonic()
            with suppress(OSError):  # which is no reason to end the work
                Path(file).write_text(latest, encoding="utf-8")
