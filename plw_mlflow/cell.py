"""A cell from data to scores, in one MLflow run: what the entry points main, train and evaluate do.

Several processes may train a cell together. The first one leads: it has the cell's run, its checkpoints, and in the end
the trained model. The others assist: they prepare the same data and the same model, and take their part in the
training.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from plw_mlflow import tracking
from plw_mlflow.config import (
    DataOptions,
    EvaluateConfig,
    MainConfig,
    ScoreOptions,
    TrainConfig,
    digest,
    recorded_data_options,
    split_list,
)
from plw_mlflow.data import prepare, profile, sources, templates, weights
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import answer_ends
from plw_mlflow.environment import outputs, precision
from plw_mlflow.environment.precision import Precision
from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import evaluate, held_out, measures, prompting, questions, scores, task_sets
from plw_mlflow.evaluation.held_out import HeldOut
from plw_mlflow.evaluation.prompting import Wrapping
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import adapters, causal, export, held, location, pad_token, pretrained, saved_adapters
from plw_mlflow.tracking import Run, StoredCheckpoints
from plw_mlflow.training import checkpoints, measured, optimizers, recomputation, train

ENDS_FROM_EXAMPLES = 100  # training examples that are looked at to see how answers end


def run(config: TrainConfig) -> None:
    """Prepare, train and log one cell, and score it if `config` is a MainConfig.

    Every process that trains the cell calls this.
    """
    check_machine(config)  # said before a run is opened
    if not is_first_process():
        assist(config)
        return
    with tracking.holding_lease(), tracking.open_run(config, config.cell_name()) as opened:
        lead(config, opened)
    print(f"\nrun {opened.id}\n{opened.address()}")


def assist(config: TrainConfig) -> None:
    """Take part in the training that the first process leads."""
    tokenizer, prepared = _prepare(config)
    model, _ = _load_model(config, prepared, tokenizer)
    train.run(config, prepared, model, config.checkpoint_dir)


def lead(config: TrainConfig, run: Run) -> None:
    """Do all that is to be done for a cell, in its run.

    The unfinished cell's checkpoints, on disk and in the store, are kept until everything is in the run. If they exist
    already, training goes on from the newest of them.
    """
    if isinstance(config, MainConfig):  # unknown tasks, and arithmetic that the device has not, fail before training
        tasks, arithmetic = load_tasks(config), _arithmetic_of_cell(config)
    tokenizer, prepared = _prepare(config)
    sets: list[HeldOut] = []
    if isinstance(config, MainConfig):
        sets = held_out.read(split_list(config.held_out or ""), tokenizer, config, config.limit)
        held_out.warn_of_overlap(sets, prepared.training)
    tracking.log_data(run, prepared)
    tracking.log_prompt_weight(run, config.plw, prepared.prompt_share(weights.of_loss(config.plw, config)))
    prepare.write(prepared, config.output)
    print(profile.text(prepared.profile))
    model, has_new_token = _load_model(config, prepared, tokenizer)
    contents = _contents(config, prepared, tokenizer)
    key = digest(config.identity() | contents)
    folder = config.checkpoint_dir / key
    with checkpoints.reserve(folder):
        checkpoints.set_aside_unusable(folder, key)  # before the newest one on disk is compared with the store's
        run.tag(base_model=contents["base"], precision=contents["precision"])
        run.tag(examples_sha256=prepared.digest, tokenizer_sha256=contents["tokenizer"])
        peak = measured.find_peak(model, contents["precision"], config.max_tokens)
        run.tag(mfu_peak=peak.named)
        stored = StoredCheckpoints(run, key)
        stored.fetch(folder, newer_than=checkpoints.newest_step(folder))
        trained = train.run(
            config,
            prepared,
            model,
            folder,
            log=run.curves.log_step,
            before_save=run.curves.save_unsent,
            after_save=stored.store if config.store_checkpoints else lambda saved: None,
            cell=key,
            begin=lambda step: tracking.begin_cell(run, key, folder, step),
            peak=peak,
        )
        run.curves.flush()
        _report(trained)
        with tempfile.TemporaryDirectory() as scratch:
            adapter = Path(scratch)
            model = _merge(config, trained.model, adapter, tokenizer, prepared, contents["base"], has_new_token)
            known = _weight_distance(config, model)  # before the weights are rounded to be kept
            _keep(config, run, model, adapter, tokenizer, prepared, trained)
        if isinstance(config, MainConfig):
            # Measured first, as scoring in bfloat16 rounds the weights.
            _measure(config, run, model, tokenizer, config.model, config.dataset, config, known)
            _score(config, run, model, tokenizer, tasks, sets, folder, arithmetic)
        tracking.describe_cell(run)
        stored.remove()
        checkpoints.remove(folder)


def check_machine(config: TrainConfig) -> None:
    """Raise UserError where this machine cannot train a cell's model as asked."""
    optimizers.check(config.optimizer)
    if config.activation_checkpointing:
        recomputation.check(pretrained.load_config(config.model))


