"""Logged models: trained models in the store and its registry, and how they come back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils import logging_utils

from plw_mlflow.config import MODELS, data_name, short_name, spell
from plw_mlflow.data.sources import NAMED, TOY, Source
from plw_mlflow.environment import provenance
from plw_mlflow.errors import UserError, first_line, without_passwords
from plw_mlflow.models import pretrained
from plw_mlflow.tracking import connection
from plw_mlflow.tracking.cells import CELL_FIELDS
from plw_mlflow.tracking.connection import check_reachable, patiently
from plw_mlflow.tracking.run import Run

NAME_CHARACTERS = 64  # of each name within a registered model's, which may have 256


def log_model(run: Run, model: Any, tokenizer: Any, config: Any, sources: Sequence[Source] = (), step: int = 0) -> None:
    """Log a plain transformers model as the run's, and register it as a version of plw-MODEL-DATASET.

    sources: of the data it was trained on. step: the last of the training. The model's page shows the run's metrics of
        that step.
    """
    name = _registered_name(run, config, sources)
    tags = {f"plw.{field}": without_passwords(spell(getattr(config, field))) for field in CELL_FIELDS}
    versions = provenance.fingerprint()
    logged = patiently(
        "logging the model",
        lambda: mlflow.transformers.log_model(
            {"model": model, "tokenizer": tokenizer},
            name="model",
            task="text-generation",
            step=step,
            # Named here because MLflow would otherwise load the model in a process of its own to find out.
            pip_requirements=[f"{package}=={versions[package]}" for package in ("torch", "transformers")],
        ),
    )
    run.model_id = logged.model_id
    version = patiently("registering the model", lambda: _register(run, f"models:/{logged.model_id}", name, tags))
    patiently("tagging the run", lambda: run.tag(status="trained", model_version=f"{name}/{version}"))


def load_model(run: Run) -> tuple[Any, Any]:
    """The model and tokenizer that a run has logged. Raises UserError where there is none, or it is damaged."""
    outputs = run.client.get_run(run.id).outputs
    logged = [run.client.get_logged_model(output.model_id) for output in outputs.model_outputs] if outputs else []
    complete = [model.model_id for model in logged if model.status == LoggedModelStatus.READY]
    if not complete:
        raise UserError(f"run {run.id} has logged no model; train it first")
    run.model_id = complete[-1]
    return _load(f"models:/{run.model_id}")


def load_registered(uri: str) -> tuple[Any, Any]:
    """Model and tokenizer of models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises UserError where there is none, where it is no text-generation model of MLflow's flavour transformers, and
    where `pretrained.load` does.
    """
    check_reachable()
    return _load(uri)


def trained_in(model: str) -> str | None:
    """The type of the arithmetic in which the cell that a registered model is of was trained; None for other models."""
    if not model.startswith("models:/"):
        return None
    check_reachable()
    client = mlflow.MlflowClient()
    try:
        version = client.get_model_version(*get_model_name_and_version(client, model))
        return client.get_run(version.run_id).data.tags.get("plw.precision") if version.run_id else None
    except MlflowException:  # there is no such version, which loading it will say, or its run is gone
        return None


def _registered_name(run: Run, config: Any, sources: Sequence[Source]) -> str:
    """The name that the cell's model is registered under: plw-MODEL-DATASET.

    The package's own names of models and data sets are unique. Files, folders and hub ids may share a name, so theirs
    is followed by the start of their content's SHA-256, or, for a hub's model, of its commit. Long names are cut.
    """
    base = run.client.get_run(run.id).data.tags.get("plw.base_model")
    model = short_name(config.model)
    if base is not None and config.model not in ("toy", *MODELS):
        model = f"{model[:NAME_CHARACTERS]}-{base.rpartition('@')[2][:8]}"
    data = short_name(data_name(config.dataset, config, lambda name: short_name(name)[:NAME_CHARACTERS]))
    digests = [source.sha256[:8] for source in sources if source.name not in (*TOY, *NAMED)]
    return "-".join(["plw", model, data, *digests])


def _register(run: Run, source: str, name: str, tags: dict[str, str]) -> str:
    """Register a logged model under a name and return its version.

    An earlier attempt may have registered it already, if only the store's answer was lost.
    """
    for version in run.client.search_model_versions(f"name = '{name}'"):
        if version.source == source:
            return str(version.version)
    logging_utils.disable_logging()  # MLflow prints two lines that say no more than the one below
    try:
        registered = mlflow.register_model(source, name, tags=tags)
    finally:
        logging_utils.enable_logging()
    print(f"registered the model as {name}, version {registered.version}")
    return str(registered.version)


def _load(uri: str) -> tuple[Any, Any]:
    """Model and tokenizer of a logged model. `mlflow.transformers` would run program code that lies among its files."""
    with _downloaded(uri) as folder:
        _check_mlmodel(uri, folder / "MLmodel")
        # The folders always have these names. Whatever else the MLmodel file names is not followed.
        model, tokenizer = folder / "model", folder / "components" / "tokenizer"
        for part in (model, tokenizer):
            if not part.is_dir():
                raise UserError(f"model {uri} lacks the folder {part.relative_to(folder)}")
        try:
            return pretrained.load(str(model)), pretrained.load_tokenizer(str(tokenizer))
        except ValueError as error:  # the folder may be a temporary one, which means nothing to the caller
            raise UserError(str(error).replace(str(folder), uri)) from None


def _check_mlmodel(uri: str, file: Path) -> None:
    """Raise UserError unless an MLmodel file describes a text-generation model with its weights and its tokenizer."""
    try:
        flavors = yaml.safe_load(file.read_text(encoding="utf-8"))["flavors"]
        saved = flavors.get("transformers")
        kinds, task = ", ".join(flavors), saved and saved.get("task")
        is_complete = saved and saved.get("model_binary") == "model" and "tokenizer" in saved.get("components")
    except Exception as error:
        raise UserError(
            f"model {uri} cannot be loaded: its MLmodel is damaged ({type(error).__name__}: {first_line(error)})"
        ) from None
    if not saved:
        raise UserError(f"model {uri} is of the flavour {kinds}; models of the flavour transformers are loaded")
    if task != "text-generation":
        raise UserError(f"model {uri} is for the task {task}; models for text-generation are loaded")
    if not is_complete:
        raise UserError(f"model {uri} lacks its own weights or its tokenizer; log both with it")


@contextmanager
def _downloaded(uri: str) -> Iterator[Path]:
    """A logged model's folder.

    It is the store's own folder if that is on this machine, and otherwise a copy that is removed when the block ends.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # `mlflow.artifacts.download_artifacts` would write into the store's own folder.
            store = ModelsArtifactRepository(uri).repo
            is_local = isinstance(store, LocalArtifactRepository)
            folder = Path(store.download_artifacts("", None if is_local else scratch)).resolve()
        except (MlflowException, OSError) as error:
            raise UserError(f"model {uri} cannot be loaded: {first_line(error)} (in {connection.address()})") from None
        yield folder
