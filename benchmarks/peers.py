"""Other trainers as benchmarks.training runs them: transformers' Trainer with a weighted loss, and TRL's SFTTrainer.

`PLWTrainer` is among them: it is beside a weighted loss over full logits, in the same loop.

Both are given what they need to be fast on a CPU, as far as it could be found by trying; `training.TRAINERS` has the
settings. The base of a LoRA is loaded in the type of the arithmetic, so that they need not cast it for each product.

TRL's packing fills rows across the whole data set. Here the examples of each step are put into rows of their own, and
these rows handed to it as already packed, so that its steps have the examples of everybody else's. Rows need not be
full on a CPU, which computes any length as it is.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights
from plw_mlflow.integrations import PLWTrainer
from plw_mlflow.models import pretrained

MEGA_BATCH = 50  # steps whose examples Trainer sorts by length at a time, by default

Step = Sequence[Example]
Report = Callable[[float], None]  # to be called at the end of each step, with its loss


@dataclass(frozen=True)
class Settings:
    """What a peer may choose for speed, while it trains the same steps."""

    micro_batch_examples: int = 1  # padded to the longest of them
    row_tokens: int = 512  # of TRL's packed rows, at most


def trainer(folder: Path, config: TrainConfig, steps: Sequence[Step], settings: Settings, report: Report) -> None:
    """Train by transformers' Trainer with a weighted loss, on padded rows in the order that is given."""
    weights = Weights(config.plw)
    rows = []
    for example in itertools.chain.from_iterable(steps):
        tokens, segment = (torch.from_numpy(part).long() for part in (example.tokens, example.segment))
        rows.append({"tokens": tokens, "weights": batches.by_segment(weights, segment)})

    def collate(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens, weights = (
            nn.utils.rnn.pad_sequence([row[name] for row in chosen], batch_first=True) for name in ("tokens", "weights")
        )
        lengths = torch.tensor([len(row["tokens"]) for row in chosen])
        is_token = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return {"input_ids": tokens, "attention_mask": is_token.long(), "weights": weights}

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            **_arguments(config, scratch, len(steps)),
            per_device_train_batch_size=settings.micro_batch_examples,
            gradient_accumulation_steps=config.batch_examples // settings.micro_batch_examples,
        )
        peer = WeightedTrainer(_model(folder, config), arguments, data_collator=collate, train_dataset=rows)
        _train(peer, report)


def plw_trainer(folder: Path, config: TrainConfig, steps: Sequence[Step], settings: Settings, report: Report) -> None:
    """Train by transformers' Trainer with the loss of this package, on packed rows in the order that is given."""
    rows = []
    for example in itertools.chain.from_iterable(steps):
        is_completion = example.segment == Segment.COMPLETION
        rows.append({"input_ids": _tokens(example), "completion_mask": is_completion.tolist()})
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            **_arguments(config, scratch, len(steps)),
            per_device_train_batch_size=settings.micro_batch_examples,
            gradient_accumulation_steps=config.batch_examples // settings.micro_batch_examples,
        )
        _train(PLWTrainer(_model(folder, config), arguments, train_dataset=rows, plw=config.plw, packing=True), report)


class WeightedTrainer(HFTrainer):
    """transformers' Trainer with the loss of this package, divided once a step by the sum of its weights."""

    loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        return torch.stack([batch["weights"][:, 1:].sum() for batch in batch_samples]).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights, targets = inputs.pop("weights")[:, 1:], inputs["input_ids"][:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses @ weights.flatten() / num_items_in_batch


def grouped(first: Step, pool: Sequence[Example], count: int) -> list[Step]:
    """The steps that Trainer makes of a pool of examples when it groups by length.

    As few steps cannot hold all lengths, `count` of them are chosen such that their lengths are evenly spread. Before
    them stands the step `first`, sorted, for the loss of the first step.
    """
    size = len(first)
    order = get_length_grouped_indices(
        [len(example.tokens) for example in pool], size, MEGA_BATCH, torch.Generator().manual_seed(0)
    )
    every = [[pool[index] for index in order[start : start + size]] for start in range(0, len(order), size)]
    every.sort(key=lambda step: sum(len(example.tokens) for example in step))
    chosen = [every[int((number + 0.5) * len(every) / count)] for number in range(count)]
    return [sorted(first, key=lambda example: -len(example.tokens)), *chosen]


def trl_packed(folder: Path, config: TrainConfig, steps: Sequence[Step], settings: Settings, report: Report) -> None:
    """Train by TRL's SFTTrainer on packed rows; config.plw is 0 or 1, as it knows no other weights."""
    count = max(len(batches.fill(step, settings.row_tokens)) for step in steps)
    packed = [row for step in steps for row in batches.fill(step, settings.row_tokens, multiple=count)]
    rows = []
    for examples in packed:
        tokens, labels = ([token for e in examples for token in part(e)] for part in (_tokens, _labels(config.plw)))
        rows.append({"input_ids": tokens, "labels": labels, "seq_lengths": [len(e.tokens) for e in examples]})
    _trl(
        _model(folder, config),
        config,
        rows,
        report,
        steps=len(steps),
        packing=True,
        max_length=settings.row_tokens,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=count,
    )


def trl_padded(folder: Path, config: TrainConfig, steps: Sequence[Step], settings: Settings, report: Report) -> None:
    """Train by TRL's SFTTrainer on padded rows in the order that is given; config.plw is 0 or 1."""
    labels = _labels(config.plw)
    rows = [{"input_ids": _tokens(e), "labels": labels(e)} for e in itertools.chain.from_iterable(steps)]
    _trl(
        _model(folder, config),
        config,
        rows,
        report,
        steps=len(steps),
        max_length=None,
        per_device_train_batch_size=settings.micro_batch_examples,
        gradient_accumulation_steps=config.batch_examples // settings.micro_batch_examples,
    )


def _tokens(example: Example) -> list[int]:
    return list(example.tokens.tolist())


def _labels(plw: float) -> Callable[[Example], list[int]]:
    """TRL's labels of an example: all tokens, or at PLW 0 those of the completion."""
    if plw not in (0, 1):
        raise ValueError(f"TRL trains at a PLW of 0 or 1, not {plw}")

    def labels(example: Example) -> list[int]:
        is_trained = (example.segment == Segment.COMPLETION) | (plw == 1)
        return [token if trained else -100 for token, trained in zip(_tokens(example), is_trained, strict=True)]

    return labels


def _trl(
    model: Any, config: TrainConfig, rows: list[dict[str, Any]], report: Report, *, steps: int, **settings: Any
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            **_arguments(config, scratch, steps),
            **settings,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        # Any tokenizer does, as the rows are tokens already.
        tokenizer = pretrained.load_tokenizer("toy")
        peer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        _train(peer, report)


def _model(folder: Path, config: TrainConfig) -> Any:
    is_lora = config.method == "lora"
    kind = getattr(torch, config.precision if is_lora else "float32")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa")
    if not is_lora:
        return model
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
    )
    return get_peft_model(model, adapters)


def _arguments(config: TrainConfig, scratch: str, steps: int) -> dict[str, Any]:
    """The arguments of either trainer that make it train as `config` says."""
    return {
        "output_dir": scratch,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.precision == "bfloat16",
        "use_cpu": True,
        "seed": config.seed,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def _train(peer: Any, report: Report) -> None:
    class EachStep(TrainerCallback):
        def on_log(self, *_: Any, **context: Any) -> None:
            if "loss" in context["logs"]:
                report(context["logs"]["loss"])

    peer.remove_callback(PrinterCallback)
    peer.add_callback(EachStep())
    peer.train()
