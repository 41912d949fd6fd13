"""Licences of base models, as far as they are known without asking anybody."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import yaml

from plw_mlflow.config import MODELS
from plw_mlflow.models.location import folder_of

KNOWN = {
    "toy": "MIT",
    "llama-7b": "LLaMA's, of Meta: for research, not for commercial use",
    "llama-2-7b": "Llama 2 Community License",
}
NONCOMMERCIAL = re.compile(r"\bnc\b|non-?commercial|not for commercial use", re.IGNORECASE)


def of_model(model: str) -> str:
    """The licence of a model whose config has been loaded; empty where it is not known.

    That of a folder, or of a model in the hub's cache, is what the head of its README.md says.
    """
    named = {place: name for name, place in MODELS.items()}.get(model, model)
    if named in KNOWN:
        return KNOWN[named]
    with suppress(Exception):  # whatever lies there, a licence that cannot be read is not known
        return _in_readme(folder_of(model) / "README.md")
    return ""


def is_noncommercial(licence: str) -> bool:
    """Whether a licence is known to forbid commercial use."""
    return NONCOMMERCIAL.search(licence) is not None


def _in_readme(file: Path) -> str:
    head = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8")[:100_000], re.DOTALL)
    said = (yaml.safe_load(head[1]) if head else {}) or {}
    licence = said.get("license_name") or said.get("license") or ""
    return str(licence)[:200]
