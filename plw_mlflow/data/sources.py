"""Sources: where a data set comes from, and what identifies it.

The study's data sets are pinned by the SHA-256 (or git blob id) of their content: a copy, wherever it comes from, is
used only if it is what the study used.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from plw_mlflow.config import DATA_FILE_ENDINGS, HUB_ID
from plw_mlflow.data import files
from plw_mlflow.environment import disk
from plw_mlflow.errors import Unreachable, UserError, did_you_mean, first_line

TOY = ("toy-short", "toy-long")


@dataclass(frozen=True)
class Source:
    """A data set, and what identifies it."""

    name: str  # as the caller gave it
    location: str  # the file's path, "generated", or "hf://datasets/ID@COMMIT"
    sha256: str  # of the unpacked file, of the generated rows as JSON, or of a hub id with its commit
    licence: str  # empty where it is not known
    prefix: str  # of its records' ids
    inverted: bool  # whether its definition asks for prompt inversion
    rows: Callable[..., Iterator[Any]] = field(repr=False, compare=False)  # reads them; takes a row's most characters

    @property
    def is_noncommercial(self) -> bool:
        """Whether the licence is known to forbid commercial use."""
        return re.search(r"\bnc\b", self.licence, re.IGNORECASE) is not None

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since the source was made."""
        path = Path(self.location)
        if path.is_absolute() and _sha256(path) != self.sha256:
            raise UserError(f"{path} has changed while it was read; start again once nothing writes to it")


@dataclass(frozen=True)
class Pinned:
    """A file on the network, and what its content must be."""

    url: str
    sha256: str  # of its content; empty where only the git blob is known
    blob: str  # start of its git blob id; empty where the SHA-256 is known
    licence: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


ALPACA = Pinned(
    "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
    "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
    sha256="2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
    blob="",
    licence="CC BY-NC 4.0",
)
# Its content was not available when this was written: only the start of its git blob id is known.
CLEANED = Pinned(
    "https://raw.githubusercontent.com/gururise/AlpacaDataCleaned/"
    "791174f63efa9aa54ca6c38639dc6e5bb5657d80/alpaca_data_cleaned.json",
    sha256="",
    blob="fce7512c",
    licence="CC BY-NC 4.0",
)
DOLLY = Pinned(
    "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/"
    "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
    sha256="2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
    blob="",
    licence="CC BY-SA 3.0",
)
NAMED = {"AlpacaData": ALPACA, "AlpacaDataCleaned": CLEANED, "AlpacaDataShort": CLEANED, "Dolly": DOLLY}
INVERTED = ("AlpacaDataShort",)  # arXiv:2401.13586v1, 3.3: AlpacaDataCleaned, its prompts inverted


def find(dataset: str, cache_dir: Path, data_dir: Path | None = None) -> Source:
    """The source of a data set: a toy or named one, a local file, or a hub id OWNER/NAME, with @REVISION to pin it.

    Raises UserError where there is none or its content is not what it must be, Unreachable where the network is
    needed and does not answer.
    """
    check(dataset, data_dir)
    if dataset in TOY:
        return _toy(dataset)
    if dataset in NAMED:
        path, sha256 = _obtain(dataset, NAMED[dataset], cache_dir, data_dir)
        return _file(path, dataset, sha256, NAMED[dataset].licence, dataset in INVERTED)
    path = Path(dataset)
    if path.is_file():
        sha256 = _sha256(path)
        licence = next((pinned.licence for pinned in NAMED.values() if pinned.sha256 == sha256), "")
        return _file(path, dataset, sha256, licence, inverted=False)
    return _hub(dataset, data_dir)


def check(dataset: str, data_dir: Path | None = None) -> None:
    """Raise UserError for what cannot be a data set, as far as its name and the first bytes of a file show.

    It imports nothing large, uses no network and makes no folder, so that a command can call it before anything else.
    """
    if dataset in (*TOY, *NAMED):
        return
    path = Path(dataset)
    try:
        if path.is_dir():
            raise UserError(_folder_message(dataset))
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(512)
            if not start:
                raise UserError(f"{dataset} is empty")
            files.check_kind(path, start)
            return
        if path.exists():
            raise UserError(f"data set {dataset!r} is no regular file, so it cannot be read twice; save it as one")
    except OSError as error:
        raise UserError(f"data set {dataset!r} cannot be read: {error.strerror}") from None
    if HUB_ID.fullmatch(dataset) and not dataset.lower().endswith(DATA_FILE_ENDINGS):
        if "@" not in dataset and (longer := _with_an_ending(path, _files(path.parent))):
            raise UserError(
                f"data set {dataset!r} is no file; did you mean {path.parent / longer[0]}? "
                "The data set of this name on the hub needs its @REVISION"
            )
        return
    if "://" in dataset:
        raise UserError(f"data set {dataset!r} is an address; download the file, and give its path")
    raise UserError(
        f"data set {dataset!r} is neither a file, nor a hub id (OWNER/NAME@REVISION), nor one of "
        + ", ".join([*TOY, *NAMED])
        + (_hint(dataset, data_dir) if path.parent.is_dir() else f"; there is no folder {path.parent}")
    )


def _folder_message(dataset: str) -> str:
    """The message about a data set that is a folder."""
    names = _files(Path(dataset))
    inside = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    also = "; the data set of this name on the hub needs its @REVISION" if HUB_ID.fullmatch(dataset) else ""
    return f"data set {dataset!r} is a folder; name one file in it{inside}{also}"


