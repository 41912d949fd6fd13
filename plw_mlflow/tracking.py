"""Tracking: everything that goes into MLflow or comes out of it. No other module imports mlflow.

A cell is one run. MLflow's own `mlflow run` has opened that run already and logged the parameters as it was given
them; here the run is joined, and only what is missing is logged.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run reports to its own store alone
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import click
import mlflow
import pandas as pd
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.filesystem_dataset_source import FileSystemDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from plw_mlflow import __version__, figures, origin, seeding, tasksets, templates
from plw_mlflow.config import CellOptions, DataOptions, data_name, short_name, spell
from plw_mlflow.errors import first_line
from plw_mlflow.evaluate import Evaluation
from plw_mlflow.sources import Source

FLUSH_SECONDS = 5.0
BATCH_METRICS = 1000  # MLflow's limit on one log_batch
BEAT_SECONDS = 15.0  # between two signs of life of a run
SILENT_SECONDS = 60.0  # a run without one for so long is taken for dead
CHECKPOINTS = "checkpoints"  # artifact folder of an unfinished cell
CELL_FIELDS = tuple(field.name for field in fields(CellOptions))


class Run:
    """An open MLflow run: of a cell, or of one entry point alone."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self._client = mlflow.MlflowClient()
        self._metrics: list[Metric] = []
        self._flushed = time.monotonic()
        self._dataset: MetaDataset | None = None
        self._model_id: str | None = None
        self._cell = ""
        self._known_step = -1  # the last step in the curves of a run that was begun before, by a pod, say
        self._stored: str | None = None  # name of this run's checkpoint in the store
        self._stored_before: list[str] = []  # earlier runs of the cell that have one there

    def log_config(self, config: Any) -> None:
        """Log the config's fields as parameters, less those logged already in whatever spelling, and all as a file."""
        known = self._client.get_run(self.id).data.params
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        missing = [Param(name, spell(value)) for name, value in values.items() if name not in known]
        self._client.log_batch(self.id, params=missing)
        mlflow.log_dict(json.loads(json.dumps(values, default=str)), "config.json")
        mlflow.log_dict(seeding.fingerprint(), "environment.json")

    def tag(self, **tags: str) -> None:
        """Set tags, each under `plw.`."""
        self._client.log_batch(self.id, tags=[RunTag(f"plw.{name}", value) for name, value in tags.items()])

    def untag(self, name: str) -> None:
        """Remove the tag `plw.NAME`, if the run has it."""
        if f"plw.{name}" in self._client.get_run(self.id).data.tags:
            self._client.delete_tag(self.id, f"plw.{name}")

    def log_data(self, sources: Sequence[Source], profile: dict[str, Any]) -> None:
        """Log the data sets as the run's inputs, with their digests, and the length profile as table and figure.

        The first is the one the run's scores are said to be of, so it has the name of all of them together.
        """
        names = [profile["name"], *(short_name(source.name) for source in sources[1:])]
        for name, source in reversed(list(zip(names, sources, strict=True))):
            where: DatasetSource
            if source.location == "generated":
                where = CodeDatasetSource({"generator": "plw_mlflow.toy", "version": __version__})
            else:
                where = _FileSource(source.location)
            # A digest holds 36 characters at most; the whole one is a tag.
            self._dataset = MetaDataset(where, name=name, digest=source.sha256[:36])  # type: ignore[abstract]
            mlflow.log_input(self._dataset, context="training")
        self.tag(data_sha256=",".join(source.sha256 for source in sources))
        mlflow.log_dict(profile, "profile.json")
        if template := templates.file(profile["template"]):
            mlflow.log_artifact(str(template), "template")
        with tempfile.TemporaryDirectory() as folder:
            figure = Path(folder, "profile.png")
            figure.write_bytes(figures.draw_profile(profile))
            mlflow.log_artifact(str(figure))

    def fetch_checkpoint(self, cell: str, folder: Path, newer_than: int) -> None:
        """Bring the store's newest checkpoint of a cell, where it is of a step after `newer_than`, into `folder`.

        Raises ValueError where another machine is still at work on the cell.
        """
        runs = self._client.search_runs(
            [self._client.get_run(self.id).info.experiment_id],
            filter_string=f"tags.`plw.checkpoint` LIKE '{cell}/%'",
        )
        stored = {run.info.run_id: run.data.tags["plw.checkpoint"].partition("/")[2] for run in runs}
        self._stored = stored.get(self.id)  # a restarted pod or container goes on in the run it began
        self._stored_before = [run_id for run_id in stored if run_id != self.id]
        marker = folder / "run_id"
        ended = marker.read_text() if marker.exists() else None  # as the folder's lock is ours
        _await_silence([run_id for run_id in self._stored_before if run_id != ended])
        newest_first = sorted(stored.items(), key=lambda item: int(item[1].removeprefix("step-")), reverse=True)
        for run_id, name in newest_first:
            if int(name.removeprefix("step-")) <= newer_than:
                return
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    found = self._client.download_artifacts(run_id, f"{CHECKPOINTS}/{name}", scratch)
                except (MlflowException, OSError) as error:
                    message = f"the checkpoint {name} of run {run_id} is not to be had ({first_line(error)})"
                    warnings.warn(f"{message}; going on without it", stacklevel=2)
                    continue
                os.replace(found, folder / name)
            marker.write_text(run_id)
            return

    def store_checkpoint(self, saved: Path) -> None:
        """Copy a checkpoint's folder into the run; then the cell's older ones in the store are removed."""
        self._client.log_artifacts(self.id, str(saved), f"{CHECKPOINTS}/{saved.name}")
        self.tag(checkpoint=f"{self._cell}/{saved.name}")  # complete from here on
        if self._stored not in (None, saved.name):
            _remove(self.id, f"{CHECKPOINTS}/{self._stored}")
        self._stored = saved.name
        self._drop_earlier()

    def drop_checkpoints(self) -> None:
        """Remove the cell's checkpoints from the store, as its model is there now."""
        self._drop_earlier()
        if self._stored is not None:
            _remove(self.id, CHECKPOINTS, tag="checkpoint")

    def _drop_earlier(self) -> None:
        while self._stored_before:
            _remove(self._stored_before.pop(), CHECKPOINTS, tag="checkpoint")

    def begin_cell(self, cell: str, folder: Path, step: int) -> None:
        """Make this the run of a cell. If an earlier run was cut short in `folder`, take its curves up to `step` over.

        The earlier run then no longer stands for the cell, and says which run does.
        """
        marker = folder / "run_id"
        earlier = marker.read_text() if marker.exists() else None
        self._cell = cell
        self._known_step = max(
            (point.step for point in self._client.get_metric_history(self.id, "train/loss")), default=-1
        )
        self.tag(cell=cell, status="training")
        if earlier and earlier != self.id:
            self._take_over(earlier, step)
        marker.write_text(self.id)

    def log_step(self, metrics: dict[str, float], step: int) -> None:
        """Log a step's metrics, unless they are known from before; they are sent together every few seconds."""
        if step <= self._known_step:
            return
        now = int(time.time() * 1000)
        self._metrics += [Metric(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the metrics held back."""
        while self._metrics:
            self._client.log_batch(self.id, metrics=self._metrics[:BATCH_METRICS])
            del self._metrics[:BATCH_METRICS]
        self._flushed = time.monotonic()

    def log_checkpoint(self, model: Any, tokenizer: Any, config: Any) -> None:
        """Log a plain transformers model as the run's, and register it as a version of plw-MODEL-DATASET."""
        logged = mlflow.transformers.log_model(
            {"model": model, "tokenizer": tokenizer},
            name="model",
            task="text-generation",
            # Named here because MLflow would otherwise load the model in a process of its own to find out.
            pip_requirements=[f"{name}=={seeding.fingerprint()[name]}" for name in ("torch", "transformers")],
        )
        self._model_id = logged.model_id
        version = mlflow.register_model(
            f"models:/{logged.model_id}",
            f"plw-{short_name(config.model)}-{short_name(data_name(config.dataset, config, short_name))}",
            tags={f"plw.{name}": spell(getattr(config, name)) for name in CELL_FIELDS},
        )
        self.tag(status="trained", model_version=f"{version.name}/{version.version}")

    def load_checkpoint(self) -> tuple[Any, Any]:
        """The model and tokenizer that this run has logged. Raises ValueError where there is none."""
        outputs = self._client.get_run(self.id).outputs
        if not outputs or not outputs.model_outputs:
            raise ValueError(f"run {self.id} has logged no model; train it first")
        self._model_id = outputs.model_outputs[-1].model_id
        parts = mlflow.transformers.load_model(f"models:/{self._model_id}", return_type="components")
        return parts["model"], parts["tokenizer"]

    def log_scores(
        self, evaluation: Evaluation, rows: list[dict[str, Any]], whole: Sequence[str] | None = None
    ) -> None:
        """Log every score as TASK/METRIC, the run's score table, and the per-sample log.

        whole: what the run's `score` is the mean of, by `Score.key`, unless the run says so itself, by its tag
        plw.score_tasks (unset: what was scored now). It is logged once the table has them all, and the run is then
        scored. Rows of tasks scored before stay in the table, unless they are scored again here.
        """
        tags = self._client.get_run(self.id).data.tags
        scored_now = [score.key for score in evaluation.primary]
        wanted = tags["plw.score_tasks"].split(",") if "plw.score_tasks" in tags else list(whole or scored_now)
        if set(wanted) < set(scored_now):  # a larger set, all of it
            wanted = scored_now
        rows_now = pd.DataFrame(rows)
        earlier = self.scores()
        if not earlier.empty:
            rows_now = pd.concat([earlier[~earlier["task"].isin(rows_now["task"])], rows_now], ignore_index=True)
        keys = [
            tasksets.key(row["task"], row["metric"], int(row["asked_fewshot"]))
            for row in rows_now.fillna({"asked_fewshot": 0}).to_dict("records")
        ]
        counted = rows_now[[key in wanted for key in keys]]
        is_whole = len(counted) == len(wanted)
        metrics = {"score": float(counted["score"].mean())} if is_whole else {}
        for score in evaluation.scores:
            metrics[f"{score.task}/{score.metric}"] = score.score
            if score.stderr is not None:
                metrics[f"{score.task}/{score.metric}_stderr"] = score.stderr
        mlflow.log_metrics(metrics, model_id=self._model_id, dataset=self._dataset)
        mlflow.log_text(rows_now.to_csv(index=False), "scores.csv")
        now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        mlflow.log_dict(evaluation.results, f"harness/{now}.json")
        if evaluation.samples:
            mlflow.log_table(pd.DataFrame(evaluation.samples).assign(evaluation=now), "samples.json")
        self.tag(score_tasks=",".join(wanted))
        if is_whole:
            caveats = zip(counted["task"], counted["caveat"].fillna(""), strict=True)
            told = "; ".join(f"{task}: {caveat}" for task, caveat in caveats if caveat)
            self.tag(status="scored", score_comparable=spell(not told))
            if told:
                self.tag(score_caveat=told)
            else:
                self.untag("score_caveat")
        else:
            absent = [key for key in wanted if key not in keys]
            print(f"the run has no score yet, which is the mean of {len(wanted)} tasks: {', '.join(absent)} to come")

    def told(self, folder: Path) -> dict[str, Any]:
        """The options that the run was given, as its config.json has them; a template's file is brought into `folder`.

        Raises ValueError where the run holds none.
        """
        try:
            path = self._client.download_artifacts(self.id, "config.json", str(folder))
        except (MlflowException, OSError):
            raise ValueError(f"run {self.id} holds no config.json, which says how its model was trained") from None
        options: dict[str, Any] = json.loads(Path(path).read_text())
        kept = [item.path for item in self._client.list_artifacts(self.id, "template")]
        if kept:
            options["template"] = self._client.download_artifacts(self.id, kept[0], str(folder))
        return options

    def check_data(self, sources: Sequence[Source]) -> None:
        """Raise ValueError where these are not the data the run's model was trained on."""
        trained_on = self._client.get_run(self.id).data.tags.get("plw.data_sha256")
        found = ",".join(source.sha256 for source in sources)
        if found != trained_on:
            named = " and ".join(source.name for source in sources)
            raise ValueError(
                f"{named} has the SHA-256 {found}, but run {self.id} was trained on {trained_on}; give the data "
                "as they were, by --data-dir or in their old place"
            )

    def curve(self, name: str) -> list[float]:
        """A metric's values, in the order of their steps; of a step logged twice, the later one."""
        points = self._client.get_metric_history(self.id, name)
        by_step = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
        return [by_step[step] for step in sorted(by_step)]

    def log_measures(self, measures: dict[str, float]) -> None:
        """Log the study's mechanism measures, each as measure/NAME."""
        named = {f"measure/{name}": value for name, value in measures.items()}
        mlflow.log_metrics(named, model_id=self._model_id)

    def log_folder(self, folder: Path, name: str) -> None:
        """Log a folder's files, if it has any, as artifacts under `name`."""
        if any(folder.iterdir()):
            mlflow.log_artifacts(str(folder), name)

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files as artifacts, under their names."""
        for file in files:
            mlflow.log_artifact(str(file))

    def log_regression(self, fit: Path) -> None:
        """Register a fit as the pyfunc model plw-regression: data frame (dataset, plw) in, scores and optimum out.

        It is coefficients in JSON and the code that reads them; nothing is pickled.
        """
        package = Path(__file__).resolve().parent
        fits = json.loads(fit.read_text())["fits"]
        with tempfile.TemporaryDirectory() as folder:
            code = Path(folder) / package.name
            code.mkdir()
            for module in ("__init__.py", "analyze.py"):
                shutil.copy(package / module, code)
            versions = seeding.fingerprint()
            mlflow.pyfunc.log_model(
                name="regression",
                loader_module="plw_mlflow.analyze",
                data_path=str(fit),
                code_paths=[str(code)],
                pip_requirements=[f"{name}=={versions[name]}" for name in ("numpy", "scipy", "pandas")],
                input_example=pd.DataFrame({"dataset": [one["dataset"] for one in fits], "plw": 0.1}),
                registered_model_name="plw-regression",
            )

    def cell(self) -> dict[str, Any]:
        """What tells this run's cell from others, for the score table. Raises ValueError where it has none."""
        run = self._client.get_run(self.id)
        if "plw.cell" not in run.data.tags:
            raise ValueError(f"run {self.id} is not the run of a cell: it has no tag plw.cell")
        return _cell(run.data.params)

    def address(self) -> str:
        """How a person opens this run in MLflow's UI."""
        run = self._client.get_run(self.id)
        page = f"#/experiments/{run.info.experiment_id}/runs/{self.id}"
        store = mlflow.get_tracking_uri()
        if store.startswith("http"):
            return f"{store.rstrip('/')}/{page}"
        return f"mlflow ui --backend-store-uri {store}    then open http://127.0.0.1:5000/{page}"

    def scores(self) -> pd.DataFrame:
        """The run's score table so far, empty if nothing was scored."""
        if "scores.csv" not in {item.path for item in self._client.list_artifacts(self.id)}:
            return pd.DataFrame()
        with tempfile.TemporaryDirectory() as folder:
            return pd.read_csv(self._client.download_artifacts(self.id, "scores.csv", folder))

    def _take_over(self, earlier: str, step: int) -> None:
        try:
            run = _get_run(earlier)
        except ValueError:
            return  # It is in another store, or deleted for good: its curves are not to be had.
        if run.info.lifecycle_stage != "active":
            return  # Deleted, though not for good: MLflow lets nobody change it.
        for name in run.data.metrics:
            if step > 0 and name.startswith(("train/", "eval/")):
                self._metrics += [m for m in self._client.get_metric_history(earlier, name) if m.step <= step]
        self.flush()
        self.tag(resumed_from=earlier)
        self._client.set_tag(earlier, "plw.superseded_by", self.id)
        if "plw.cell" in run.data.tags:
            self._client.delete_tag(earlier, "plw.cell")
        if run.info.status == RunStatus.to_string(RunStatus.RUNNING):
            self._client.set_terminated(earlier, RunStatus.to_string(RunStatus.KILLED))


@contextmanager
def open_run(config: Any, name: str, run_id: str | None = None) -> Iterator[Run]:
    """Open a run (the one `mlflow run` has begun, if any), or reopen `run_id`; it ends with the block.

    A new run that fails is marked FAILED with the reason as its tag plw.error, an interrupted one KILLED; when adding
    to a reopened one fails, that keeps the status it had. Raises ConnectionError where the tracking server does not
    answer.
    """
    _check_reachable()
    before = None if run_id is None else _get_run(run_id).info.status
    wrapper = None if run_id is None else _leave_wrapper(run_id)
    status = "FINISHED"
    active = mlflow.start_run(run_id=run_id, run_name=None if run_id else name)
    run = Run(active.info.run_id)
    try:
        _check_container(run.id, wrapper, config)
        if run_id is None:
            run.tag(version=__version__, **_origin())
            run.log_config(config)
        with _giving_signs_of_life(run.id):
            yield run
        run.flush()
        run.untag("error")
    except BaseException as error:
        status = before or ("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        with suppress(MlflowException):  # a store that is gone must not hide why the run failed
            run.flush()
            if before is None:
                run.tag(status="failed", error=f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        mlflow.end_run(status)


def load_registered(uri: str) -> tuple[Any, Any]:
    """Model and tokenizer of models:/NAME/VERSION or models:/NAME@ALIAS. Raises ValueError where there is none."""
    _check_reachable()
    try:
        parts = mlflow.transformers.load_model(uri, return_type="components")
    except MlflowException as error:
        raise ValueError(f"model {uri} cannot be loaded: {first_line(error)}") from None
    return parts["model"], parts["tokenizer"]


@contextmanager
def open_sweep(config: Any) -> Iterator[tuple[Run, Callable[[str], str]]]:
    """Open a sweep's parent run; yields it with a function that opens a child for a cell and returns the child's id."""
    with open_run(config, "sweep") as parent:
        client = mlflow.MlflowClient()
        experiment = client.get_run(parent.id).info.experiment_id

        def open_child(name: str) -> str:
            tags = {"mlflow.parentRunId": parent.id}
            return str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)

        yield parent, open_child


def child_environment(run_id: str) -> dict[str, str]:
    """The environment of a process that is to log into `run_id`, and no other run."""
    return os.environ | {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}


def fail(run_id: str) -> None:
    """Mark a run FAILED whose process ended badly, perhaps before it could say so itself."""
    mlflow.MlflowClient().set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))


@contextmanager
def _giving_signs_of_life(run_id: str) -> Iterator[None]:
    """Within the block, a thread changes the run's tag plw.alive every few seconds, whatever else goes on."""
    ended = threading.Event()

    def beat() -> None:
        client = mlflow.MlflowClient()
        while not ended.wait(BEAT_SECONDS):
            with suppress(Exception):  # a store that is away for a while is not this thread's business
                client.set_tag(run_id, "plw.alive", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)


def _await_silence(run_ids: Sequence[str]) -> None:
    """Return once none of the runs is RUNNING, or has given a sign of life for SILENT_SECONDS.

    Raises ValueError if one does meanwhile. No clocks of machines are compared.
    """
    client = mlflow.MlflowClient()

    def signs() -> dict[str, str | None]:
        runs = map(client.get_run, run_ids)
        return {r.info.run_id: r.data.tags.get("plw.alive") for r in runs if r.info.status == "RUNNING"}

    first, started = signs(), time.monotonic()
    if first:
        print(
            f"run {', '.join(first)} has not ended; waiting {SILENT_SECONDS:.0f} s to see whether it trains this cell"
        )
    while (now := signs()) and time.monotonic() < started + SILENT_SECONDS:
        if alive := [run_id for run_id, sign in now.items() if sign != first.get(run_id)]:
            raise ValueError(
                f"another process is training this very cell, as run {', '.join(alive)}; wait for it, or end it"
            )
        time.sleep(min(1.0, SILENT_SECONDS / 10))


def _remove(run_id: str, path: str, tag: str | None = None) -> None:
    """Remove what is no longer needed from a run; that this fails is no reason to stop."""
    try:
        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        get_artifact_repository(run.info.artifact_uri).delete_artifacts(path)
        if tag is not None and f"plw.{tag}" in run.data.tags:
            client.delete_tag(run_id, f"plw.{tag}")
    except Exception as error:  # of whichever store it is
        warnings.warn(f"{path} of run {run_id} cannot be removed ({first_line(error)})", stacklevel=2)


def _leave_wrapper(run_id: str) -> str | None:
    """Where `mlflow run` has opened a run for work on another one, say so on it, and leave it alone; gives its id."""
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)
    if wrapper and wrapper != run_id:
        mlflow.MlflowClient().set_tag(wrapper, "plw.for_run", run_id)
    return wrapper


