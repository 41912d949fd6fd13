"""Logged models: trained models in the store and its registry, and how they come back."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
import yaml
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.models.signature import ModelSignature
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from plw_mlflow.config import MODELS, data_name, short_name, spell
from plw_mlflow.data.sources import NAMED, TOY, Source
from plw_mlflow.environment import provenance
from plw_mlflow.errors import UserError, first_line, without_passwords
from plw_mlflow.models import held, licences, pretrained, saved_adapters
from plw_mlflow.models.files import reading
from plw_mlflow.tracking import cards, connection
from plw_mlflow.tracking.cells import CELL_FIELDS, parameters
from plw_mlflow.tracking.connection import check_reachable, patiently
from plw_mlflow.tracking.run import Run
from plw_mlflow.tracking.scores import read_scores

if TYPE_CHECKING:
    import torch

TASK = "text-generation"
MODEL, MERGED = "model", "merged"  # names of a run's model, and of the whole one that an adapter was made into later
WHOLE, ADAPTER = "whole model", "adapter"  # what a registered version is, by its tag plw.form
PEFT = "peft"  # the folder of an adapter in a logged model, as MLflow names it
EXAMPLE = "Write one sentence about a river."  # of what a model may be asked
# Texts go in and come out, longer. The parameters have these values where a request does not give them.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string)]),
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", DataType.long, 256),
            ParamSpec("do_sample", DataType.boolean, False),
            ParamSpec("temperature", DataType.double, 1.0),
            ParamSpec("top_p", DataType.double, 1.0),
        ]
    ),
)
NAME_CHARACTERS = 64  # of each name within a registered model's, which may have 256


def log_model(
    run: Run,
    model: Any,
    tokenizer: Any,
    config: Any,
    sources: Sequence[Source] = (),
    step: int = 0,
    example: str = EXAMPLE,
) -> None:
    """Log a plain transformers model as the run's, and register it as a version of plw-MODEL-DATASET.

    sources: of the data it was trained on. step: the last of the training. The model's page shows the run's metrics of
        that step. example: a prompt, as the model reads prompts.
    """
    save = partial(_save_whole, model=model, tokenizer=tokenizer, example=example)
    _log(run, config, sources, {"form": WHOLE}, save, step)


def log_adapter(
    run: Run,
    adapter: Path,
    model: Any,
    tokenizer: Any,
    config: Any,
    sources: Sequence[Source] = (),
    step: int = 0,
    example: str = EXAMPLE,
) -> None:
    """Log a folder of adapters as the run's model, without its base, and register it likewise.

    adapter: with the file of `saved_adapters.note_base`, whose base has to be there when the model is loaded.
    model: the trained one, with the adapters merged. The others are as of `log_model`.

    MLflow loads it back in two ways: by its flavour transformers, as peft's model on the base, and by the flavour
    pyfunc (`adapter_model.py`), which also compares the base with the one of the training.
    """
    note = saved_adapters.trained_on(adapter)
    assert note is not None  # it was just written
    save = partial(_save_adapter, adapter=adapter, model=model, tokenizer=tokenizer, example=example)
    _log(run, config, sources, {"form": ADAPTER, "base": note["base"], "base_digest": note["digest"]}, save, step)


def log_merged(run_id: str) -> str:
    """Log the whole model of a finished run that has logged an adapter, as another model of that run.

    It is registered under the same name. Returns its version there. An earlier one is found and not logged again.
    """
    import torch

    run = Run(run_id)
    tags = patiently("reading the run", lambda: run.client.get_run(run_id)).data.tags
    if "plw.merged_version" in tags:
        return tags["plw.merged_version"].rpartition("/")[2]
    name, _, version = tags["plw.model_version"].rpartition("/")
    adapter_tags = run.client.get_model_version(name, version).tags
    outputs: Any = run.client.get_run(run_id).outputs
    kind = getattr(torch, tags["plw.save_precision"])
    model, tokenizer = load_model(run, held_in=kind)
    held.round_weights(model, kind)
    step = next(output.step for output in outputs.model_outputs if output.model_id == run.model_id)
    save = partial(_save_whole, model=model, tokenizer=tokenizer, example=_example(f"models:/{run.model_id}"))
    model_id, sha256 = patiently("logging the model", lambda: _log_files(run_id, save, MERGED, step))
    own_tags = {**adapter_tags, "plw.form": WHOLE, "plw.merged_from": version, "plw.sha256": sha256}
    merged = patiently("registering the model", lambda: _register(run, f"models:/{model_id}", name, own_tags))
    patiently("tagging the run", lambda: run.tag(merged_version=f"{name}/{merged}"))
    patiently("describing the model", lambda: cards.write(run, read_scores(run)))
    return merged


def _log(
    run: Run, config: Any, sources: Sequence[Source], more_tags: Mapping[str, str], save: Callable[..., None], step: int
) -> None:
    """Log what a function saves as the run's model, and register it; `more_tags` are of its version."""
    name = _registered_name(run, config, sources)
    run.model_id, sha256 = patiently("logging the model", lambda: _log_files(run.id, save, MODEL, step))
    tags = {field: spell(getattr(config, field)) for field in CELL_FIELDS} | {**more_tags, "sha256": sha256}
    known = {"base": licences.of_model(config.model), "data": ", ".join(filter(None, (one.licence for one in sources)))}
    tags |= {f"{what}_licence": licence for what, licence in known.items() if licence}
    each = [known["base"], *(one.licence for one in sources)]
    if any(map(licences.is_noncommercial, each)) or all(each):  # else nobody here knows
        tags["noncommercial"] = spell(any(map(licences.is_noncommercial, each)))
    shown = {f"plw.{key}": without_passwords(value) for key, value in tags.items()}
    version = patiently("registering the model", lambda: _register(run, f"models:/{run.model_id}", name, shown))
    patiently(
        "tagging the run",
        lambda: run.tag(status="trained", model_version=f"{name}/{version}", model_sha256=sha256),
    )
    patiently("describing the model", lambda: cards.write(run, pd.DataFrame()))


