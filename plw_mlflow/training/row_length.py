"""How long a packed row may be. Longer rows keep a device busier; what they cost is the memory of activations.

On a CPU a row follows the model's size, by an estimate of what a token needs (`on_cpu`): the same at each start of a
training, whatever else the machine does, so that a training that goes on ends in the same bits. On a GPU the longest
row that fits can be found by trial (`found`).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from plw_mlflow.config import TrainConfig, cache_folder, digest
from plw_mlflow.environment import disk
from plw_mlflow.environment.precision import Precision
from plw_mlflow.errors import UserError
from plw_mlflow.models import causal

# Bytes that the backward pass needs of a token in one decoder layer, for each number of its hidden state. Measured on
# LLaMA, inner states of 2.7 times the hidden ones included; other families need 0.4 to 1.1 of it.
LAYER_BYTES: Mapping[Precision, int] = {"float32": 90, "bfloat16": 60}
# What activations of a row may take on a CPU. Rows of `LEAST_TOKENS` are allowed in any case: with shorter ones the
# work that each row makes on the weights would cost more than a few per cent.
BUDGET_BYTES = 2**30
LEAST_TOKENS = 1024

SPARE_SHARE = 0.1  # of a GPU's memory, for what falls between its allocator's blocks
DECIDE_MEMORY = (  # options on which the memory of a step depends, beside those of the model
    *("method", "precision", "activation_checkpointing", "optimizer", "lora_rank", "lora_targets", "lora_dropout"),
    *("parallel", "base_penalty", "max_tokens", "batch_examples", "compile"),
)


def choose(config: TrainConfig, model: Any, accelerator: Accelerator, peak_bytes: Callable[[int], int | None]) -> int:
    """How many tokens a packed row of a training may hold.

    model: as it is trained. peak_bytes: as `found` takes it; used on a GPU alone, for `--micro-batch-tokens auto`.
    """
    most = config.micro_batch_examples * config.max_tokens
    if isinstance(config.micro_batch_tokens, int):
        return config.micro_batch_tokens
    if not config.packing or config.divisor_scope == "micro-batch":  # where examples are counted
        return most
    if accelerator.device.type == "cpu":
        return on_cpu(
            causal.unwrap(model).config,
            "bfloat16" if accelerator.mixed_precision == "bf16" else "float32",
            is_computed_again=config.activation_checkpointing,
            longest=config.max_tokens,
            most=most,
        )
    if config.micro_batch_tokens is None:
        return most
    circumstances = {
        "options": {name: getattr(config, name) for name in DECIDE_MEMORY},
        "model": causal.unwrap(model).config.to_json_string(use_diff=False),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    file = cache_folder(config) / "row_lengths.json"
    # All processes make the trial or none does, as they may have to wait for one another in it.
    if known := _least(recall(file, circumstances), accelerator):
        return known
    tokens = _least(_find(config, accelerator, peak_bytes), accelerator)
    remember(file, circumstances, tokens)
    return tokens


def on_cpu(settings: Any, precision: Precision, *, is_computed_again: bool, longest: int, most: int) -> int:
    """Tokens of a packed row whose activations stay within the budget, or `LEAST_TOKENS` of them.

    settings: the model's config, as transformers has it. is_computed_again: whether layers keep their inputs alone.
    longest, most: tokens of the longest example, and what a row may hold at most.
    """
    text = settings.get_text_config()
    whole_layer = text.hidden_size * LAYER_BYTES[precision]
    if is_computed_again:  # one layer at a time is whole
        token_bytes = 4 * text.hidden_size * text.num_hidden_layers + whole_layer
    else:
        token_bytes = whole_layer * text.num_hidden_layers
    return min(max(BUDGET_BYTES // token_bytes, LEAST_TOKENS, longest), most)


def found(peak_bytes: Callable[[int], int | None], total_bytes: int, *, longest: int, most: int, may_fail: bool) -> int:
    """The longest row, from `longest` to `most` tokens, for which a step fits into a device's memory, by trial.

    peak_bytes: the memory at the peak of a step on a row of so many tokens, or None where it runs out.
    may_fail: whether it may be tried where memory ends. If not, as where other processes would wait for this one for
        ever, the row is only reckoned, with more to spare.

    Memory grows evenly with the tokens of a row, so two short rows tell where it ends. A third is the proof.
    """
    spare = SPARE_SHARE if may_fail else 2 * SPARE_SHARE
    first, second = longest, 2 * longest
    low, high = peak_bytes(first), peak_bytes(second)
    if low is None or high is None:
        return first
    tokens = first + int(((1 - spare) * total_bytes - low) / max((high - low) / (second - first), 1))
    tokens = max(first, min(tokens, most))
    while may_fail and tokens > second and peak_bytes(tokens) is None:
        tokens = max(second, tokens * 4 // 5)
    return tokens


def recall(file: Path, circumstances: Mapping[str, Any]) -> int:
    """What `remember` was last told for these circumstances; 0 for nothing."""
    tokens = _read(file).get(digest(dict(circumstances)))
    return tokens if isinstance(tokens, int) else 0


def remember(file: Path, circumstances: Mapping[str, Any], tokens: int) -> None:
    """Have a file hold what was found under these circumstances. A warning says that it cannot be written to."""
    try:
        with disk.locked(file.with_suffix(".lock")), disk.writing(file.parent):
            content = _read(file) | {digest(dict(circumstances)): tokens}
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(file)
    except UserError as error:
        warnings.warn(f"{error}; the longest packed row will be looked for again", stacklevel=2)


def _read(file: Path) -> dict[str, Any]:
    """The content of the file; empty where there is none, or a damaged one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _least(tokens: int, accelerator: Accelerator) -> int:
    """The least number that any process has; every process has to call this."""
    gathered = accelerator.gather(torch.tensor([tokens], device=accelerator.device))
    assert isinstance(gathered, torch.Tensor)
    return int(gathered.min())


def _find(config: TrainConfig, accelerator: Accelerator, peak_bytes: Callable[[int], int | None]) -> int:
    """`found` on this process's GPU, a whole step's share of the processes being the most that a row can hold."""
    free, _ = torch.cuda.mem_get_info()
    return found(
        peak_bytes,
        free + torch.cuda.memory_reserved(),
        longest=config.max_tokens,
        most=math.ceil(config.batch_examples / accelerator.num_processes) * config.max_tokens,
        may_fail=accelerator.num_processes == 1 or config.parallel == "ddp",
    )
