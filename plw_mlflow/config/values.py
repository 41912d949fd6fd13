"""Values: how they are spelt in MLproject and MLflow, what data sets and models are called, and digests of values."""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plw_mlflow.config.options import DataOptions

UNSET = ("", "''")  # how an unset value is spelt; the second by `mlflow run`, which quotes values for a shell
_TRUE = {"true", "t", "yes", "y", "on", "1"}  # as click reads them
_FALSE = {"false", "f", "no", "n", "off", "0"}
# Endings of data files' names, those that cannot be read included: a name that has one is a file's, not a hub id.
DATA_FILE_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".gz", ".zst"),
    *(".txt", ".xls", ".xlsx", ".arrow", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz"),
)

# A model or data set on the hub, as OWNER/NAME or OWNER/NAME@REVISION. Paths such as ./mine or ../mine are none.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s]+)?")


def spell(value: Any) -> str:
    """A value as MLproject and MLflow have it: "" for unset, true or false for booleans, floats written out."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def digest(values: dict[str, Any]) -> str:
    """A short, stable name for a set of values: the start of the SHA-256 of their sorted JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flag(field_name: str) -> str:
    """An option's name on the command line, without its dashes: max-tokens for the field max_tokens."""
    return field_name.replace("_", "-")


def counted(number: int, noun: str) -> str:
    """So many of a thing: "1 cell", "2 cells"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def split_list(listed: str) -> list[str]:
    """The parts of a comma-separated list, without blanks."""
    return [part.strip() for part in listed.split(",") if part.strip()]


def read(text: str, hint: Any) -> Any:
    """The value that a text spells, for an option of a type such as `int | None`: the opposite of `spell`.

    Raises ValueError where it spells none; words that a type does not know are left as they are.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if text in UNSET and type(None) in kinds:
        return None
    if any(text in typing.get_args(kind) for kind in kinds):  # of a Literal
        return text
    if bool in kinds:
        if (word := text.lower()) not in _TRUE | _FALSE:
            raise ValueError(text)
        return word in _TRUE
    return next((kind(text) for kind in (int, float, Path) if kind in kinds), text)


IN_DATA_NAME = ("invert", "mix", "mix_invert", "mix_share")  # the options that it contains


def data_name(dataset: str, options: DataOptions, shown: Callable[[str], str] = str) -> str:
    """The name of a cell's data, with how they are made: "toy-long inverted", "toy-long + 0.7 toy-short".

    shown: writes the name of a single data set.
    """
    name = shown(dataset) + " inverted" * options.invert
    if options.mix is None:
        return name
    return f"{name} + {options.mix_share:g} {shown(options.mix)}{' inverted' * options.mix_invert}"


def shown_name(name: str) -> str:
    """The name of a data set or model in tables and titles: a file or folder without the folders above it.

    A hub id, or a name that this package gives, stays as it is.
    """
    is_hub_id = HUB_ID.fullmatch(name) and not name.lower().endswith(DATA_FILE_ENDINGS)
    return name if is_hub_id else Path(name).name or name


def short_name(name: str) -> str:
    """The last part of a path or hub id, without a data file's endings, as it may stand in a registered model's name.

    Letters and digits of all scripts stay.
    """
    last = re.sub(
        r"(\.(jsonl?|ndjson|csv|tsv|parquet))?(\.(gz|zst))?$", "", Path(name.partition("@")[0]).name, flags=re.I
    )
    letters = unicodedata.normalize("NFC", last)
    kept = "".join(char if char in "._-" or unicodedata.category(char)[0] in "LMN" else " " for char in letters)
    return "-".join(kept.split()).strip("-.") or "unnamed"
