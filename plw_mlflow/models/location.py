"""Location: where the model of a name is, what identifies its weights, and which base an adapter names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from plw_mlflow.config import MODELS
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.toy import TOY_FOLDER

# A folder holds a tokenizer if it has a file of one of these names.
TOKENIZERS = ("*token*", "*vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")


@dataclass(frozen=True)
class Location:
    """Where a model comes from."""

    path: str  # folder or hub id
    revision: str | None  # of a hub id; None for a folder

    @property
    def is_folder(self) -> bool:
        """Whether the model lies on this machine's disk."""
        return Path(self.path).is_dir()


def locate(name: str) -> Location:
    """Where the model is that somebody calls `toy`, or by a name of the study, a folder, or ID@REVISION of a hub.

    Raises UserError for a path that is no folder.
    """
    if name == "toy":
        return Location(str(TOY_FOLDER), None)
    name = MODELS.get(name, name)
    if Path(name).is_dir():
        return Location(str(Path(name).resolve()), None)
    path, _, revision = name.partition("@")
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model {name!r} is not a folder on this machine")
    return Location(path, revision or None)


def folder_of(model: str) -> Path:
    """The folder with the files of a model whose config has been loaded; for the hub, its commit's in the cache."""
    where = locate(model)
    if where.is_folder:
        return Path(where.path)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(where.path, "config.json", revision=where.revision, local_files_only=True)).parent


def digest(model: str) -> str:
    """What identifies a model whose config has been loaded: ID@COMMIT of the hub, or a SHA-256 of a folder's files.

    The files are config.json and those of the weights.
    """
    where, folder = locate(model), folder_of(model)
    if not where.is_folder:
        return f"{where.path}@{folder.name}"
    sha256 = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in (folder / "config.json", *weights):
        sha256.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                sha256.update(block)
    return sha256.hexdigest()


def base_of(settings: Path) -> str:
    """The name of the base, with its revision, in an adapter's settings. Raises UserError where there is none."""
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
        base, revision = content["base_model_name_or_path"], content.get("revision")
    except Exception as error:
        raise UserError(f"{settings} names no base model: {type(error).__name__} {first_line(error)}") from None
    if not base or (isinstance(base, str) and not base.strip()):
        raise UserError(f"{settings} names no base model: base_model_name_or_path is empty")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(f"{settings} names no base model: {base!r} with revision {revision!r} is no name")
    if base.startswith("."):  # relative to the folder in which somebody trained it
        raise UserError(f"{settings} names its base by a relative path, {base!r}; say by --base where that is")
    return f"{base}@{revision}" if revision else base