def score_table(*, sweep: str | None = None, experiment: str | None = None) -> pd.DataFrame:
    """The score table of a sweep's cells, or of all cells of an experiment: scored runs only, the newest of each cell.

    With several methods, a method counts as a model of its own. Raises ValueError where there is nothing.
    """
    _check_reachable()
    client = mlflow.MlflowClient()
    if sweep is not None:
        experiment_id = _get_run(sweep).info.experiment_id
        wanted, what = f"tags.`mlflow.parentRunId` = '{sweep}'", f"sweep {sweep}"
    else:
        found = client.get_experiment_by_name(str(experiment))
        if found is None:
            raise ValueError(f"there is no experiment {experiment!r} in {mlflow.get_tracking_uri()}")
        experiment_id, wanted, what = found.experiment_id, "attributes.status = 'FINISHED'", f"experiment {experiment}"
    runs = client.search_runs(
        [experiment_id], filter_string=wanted, order_by=["attributes.start_time DESC"], max_results=50_000
    )
    newest: dict[tuple[Any, ...], mlflow.entities.Run] = {}
    for run in runs:
        if "plw.cell" in run.data.tags and run.data.tags.get("plw.status") == "scored":
            # By value, as parameters keep their caller's spelling: 1e-2 and 0.01 are one PLW.
            key = (*_cell(run.data.params).values(), run.data.params["method"])
            other = newest.setdefault(key, run)
            if other.data.tags["plw.cell"] != run.data.tags["plw.cell"]:
                raise ValueError(
                    f"{what} holds two kinds of cell that differ in more than {', '.join(CELL_FIELDS)}, such as runs "
                    f"{other.info.run_id} and {run.info.run_id}; delete one kind, or give them experiments of their own"
                )
    if not newest:
        raise ValueError(f"{what} holds no scored cell")
    tables = [
        Run(run.info.run_id)
        .scores()
        .assign(dataset=_cell(run.data.params)["dataset"], method=run.data.params["method"])
        for run in newest.values()
    ]
    table = pd.concat(tables, ignore_index=True)
    if table["method"].nunique() > 1:
        table["model"] += " (" + table["method"] + ")"
    table = table.drop(columns="method")
    table.attrs["source"] = what
    return table


