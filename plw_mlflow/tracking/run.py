"""Run: what one MLflow run is told, and can be asked."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import mlflow
import pandas as pd
import yaml
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import LoggedModelStatus, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.types import ColSpec, Schema

from plw_mlflow import __version__, seeding
from plw_mlflow.config import UNSET, CellOptions, DataOptions, data_name, digest, short_name, shown_name, spell
from plw_mlflow.config.presets import MODELS
from plw_mlflow.data import templates
from plw_mlflow.data.profile import Profile
from plw_mlflow.data.sources import NAMED, TOY, Source
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError, first_line, without_passwords
from plw_mlflow.evaluation import task_sets
from plw_mlflow.evaluation.scores import Evaluation
from plw_mlflow.models import pretrained
from plw_mlflow.tracking import connection
from plw_mlflow.tracking.connection import check_reachable, get_run, patiently
from plw_mlflow.tracking.curves import Curves
from plw_mlflow.tracking.stored import StoredCheckpoints, tell_not_stored

CURVE_SECONDS = 15.0  # in which the curve up to a checkpoint has to arrive, for that to be copied into the store
NAME_CHARACTERS = 64  # of each name within a registered model's, which may have 256
TAG_CHARACTERS = 5000  # which every store keeps of a tag; MLflow cuts longer ones off, some stores earlier than others
PARAMETER_CHARACTERS = 6000  # likewise of a parameter
DIGEST = "sha256:"  # begins what stands for a longer text
CELL_FIELDS = tuple(field.name for field in fields(CellOptions))


class Run:
    """An open MLflow run: of a cell, or of one entry point alone.

    What is called while a model trains (log_step, save_unsent, store_checkpoint) neither waits for a store that is away
    nor fails because of it; what is called after that (flush and all that comes then) waits for it. Before the
    training, everything fails at once.
    """

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self._client = mlflow.MlflowClient()
        self._curves = Curves(run_id)
        self._stored = StoredCheckpoints(run_id)
        self._sources: Sequence[Source] = ()
        self._model_id: str | None = None
        self._cell = ""

    def log_config(self, config: Any) -> None:
        """Log the config's fields as parameters, less those logged already in whatever spelling, and all as a file.

        `mlflow run` has logged an unset one as empty, which nobody can change: what a preset made of it is a tag. Of a
        value that is too long for a parameter, that holds a digest; passwords in addresses are left out everywhere.
        """
        known = self._client.get_run(self.id).data.params
        values = {
            field.name: without_passwords(value) if isinstance(value, str) else value
            for field in fields(config)
            for value in [getattr(config, field.name)]
        }
        missing = [
            Param(name, _fitting(spell(value), PARAMETER_CHARACTERS, "config.json"))
            for name, value in values.items()
            if name not in known
        ]
        self._client.log_batch(self.id, params=missing)
        if told := [name for name, value in known.items() if without_passwords(value) != value]:
            warnings.warn(
                f"mlflow run has logged the password in {', '.join(told)} as a parameter of run {self.id}, where "
                "others can read it: change the password, or remove the run (mlflow runs delete, then mlflow gc)",
                stacklevel=2,
            )
        unset = {name for name, value in known.items() if name in values and value in UNSET}
        self.tag(**{f"preset.{name}": spell(values[name]) for name in unset if values[name] is not None})
        mlflow.log_dict(json.loads(json.dumps(values, default=str)), "config.json")
        mlflow.log_dict(environment := seeding.fingerprint(), "environment.json")
        self.tag(environment=digest(environment))  # so that runs can be compared without reading the file of each

    def tag(self, **tags: str) -> None:
        """Set tags, each under `plw.`; of a value that is too long for one, the tag holds a digest, and a file it all.

        Passwords in addresses are left out.
        """
        found = []
        for name, value in tags.items():
            value = without_passwords(value)
            fitting = _fitting(value, TAG_CHARACTERS, _tag_file(name))
            if fitting != value:
                self._client.log_text(self.id, value, _tag_file(name))
            found.append(RunTag(f"plw.{name}", fitting))
        self._client.log_batch(self.id, tags=found)

    def _tagged(self, name: str) -> str | None:
        """The whole value that `tag` was given; None where it was not."""
        value = self._client.get_run(self.id).data.tags.get(f"plw.{name}")
        if value is not None and value.startswith(DIGEST):
            with tempfile.TemporaryDirectory() as folder:
                return Path(self._client.download_artifacts(self.id, _tag_file(name), folder)).read_text()
        return value

    def untag(self, name: str) -> None:
        """Remove the tag `plw.NAME`, if the run has it."""
        if f"plw.{name}" in self._client.get_run(self.id).data.tags:
            self._client.delete_tag(self.id, f"plw.{name}")

    def log_data(self, sources: Sequence[Source], profile: Profile) -> None:
        """Log the data sets as the run's inputs, with their digests, and the length profile as table and figure.

        The first has the name of all of them together.
        """
        self._sources = sources
        names = [profile.name, *(short_name(source.name) for source in sources[1:])]
        for name, source in reversed(list(zip(names, sources, strict=True))):
            where: DatasetSource
            if source.location == "generated":
                where = CodeDatasetSource({"generator": "plw_mlflow.toy", "version": __version__})
            else:
                where = _FileSource(source.location)
            # A digest holds 36 characters at most; the whole one is a tag.
            dataset = MetaDataset(where, name=name, digest=source.sha256[:36])  # type: ignore[abstract]
            mlflow.log_input(dataset, context="training")
        self.tag(data_sha256=",".join(source.sha256 for source in sources))
        mlflow.log_dict(asdict(profile), "profile.json")
        if template := templates.file(profile.template):
            mlflow.log_artifact(str(template), "template")
        from plw_mlflow.data import profile_figure  # matplotlib takes a while to import

        with tempfile.TemporaryDirectory() as folder:
            figure = Path(folder, "profile.png")
            figure.write_bytes(profile_figure.draw_profile(profile))
            mlflow.log_artifact(str(figure))

    def fetch_checkpoint(self, cell: str, folder: Path, newer_than: int) -> None:
        """Bring the store's newest checkpoint of a cell, where it is of a step after `newer_than`, into `folder`.

        Raises UserError where another machine is still at work on the cell.
        """
        self._stored.fetch(cell, folder, newer_than)

    def store_checkpoint(self, saved: Path) -> None:
        """Copy a checkpoint's folder into the run, once the curve up to it is there; older ones are then removed.

        Where the store does not take it, a warning says so.
        """
        if self._curves.wait(CURVE_SECONDS):
            self._stored.store(self._cell, saved)
        else:  # on another machine, nobody would find what is missing of the curve
            tell_not_stored(saved, "it takes no metrics either")

    def drop_checkpoints(self) -> None:
        """Remove the cell's checkpoints from the store, as its model is there now."""
        self._stored.drop()

    def begin_cell(self, cell: str, folder: Path, step: int) -> None:
        """Make this the run of a cell. If an earlier run was cut short in `folder`, take its curves up to `step` over.

        The earlier run then no longer stands for the cell, and says which run does.
        """
        marker = folder / "run_id"
        earlier = marker.read_text() if marker.exists() else None
        found = None if earlier in (None, self.id) else _find(str(earlier))
        self._cell = cell
        self._curves.begin(folder, None if found is None else earlier, step)
        self.tag(cell=cell, status="training")
        if found is not None and found.info.lifecycle_stage == "active":  # nobody may change a deleted one
            self._supersede(found)
        marker.write_text(self.id)

    def log_step(self, metrics: dict[str, float], step: int) -> None:
        """Log a step's metrics, unless they are known from before; they are sent together every few seconds."""
        self._curves.log_step(metrics, step)

    def save_unsent(self) -> None:
        """Before a checkpoint is saved, put in safety beside it what the store has not got of the curves."""
        self._curves.save_unsent()

    def flush(self) -> None:
        """Wait until the store has the curves. Raises Unreachable where it stays away."""
        self._curves.flush()

    def close(self, seconds: float) -> None:
        """Send no more of the curves after so many seconds."""
        self._curves.wait(seconds)
        self._curves.close()

    def log_checkpoint(self, model: Any, tokenizer: Any, config: Any, step: int = 0) -> None:
        """Log a plain transformers model as the run's, and register it as a version of plw-MODEL-DATASET.

        step: the last of the training. The model's page shows the run's metrics of that step.
        """
        name = self._registered_name(config)
        tags = {f"plw.{field}": without_passwords(spell(getattr(config, field))) for field in CELL_FIELDS}
        versions = seeding.fingerprint()
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
        self._model_id = logged.model_id
        version = patiently("registering the model", lambda: self._register(f"models:/{logged.model_id}", name, tags))
        model_version = f"{name}/{version}"
        patiently("tagging the run", lambda: self.tag(status="trained", model_version=model_version))

    def _registered_name(self, config: Any) -> str:
        """The name that the cell's model is registered under: plw-MODEL-DATASET.

        Names that this package gives stand there alone. Files, folders and hub ids may share a name, so theirs is
        followed by the start of their content's SHA-256 (of a hub's model, of its commit); long ones are cut.
        """
        base = self._client.get_run(self.id).data.tags.get("plw.base_model")
        model = short_name(config.model)
        if base is not None and config.model not in ("toy", *MODELS):
            model = f"{model[:NAME_CHARACTERS]}-{base.rpartition('@')[2][:8]}"
        data = short_name(data_name(config.dataset, config, lambda name: short_name(name)[:NAME_CHARACTERS]))
        own = [source.sha256[:8] for source in self._sources if source.name not in (*TOY, *NAMED)]
        return "-".join(["plw", model, data, *own])

    def _register(self, model: str, name: str, tags: dict[str, str]) -> str:
        """Register a logged model, unless it is; gives the number of its version."""
        for known in self._client.search_model_versions(f"name = '{name}'"):
            if known.source == model:  # the answer was lost when it was registered
                return str(known.version)
        return str(mlflow.register_model(model, name, tags=tags).version)

    def load_checkpoint(self) -> tuple[Any, Any]:
        """The model and tokenizer that this run has logged. Raises UserError where there is none, or it is damaged."""
        outputs = self._client.get_run(self.id).outputs
        logged = [self._client.get_logged_model(one.model_id) for one in outputs.model_outputs] if outputs else []
        whole = [one.model_id for one in logged if one.status == LoggedModelStatus.READY]  # not cut off by a lost store
        if not whole:
            raise UserError(f"run {self.id} has logged no model; train it first")
        self._model_id = whole[-1]
        return _load_logged(f"models:/{self._model_id}")

    def log_scores(
        self, evaluation: Evaluation, rows: list[dict[str, Any]], whole: Sequence[str] | None = None
    ) -> None:
        """Log every score as TASK/METRIC, the run's score table, and the per-sample log.

        whole: what the run's `score` is the mean of, by `Score.key`, unless the run says so itself, by its tag
        plw.score_tasks (unset: what was scored now). It is logged once the table has them all, and the run is then
        scored. Rows of tasks scored before stay in the table, unless they are scored again here.
        """
        now = time.time()
        clock = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}"  # of this evaluation
        patiently("logging the scores", lambda: self._log_scores(evaluation, rows, whole, now, clock))
        if evaluation.samples:
            samples = pd.DataFrame(evaluation.samples).assign(evaluation=clock)
            patiently("logging the samples", lambda: self._log_samples(samples, clock))

    def _log_samples(self, samples: pd.DataFrame, clock: str) -> None:
        """Add an evaluation's samples to the run's table, unless they are there: it may be the answer that was lost."""
        if "samples.json" in {item.path for item in self._client.list_artifacts(self.id)}:
            with tempfile.TemporaryDirectory() as folder:
                file = self._client.download_artifacts(self.id, "samples.json", folder)
                known = pd.read_json(file, orient="split", convert_dates=False, dtype=False)
            if "evaluation" in known and (known["evaluation"] == clock).any():
                samples = samples[:0]  # no further rows; but the run may not have noted yet that it has a table
        mlflow.log_table(samples, "samples.json")

    def _log_scores(
        self, evaluation: Evaluation, rows: list[dict[str, Any]], whole: Sequence[str] | None, now: float, clock: str
    ) -> None:
        tags = self._client.get_run(self.id).data.tags
        scored_now = [score.key for score in evaluation.primary]
        told_before = self._tagged("score_tasks")
        wanted = list(whole or scored_now) if told_before is None else told_before.split(",")
        if set(wanted) < set(scored_now):  # a larger set, all of it
            wanted = scored_now
        table, earlier = pd.DataFrame(rows), self.scores()
        if not earlier.empty:
            table = pd.concat([earlier[~earlier["task"].isin(table["task"])], table], ignore_index=True)
        keys = [
            task_sets.key(row["task"], row["metric"], int(row["asked_fewshot"]))
            for row in table.fillna({"asked_fewshot": 0}).to_dict("records")
        ]
        counted = table[[key in wanted for key in keys]]
        is_whole = len(counted) == len(wanted)
        metrics = {"score": float(counted["score"].mean())} if is_whole else {}
        for score in evaluation.scores:
            metrics[f"{score.task}/{score.metric}"] = score.score
            if score.stderr is not None:
                metrics[f"{score.task}/{score.metric}_stderr"] = score.stderr
        mlflow.log_metrics(
            metrics,
            timestamp=int(now * 1000),  # one time, so that metrics sent twice are there once
            model_id=self._model_id,  # without a data set: the run's own is what the model was trained on
        )
        mlflow.log_text(outputs.table(table).decode(), "scores.csv")
        mlflow.log_dict(evaluation.results, f"harness/{clock}.json")
        self.tag(score_tasks=",".join(wanted))
        if is_whole:
            caveats = zip(counted["task"], counted["caveat"].fillna(""), strict=True)
            prompts = sorted(set(counted["prompt"].fillna("harness")))
            mixed = [f"prompts differ: {', '.join(prompts)}"] if len(prompts) > 1 else []
            told = "; ".join([f"{task}: {caveat}" for task, caveat in caveats if caveat] + mixed)
            self.tag(status="scored", score_comparable=spell(not told))
            if told:
                self.tag(score_caveat=told)
            else:
                self.untag("score_caveat")
        else:
            if tags.get("plw.status") == "scored":  # its score was of rows that are no longer there
                self.tag(status="trained")
                self.untag("score_comparable")
                self.untag("score_caveat")
            absent = [key for key in wanted if key not in keys]
            print(f"the run has no score yet, which is the mean of {len(wanted)} tasks: {', '.join(absent)} to come")

    def told(self, folder: Path) -> dict[str, Any]:
        """The options that the run was given, as its config.json has them; a template's file is brought into `folder`.

        Raises UserError where the run holds none.
        """
        try:
            path = self._client.download_artifacts(self.id, "config.json", str(folder))
        except (MlflowException, OSError):
            raise UserError(f"run {self.id} holds no config.json, which says how its model was trained") from None
        options: dict[str, Any] = json.loads(Path(path).read_text())
        kept = [item.path for item in self._client.list_artifacts(self.id, "template")]
        if kept:
            options["template"] = self._client.download_artifacts(self.id, kept[0], str(folder))
        return options

    def check_data(self, sources: Sequence[Source]) -> None:
        """Raise UserError where these are not the data the run's model was trained on."""
        trained_on = self._tagged("data_sha256")
        found = ",".join(source.sha256 for source in sources)
        if found != trained_on:
            named = " and ".join(source.name for source in sources)
            raise UserError(
                f"{named} has the SHA-256 {found}, but run {self.id} was trained on {trained_on}; give the data "
                "as they were, by --data-dir or in their old place"
            )

    def curve(self, name: str) -> dict[int, float]:
        """A metric's values by step, in order; of a step logged twice, the later one."""
        points = self._client.get_metric_history(self.id, name)
        by_step = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
        return dict(sorted(by_step.items()))

    def log_measures(self, measures: dict[str, float]) -> None:
        """Log the study's mechanism measures, each as measure/NAME."""
        named = {f"measure/{name}": value for name, value in measures.items()}
        patiently("logging the measures", lambda: mlflow.log_metrics(named, model_id=self._model_id))

    def log_folder(self, folder: Path, name: str) -> None:
        """Log a folder's files, if it has any, as artifacts under `name`."""
        if any(folder.iterdir()):
            patiently(f"logging {name}", lambda: mlflow.log_artifacts(str(folder), name))

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files as artifacts, under their names."""
        for file in files:
            mlflow.log_artifact(str(file))

    def log_regression(self, fit: Path) -> None:
        """Register a fit.json as the pyfunc model plw-regression (`regression.py` says what goes in and out).

        It is numbers in JSON and the code that reads them; nothing is pickled.
        """
        package = Path(__file__).resolve().parents[1]
        answers = json.loads(fit.read_text())["answers"]
        rows = [(one["dataset"], 0.1, None) for one in answers]
        rows += [(one["dataset"], 0.1, task["task"]) for one in answers for task in one["by_task"][:1]]
        columns = [ColSpec("string", "dataset"), ColSpec("double", "plw"), ColSpec("string", "task", required=False)]
        given_back = [ColSpec("double", name) for name in ("score", "low", "high", "optimum_plw")]
        with tempfile.TemporaryDirectory() as folder:
            code = Path(folder) / package.name
            code.mkdir()
            for module in ("__init__.py", "errors.py", "transforms.py"):
                shutil.copy(package / module, code / module)
            versions = seeding.fingerprint()
            mlflow.pyfunc.log_model(
                name="regression",
                python_model=str(package / "tracking" / "regression.py"),
                artifacts={"fit": str(fit)},
                code_paths=[str(code)],
                pip_requirements=[f"{name}=={versions[name]}" for name in ("mlflow", "numpy", "scipy", "pandas")],
                signature=ModelSignature(Schema([*columns]), Schema([*given_back])),
                input_example=pd.DataFrame(rows, columns=["dataset", "plw", "task"]),
                registered_model_name="plw-regression",
            )

    def cell(self) -> dict[str, Any]:
        """What tells this run's cell from others, for the score table. Raises UserError where it has none."""
        run = patiently("reading the run", lambda: self._client.get_run(self.id))
        if "plw.cell" not in run.data.tags:
            raise UserError(f"run {self.id} is not the run of a cell: it has no tag plw.cell")
        return cell_columns(parameters(run))

    def address(self) -> str:
        """How a person opens this run in MLflow's UI."""
        run = self._client.get_run(self.id)
        page = f"#/experiments/{run.info.experiment_id}/runs/{self.id}"
        store = connection.address()
        if store.startswith("http"):
            return re.sub("//[^/@]*@", "//", f"{store.rstrip('/')}/{page}")  # a browser asks who one is
        command = f"mlflow ui --backend-store-uri {store}"
        if store != mlflow.get_tracking_uri():  # it holds a password
            command = 'MLFLOW_BACKEND_STORE_URI="$MLFLOW_TRACKING_URI" mlflow ui'
        return f"{command}    then open http://127.0.0.1:5000/{page}"

    def scores(self) -> pd.DataFrame:
        """The run's score table so far, empty if nothing was scored."""
        if "scores.csv" not in {item.path for item in self._client.list_artifacts(self.id)}:
            return pd.DataFrame()
        with tempfile.TemporaryDirectory() as folder:
            return pd.read_csv(self._client.download_artifacts(self.id, "scores.csv", folder))

    def _supersede(self, earlier: mlflow.entities.Run) -> None:
        run_id = earlier.info.run_id
        self.tag(resumed_from=run_id)
        self._client.set_tag(run_id, "plw.superseded_by", self.id)
        if "plw.cell" in earlier.data.tags:
            self._client.delete_tag(run_id, "plw.cell")
        if earlier.info.status == RunStatus.to_string(RunStatus.RUNNING):
            self._client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))