def _log_files(run_id: str, save: Callable[..., None], name: str, step: int) -> tuple[str, str]:
    """Log what a function saves as a model of a run; returns its id, and what identifies its files."""
    sha256 = ""

    def save_and_digest(path: str, mlflow_model: Model, **_: Any) -> None:
        nonlocal sha256
        save(path, mlflow_model)
        sha256 = files_digest(Path(path))

    flavor = SimpleNamespace(save_model=save_and_digest)
    # The example is not tried out here, for which MLflow would load the model once more.
    logged: ModelInfo = Model.log(None, flavor, name=name, run_id=run_id, step=step, validate_serving_input=False)
    return str(logged.model_id), sha256


def files_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files of a logged model, but for those that loading it leaves there."""
    sha256 = hashlib.sha256()
    left_by_loading = {"__pycache__", "registered_model_meta"}  # MLflow writes the latter into a store on this machine
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        if left_by_loading & {*path.parts}:
            continue
        sha256.update(f"{path.as_posix()}\0".encode())
        with (folder / path).open("rb") as content:
            sha256.update(hashlib.file_digest(content, "sha256").digest())
    return sha256.hexdigest()


def _save_whole(path: str, mlflow_model: Model, *, model: Any, tokenizer: Any, example: str) -> None:
    """Write a whole model as MLflow's flavour transformers has it."""
    with _without_peft():
        mlflow.transformers.save_model(
            path=path,
            mlflow_model=mlflow_model,
            transformers_model={"model": model, "tokenizer": tokenizer},
            task=TASK,
            signature=SIGNATURE,
            input_example=_with_parameters(example),
            # Named here because MLflow would otherwise load the model in a process of its own to find out.
            pip_requirements=_requirements("torch", "transformers"),
        )


def _with_parameters(example: str) -> tuple[list[str], dict[str, Any]]:
    """A prompt as MLflow takes an example of what a model is given: with the parameters of the generation."""
    return [example], {"max_new_tokens": 32}


