"""A run of MLflow: its tags, its configuration, its files, and what a training adds to it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from plw_mlflow.config import UNSET, digest, spell
from plw_mlflow.environment import provenance
from plw_mlflow.errors import UserError, without_passwords
from plw_mlflow.tracking import pages
from plw_mlflow.tracking.cells import cell_columns, check_is_of_cell, parameters
from plw_mlflow.tracking.connection import patiently, suppressing_missing
from plw_mlflow.tracking.curves import TrainingCurves

TAG_CHARACTERS = 5000  # which every store keeps of a tag; MLflow cuts longer ones off, some stores earlier than others
PARAMETER_CHARACTERS = 6000  # likewise of a parameter
DESCRIBED = "plw.described"  # the tag with the digest of the description that this package wrote
DIGEST = "sha256:"  # begins what stands for a longer text


class Run:
    """An open MLflow run: of a cell, or of one entry point alone.

    A store that is away when the run is opened is an error at once, but for the cell of a sweep. While a model trains,
    its curves and checkpoints neither wait for such a store nor fail because of it. Whatever is logged after the
    training waits for the store.

    Data, checkpoints, models, scores and regressions are logged by modules of their own.
    """

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.client = mlflow.MlflowClient()
        self.curves = TrainingCurves(run_id)
        self.model_id: str | None = None  # of the logged model that scores and measures are of

    def log_config(self, config: Any) -> None:
        """Log a config's fields as parameters, and all of them as config.json.

        Parameters that `mlflow run` has logged already stay as they are. An unset one was logged as empty, which nobody
        can change, so the value that the preset gave it becomes a tag. A value too long for a parameter is replaced by
        its digest. Passwords in addresses are left out everywhere.
        """
        logged = self.client.get_run(self.id).data.params
        values = {
            field.name: without_passwords(value) if isinstance(value, str) else value
            for field in fields(config)
            for value in [getattr(config, field.name)]
        }
        missing = [
            Param(name, _shortened(spell(value), PARAMETER_CHARACTERS, "config.json"))
            for name, value in values.items()
            if name not in logged
        ]
        self.client.log_batch(self.id, params=missing)
        _warn_of_passwords(self.id, logged)
        unset = {name for name, value in logged.items() if name in values and value in UNSET}
        self.tag(**{f"preset.{name}": spell(values[name]) for name in unset if values[name] is not None})
        mlflow.log_dict(json.loads(json.dumps(values, default=str)), "config.json")
        mlflow.log_dict(environment := provenance.fingerprint(), "environment.json")
        mlflow.log_dict(provenance.code_files(provenance.ROOT), "code.json")
        self.tag(environment=digest(environment))  # so that runs can be compared without reading the file of each

    def config(self, folder: Path) -> dict[str, Any]:
        """The options that the run was given, as its config.json has them.

        A template that is a file is copied into `folder`, and the option then names the copy. Raises UserError where
        the run holds no config.json.
        """
        try:
            path = self.client.download_artifacts(self.id, "config.json", str(folder))
        except (MlflowException, OSError):
            raise UserError(f"run {self.id} holds no config.json, which says how its model was trained") from None
        options: dict[str, Any] = json.loads(Path(path).read_text())
        templates = [item.path for item in self.client.list_artifacts(self.id, "template")]
        if templates:
            options["template"] = self.client.download_artifacts(self.id, templates[0], str(folder))
        return options

    def tag(self, **tags: str) -> None:
        """Set tags, each under `plw.`, without passwords in addresses.

        For a value too long for a tag, the tag holds a digest, and a file of the run the whole value.
        """
        shortened = []
        for name, value in tags.items():
            value = without_passwords(value)
            tag = RunTag(f"plw.{name}", _shortened(value, TAG_CHARACTERS, _tag_file(name)))
            if tag.value != value:
                self.client.log_text(self.id, value, _tag_file(name))
            shortened.append(tag)
        self.client.log_batch(self.id, tags=shortened)

    def read_tag(self, name: str) -> str | None:
        """The whole value of the tag `plw.NAME`; None where the run has no such tag."""
        value = self.client.get_run(self.id).data.tags.get(f"plw.{name}")
        if value is not None and value.startswith(DIGEST):
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(self.id, _tag_file(name), folder)).read_text()
        return value

    def untag(self, name: str) -> None:
        """Remove the tag `plw.NAME`, if the run has it."""
        if f"plw.{name}" in self.client.get_run(self.id).data.tags:
            with suppressing_missing():
                self.client.delete_tag(self.id, f"plw.{name}")

    def log_folder(self, folder: Path, name: str) -> None:
        """Log a folder's files, if it has any, as artifacts under `name`."""
        if any(folder.iterdir()):
            patiently(f"logging {name}", lambda: mlflow.log_artifacts(str(folder), name))

    def log_bytes(self, name: str, content: bytes) -> None:
        """Log a file of this content under a path within the run's files."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, Path(name).name)
            file.write_bytes(content)
            mlflow.log_artifact(str(file), str(Path(name).parent))

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files as artifacts, under their names."""
        for file in files:
            mlflow.log_artifact(str(file))

    def files(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of files that were logged under these names."""
        with tempfile.TemporaryDirectory() as folder:
            return {name: Path(self.client.download_artifacts(self.id, name, folder)).read_bytes() for name in names}

    def cell(self) -> dict[str, Any]:
        """The columns of the score table that tell this run's cell from others.

        Raises UserError where the run is not the run of a cell.
        """
        run = patiently("reading the run", lambda: self.client.get_run(self.id))
        check_is_of_cell(run)
        return cell_columns(parameters(run))

    def address(self) -> str:
        """How a person opens this run in MLflow's UI."""
        return pages.opened(pages.run_page(self.client.get_run(self.id).info.experiment_id, self.id))

    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        run = patiently("reading the run", lambda: self.client.get_run(self.id))
        return {str(name): float(value) for name, value in run.data.metrics.items()}

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers that are of the whole run, in place of earlier ones of these names."""
        now = round(1000 * time.time())  # sent again, they are stored once; of two at one time, the larger would count
        entities = [Metric(re.sub(r"[^\w\-. /]", "-", name), value, now, 0) for name, value in metrics.items()]
        patiently("logging metrics", lambda: self.client.log_batch(self.id, metrics=entities))

    def describe(self, text: str) -> None:
        """Make a text in Markdown the run's description, which MLflow shows on its page, unless a person wrote one."""
        shown = text if len(text) <= TAG_CHARACTERS else text[: TAG_CHARACTERS - 2] + " …"

        def describe() -> None:
            tags = self.client.get_run(self.id).data.tags
            if is_ours(tags.get("mlflow.note.content"), tags):
                both = {DESCRIBED: text_digest(shown), "mlflow.note.content": shown}
                self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in both.items()])

        patiently("describing the run", describe)


