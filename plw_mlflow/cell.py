"""A cell from data to scores, in one MLflow run: what the entry points main and train share."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from plw_mlflow.config import (
    DataOptions,
    EvaluateConfig,
    MainConfig,
    ScoreOptions,
    TrainConfig,
    data_name,
    digest,
    names,
    short_name,
)
from plw_mlflow.data import prepare, profile, sources, templates
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example, answer_ends
from plw_mlflow.environment import outputs
from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import evaluate, measures, prompting, scores
from plw_mlflow.evaluation.prompting import Wrapping
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import adapters, causal, export, location, pad_token, pretrained, saved_adapters
from plw_mlflow.tracking import Run
from plw_mlflow.training import checkpoints, train


def name(config: TrainConfig) -> str:
    """What MLflow's list of runs calls the cell."""
    data, model = data_name(config.dataset, config, short_name), short_name(config.model)
    return f"plw {config.plw:g} {data} {model} {config.method} seed {config.seed}"  # lists cut long names off


def run(config: MainConfig, run: Run) -> None:
    """Prepare, train and evaluate; the unfinished cell's checkpoints are kept until its scores are in the run."""
    tasks = load_tasks(config)  # an unknown task is to be found before the training, not after it
    with trained(config, run) as done:
        if done is None:
            return
        model, tokenizer, folder = done
        wrapping = (
            prompting.wrapping(config.template, tokenizer, config.prompt_border) if config.apply_template else None
        )
        evaluation = evaluate.run(model, tokenizer, tasks, config, config.fewshot_seed, folder, wrapping)
        rows = scores.table(evaluation, run.cell())
        run.log_scores(evaluation, rows)
        scores.write(rows, config.output)
        print(scores.text(evaluation))
        measure(config, run, model, tokenizer, config.model, config.dataset, config)


