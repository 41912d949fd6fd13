"""Train: the loop. A step's loss is a sum over everything in the step, divided once, here.

Written on Accelerate rather than on transformers.Trainer because the divisor is the science of this package and
must be readable in one place. Every random choice of a step follows from seed and step, so that a run killed and
resumed ends in the same weights as one left alone; on a CPU, to the bit.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from plw_mlflow import adapters, batches, loss, models, seeding
from plw_mlflow.batches import Batch, Weights
from plw_mlflow.config import TrainConfig
from plw_mlflow.prepare import Prepared
from plw_mlflow.regularisers import BasePenalty
from plw_mlflow.tokens import Example

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    model: Any  # the trained model, with its adapters if it has any
    steps: int
    resumed_from: int  # step of the checkpoint it went on from, 0 for none
    tokens_per_second: float  # of all processes, validation and checkpoints included, since it started or resumed
    seconds: float


@dataclass
class _State:
    """Everything that changes from step to step."""

    learner: models.Learner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0


def run(
    config: TrainConfig,
    prepared: Prepared,
    model: Any,
    folder: Path,
    log: Log = lambda metrics, step: None,
    before_save: Callable[[], None] = lambda: None,
    after_save: Callable[[Path], None] = lambda saved: None,
) -> Trained:
    """Train a model on prepared examples, from the newest checkpoint in `folder` if there is one.

    log: called after every step with its metrics (losses in nats per token).
    before_save: called before each checkpoint, to put in safety whatever the caller holds back.
    after_save: called with each checkpoint's folder, once it is complete.

    Raises FloatingPointError at the first loss or gradient that is not finite, naming the step; the last
    checkpoint stays as it was. On SIGTERM, the step at hand is finished and saved, and KeyboardInterrupt raised.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision(config.precision))
    model = adapters.adapt(model, config.method, config, config.seed)
    total = batches.count_steps(len(prepared.training), config.batch_examples, config.epochs)
    state = _start(config, model, total)
    penalty = BasePenalty(model, config.base_penalty, config.base_penalty_order) if config.base_penalty else None
    resumed_from = _load(folder, state)  # after the penalty has its copy of the base
    learner, optimizer = accelerator.prepare(state.learner, state.optimizer)
    weights = Weights.told_by(config)
    by_length = config.divisor_scope == "step"  # within a step the cut does not matter; for micro-batches it does

    started, tokens_seen = time.monotonic(), 0
    if resumed_from == 0:
        log(evaluate(learner, prepared.validation, config, accelerator), 0)
    with (
        _hearing_sigterm() as is_to_stop,
        tqdm(
            total=total,
            initial=resumed_from,
            desc=f"plw {config.plw:g}",
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        ) as progress,
    ):
        learner.train()
        for indices in batches.steps(
            len(prepared.training), config.batch_examples, seed=config.seed, first=resumed_from, total=total
        ):
            seeding.seed_global(config.seed, "dropout", state.step, accelerator.process_index)
            step_started = time.monotonic()
            examples = [prepared.training[index] for index in indices]
            micro_batches = [
                batches.collate(cut, weights)
                for cut in batches.split(examples, config.micro_batch_examples, by_length=by_length)
            ]
            metrics: dict[str, float] = _accumulate(learner, micro_batches, config, accelerator)
            if penalty is not None:
                metrics["train/base_penalty"] = penalty.add_gradients()
            norm = accelerator.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
            metrics["train/grad_norm"] = float(norm) if norm is not None else math.nan
            metrics["train/learning_rate"] = float(state.schedule.get_last_lr()[0])
            _finite(metrics, state.step + 1)
            optimizer.step()
            state.schedule.step()
            optimizer.zero_grad()
            state.step += 1
            step_tokens = sum(len(example.tokens) for example in examples)
            tokens_seen += step_tokens
            metrics["train/tokens_per_second"] = step_tokens / (time.monotonic() - step_started)
            saving = state.step % config.save_every == 0 or state.step == total
            stopping = is_to_stop()
            if saving or state.step % config.eval_every == 0:
                # Before each checkpoint too: the step's own loss says nothing of the weights the step has made. Only
                # before that of SIGTERM there may be no time.
                metrics |= _finite(evaluate(learner, prepared.validation, config, accelerator), state.step)
            log(metrics, state.step)
            progress.set_postfix(
                loss=f"{metrics['train/loss']:.3f}", tokens_per_s=f"{metrics['train/tokens_per_second']:.0f}"
            )
            progress.update()
            if saving or stopping:
                before_save()
                if accelerator.is_main_process:
                    after_save(_save(folder, state))
            if stopping:
                break
    if is_to_stop():
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    return Trained(state.learner.model.eval(), total, resumed_from, tokens_seen / seconds, seconds)


@contextmanager
def _hearing_sigterm() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM is only noted: gives a function that says whether it has come."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # nobody else may handle signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGTERM, before)