def check_data(config: TrainConfig) -> None:
    """Raise UserError where a cell's data cannot be trained or measured on. The cache then has them."""
    tokenizer, _ = _prepare(config)
    if isinstance(config, MainConfig):
        held_out.read(split_list(config.held_out or ""), tokenizer, config)


def identify(config: TrainConfig) -> tuple[str, dict[str, str]]:
    """What identifies a cell: a digest, and the contents that it is of, beside the options.

    The data are read for it, and tokenised if they have not been.
    """
    tokenizer, prepared = _prepare(config)
    contents = _contents(config, prepared, tokenizer)
    return digest(config.identity() | contents), contents


def _prepare(config: TrainConfig) -> tuple[Any, Prepared]:
    """The tokenizer and the prepared data of a cell. Raises UserError where the model cannot be trained on them."""
    settings = pretrained.load_config(config.model)
    _check_recipe(settings, config)
    tokenizer = pretrained.load_tokenizer(config.model, config.tokenizer)
    prepared = prepare.run(config.dataset, tokenizer, config, weights.of_loss(config.plw, config))
    if isinstance(config, MainConfig):
        measures.check(split_list(config.measures or ""), len(prepared.validation))
    template = templates.file(config.template)
    if template is not None and template.suffix == ".jinja":  # the model is to be used as it was trained
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if causal.length_limit(settings) is not None:  # few models have one, and all examples are read for it
        longest = max(len(example.tokens) for part in (prepared.training, prepared.validation) for example in part)
        causal.check_length(settings, longest)
    return tokenizer, prepared


def _load_model(config: TrainConfig, prepared: Prepared, tokenizer: Any) -> tuple[Any, bool]:
    """The model to train, and whether a padding token was added to it and to the tokenizer.

    Only the first process reads the weights, unless they are held in 4 bits; the others are given them in training.
    """
    arithmetic = getattr(torch, precision.resolve(config.precision, config.model))
    if is_first_process() or config.method == "qlora":
        model = pretrained.load(
            config.model,
            dropout=config.dropout,
            four_bit=arithmetic if config.method == "qlora" else None,
            # An added token gets a row of the head, which is saved, so it must not be rounded first.
            held_in=arithmetic if config.method in ("lora", "dora") and not config.add_pad_token else None,
        )
    else:
        model = pretrained.outline(config.model, dropout=config.dropout)
    _check_vocabulary(model, prepared, config)
    return model, config.add_pad_token and pad_token.add(model, tokenizer)


def _contents(config: TrainConfig, prepared: Prepared, tokenizer: Any) -> dict[str, str]:
    """What identifies the cell beside its options: the contents of what they name, and the arithmetic."""
    return {
        "data": ",".join(source.sha256 for source in prepared.sources),
        "examples": prepared.digest,
        "base": location.digest(config.model),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "precision": precision.resolve(config.precision, config.model),
    }


def _report(trained: train.Trained) -> None:
    if trained.resumed_from:
        print(f"went on from the checkpoint of step {trained.resumed_from} of {trained.steps}")
    if trained.resumed_from < trained.steps:
        print(f"trained to step {trained.steps}, {trained.tokens_per_second:.0f} tokens per second")