def wrapping(config: EvaluateConfig, run: Run, tokenizer: Any) -> Wrapping | None:
    """What puts prompts into the template of the run's cell, or of a model without a cell; None if not asked for.

    Raises UserError where there is none.
    """
    if not config.apply_template:
        return None
    if config.run_id is None:
        return prompting.own_wrapping(str(config.model), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        told = run.told(Path(folder))
        return prompting.wrapping(told["template"], tokenizer, told.get("prompt_border", "offsets"))


def measure(
    scoring: ScoreOptions, run: Run, model: Any, tokenizer: Any, base: str, dataset: str, data: DataOptions
) -> None:
    """Log and print the measures that `scoring` names, of the model that the run has trained."""
    if wanted := names(scoring.measures or ""):
        curve = list(run.curve("train/loss").values())
        found = measures.run(wanted, model, tokenizer, base, dataset, data, scoring.measure_prompts, curve)
        run.log_measures(found)
        print("\n".join(f"measure/{name:<42}{value:>12.5g}" for name, value in found.items()))


def measure_trained(config: EvaluateConfig, run: Run, model: Any, tokenizer: Any) -> None:
    """The same for a run of earlier, by the options that it was given.

    Raises UserError where its data are no longer what it was trained on.
    """
    if not config.measures:
        return
    with tempfile.TemporaryDirectory() as folder:
        told = run.told(Path(folder))
        known: dict[str, Any] = {
            field.name: told[field.name] for field in fields(DataOptions) if told.get(field.name) is not None
        }
        known |= {name: Path(known[name]) for name in ("cache_dir", "data_dir") if name in known}
        if config.data_dir is not None:
            known["data_dir"] = config.data_dir
        data = DataOptions(**known | {"output": None})
        cache = prepare.cache_dir(data)
        run.check_data([sources.find(name, cache, data.data_dir) for name in (told["dataset"], data.mix) if name])
        measure(config, run, model, tokenizer, told["model"], told["dataset"], data)


@contextmanager
def trained(config: TrainConfig, run: Run) -> Iterator[tuple[Any, Any, Path] | None]:
    """Train, or go on training, and log the model; yields it, adapters merged, its tokenizer, and the cell's folder.

    When the block ends well, the cell's checkpoints are removed, on disk with all that the folder holds, and in the
    store. Of several processes, the first alone has them, and the model; the others yield None when they have done
    their part of the training.
    """
    adapters.check(config.method)
    settings = pretrained.load_config(config.model)
    _check_recipe(settings, config)
    tokenizer = pretrained.load_tokenizer(config.model, config.tokenizer)
    prepared = prepare.run(
        config.dataset,
        tokenizer,
        config,
        template_weight=config.template_weight,
        completion_weight=config.completion_weight,
    )
    measures.check(names(getattr(config, "measures", None) or ""), len(prepared.validation))
    template = templates.file(config.template)
    if template is not None and template.suffix == ".jinja":  # the model is to be used as it was trained
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if causal.length_limit(settings) is not None:  # few models have one, and all examples are read for it
        longest = max(len(example.tokens) for part in (prepared.training, prepared.validation) for example in part)
        causal.check_length(settings, longest)
    run.log_data(prepared.sources, prepared.profile)
    prepare.write(prepared, config.output if is_first_process() else None)
    print(profile.text(prepared.profile))
    precision = train.resolve_precision(config.precision)
    four_bit = getattr(torch, precision) if config.method == "qlora" else None
    model = pretrained.load(config.model, dropout=config.dropout, four_bit=four_bit)
    _check_vocabulary(model, prepared, config)
    has_new_token = config.add_pad_token and pad_token.add(model, tokenizer)
    contents = {
        "data": ",".join(source.sha256 for source in prepared.sources),
        "examples": prepared.digest,
        "base": location.digest(config.model),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "precision": precision,
    }
    key = digest(config.identity() | contents)
    folder = config.checkpoint_dir / key
    if not is_first_process():
        train.run(config, prepared, model, folder)
        yield None
        return
    with checkpoints.reserve(folder):
        checkpoints.set_aside_unusable(folder, key)  # before anybody counts them
        run.tag(base_model=contents["base"], precision=contents["precision"], examples_sha256=prepared.digest)
        run.fetch_checkpoint(key, folder, newer_than=checkpoints.newest_step(folder))
        done = train.run(
            config,
            prepared,
            model,
            folder,
            run.log_step,
            run.save_unsent,
            run.store_checkpoint if config.store_checkpoints else lambda saved: None,
            cell=key,
            begin=lambda step: run.begin_cell(key, folder, step),  # takes the curves over, up to that step
        )
        run.flush()
        if done.resumed_from:
            print(f"went on from the checkpoint of step {done.resumed_from} of {done.steps}")
        if done.resumed_from < done.steps:
            print(f"trained to step {done.steps}, {done.tokens_per_second:.0f} tokens per second")
        with tempfile.TemporaryDirectory() as adapter:
            merged = adapters.merge(done.model, Path(adapter), with_embeddings=has_new_token)
            if any(Path(adapter).iterdir()):
                saved_adapters.note_base(Path(adapter), config.model, contents["base"])
            end_generation(merged, answer_ends(_some(prepared), tokenizer, config.max_tokens))
            run.log_folder(Path(adapter), outputs.ADAPTER)
            export.write(merged, tokenizer, Path(adapter), config.output)
        run.log_checkpoint(merged, tokenizer, config, done.steps)
        yield merged, tokenizer, folder
        run.drop_checkpoints()
        shutil.rmtree(folder)


def end_generation(model: Any, ends: Sequence[int]) -> None:
    """Have a model's generation settings name further tokens that end a text, beside those that they name."""
    before = causal.text_ends(model)
    if not before.issuperset(ends):
        model.generation_config.eos_token_id = sorted(before.union(ends))


def _some(prepared: Prepared) -> Iterator[Example]:
    """Training examples enough to see how answers end."""
    return (prepared.training[index] for index in range(min(100, len(prepared.training))))


def _check_recipe(settings: Any, config: TrainConfig) -> None:
    """Raise UserError where a model's config (`models.load_config`) shows that it cannot be trained as told."""
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
