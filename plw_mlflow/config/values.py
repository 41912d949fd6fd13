"""Values: how they are spelt in MLproject and MLflow, what data sets and models are called, and digests of values."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plw_mlflow.config.options import DataOptions

UNSET = ("", "''")  # how an unset value is spelt; the second by `mlflow run`, which quotes values for a shell
# Endings of data files' names, those that cannot be read included: a name that has one is a file's, not a hub id.
DATA_FILE_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".gz", ".zst"),
    *(".txt", ".xls", ".xlsx", ".arrow", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz"),
)

# A model or data set on the hub, as OWNER/NAME or OWNER/NAME@REVISION. Paths such as ./mine or ../mine are none.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s]+)?")


def spell(value: Any) -> str:
    """A value as MLproject and MLflow have it: unset is empty, truth is in small letters, floats are written out."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def digest(values: dict[str, Any]) -> str:
    """A short, stable name for a set of values: the start of the SHA-256 of their sorted JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flag(field_name: str) -> str:
    """An option's name on the command line, without its dashes: max-tokens for the field max_tokens."""
    return field_name.replace("_", "-")


def split_list(listed: str) -> list[str]:
    """The parts of a comma-separated list, without blanks."""
    return [part.strip() for part in listed.split(",") if part.strip()]


def data_name(dataset: str, options: DataOptions, shown: Callable[[str], str] = str) -> str:
    """What tells the data of one cell from another's: "toy-long inverted", "toy-long + 0.7 toy-short".

    shown: how each data set's own name is to be written.
    """
    name = shown(dataset) + " inverted" * options.invert
    if options.mix is None:
        return name
    return f"{name} + {options.mix_share:g} {shown(options.mix)}{' inverted' * options.mix_invert}"


def shown_name(name: str) -> str:
    """A data set or model as tables and titles name it: a file or folder without the folders it lies in.

    A hub id and the names that this package gives stay as they are.
    """
    is_hub_id = HUB_ID.fullmatch(name) and not name.lower().endswith(DATA_FILE_ENDINGS)
    return name if is_hub_id else Path(name).name or name


def short_name(name: str) -> str:
    """The last part of a path or hub id, without a data file's endings, fit for a registered model's name.

    It keeps the letters and digits of all scripts.
    """
    last = re.sub(
        r"(\.(jsonl?|ndjson|csv|tsv|parquet))?(\.(gz|zst))?$", "", Path(name.partition("@")[0]).name, flags=re.I
    )
    letters = unicodedata.normalize("NFC", last)
    kept = "".join(one if one in "._-" or unicodedata.category(one)[0] in "LMN" else " " for one in letters)
    return "-".join(kept.split()).strip("-.") or "unnamed"
