"""Store: the examples of one data set, tokenised once, as an Arrow file that is mapped into memory.

A stored file serves every length limit, split and mixture: those are choices among its rows, made on its columns of
counts. It is written under another name, under a lock, and renamed when it is whole, so that two processes that need
the same one at the same time make it once. A finished one is read without a lock, also from a read-only folder.

The SHA-256 of both files lies beside them, in the form of `sha256sum --check SHA256SUMS`, and is compared whenever they
are opened. This finds damage, and files that were changed or replaced one by one. It does not find a change by somebody
who can write to the folder and has written the sums again: keep the cache where only people you trust can write.
Nothing outside the folder says what the sums should be; only reading and tokenising the data again would.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example
from plw_mlflow.environment import disk
from plw_mlflow.errors import UserError, first_line

BARE = ("instruction", "input", "completion")  # tokens of a record's own texts, each tokenised alone
BY_SEGMENT = {segment: f"{segment.name.lower()}_tokens" for segment in Segment}  # tokens of the example
COUNTS = (*BARE, *BY_SEGMENT.values(), "length", "straddling", "straddling_end", "audit")  # the last: `audit.flags`
SCHEMA = pa.schema(
    [("number", pa.int64()), ("key", pa.binary(16)), ("inverted", pa.bool_())]
    + [(name, pa.int32()) for name in COUNTS]
    + [("first", pa.int8())]  # segment of the first token, which is never predicted
    + [("tokens", pa.list_(pa.int32())), ("segment", pa.list_(pa.int8()))]
)
EXAMPLES, ABOUT, SUMS = "examples.arrow", "about.json", "SHA256SUMS"
DAMAGE = (OSError, ValueError, KeyError)  # how stored files show that they are not whole


class Writer:
    """Writes examples to an Arrow file, a record batch at a time."""

    def __init__(self, folder: Path, file: Any) -> None:
        """folder: where they are to be stored, for messages."""
        self._folder, self._file = folder, file
        self._digest = hashlib.sha256()
        self._largest = -1

    def add(
        self,
        numbers: Sequence[int],
        keys: Sequence[bytes],
        inverted: Sequence[bool],
        bare: np.ndarray,
        examples: Sequence[Example],
        flags: np.ndarray,
    ) -> None:
        """Write the examples of some records.

        numbers: where each record stood in its source.
        keys: of each record as it was read (`Record.key`).
        bare: int [N, 3] tokens of instruction, input and completion, each alone.
        flags: int32 [N], of `audit.flags`.

        Raises UserError where they cannot be written.
        """
        lengths = np.array([len(example.tokens) for example in examples])
        tokens = np.concatenate([example.tokens for example in examples])
        segment = np.concatenate([example.segment for example in examples])
        cells = np.repeat(np.arange(len(examples)), lengths) * len(Segment) + segment
        by_segment = np.bincount(cells, minlength=len(examples) * len(Segment)).reshape(-1, len(Segment))
        straddling = np.array([(example.straddling, example.straddling_end) for example in examples])
        counts = np.column_stack([bare, by_segment, lengths, straddling, flags]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        offsets = pa.array(starts)
        columns = [pa.array(numbers, pa.int64()), pa.array(keys, pa.binary(16)), pa.array(inverted, pa.bool_())]
        columns += [pa.array(column) for column in counts.T] + [pa.array(segment[starts[:-1]])]
        columns += [pa.ListArray.from_arrays(offsets, part) for part in (tokens, segment)]
        with disk.writing(self._folder):
            self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
        for part in (lengths.astype(np.int32), tokens, segment):
            self._digest.update(part.tobytes())
        self._largest = max(self._largest, int(tokens.max()))

    def about(self) -> dict[str, Any]:
        """What identifies the examples written so far, and what a model must know to read them."""
        return {"digest": self._digest.hexdigest(), "largest_token": self._largest}


class Store:
    """Examples as they were stored, one a row."""

    def __init__(self, folder: Path) -> None:
        """Raises one of DAMAGE where what lies in the folder is not what was stored there."""
        about, examples = (folder / ABOUT).read_bytes(), pa.memory_map(str(folder / EXAMPLES)).read_buffer()
        if _sums(about, examples) != (folder / SUMS).read_text():
            raise UserError(f"its files are not those of its {SUMS}")
        self.about: dict[str, Any] = json.loads(about)
        file = pa.ipc.open_file(examples)
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        # Number int64 [N], key uint8 [N, 16], inverted bool [N], every count int32 [N], and first int8 [N].
        self.columns = {
            name: np.concatenate([batch[name].to_numpy(zero_copy_only=False) for batch in batches])
            for name in ("number", "inverted", *COUNTS, "first")
        }
        self.columns["key"] = np.concatenate(
            [np.frombuffer(batch["key"].buffers()[1], np.uint8, 16 * len(batch)).reshape(-1, 16) for batch in batches]
        )
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()
        self._lists = [
            tuple(part.to_numpy() for part in (b["tokens"].offsets, b["tokens"].values, b["segment"].values))
            for b in batches
        ]

    def __getitem__(self, row: int) -> Example:
        """The example of a row, whole; its arrays lie in the mapped file and cannot be written to."""
        batch = bisect.bisect_right(self._starts, row) - 1
        offsets, tokens, segment = self._lists[batch]
        start, end = offsets[row - self._starts[batch] : row - self._starts[batch] + 2]
        straddling = (int(self.columns[name][row]) for name in ("straddling", "straddling_end"))
        return Example(tokens[start:end], segment[start:end], *straddling)


class Examples(Sequence[Example]):
    """Some rows of some stores, in a given order, each cut off at `max_tokens`."""

    def __init__(
        self, stores: Sequence[Store], prefixes: Sequence[str], which: np.ndarray, rows: np.ndarray, max_tokens: int
    ) -> None:
        """prefixes: of each store's record ids. which, rows: int [N] store and row of each example."""
        self._stores, self._prefixes, self._which, self._rows = stores, prefixes, which, rows
        self._max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        example = self._stores[self._which[index]][int(self._rows[index])]
        if len(example.tokens) <= self._max_tokens:
            return example
        tokens, segment = example.tokens[: self._max_tokens], example.segment[: self._max_tokens]
        return replace(example, tokens=tokens, segment=segment)

    def id(self, index: int) -> str:
        """The id of the record behind an example."""
        which = self._which[index]
        return f"{self._prefixes[which]}:{self._stores[which].columns['number'][self._rows[index]]}"


