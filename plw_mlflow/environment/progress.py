"""Progress: a bar for whoever watches a terminal, and a plain line a minute for whoever reads a log file later."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BEFORE_BAR = 2.0  # what takes less shows none


class Progress:
    """Shows on standard error how much of some work is done, while the work goes on within its block."""

    def __init__(self, description: str, total: int, unit: str, *, done: int = 0, is_shown: bool = True) -> None:
        """unit: what is counted, in the plural. done: how many of them were done before, in another process, say."""
        self._description, self._total, self._unit, self._done = description, total, unit, done
        self._writes_lines = is_shown and not sys.stderr.isatty()
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
        if self._writes_lines and time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            parts = [f"{self._done} of {self._total} {self._unit}", *(f"{key} {text}" for key, text in numbers.items())]
            print(f"{self._description}: {', '.join(parts)}", file=sys.stderr, flush=True)