def _merge(
    config: TrainConfig,
    model: Any,
    adapter: Path,
    tokenizer: Any,
    prepared: Prepared,
    base: str,
    has_new_token: bool,
) -> Any:
    """The trained model with its adapters merged, which are saved to a folder.

    Its linear layers are held in bfloat16 if nothing that is done with it needs them in float32. Where nothing needs
    the whole model, this is the base that the adapters are on.

    base: what identifies the base model's content.
    """
    # Adapters are small, so they are rounded only where that is asked for.
    kind = torch.bfloat16 if config.save_precision == "bfloat16" else torch.float32
    adapters.save(model, adapter, with_embeddings=has_new_token, kind=kind)
    if any(adapter.iterdir()):
        saved_adapters.note_base(adapter, config.model, base, _saved_precision(config))
    if isinstance(config, MainConfig) or config.output is not None or config.logged() == "merged":
        merged = adapters.merge(model, adapter, torch.float32 if _needs_float32(config) else torch.bfloat16)
    else:
        merged = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = min(ENDS_FROM_EXAMPLES, len(prepared.training))
    examples = (prepared.training[index] for index in range(count))
    end_generation(merged, answer_ends(examples, tokenizer, config.max_tokens))
    return merged


def _needs_float32(config: TrainConfig) -> bool:
    """Whether the trained model's linear layers are needed in float32: to be saved, measured, or scored so."""
    types = {_saved_precision(config)} if config.output is not None or config.logged() == "merged" else set()
    if isinstance(config, MainConfig):
        types.add("float32" if config.measures else _arithmetic_of_cell(config))
    return "float32" in types


def _keep(
    config: TrainConfig, run: Run, model: Any, adapter: Path, tokenizer: Any, prepared: Prepared, trained: train.Trained
) -> None:
    """Write the trained model to the output folder, and log it or its adapter; the model becomes what was logged.

    A whole model that is logged is scored with the numbers that it was rounded to; one that is logged as its adapter
    with those of the sum of base and adapter in float32. In both cases whoever loads it back scores the same model.
    Where an earlier process has trained to the end and logged the model, it is not logged again.
    """
    kind: torch.dtype = getattr(torch, _saved_precision(config))
    example = _example(config, tokenizer)
    run.tag(save_precision=_saved_precision(config))
    kept = config.logged()
    if kept == "merged":
        held.round_weights(model, kind)
    export.write(model, tokenizer, adapter, config.output, kind)
    if kept == "none":
        run.tag(status="trained")
    elif trained.resumed_from == trained.steps and tracking.is_logged(run):
        print("the model is in the run already")
    elif kept == "merged":
        run.log_folder(adapter, outputs.ADAPTER)
        tracking.log_model(run, model, tokenizer, config, prepared.sources, trained.steps, example)
    else:
        tracking.log_adapter(run, adapter, model, tokenizer, config, prepared.sources, trained.steps, example)
    if isinstance(config, MainConfig):  # which scores it
        held.widen(model, but_linear=not _needs_float32(config))


def _example(config: TrainConfig, tokenizer: Any) -> str:
    """A prompt in the template that a cell is trained with, as an example of what its model may be asked."""
    instruction = "Write one sentence about a river."
    wrapping = prompting.wrapping(config.template, tokenizer, config.prompt_border)
    try:
        return str(wrapping([{"role": "user", "content": instruction}]))
    except UserError:  # a template may hold nothing but what is in its own data
        return instruction


def _saved_precision(config: TrainConfig) -> str:
    """The type in which whole models of a cell are saved."""
    return precision.saved(config.save_precision, config.precision, config.model)


def end_generation(model: Any, ends: Sequence[int]) -> None:
    """Have a model's generation settings name further tokens that end a text, beside those that they name."""
    before = causal.text_ends(model)
    if not before.issuperset(ends):
        model.generation_config.eos_token_id = sorted(before.union(ends))


def _arithmetic_of_cell(config: MainConfig) -> Precision:
    """The type of the arithmetic in which a cell is scored: that of its training, unless another one is asked for."""
    asked = config.precision if config.eval_precision == "auto" else config.eval_precision
    return precision.resolve(asked, config.model)


