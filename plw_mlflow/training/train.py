"""Train: the loop. A step's loss is a sum over everything in the step, divided once, here.

Written on Accelerate rather than on transformers.Trainer because the divisor is the science of this package and
must be readable in one place. Every random choice of a step follows from seed and step, so that a run killed and
resumed ends in the same weights as one left alone; on a CPU, to the bit.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from plw_mlflow import seeding
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.batches import Batch, Weights
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.errors import RunError, UserError, first_line
from plw_mlflow.models import adapters, causal
from plw_mlflow.training import attention, checkpoints, loss, parallel
from plw_mlflow.training.base_penalty import BasePenalty
from plw_mlflow.training.checkpoints import Checkpoint
from plw_mlflow.training.learner import Learner

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    model: Any  # the trained model, with its adapters if it has any; None in processes other than the first
    steps: int
    resumed_from: int  # step of the checkpoint it went on from, 0 for none
    tokens_per_second: float  # of all processes, validation and checkpoints included, since it started or resumed
    seconds: float


def run(
    config: TrainConfig,
    prepared: Prepared,
    model: Any,
    folder: Path,
    log: Log = lambda metrics, step: None,
    before_save: Callable[[], None] = lambda: None,
    after_save: Callable[[Path], None] = lambda saved: None,
    *,
    cell: str = "",
    begin: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train a model on prepared examples, from the newest checkpoint of `cell` in `folder` if there is one.

    cell: identifies the training; a checkpoint that names another is set aside, as is one whose tensors do not fit.
    begin: called before anything else is, with the step that training goes on from, 0 for none.
    log: called after every step with its metrics (losses in nats per token).
    before_save: called before each checkpoint, to put in safety whatever the caller holds back.
    after_save: called with each checkpoint's folder, once it is complete, by another thread.

    Every process that torchrun has started is to call this; `folder` and what the functions do is for the first
    alone.

    Raises RunError at the first loss or gradient that is not finite, naming the step, and RunError where
    memory runs out; the last checkpoint stays as it was. On SIGTERM to any process, the step at hand is finished and
    saved, and KeyboardInterrupt raised.
    """
    accelerator = parallel.accelerator(mixed_precision(config.precision))
    total = batches.count_steps(len(prepared.training), config.batch_examples, config.epochs)
    model = adapters.adapt(model, config.method, config, config.seed).eval()
    is_sharded = config.parallel == "fsdp2" and accelerator.num_processes > 1
    outline = parallel.outline(model) if is_sharded and accelerator.is_main_process else None
    with ExitStack() as stack:
        is_packed = config.packing and stack.enter_context(_packing(model))
        loop = _Loop(config, prepared, model, is_packed, total, accelerator)
        resumed_from = loop.load(
            checkpoints.load(folder, cell, loop.check_fit) if accelerator.is_main_process else None
        )
        begin(resumed_from)
        writer = checkpoints.Writer(folder, cell, config.keep, after_save)
        stack.callback(writer.wait)
        is_to_stop = stack.enter_context(_hearing_sigterm())
        started, tokens_seen = time.monotonic(), 0
        if resumed_from == 0:
            log(loop.evaluate(), 0)
        progress = stack.enter_context(
            tqdm(
                total=total,
                initial=resumed_from,
                desc=f"plw {config.plw:g}",
                unit="step",
                dynamic_ncols=True,
                disable=not accelerator.is_main_process,
            )
        )
        stopping = False
        for indices in batches.steps(
            len(prepared.training), config.batch_examples, seed=config.seed, first=resumed_from, total=total
        ):
            examples = [prepared.training[index] for index in indices]
            step_started = time.monotonic()
            metrics, stopping = loop.take_step(examples, is_to_stop)
            step_tokens = sum(len(example.tokens) for example in examples)
            tokens_seen += step_tokens
            metrics["train/tokens_per_second"] = step_tokens / (time.monotonic() - step_started)
            saving = loop.step % config.save_every == 0 or loop.step == total
            if saving or loop.step % config.eval_every == 0:
                # Before each checkpoint too: the step's own loss says nothing of the weights the step has made. Only
                # before that of SIGTERM there may be no time.
                metrics |= _finite(loop.evaluate(), loop.step)
            log(metrics, loop.step)
            progress.set_postfix(
                loss=f"{metrics['train/loss']:.3f}", tokens_per_s=f"{metrics['train/tokens_per_second']:.0f}"
            )
            progress.update()
            if saving or stopping:
                checkpoint = loop.checkpoint()
                if accelerator.is_main_process:
                    before_save()
                    writer.save(checkpoint)
                del checkpoint  # which is as large as the state: the writer lets go of it when it is written
            if stopping:
                break
        writer.wait()
        if stopping or loop.is_any_told(is_to_stop):  # in the last step, perhaps after it was asked
            raise KeyboardInterrupt
        seconds = time.monotonic() - started
        trained = model
        if is_sharded:
            weights = parallel.whole(dict(model.named_parameters()))
            trained = outline and parallel.fill_in(outline, weights)
    trained = trained.eval() if accelerator.is_main_process else None
    return Trained(trained, total, resumed_from, tokens_seen / seconds, seconds)