def _example(uri: str) -> str:
    """The prompt that a model was logged with as an example."""
    with _downloaded(uri) as folder:
        saved: Any = Model.load(str(folder)).load_input_example(str(folder))
    return str(saved[0] if isinstance(saved, list) else saved.iloc[0, 0]) if saved is not None else EXAMPLE


@contextmanager
def _without_peft() -> Iterator[None]:
    """Within the block, peft cannot be imported, unless it was before.

    MLflow imports it to ask whether a model is one of peft's, which takes 2 to 3 processor seconds. It is none as long
    as nobody has imported peft, and MLflow takes a peft that is not to be had for that answer.
    """
    if "peft" in sys.modules:
        yield
        return
    sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["peft"]


def _save_adapter(path: str, mlflow_model: Model, *, adapter: Path, model: Any, tokenizer: Any, example: str) -> None:
    """Write an adapter as MLflow's flavours have it; MLflow's own function would need peft's model of it, and the hub.

    MLflow then loads base and tokenizer of the hub by their commit. A base that is a folder it loads from where that
    is now, unless another place is given (`base_model_path`).
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    where = {"local_base_model_path": base}
    if revision is not None:
        where = {"source_model_revision": revision, "tokenizer_name": base, "tokenizer_revision": revision}
    mlflow_model.add_flavor(
        "transformers",
        transformers_version=provenance.fingerprint()["transformers"],
        code=None,
        task=TASK,
        instance_type="TextGenerationPipeline",
        pipeline_model_type=type(model).__name__,
        source_model_name=base,
        torch_dtype="torch.float32",  # in which the adapters were merged to be scored
        peft_adaptor=PEFT,
        components=["tokenizer"],
        tokenizer_type=type(tokenizer).__name__,
        **where,
    )
    mlflow.pyfunc.save_model(
        path,
        mlflow_model=mlflow_model,
        python_model=str(Path(__file__).with_name("adapter_model.py")),
        model_config={"base": ""},
        signature=SIGNATURE,
        input_example=_with_parameters(example),
        pip_requirements=_requirements("mlflow", "torch", "transformers", "peft"),
    )
    folder = Path(path)
    shutil.copytree(adapter, folder / PEFT)
    model.generation_config.save_pretrained(folder / PEFT)
    tokenizer.save_pretrained(folder / "components" / "tokenizer")
    mlflow_model.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    mlflow_model.save(str(folder / "MLmodel"))


def _requirements(*packages: str) -> list[str]:
    versions = provenance.fingerprint()
    return [f"{package}=={versions[package]}" for package in packages]


def is_logged(run: Run) -> bool:
    """Whether a run has logged and registered its model already; its scores are then that one's."""
    if run.read_tag("model_version") is None:
        return False
    try:
        run.model_id = _own_model(run)
    except UserError:  # it was removed
        return False
    return True