def open_or_build(folder: Path, build: Callable[[Writer], dict[str, Any]]) -> Store:
    """The store in `folder`, which `build` writes first if there is none yet, or if it is damaged.

    build: adds the examples to a writer, and returns what `Store.about` is to hold beside what identifies them.

    Raises UserError where it cannot be written, and what `build` raises; the unfinished store is then removed.
    """
    with suppress(*DAMAGE):
        return Store(folder)
    with disk.locked(Path(f"{folder}.lock")):
        try:
            return Store(folder)  # as another process has made it meanwhile
        except DAMAGE as error:
            if os.path.lexists(folder):
                message = f"what is stored in {folder} cannot be used ({first_line(error)}); it is made again"
                warnings.warn(message, stacklevel=2)
        _write(folder, build)
        return Store(folder)


def _write(folder: Path, build: Callable[[Writer], dict[str, Any]]) -> None:
    unfinished = Path(f"{folder}.unfinished")  # of a process that was killed, perhaps: the lock is ours
    try:
        with disk.writing(folder):
            disk.remove(unfinished)
            unfinished.mkdir()
            sink = pa.OSFile(str(unfinished / EXAMPLES), "wb")
        with sink:
            with disk.writing(folder):
                file = pa.ipc.new_file(sink, SCHEMA)
            writer = Writer(folder, file)
            about = json.dumps(build(writer) | writer.about()).encode()
            with disk.writing(folder):
                file.close()
                sink.close()
        with disk.writing(folder):
            (unfinished / ABOUT).write_bytes(about)
            (unfinished / SUMS).write_text(_sums(about, pa.memory_map(str(unfinished / EXAMPLES)).read_buffer()))
            disk.remove(folder)  # damaged, if it is there
            os.replace(unfinished, folder)
    finally:
        with suppress(OSError):
            disk.remove(unfinished)


def _sums(about: bytes, examples: Any) -> str:
    """What `sha256sum about.json examples.arrow` would print of such contents, the second a buffer."""
    contents = {ABOUT: about, EXAMPLES: examples}
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