def mark_best(run_id: str) -> str:
    """Give the model version a cell has registered the alias `best`; returns the model's name."""
    name, _, version = _get_run(run_id).data.tags["plw.model_version"].rpartition("/")
    mlflow.MlflowClient().set_registered_model_alias(name, "best", version)
    return name


def best_cells(sweep: str) -> dict[tuple[str, str], str]:
    """The run with the highest score for each (model, dataset) of a sweep."""
    client = mlflow.MlflowClient()
    runs = client.search_runs(
        [_get_run(sweep).info.experiment_id],
        filter_string=f"tags.`mlflow.parentRunId` = '{sweep}' and tags.`plw.status` = 'scored'",
        order_by=["metrics.score DESC"],
        max_results=50_000,  # MLflow's limit
    )
    best: dict[tuple[str, str], str] = {}
    for run in runs:
        best.setdefault((run.data.params["model"], run.data.params["dataset"]), run.info.run_id)
    return best


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


def _cell(params: dict[str, str]) -> dict[str, Any]:
    """A cell's columns in the score table; its data set is named by what was done to it, too."""

    def is_true(name: str) -> bool:
        return bool(click.BOOL(params.get(name) or "false"))  # as the caller spelled it; older runs lack some

    options = DataOptions(
        invert=is_true("invert"),
        mix=params.get("mix") or None,
        mix_invert=is_true("mix_invert"),
        mix_share=float(params.get("mix_share") or DataOptions.mix_share),
    )
    data = data_name(params["dataset"], options)
    return {"model": params["model"], "dataset": data, "plw": float(params["plw"]), "seed": int(params["seed"])}