def _accumulate(
    learner: Any, micro_batches: list[Batch], config: TrainConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Add up the gradients of one step, and return its losses.

    micro_batches: those of all processes; each computes its share.

    The step's divisor is summed over all micro-batches and all processes before the first backward pass.
    """
    device = accelerator.device
    mine = _share(micro_batches, accelerator)
    divisors = [loss.divisor(batch.weights, config.loss_divisor) for batch in mine]
    whole = accelerator.reduce(torch.stack(divisors).sum().to(device), "sum")
    # Sums over this process: divided loss; prompt losses and tokens; completion losses and tokens.
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for number, (cpu_batch, own) in enumerate(zip(mine, divisors, strict=True), start=1):
        batch = cpu_batch.to(device)
        with accelerator.no_sync(learner) if number < len(mine) else nullcontext():
            total, nll = learner(batch.tokens, batch.attention, batch.weights)
            # DDP averages gradients over processes where a sum is wanted: hence the factor of their number.
            divided = total * _reciprocal(whole if config.divisor_scope == "step" else own * len(micro_batches))
            accelerator.backward(divided * accelerator.num_processes)
        sums += torch.cat([divided.detach().double().reshape(1), _by_side(nll, batch)])
    found = accelerator.reduce(sums, "sum").tolist()
    return {"train/loss": found[0]} | _means("train", found[1:])


@torch.no_grad()
def evaluate(
    learner: Any, examples: Sequence[Example], config: TrainConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Unweighted mean loss of prompt and of completion tokens, in nats: comparable across PLWs."""
    learner.eval()
    everything = Weights(prompt=1.0, template=1.0, completion=1.0)
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for cut in batches.split(examples, config.micro_batch_examples, by_length=True):
        batch = batches.collate(cut, everything).to(accelerator.device)
        sums += _by_side(learner(batch.tokens, batch.attention, batch.weights)[1], batch)
    learner.train()
    return _means("eval", sums.tolist())


def _finite(metrics: dict[str, float], step: int) -> dict[str, float]:
    """The same metrics, or FloatingPointError with the first that is not a finite number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; training stops there, and the last good checkpoint, if there is "
                f"one yet, is kept. Lower --learning-rate or --max-grad-norm, or look at the data of this step"
            )
    return metrics


def _by_side(nll: Tensor, batch: Batch) -> Tensor:
    """Prompt loss and tokens, completion loss and tokens, of the rows the loss computed; float64 [4]."""
    counted = batch.weights[:, 1:] != 0
    completion = batch.is_completion[:, 1:] & counted
    prompt = counted & ~completion
    nll = nll.double()
    return torch.stack([nll[prompt].sum(), prompt.sum(), nll[completion].sum(), completion.sum()])


def _means(prefix: str, sums: list[float]) -> dict[str, float]:
    """Means from the sums of `_by_side`; a side without computed tokens has none."""
    sides = {"prompt_loss": sums[:2], "completion_loss": sums[2:]}
    return {f"{prefix}/{side}": total / count for side, (total, count) in sides.items() if count}


def _reciprocal(divisor: Tensor) -> Tensor:
    """1 / divisor as float32, and 0 where nothing weighs anything."""
    return torch.where(divisor > 0, 1 / divisor, 0.0).float()


def _share(micro_batches: list[Batch], accelerator: Accelerator) -> list[Batch]:
    """This process's micro-batches; all get equally many, or a collective call would wait forever."""
    processes = accelerator.num_processes
    first = micro_batches[0]
    empty = Batch(first.tokens, first.attention, torch.zeros_like(first.weights), first.is_completion)
    padded = micro_batches + [empty] * (-len(micro_batches) % processes)
    return padded[accelerator.process_index :: processes]


def mixed_precision(precision: str) -> str:
    """What `--precision` comes to on this machine, as Accelerate calls it: "bf16" or "no"."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if precision == "bfloat16" else "no"


def _start(config: TrainConfig, model: Any, total: int) -> _State:
    """Optimiser and schedule. As in transformers, vectors (norms, biases) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
    # As in transformers, the first step of a warm-up has rate 0; a run of one step has none, or it would learn nothing.
    warmup = min(math.ceil(config.warmup_ratio * total), total - 1)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    return _State(models.Learner(model, config.label_smoothing), optimizer, schedule)


# Checkpoints: FOLDER/step-NNNNNN, complete from the moment it has that name.


@contextmanager
def reserve(folder: Path) -> Iterator[None]:
    """Keep every other process from training in `folder` meanwhile; the lock dies with its process.

    Raises ValueError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training this very cell in {folder}; wait for it, or end it"
            ) from None
        yield


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in _checkpoints(folder)), default=0)


def _save(folder: Path, state: _State) -> Path:
    """Write a checkpoint, then remove the ones before it; returns its own folder."""
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(_trained(state), unfinished / "weights.safetensors")
    torch.save(
        {"optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict()},
        unfinished / "optimizer.pt",
    )
    finished = folder / f"step-{state.step:06d}"
    os.replace(unfinished, finished)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)
    return finished


def _load(folder: Path, state: _State) -> int:
    """Put the newest checkpoint into `state`; returns its step, or 0 where there is none."""
    found = _checkpoints(folder)
    if not found:
        return 0
    saved = load_file(found[-1] / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in _trained(state).items():
            parameter.copy_(saved[name])
    rest = torch.load(found[-1] / "optimizer.pt", weights_only=True)
    state.optimizer.load_state_dict(rest["optimizer"])
    state.schedule.load_state_dict(rest["schedule"])
    state.step = newest_step(folder)
    return state.step


def _trained(state: _State) -> dict[str, Tensor]:
    """The parameters that training changes, by name; a tied one once."""
    return {name: parameter for name, parameter in state.learner.model.named_parameters() if parameter.requires_grad}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