def listed(lines: Sequence[str], room: int) -> str:
    """As many lines as there is room for, in characters; a last line then says how many more `scores.csv` has."""
    for shown in range(len(lines), 0, -1):
        more = [f"- and {len(lines) - shown} more, in `scores.csv` of the run"] * (shown < len(lines))
        if len(text := "\n".join([*lines[:shown], *more])) <= room:
            return text
    return f"{len(lines)} scores are in `scores.csv` of the run." if lines else ""


def text_digest(text: str) -> str:
    """What identifies a description that this package has written."""
    return digest({"text": text})


def is_ours(description: str | None, tags: Mapping[str, str]) -> bool:
    """Whether a description may be replaced: there is none, or it is the one whose digest the tags have."""
    return not description or tags.get(DESCRIBED) == text_digest(description)


def _warn_of_passwords(run_id: str, logged: dict[str, str]) -> None:
    """Warn of passwords that `mlflow run` has logged as parameters, which nobody can change any more."""
    if names := [name for name, value in logged.items() if without_passwords(value) != value]:
        warnings.warn(
            f"mlflow run has logged the password in {', '.join(names)} as a parameter of run {run_id}, where "
            "others can read it: change the password, or remove the run (mlflow runs delete, then mlflow gc)",
            stacklevel=3,
        )


def _tag_file(name: str) -> str:
    """The artifact that holds the value of a tag that is too long for one."""
    return f"tags/{name}.txt"


def _shortened(text: str, characters: int, place: str) -> str:
    """A text if MLflow keeps so many characters, else its digest and the place where the whole text is."""
    if len(text) <= characters:
        return text
    return f"{DIGEST}{hashlib.sha256(text.encode()).hexdigest()} ({len(text)} characters, in {place})"