class NoRun(Run):
    """Stands for the run in processes other than the first of a training: it is told everything and does nothing.

    What only the first process may ask for (its cell, scores, a model) is not to be had.
    """

    def __init__(self) -> None:
        self.id = ""

    def address(self) -> str:
        """Nowhere."""
        return ""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    tag = untag = log_config = log_data = log_step = save_unsent = flush = close = _nothing
    begin_cell = fetch_checkpoint = store_checkpoint = drop_checkpoints = log_checkpoint = _nothing
    log_scores = log_measures = log_folder = log_files = log_regression = _nothing


def _find(run_id: str) -> mlflow.entities.Run | None:
    """A run whose curves are to be had, even where it was deleted; None where it is in another store."""
    try:
        return get_run(run_id, even_deleted=True)
    except ValueError:
        return None


def _tag_file(name: str) -> str:
    """The artifact that holds the value of a tag that is too long for one."""
    return f"tags/{name}.txt"


def _fitting(text: str, characters: int, where: str) -> str:
    """A text if MLflow keeps so much, else its digest, which tells it from others as well, and where all of it is."""
    if len(text) <= characters:
        return text
    return f"{DIGEST}{hashlib.sha256(text.encode()).hexdigest()} ({len(text)} characters, in {where})"


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


def load_registered(uri: str) -> tuple[Any, Any]:
    """Model and tokenizer of models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises UserError where there is none, where it is no text-generation model of MLflow's flavour transformers, and as
    `models.load` does.
    """
    check_reachable()
    return _load_logged(uri)