def load_model(run: Run, base: str | None = None, held_in: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model and tokenizer that a run has logged; an adapter is merged into its base.

    base: where the base of an adapter is, in place of where it was in training.
    held_in: as of `pretrained.load_for_scoring`.

    Raises UserError where there is no model, or it is damaged, or its base is another one now.
    """
    run.model_id = _own_model(run)
    return _load(f"models:/{run.model_id}", base, held_in)


@contextmanager
def folder_of(run: Run) -> Iterator[Path]:
    """The files of the model that a run has logged, for the block. Raises UserError where there is none."""
    with _downloaded(f"models:/{_own_model(run)}") as folder:
        yield folder


def _own_model(run: Run) -> str:
    """The id of the model that a run has logged. Raises UserError where there is none."""
    found = connection.get_run(run.id)
    outputs = found.outputs.model_outputs if found.outputs else []
    logged = [run.client.get_logged_model(output.model_id) for output in outputs]
    complete = [model.model_id for model in logged if model.status == LoggedModelStatus.READY and model.name != MERGED]
    if not complete:
        if parameters(found).get("log_model") == "none":
            raise UserError(f"run {run.id} has logged no model, as it was told to (--log-model none)")
        raise UserError(f"run {run.id} has logged no model; train it first")
    return str(complete[-1])


def load_registered(uri: str, base: str | None = None, held_in: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of models:/NAME/VERSION, models:/NAME@ALIAS or models:/ID.

    An adapter is merged into its base.

    base, held_in: as of `load_model`.

    Raises UserError where there is none, where it is no text-generation model of MLflow's flavour transformers, and
    where `pretrained.load` does.
    """
    check_reachable()
    return _load(uri, base, held_in)


def trained_in(model: str) -> str | None:
    """The type of the arithmetic in which the cell of a model in MLflow was trained; None for other models."""
    if not model.startswith("models:/"):
        return None
    check_reachable()
    client = mlflow.MlflowClient()
    try:
        name, *version = get_model_name_and_version(client, model)  # of models:/ID, which is not registered, the id
        run_id = (
            client.get_model_version(name, *version).run_id if version else client.get_logged_model(name).source_run_id
        )
        return client.get_run(run_id).data.tags.get("plw.precision") if run_id else None
    except MlflowException:  # there is no such model, which loading it will say, or its run is gone
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
    with connection.without_notes():  # which say no more than the line below
        registered = mlflow.register_model(source, name, tags=tags)
    print(f"registered the model as {name}, version {registered.version}")
    return str(registered.version)


def _load(uri: str, base: str | None, held_in: torch.dtype | None) -> tuple[Any, Any]:
    """Model and tokenizer of a logged model. MLflow's functions would run program code that lies among its files."""
    with _downloaded(uri) as folder:
        is_adapter = _is_adapter(uri, folder / "MLmodel")
        # The folders always have these names. Whatever else the MLmodel file names is not followed.
        model, tokenizer = folder / (PEFT if is_adapter else "model"), folder / "components" / "tokenizer"
        for part in (model, tokenizer):
            if not part.is_dir():
                raise UserError(f"model {uri} lacks the folder {part.relative_to(folder)}")
        if base is not None and not is_adapter:
            raise UserError(f"base is an option for adapters, but {uri} is a whole model")
        try:
            load = partial(_load_adapter, base=base) if is_adapter else pretrained.load
            loaded = load(str(model), held_in=held_in)
            return loaded, pretrained.load_tokenizer(str(tokenizer))
        except ValueError as error:  # the folder may be a temporary one, which means nothing to the caller
            raise UserError(str(error).replace(str(folder), uri)) from None


def _load_adapter(place: str, base: str | None, held_in: torch.dtype | None) -> Any:
    folder = Path(place)
    if not (folder / "adapter_model.safetensors").is_file():  # peft would read a pickle in its place
        raise UserError(f"model {folder.parent} lacks the file {folder.name}/adapter_model.safetensors")
    model, _ = pretrained.load_adapted(folder, base, is_same=True, held_in=held_in)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with reading("the generation settings of", str(folder)):
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _is_adapter(uri: str, file: Path) -> bool:
    """Whether an MLmodel file describes an adapter, and not a whole model.

    Raises UserError unless it describes a text-generation model with its weights, or its adapter, and its tokenizer.
    """
    try:
        flavors = yaml.safe_load(file.read_text(encoding="utf-8"))["flavors"]
        saved = flavors.get("transformers")
        kinds, task = ", ".join(flavors), saved and saved.get("task")
        is_adapter = saved and saved.get("peft_adaptor") == PEFT
        has_weights = is_adapter or (saved and saved.get("model_binary") == "model")
        is_complete = has_weights and "tokenizer" in saved.get("components")
    except Exception as error:
        raise UserError(
            f"model {uri} cannot be loaded: its MLmodel is damaged ({type(error).__name__}: {first_line(error)})"
        ) from None
    if not saved:
        raise UserError(f"model {uri} is of the flavour {kinds}; models of the flavour transformers are loaded")
    if task != TASK:
        raise UserError(f"model {uri} is for the task {task}; models for text-generation are loaded")
    if not is_complete:
        raise UserError(f"model {uri} lacks its own weights or its tokenizer; log both with it")
    return bool(is_adapter)


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
