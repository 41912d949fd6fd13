"""Grid: the cells of a sweep, and what identifies each of them.

A cell's identity is a digest of the options that decide its model and its scores, with the contents of the files,
models and data sets that they name in place of the names, and of the code that decides them. Two cells of one identity
are one cell, whichever sweep they are of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from plw_mlflow import cell as training
from plw_mlflow.config import DataOptions, MainConfig, SweepConfig, counted, digest, flag, spell
from plw_mlflow.data import prepare, sources, templates
from plw_mlflow.environment import provenance
from plw_mlflow.errors import UserError
from plw_mlflow.models import location, pretrained


@dataclass(frozen=True)
class Cell:
    """A cell of a sweep."""

    config: MainConfig
    name: str
    identity: str
    training: str  # identifies what is trained: of cells that differ in how they are scored, it is the same

    def arguments(self) -> list[str]:
        """The command-line arguments of entrypoints.main that give the cell."""
        return [
            part
            for field in fields(self.config)
            for part in ("--" + flag(field.name), spell(getattr(self.config, field.name)))
        ]


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep."""

    cells: list[Cell]
    identity: str  # of the options of all cells, whatever their order
    contents: dict[str, str]  # what identifies the content of each file, model and data set that they name


def plan(config: SweepConfig) -> Plan:
    """The cells of a sweep. Files are read, and the hub is asked, for what identifies their contents."""
    cells, differing = config.cells(), config.differing()
    contents: dict[str, str] = {}
    for cell in cells:
        for _, name, of in _named(cell):
            contents[name] = contents.get(name) or of()
    code = provenance.code_digest(provenance.ROOT, provenance.CODE_OF_CELLS)
    planned = []
    for cell in cells:
        read = {"contents": {option: contents[name] for option, name, _ in _named(cell)}, "code": code}
        values = {name: value for name, value in cell.definition().items() if name not in _NAMING}
        planned.append(Cell(cell, cell.cell_name(differing), digest(values | read), digest(cell.identity() | read)))
    if len(by_identity := {cell.identity: cell for cell in planned}) < len(planned):
        left_out = counted(len(planned) - len(by_identity), "cell")
        print(f"left out, as others are the same under another name: {left_out}")
        planned = list(by_identity.values())
    of_all: dict[str, object] = {"cells": sorted(digest(cell.definition()) for cell in cells)}
    if config.adaptive:  # some of the cells are then never run, so it is another sweep than that of all of them
        of_all["adaptive"] = True
    return Plan(planned, digest(of_all), contents)


def check(cells: Sequence[Cell], *, are_here: bool) -> None:
    """Raise UserError that names the first cell of each kind that cannot be trained, before any is begun.

    are_here: whether they are trained on this machine, so that it has to be able to.
    """
    faults = list[str]()
    for one in _first_of_each(cells, ("model", "optimizer")) if are_here else []:
        with _collecting(faults, one):
            training.check_machine(one.config)
    for one in _first_of_each(cells, _DATA):
        with _collecting(faults, one):
            training.check_data(one.config)
    if faults:
        raise UserError("; ".join(faults))


def _first_of_each(cells: Sequence[Cell], options: Sequence[str]) -> list[Cell]:
    """The first of all cells that have the same values of options."""
    firsts: dict[tuple[str, ...], Cell] = {}
    for one in cells:
        firsts.setdefault(tuple(spell(getattr(one.config, name)) for name in options), one)
    return list(firsts.values())


@contextmanager
def _collecting(faults: list[str], of: Cell) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        faults.append(f"{of.name}: {error}")


_DATA = ("dataset", "model", "method", *(field.name for field in fields(DataOptions)))  # that decide what is prepared
_NAMING = ("dataset", "mix", "model", "tokenizer", "template")  # options whose contents count in place of their names


def _named(cell: MainConfig) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """The options of a cell that name something, what they name, in words, and functions that identify its content."""
    cache = prepare.cache_dir(cell)
    for option, dataset in (("dataset", cell.dataset), ("mix", cell.mix)):
        if dataset:
            yield option, f"data set {dataset}", partial(_data, dataset, cache, cell.data_dir)
    yield "model", f"model {cell.model}", partial(_model, cell.model)
    tokenizer = cell.tokenizer or cell.model
    yield "tokenizer", f"tokenizer {tokenizer}", partial(_tokenizer, tokenizer)
    file = templates.file(cell.template)
    yield "template", f"template {cell.template}", lambda: cell.template if file is None else _digest([file])


def _data(name: str, cache: Path, data_dir: Path | None) -> str:
    return sources.find(name, cache, data_dir).sha256


def _model(name: str) -> str:
    if not location.locate(name).is_folder:
        pretrained.load_config(name)  # after which its commit on the hub is known
    return location.digest(name)


def _tokenizer(name: str) -> str:
    folder = Path(location.locate(name).path)
    return (
        _digest(sorted({file for pattern in location.TOKENIZERS for file in folder.glob(pattern) if file.is_file()}))
        or name
    )


def _digest(files: list[Path]) -> str:
    """SHA-256 of the names and contents of files; of none, an empty text."""
    of_all = hashlib.sha256()
    for file in files:
        of_all.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return of_all.hexdigest() if files else ""
