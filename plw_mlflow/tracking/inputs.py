"""Inputs: the data sets that a run has used, as MLflow's dataset inputs, and their length profile."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag

from plw_mlflow import __version__
from plw_mlflow.config import short_name
from plw_mlflow.data import templates
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.sources import Source
from plw_mlflow.errors import UserError
from plw_mlflow.tracking.connection import patiently
from plw_mlflow.tracking.run import Run
from plw_mlflow.transforms import EXPONENT

DIGEST_CHARACTERS = 36  # of a data set's digest; MLflow takes no more


def log_data(run: Run, prepared: Prepared) -> None:
    """Log the data sets as the run's inputs with their digests, and the length profile as a table and a figure.

    Several data sets are mixed into the first one, which is logged under the name of the mixture.

    Of runs that log a new data set at the same moment, MLflow's database takes one and refuses the others, which find
    the data set there when they ask again.
    """
    sources, profile = prepared.sources, prepared.profile
    names = [profile.name, *(short_name(source.name) for source in sources[1:])]
    for name, source in reversed(list(zip(names, sources, strict=True))):
        origin: DatasetSource
        if source.location == "generated":
            origin = CodeDatasetSource({"generator": "plw_mlflow.toy", "version": __version__})
        else:
            origin = _FileSource(source.location)
        dataset = MetaDataset(origin, name=name, digest=source.sha256[:DIGEST_CHARACTERS])  # type: ignore[abstract]
        patiently("logging the data", partial(mlflow.log_input, dataset, context="training"))
    run.tag(data_sha256=",".join(source.sha256 for source in sources))
    mlflow.log_dict(asdict(profile), "profile.json")
    if template := templates.file(profile.template):
        mlflow.log_artifact(str(template), "template")
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder, "profile.png")
        figure.write_bytes(prepared.figure)
        mlflow.log_artifact(str(figure))


def log_prompt_weight(run: Run, plw: float, share: float | None) -> None:
    """Log what the PLW comes to as metrics, by which MLflow's lists and charts can order the cells.

    w_p is the power of the PLW on which scores are fitted, prompt_share the prompts' share of the loss weight.
    """
    run.log_metrics({"w_p": plw**EXPONENT} | ({} if share is None else {"prompt_share": share}))


def log_benchmarks(run: Run, benchmarks: Sequence[MetaDataset], versions: Sequence[str]) -> None:
    """Log benchmarks as inputs of the evaluation, each with the version of its task."""
    inputs = [
        DatasetInput(
            dataset._to_mlflow_entity(),
            [InputTag("mlflow.data.context", "evaluation"), InputTag("version", version)],
        )
        for dataset, version in zip(benchmarks, versions, strict=True)
    ]
    run.client.log_inputs(run.id, inputs)


def benchmark(task: str, contents: Mapping[str, Any]) -> MetaDataset:
    """A benchmark as a data set of MLflow's, with the digest of its documents. contents: as `evaluate` gives them."""
    origin = CodeDatasetSource({"task": task, **contents})
    dataset: Any = MetaDataset(origin, name=task, digest=contents["sha256"][:DIGEST_CHARACTERS])  # type: ignore[abstract]
    return dataset


def check_data(run: Run, sources: Sequence[Source]) -> None:
    """Raise UserError where the sources are not the data that the run's model was trained on."""
    expected = run.read_tag("data_sha256")
    sha256 = ",".join(source.sha256 for source in sources)
    if sha256 != expected:
        named = " and ".join(source.name for source in sources)
        raise UserError(
            f"{named} has the SHA-256 {sha256}, but run {run.id} was trained on {expected}; give the data "
            "as they were, by --data-dir or in their old place"
        )


class _FileSource(FileSystemDatasetSource):
    """A file on this machine as a data set's source."""

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def uri(self) -> str:
        return self._path

    @staticmethod
    def _get_source_type() -> str:
        return "local"

    def load(self, dst_path: str | None = None) -> str:
        return self._path

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, str) and Path(raw_source).is_file()

    @classmethod
    def _resolve(cls, raw_source: str) -> _FileSource:
        return cls(raw_source)

    def to_dict(self) -> dict[str, Any]:
        return {"uri": self._path}

    @classmethod
    def from_dict(cls, source_dict: dict[str, Any]) -> _FileSource:
        return cls(source_dict["uri"])