def _hint(dataset: str, data_dir: Path | None) -> str:
    """A suggestion of what an unknown name may mean; empty if nothing is like it."""
    return did_you_mean(dataset, [*TOY, *NAMED], folders=[data_dir] if data_dir else [])


def _files(folder: Path) -> list[str]:
    """The names of a folder's files that may hold data; none where it cannot be read."""
    try:
        names = sorted(path.name for path in itertools.islice(folder.iterdir(), 10_000) if path.is_file())
    except OSError:
        return []
    return [name for name in names if name.lower().endswith(DATA_FILE_ENDINGS)]


def _with_an_ending(path: Path, names: list[str]) -> list[str]:
    """Those of the names that are the path's own name with an ending."""
    return [name for name in names if name.lower().startswith(path.name.lower() + ".")]


def _toy(name: str) -> Source:
    from plw_mlflow.toy import instructions

    rows = instructions.rows(name)
    sha256 = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Source(name, "generated", sha256, "MIT", name, False, lambda most=0: iter(rows))


def _file(path: Path, name: str, sha256: str, licence: str, inverted: bool) -> Source:
    return Source(name, str(path.resolve()), sha256, licence, path.name, inverted, partial(files.rows, path))


def _obtain(name: str, pinned: Pinned, cache_dir: Path, data_dir: Path | None) -> tuple[Path, str]:
    """The pinned file and its SHA-256: from the folder of local copies or one in it, from the cache, or downloaded."""
    if data_dir is not None:
        folders = [data_dir, *sorted(path for path in data_dir.iterdir() if path.is_dir())]
        for local in (folder / (pinned.file + ending) for folder in folders for ending in ("", ".gz", ".zst")):
            if local.is_file():
                return local, _verified(local, name, pinned)
    folder = cache_dir / "sources" / (pinned.sha256 or pinned.blob)[:16]
    target = folder / pinned.file
    if not target.exists():  # complete from the moment it has that name; else a folder to read from is enough
        with disk.locked(folder / "lock"):
            if not target.exists():
                part = folder / "part"
                _download(pinned.url, part, name)
                _verified(part, name, pinned)
                os.replace(part, target)
    return target, _verified(target, name, pinned)


def _download(url: str, path: Path, name: str) -> None:
    try:
        disk.remove(path)
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("xb") as file:
            shutil.copyfileobj(answer, file)
    except (OSError, http.client.HTTPException) as error:
        with suppress(OSError):
            disk.remove(path)
        raise Unreachable(
            f"{name} cannot be downloaded ({first_line(error)}); get {url} elsewhere, put it into a folder, and name "
            f"that with --data-dir"
        ) from None


def _verified(path: Path, name: str, pinned: Pinned) -> str:
    """The file's SHA-256. Raises UserError where its content is not the pinned one."""
    sha256 = _sha256(path)
    if pinned.sha256:
        actual, expected, kind = sha256, pinned.sha256, "SHA-256"
    else:
        actual, expected, kind = _git_blob(path), pinned.blob, "git blob id"
    if not actual.startswith(expected):
        raise UserError(
            f"{path} is not {name}: its content has the {kind} {actual}, which must be (or start with) {expected}; "
            f"remove it, or give its path as --dataset to use it under its own name"
        )
    return sha256


def _sha256(path: Path) -> str:
    with files.unpacked(path) as stream:
        return _digest(stream, hashlib.sha256())


def _git_blob(path: Path) -> str:
    with files.unpacked(path) as stream:
        size = sum(len(chunk) for chunk in iter(lambda: stream.read(files.CHUNK), b""))
    with files.unpacked(path) as stream:
        return _digest(stream, hashlib.sha1(f"blob {size}\0".encode()))


def _digest(stream: BinaryIO, digest: Any) -> str:
    for chunk in iter(lambda: stream.read(files.CHUNK), b""):
        digest.update(chunk)
    return str(digest.hexdigest())


def _hub(dataset: str, data_dir: Path | None) -> Source:
    """The train split of a data set on the hub, at the commit its revision stands for."""
    from huggingface_hub import HfApi

    name, _, revision = dataset.partition("@")
    licence, commit = "", revision
    try:
        info = HfApi().dataset_info(name, revision=revision or None, timeout=20)
        licence, commit = str(getattr(info.card_data, "license", None) or ""), str(info.sha)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            raise UserError(
                f"the hub has no data set {dataset} for you: {first_line(error)}{_hint(dataset, data_dir)}"
            ) from None
        if not re.fullmatch("[0-9a-f]{40}", revision):
            raise Unreachable(
                f"the hub cannot be asked for {dataset} ({first_line(error)}); with the whole commit as @REVISION, "
                f"what was downloaded before can be used{_hint(dataset, data_dir)}"
            ) from None
    identity = f"hf://datasets/{name}@{commit}"
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return Source(dataset, identity, sha256, licence, name, False, partial(_hub_rows, name, commit))


def _hub_rows(name: str, commit: str, most: int = files.MOST_CHARACTERS) -> Iterator[Any]:
    import datasets

    try:
        table = datasets.load_dataset(name, revision=commit, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {name} at {commit} cannot be read from the hub: {first_line(error)}") from None
    for row in table:
        yield row if files.characters(row) <= most else files.too_long(most)