@contextmanager
def _packing(model: Any) -> Iterator[bool]:
    """Within the block, the model takes packed rows, if it can, which this gives; a warning says why it cannot."""
    unwrapped = causal.unwrap(model)
    if reason := attention.why_not(unwrapped):
        warnings.warn(f"{unwrapped.config.model_type}: {reason}; training on padded rows instead", stacklevel=4)
        yield False
        return
    with attention.over_examples(unwrapped):
        yield True


class _Loop:
    """What changes from step to step, and how a step changes it."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        model: Any,
        is_packed: bool,
        total: int,
        accelerator: Accelerator,
    ) -> None:
        self.step = 0  # optimiser steps taken
        self._total = total
        self._config, self._is_packed, self._accelerator = config, is_packed, accelerator
        self._weights = Weights(config.plw, config.template_weight, config.completion_weight)
        self._validation = self._cut(prepared.validation, is_step=False)
        self._model = model
        learner = Learner(model, config.label_smoothing)
        self._learner = parallel.wrap(learner, mixed_precision(config.precision), config.parallel, accelerator)
        self._learner.train()
        self._penalty = (
            BasePenalty(model, config.base_penalty, config.base_penalty_order) if config.base_penalty else None
        )
        trained = self._trained.values()
        # As in transformers, vectors (norms, biases) do not decay.
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
        # As in transformers, the first step of a warm-up has rate 0; a run of one step has none, or it would learn
        # nothing.
        warmup = min(math.ceil(config.warmup_ratio * total), total - 1)
        # A function of the step, so a run that goes on has nothing to restore.
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, total).lr_lambdas[0]

    @property
    def _trained(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name; a tied one once."""
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def take_step(self, examples: Sequence[Example], is_to_stop: Callable[[], bool]) -> tuple[dict[str, float], bool]:
        """Train on a step's examples, shared out among the processes.

        Returns the metrics, and whether any process has been told to stop.
        """
        config, number = self._config, self.step + 1
        seeding.seed_global(config.seed, "dropout", self.step, self._accelerator.process_index)
        micro_batches = self._cut(examples, is_step=True)
        with self._naming_memory():
            metrics, stopping = self._accumulate(micro_batches, is_to_stop)
        if self._penalty is not None:
            metrics["train/base_penalty"] = self._penalty.add_gradients()
        norm = self._accelerator.clip_grad_norm_(list(self._trained.values()), config.max_grad_norm)
        metrics["train/grad_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        rate = config.learning_rate * self._schedule(self.step)
        metrics["train/learning_rate"] = rate
        _finite(metrics, number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with self._naming_memory("--method lora, or --parallel fsdp2 with more --processes, needs less for AdamW"):
            self._optimizer.step()
        self._optimizer.zero_grad()
        self.step = number
        return metrics, stopping

    def _cut(self, examples: Sequence[Example], *, is_step: bool) -> list[list[Example]]:
        """Cut examples into the micro-batches of all processes; of no examples, there are none."""
        config = self._config
        if not examples:  # of validation, where all records are one text
            return []
        if is_step and config.divisor_scope == "micro-batch":  # what is in one then matters
            return batches.split(examples, config.micro_batch_examples, by_length=False)
        if self._is_packed:
            row_tokens = config.micro_batch_tokens or config.micro_batch_examples * config.max_tokens
            return batches.fill(examples, row_tokens, multiple=self._accelerator.num_processes)
        return batches.split(examples, config.micro_batch_examples, by_length=True)

    def _collate(self, micro_batches: Sequence[Sequence[Example]], weights: Weights) -> list[Batch]:
        """This process's micro-batches; all get equally many, or a collective call would wait forever."""
        collate = batches.pack if self._is_packed else batches.collate
        processes, own = self._accelerator.num_processes, self._accelerator.process_index
        mine = [collate(examples, weights) for examples in micro_batches[own::processes]]
        if own >= len(micro_batches) % processes > 0:
            mine.append(collate(micro_batches[0][:1], Weights(0, 0, 0)))
        return mine

    def _accumulate(
        self, micro_batches: Sequence[Sequence[Example]], is_to_stop: Callable[[], bool]
    ) -> tuple[dict[str, float], bool]:
        """Add up the gradients of one step, and return its losses, and whether any process is to stop.

        The step's divisor is summed over all micro-batches and all processes before the first backward pass.
        """
        config, accelerator, device = self._config, self._accelerator, self._accelerator.device
        mine = self._collate(micro_batches, self._weights)
        divisors = [loss.divisor(batch.weights, config.loss_divisor) for batch in mine]
        whole = accelerator.reduce(torch.stack(divisors).sum().to(device), "sum")
        # Sums over this process: divided loss; prompt losses and tokens; completion losses and tokens.
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        for number, (cpu_batch, own) in enumerate(zip(mine, divisors, strict=True), start=1):
            batch = cpu_batch.to(device)
            with accelerator.no_sync(self._learner) if number < len(mine) else nullcontext():
                total, nll = self._learner(batch.tokens, batch.weights, **batch.context)
                divided = total * _reciprocal(whole if config.divisor_scope == "step" else own * len(micro_batches))
                # Gradients are averaged over processes where a sum is wanted: hence the factor of their number.
                (divided * accelerator.num_processes).backward()
            sums += torch.cat([divided.detach().double().reshape(1), _by_side(nll, batch)])
        found = accelerator.reduce(sums, "sum").tolist()
        return {"train/loss": found[0]} | _means("train", found[1:]), self.is_any_told(is_to_stop)

    def is_any_told(self, is_to_stop: Callable[[], bool]) -> bool:
        """Whether any process has been told to stop, so that all do or none; every process has to ask."""
        told = torch.tensor(float(is_to_stop()), device=self._accelerator.device)
        return float(self._accelerator.reduce(told, "sum")) > 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Unweighted mean loss of validation's prompt and completion tokens, in nats: comparable across PLWs."""
        self._learner.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self._accelerator.device)
        with self._naming_memory():
            for cpu_batch in self._collate(self._validation, Weights(plw=1.0)):
                batch = cpu_batch.to(self._accelerator.device)
                sums += _by_side(self._learner(batch.tokens, batch.weights, **batch.context)[1], batch)
        self._learner.train()
        return _means("eval", self._accelerator.reduce(sums, "sum").tolist())

    @contextmanager
    def _naming_memory(self, way_out: str = "") -> Iterator[None]:
        """Within the block, running out of memory says what to do: `way_out`, or which option to lower."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no name of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            config = self._config
            option, value = "--micro-batch-examples", config.micro_batch_examples
            if self._is_packed and config.divisor_scope == "step":
                option, value = "--micro-batch-tokens", config.micro_batch_tokens or value * config.max_tokens
            # Under divisor-scope micro-batch, what is in one is part of the recipe.
            harmless = ", which leaves the step's result as it is" if config.divisor_scope == "step" else ""
            lower = f"lower {option} (now {value}){harmless}, or --max-tokens (now {config.max_tokens})"
            raise RunError(
                f"out of memory after step {self.step}; {way_out or lower}. What the device says: {first_line(error)}"
            ) from error

    def checkpoint(self) -> Checkpoint:
        """A copy of everything that changes, empty but in the first process.

        Every process has to ask for it, since each may hold a part.
        """
        state = {
            f"{kind}/{name}": value
            for name, parameter in self._trained.items()
            for kind, value in (self._optimizer.state[parameter] or _empty_state(parameter)).items()
        }
        return Checkpoint(self.step, parallel.whole(self._trained), parallel.whole(state))

    def check_fit(self, found: Checkpoint) -> None:
        """Raise UserError where a checkpoint is none that this training could have saved."""
        if found.step > self._total:
            raise UserError(f"it is of step {found.step}, and the training has {self._total}")
        state = {
            f"{kind}/{name}": empty
            for name, parameter in self._trained.items()
            for kind, empty in _empty_state(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")).items()
        }
        _check_tensors(found.weights, self._trained)
        _check_tensors(found.optimizer, state)

    def load(self, found: Checkpoint | None) -> int:
        """Go on from a checkpoint that the first process has, if it has one; returns its step, or 0."""
        step = torch.tensor(0 if found is None else found.step, device=self._accelerator.device)
        parallel.spread(step if self._accelerator.is_main_process else None, step)
        self.step = int(step)
        for name, parameter in self._trained.items() if self.step else ():
            parallel.spread(found.weights[name] if found else None, parameter)
            for kind, empty in _empty_state(parameter).items():
                value = empty.to(self._accelerator.device)  # which the number of steps is not on
                parallel.spread(found.optimizer[f"{kind}/{name}"] if found else None, value)
                self._optimizer.state[parameter][kind] = value.to(empty.device)
        return self.step


def _empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter that never had a gradient: the steps with one, and the averages over these."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise UserError where tensors differ in name, shape or type from those expected, or have values they cannot."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"it lacks {len(missing)} tensors, the first of them {missing[0]}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise UserError(f"it has {len(unknown)} tensors too many, the first of them {unknown[0][:80]!r}")
    for name, tensor in found.items():
        own = expected[name]
        if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            raise UserError(
                f"its {name} is {tensor.dtype} {list(tensor.shape)}, which must be {own.dtype} {list(own.shape)}"
            )
        if tensor.numel():
            lowest, highest = map(float, tensor.aminmax())  # both NaN where there is one
            is_square_or_count = name.startswith(("exp_avg_sq/", "step/"))  # squares may have overflowed
            if not (lowest >= 0 if is_square_or_count else math.isfinite(lowest) and math.isfinite(highest)):
                raise UserError(f"its {name} has values from {lowest} to {highest}")


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


def _finite(metrics: dict[str, float], step: int) -> dict[str, float]:
    """The same metrics, or RunError with the first that is not a finite number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(
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


def mixed_precision(precision: str) -> Literal["no", "bf16"]:
    """What `--precision` comes to on this machine, as Accelerate calls it: "bf16" or "no"."""
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if precision == "bfloat16" else "no"