def _score(
    config: MainConfig,
    run: Run,
    model: Any,
    tokenizer: Any,
    tasks: Any,
    sets: Sequence[HeldOut],
    folder: Path,
    arithmetic: Precision,
) -> None:
    """Score the trained model on tasks and held-out sets, and log, write and print the scores."""
    wrapping = prompting.wrapping(config.template, tokenizer, config.prompt_border) if config.apply_template else None
    evaluation = evaluate.run(model, tokenizer, tasks, config, config.fewshot_seed, folder, wrapping, arithmetic, sets)
    rows = scores.table(evaluation, run.cell())
    tracking.log_scores(run, evaluation, rows)
    scores.write(rows, config.output)
    questions.write(evaluation, rows, config.output)
    print(scores.text(evaluation))
    if remark := task_sets.remark(config.tasks, config.dataset):
        print(remark)


def score_model(config: EvaluateConfig) -> None:
    """Score the model of an earlier run in that run, or any other model in a run of its own.

    Answers are kept in a folder until the scores are in the run, so that a scoring that was killed goes on.
    """
    folder = config.checkpoint_dir / digest({"run": config.run_id, "of": config.model, "at": config.endpoint})
    title = f"evaluate {config.model}"
    with (
        checkpoints.reserve(folder),
        tracking.open_run(config, title, config.run_id, experiment=tracking.LOOKING) as run,
    ):
        tasks = load_tasks(config)  # unknown tasks fail before a large model is read
        is_of_cell = config.run_id is not None
        cell_columns = run.cell() if is_of_cell else _no_cell(config.model)  # before hours of scoring, as it may fail
        if config.endpoint is not None:
            from plw_mlflow.evaluation.endpoint import Endpoint  # slow to import

            endpoint = Endpoint(config.endpoint, str(config.model), config.tokenizer, folder, config.endpoint_key_env)
            wrapping = _wrapping(config, run, endpoint.tokenizer)
            evaluation = evaluate.score(endpoint, tasks, config, config.fewshot_seed, wrapping)
        else:
            arithmetic = _arithmetic(config, run)  # before a large model is read, as the device may not have it
            model, tokenizer = _load_for_scoring(config, run, arithmetic)
            wrapping, sets = _wrapping(config, run, tokenizer), _held_out(config, run, tokenizer)
            if is_of_cell:  # before scoring in bfloat16 rounds the weights
                _measure_again(config, run, model, tokenizer)
            evaluation = evaluate.run(
                model, tokenizer, tasks, config, config.fewshot_seed, folder, wrapping, arithmetic, sets
            )
        rows = scores.table(evaluation, cell_columns)
        measurements = [score.key for score in evaluation.primary]
        tracking.log_scores(run, evaluation, rows, task_sets.whole(measurements) if is_of_cell else measurements)
        shutil.rmtree(folder, ignore_errors=True)
        scores.write(rows, config.output)
        questions.write(evaluation, rows, config.output)
        print(text := scores.text(evaluation))
        if is_of_cell:
            if remark := task_sets.remark(config.tasks, cell_columns["dataset"]):
                print(remark)
            tracking.describe_cell(run)
        else:
            run.describe(f"Scores of `{config.model}`, which is no cell's model.\n\n```\n{text}\n```")
    print(f"\nrun {run.id}\n{run.address()}")


def _arithmetic(config: EvaluateConfig, run: Run) -> Precision:
    """The type of the arithmetic in which a model is scored.

    Unless one is asked for, it is that in which the run's cell, or the one that a registered model is of, was trained;
    for other models it is what is fast on this device. Raises UserError for one that is asked for and that the device
    has not; in place of a cell's, a warning says so.
    """
    if config.eval_precision != "auto":
        return precision.resolve(config.eval_precision, str(config.model))
    if config.model is None:
        trained_in = run.read_tag("precision") or "float32"  # as older runs were, which do not say it
    else:
        trained_in = tracking.trained_in(config.model) or "auto"
    try:
        return precision.resolve(trained_in, str(config.model))
    except UserError as error:
        warnings.warn(f"{error}; the cell was trained in {trained_in}, and is scored in float32 here", stacklevel=2)
        return "float32"