def _get_run(run_id: str) -> mlflow.entities.Run:
    try:
        return mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"there is no run {run_id!r} in {mlflow.get_tracking_uri()}") from None


def _origin() -> dict[str, str]:
    """The code, its commit and the image it runs in, as far as they are known."""
    found = {"image": origin.image(), "git_commit": origin.commit(), "code_sha256": origin.code_digest(origin.ROOT)}
    return {name: value for name, value in found.items() if value}


def _check_container(run_id: str, wrapper: str | None, config: Any) -> None:
    """In a container, find out before the work whether it is the right code, and whether its results would last.

    wrapper: the run for which MLflow has recorded a commit, where that is another one.
    """
    client = mlflow.MlflowClient()
    place = client.get_experiment(client.get_run(run_id).info.experiment_id).artifact_location
    origin.check_mounted(mlflow.get_tracking_uri(), place)
    worker = wrapper or run_id
    try:
        origin.check_image(client.get_run(worker).data.tags.get("mlflow.source.git.commit"))
    except ValueError as error:
        if not config.allow_stale_image:
            raise
        warnings.warn(str(error), stacklevel=2)
        client.set_tag(worker, "plw.stale_image", "true")


def _quiet() -> None:
    """Keep MLflow's notes on migrations and absent model cards from between a person and the numbers."""
    for logger, level in (
        ("alembic", logging.WARNING),
        ("mlflow", logging.WARNING),
        ("mlflow.transformers", logging.ERROR),
    ):
        logging.getLogger(logger).setLevel(level)


def _check_reachable() -> None:
    """Ask the tracking server one thing, without the minutes of retries that MLflow would spend."""
    _quiet()
    patient = {
        name: os.environ.get(name) for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    }
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:
        uri = mlflow.get_tracking_uri()
        raise ConnectionError(f"the tracking store {uri} cannot be used: {first_line(error)}") from None
    finally:
        for name, value in patient.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