def _load_logged(uri: str) -> tuple[Any, Any]:
    """Model and tokenizer of a logged model; MLflow brings the files, but would run code that lies among them."""
    with _downloaded(uri) as folder:
        try:
            flavors = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]
            saved = flavors.get("transformers")
            kinds, task = ", ".join(flavors), saved and saved.get("task")
            # The folders have these names always; whatever else is named is not followed.
            is_whole = saved and saved.get("model_binary") == "model" and "tokenizer" in saved.get("components")
        except Exception as error:
            raise UserError(
                f"model {uri} cannot be loaded: its MLmodel is damaged ({type(error).__name__}: {first_line(error)})"
            ) from None
        if not saved:
            raise UserError(f"model {uri} is of the flavour {kinds}; models of the flavour transformers are loaded")
        if task != "text-generation":
            raise UserError(f"model {uri} is for the task {task}; models for text-generation are loaded")
        if not is_whole:
            raise UserError(f"model {uri} lacks its own weights or its tokenizer; log both with it")
        parts = folder / "model", folder / "components" / "tokenizer"
        if lacking := [part for part in parts if not part.is_dir()]:
            raise UserError(f"model {uri} lacks the folder {lacking[0].relative_to(folder)}")
        try:
            return pretrained.load(str(parts[0])), pretrained.load_tokenizer(str(parts[1]))
        except ValueError as error:  # the folder may be a temporary one, of which nobody knows
            raise UserError(str(error).replace(str(folder), uri)) from None