def _load_for_scoring(config: EvaluateConfig, run: Run, arithmetic: Precision) -> tuple[Any, Any]:
    """The model and the tokenizer that a run has logged, or that a name in MLflow's registry or a place means.

    Where nothing but scoring is asked for, its linear layers are held in the type of the arithmetic from the start.
    """
    held_in = torch.bfloat16 if arithmetic == "bfloat16" and not config.measures else None
    if config.model is None:
        return tracking.load_model(run, config.base, held_in)
    if config.model.startswith("models:/"):
        return tracking.load_registered(config.model, config.base, held_in)
    return pretrained.load_for_scoring(config.model, config.base, held_in)


def _no_cell(model: str | None) -> dict[str, Any]:
    """The columns of the score table that name a cell, for a model that no cell has trained."""
    return {"model": model, "dataset": "", "plw": "", "seed": ""}


def _wrapping(config: EvaluateConfig, run: Run, tokenizer: Any) -> Wrapping | None:
    """What puts prompts into the template of the run's cell, or of a model without a cell; None if not asked for.

    Raises UserError where there is no template.
    """
    if not config.apply_template:
        return None
    if config.run_id is None:
        return prompting.own_wrapping(str(config.model), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        options = run.config(Path(folder))
        return prompting.wrapping(options["template"], tokenizer, options.get("prompt_border", "offsets"))


def _held_out(config: EvaluateConfig, run: Run, tokenizer: Any) -> list[HeldOut]:
    """The held-out data sets that are asked for, whose examples are made as those of the run's cell were."""
    if config.held_out is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        data = recorded_data_options(run.config(Path(folder)), config.data_dir)
    return held_out.read(split_list(config.held_out), tokenizer, data, config.limit)


def _weight_distance(config: TrainConfig, model: Any) -> dict[str, float]:
    """The measure weight_distance of a trained model, if it is asked for."""
    if not isinstance(config, MainConfig) or "weight_distance" not in split_list(config.measures or ""):
        return {}
    return measures.weight_distance(model, pretrained.load(config.model).to(model.device))


def _measure(
    scoring: ScoreOptions,
    run: Run,
    model: Any,
    tokenizer: Any,
    base: str,
    dataset: str,
    data: DataOptions,
    known: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Log and print the measures that `scoring` names, of the model that the run has trained. known: some of them."""
    if chosen := split_list(scoring.measures or ""):
        losses = list(run.curves.values("train/loss").values())
        missing = [name for name in chosen if name not in known]
        values = {**known}
        values |= measures.run(missing, model, tokenizer, base, dataset, data, scoring.measure_prompts, losses)
        tracking.log_measures(run, values)
        print("\n".join(f"measure/{name:<42}{value:>12.5g}" for name, value in values.items()))


def _measure_again(config: EvaluateConfig, run: Run, model: Any, tokenizer: Any) -> None:
    """Log and print the measures of the model that an earlier run has trained, by the options of that run.

    Raises UserError where its data are no longer what it was trained on.
    """
    if not config.measures:
        return
    with tempfile.TemporaryDirectory() as folder:
        options = run.config(Path(folder))
        data = recorded_data_options(options, config.data_dir)
        cache = prepare.cache_dir(data)
        datasets = [name for name in (options["dataset"], data.mix) if name]
        tracking.check_data(run, [sources.find(name, cache, data.data_dir) for name in datasets])
        _measure(config, run, model, tokenizer, options["model"], options["dataset"], data)


def _check_recipe(settings: Any, config: TrainConfig) -> None:
    """Raise UserError where a model's settings (`pretrained.load_config`) show that it cannot be trained as asked."""
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise UserError(f"max-tokens is {config.max_tokens}, but {config.model} has {positions} positions")
    stored = getattr(settings, "quantization_config", None)
    if stored is not None and config.method == "full":
        kind = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise UserError(
            f"{config.model} is stored in fewer bits ({kind}), which method full cannot train; name the model that it "
            f"was made of, or use --method lora"
        )


def _check_vocabulary(model: Any, prepared: Prepared, config: TrainConfig) -> None:
    """Raise UserError where the examples are of another vocabulary than the model's."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if prepared.largest_token >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {prepared.largest_token}, but {config.model} knows only {vocabulary} tokens"
        )