@contextmanager
def _downloaded(uri: str) -> Iterator[Path]:
    """A logged model's folder: the store's own, where that is on this machine, else a copy for as long as the block."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # Not by mlflow.artifacts, which writes into the store's own folder.
            store = ModelsArtifactRepository(uri).repo
            is_here = isinstance(store, LocalArtifactRepository)
            folder = Path(store.download_artifacts("", None if is_here else scratch)).resolve()
        except (MlflowException, OSError) as error:
            raise UserError(f"model {uri} cannot be loaded: {first_line(error)} (in {connection.address()})") from None
        yield folder


def parameters(run: mlflow.entities.Run) -> dict[str, str]:
    """A run's parameters, unquoted; in place of those that were left unset, what its preset made of them."""
    tags = run.data.tags
    return {
        name: tags.get(f"plw.preset.{name}", "") if value in UNSET else unquoted(value)
        for name, value in run.data.params.items()
    }


def unquoted(value: str) -> str:
    """A parameter as its caller gave it: `mlflow run` logs it as quoted for a shell, in quotes if it has a blank."""
    try:
        parts = shlex.split(value)
    except ValueError:  # a lone quotation mark
        return value
    return parts[0] if len(parts) == 1 and shlex.quote(parts[0]) == value else value


def cell_columns(params: dict[str, str], shown: Callable[[str], str] = shown_name) -> dict[str, Any]:
    """A cell's columns in the score table; its data set is named by what was done to it, too.

    shown: how the model's and each data set's own name is to be written.
    """

    def is_true(name: str) -> bool:
        return bool(click.BOOL(params.get(name) or "false"))  # as the caller spelled it; older runs lack some

    options = DataOptions(
        invert=is_true("invert"),
        mix=params.get("mix") or None,
        mix_invert=is_true("mix_invert"),
        mix_share=float(params.get("mix_share") or DataOptions.mix_share),
    )
    data = data_name(params["dataset"], options, shown)
    return {"model": shown(params["model"]), "dataset": data, "plw": float(params["plw"]), "seed": int(params["seed"])}
