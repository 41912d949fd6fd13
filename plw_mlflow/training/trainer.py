"""Trainer: what changes from step to step, how a step changes it, and by what the loss of a step is divided.

Every random choice of a step follows from seed and step, so that a run killed and resumed ends in the same weights as
one left alone; on a CPU, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from plw_mlflow import seeding
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data import weights as weighting
from plw_mlflow.data.batches import Batch, Factors
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import RunError, first_line
from plw_mlflow.training import optimizers, parallel, row_length, state
from plw_mlflow.training.base_penalty import BasePenalty
from plw_mlflow.training.checkpoints import Checkpoint, Saved
from plw_mlflow.training.learner import Learner
from plw_mlflow.training.schedule import cosine_with_warmup

ASYNCHRONOUS = {"cuda"}  # kinds of device that work through a queue, which their host should never have to wait for


@dataclass(frozen=True)
class Step:
    """An optimiser step, made ready."""

    own: list[Batch]  # this process's micro-batches, on the CPU
    count: int  # of the micro-batches of all processes
    tokens: int  # in the examples of all processes


class Trainer:
    """A model in training: it takes one optimiser step after another on the examples it is given."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        model: Any,
        is_packed: bool,
        total_steps: int,
        accelerator: Accelerator,
    ) -> None:
        """model: with its adapters, in evaluation mode. is_packed: whether it takes packed rows."""
        self.step = 0  # optimiser steps taken
        self._total_steps = total_steps
        self._config, self._is_packed, self._accelerator = config, is_packed, accelerator
        self._weights = weighting.of_loss(config.plw, config)
        self._model = model
        self._learner = parallel.wrap(
            Learner(model, config.label_smoothing, has_fused_loss=config.compile), config.parallel, accelerator
        )
        self._learner.train()
        self._penalty = (
            BasePenalty(model, config.base_penalty, config.base_penalty_order) if config.base_penalty else None
        )
        # There AdamW is one kernel, which can be told on the device to leave everything as it is (`begin_step`).
        self._is_fused = accelerator.device.type in ASYNCHRONOUS and config.optimizer == "adamw"
        self._optimizer = optimizers.make(
            config.optimizer,
            list(self._trained.values()),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            is_fused=self._is_fused,
        )
        # As in transformers, the first step of a warm-up has rate 0; a run of one step has none, or it would learn
        # nothing.
        self._warmup = min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1)
        if config.compile:
            self._compile()
        self._row_tokens = row_length.choose(config, model, accelerator, self._peak_bytes)
        self._validation = self._cut(prepared.validation, is_step=False)

    @property
    def _trained(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name; a tied one once."""
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def prepare(self, examples: Sequence[Example]) -> Step:
        """Make an optimiser step of examples ready for `begin_step`."""
        micro_batches = self._cut(examples, is_step=True)
        own = self._collate(micro_batches, self._weights, self._factors(micro_batches))
        if self._accelerator.device.type in ASYNCHRONOUS:
            own = [batch.pinned() for batch in own]
        return Step(own, len(micro_batches), sum(len(example.tokens) for example in examples))

    def begin_step(self, step: Step) -> Tensor:
        """Train on a step's examples, shared out among the processes; gives what `end_step` takes.

        A GPU may still be at work on it when this returns, so that its host can prepare the next step meanwhile.

        Raises RunError where memory runs out, or as `end_step` does.
        """
        config = self._config
        seeding.seed_global(config.seed, "dropout", self.step, self._accelerator.process_index)
        with self._explaining_memory():
            sums = self._accumulate_gradients(step)
        penalty = sums.new_zeros(()) if self._penalty is None else self._penalty.add_gradients().double()
        norm = self._accelerator.clip_grad_norm_(list(self._trained.values()), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        numbers = torch.cat([sums, torch.stack([penalty, norm.double()])])
        if self._is_fused:  # reading the numbers here would make the host wait, and then the GPU
            self._optimizer.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[attr-defined]
        else:
            self._metrics(numbers)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        with self._explaining_memory(self._less_for_averages()):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return numbers

    def end_step(self, numbers: Tensor) -> dict[str, float]:
        """Wait for a step that was begun; gives its metrics.

        Raises RunError where one of them is not finite. The weights are then as they were before the step.
        """
        metrics = self._metrics(numbers)
        self.step += 1
        return metrics

    def _metrics(self, numbers: Tensor) -> dict[str, float]:
        """The metrics of the step after `self.step` from its sums, penalty and norm; all are finite."""
        loss, *sides, penalty, norm = numbers.tolist()
        metrics = {"train/loss": loss} | _means("train", sides)
        if self._penalty is not None:
            metrics["train/base_penalty"] = penalty
        metrics |= {"train/grad_norm": norm, "train/learning_rate": self._rate()}
        check_finite(metrics, self.step + 1)
        return metrics

    def _rate(self) -> float:
        """The learning rate of the step after `self.step`."""
        return self._config.learning_rate * cosine_with_warmup(self.step, self._warmup, self._total_steps)

    def _accumulate_gradients(self, step: Step) -> Tensor:
        """Add up the gradients of a step's loss; gives its sums over all processes, float64 [5].

        They are its loss, and then prompt losses and tokens, completion losses and tokens. With S_m = sum_i w_i l_i,
        the summed loss that the learner gives for micro-batch m, and its divisor D_m, the loss of the step is

            sum over all micro-batches m of all processes of  S_m / D_m.
        """
        accelerator, device = self._accelerator, self._accelerator.device
        divisors = self._divisors(step)
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        for number, (cpu_batch, divisor) in enumerate(zip(step.own, divisors, strict=True), start=1):
            batch = cpu_batch.to(device)
            with accelerator.no_sync(self._learner) if number < len(step.own) else nullcontext():
                total, nll = self._learner(batch.tokens, batch.weights, batch.rows, **batch.context)
                reciprocal = torch.where(divisor > 0, 1 / divisor, 0.0).float()  # 0 where no token weighs anything
                divided = total * reciprocal
                # Gradients are averaged over processes, where their sum is wanted.
                (divided * accelerator.num_processes).backward()
            sums += torch.cat([divided.detach().double().reshape(1), _by_side(nll, batch)])
        reduced = accelerator.reduce(sums, "sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _factors(self, micro_batches: Sequence[Sequence[Example]]) -> list[Factors]:
        """By what the weights of each micro-batch's examples are multiplied, if they are."""
        if not self._weights.have_factors:
            return [None] * len(micro_batches)
        counts = [weighting.count(examples) for examples in micro_batches]
        lengths = [len(examples) for examples in micro_batches]
        groups = np.repeat(np.arange(len(lengths)), lengths)
        found = weighting.factors(np.concatenate(counts), self._weights, groups)
        return list(np.split(found, np.cumsum(lengths)[:-1]))

    def _divisors(self, step: Step) -> list[Tensor]:
        """The divisors D_m of this process's micro-batches, float64 scalars.

        d_m is the sum of a micro-batch's weights (`--loss-divisor` weights and share), or the number of those that are
        not 0 (tokens, as arXiv:2507.07817 has it, and segments). By `--divisor-scope`, D_m is

            step         the sum of d_m over all micro-batches of all processes: one divisor, however the step is cut;
            micro-batch  step.count * d_m, which makes the loss of the step the mean of the micro-batches' own means;
            example      as for step: the examples' own divisors are in the weights already (`weights.factors`).
        """
        if self._config.loss_divisor in ("weights", "share"):
            own_divisors = [batch.weights.double().sum() for batch in step.own]
        else:
            own_divisors = [batch.weights.count_nonzero().double() for batch in step.own]
        device = self._accelerator.device
        if self._config.divisor_scope == "micro-batch":
            return [(step.count * each).to(device, non_blocking=True) for each in own_divisors]
        own_sum = torch.stack(own_divisors).sum().to(device, non_blocking=True)
        return [self._accelerator.reduce(own_sum, "sum")] * len(step.own)

    def _cut(self, examples: Sequence[Example], *, is_step: bool) -> list[list[Example]]:
        """Cut examples into the micro-batches of all processes; of no examples, there are none."""
        config = self._config
        if not examples:  # of validation, where all records are one text
            return []
        if is_step and config.divisor_scope == "micro-batch":  # the result depends on what is in one
            return batches.split(examples, config.micro_batch_examples, by_length=False)
        if self._is_packed:
            return batches.fill(examples, self._row_tokens, multiple=self._accelerator.num_processes)
        return batches.split(examples, config.micro_batch_examples, by_length=True)

    def _collate(
        self, micro_batches: Sequence[Sequence[Example]], weights: Weights, factors: Sequence[Factors]
    ) -> list[Batch]:
        """This process's micro-batches; all get equally many, or a collective call would wait for ever."""
        collate = batches.pack if self._is_packed else batches.collate
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        own_parts = zip(micro_batches[rank::processes], factors[rank::processes], strict=True)
        own = [collate(examples, weights, by) for examples, by in own_parts]
        if rank >= len(micro_batches) % processes > 0:
            own.append(collate(micro_batches[0][:1], Weights(0, 0, 0)))
        return own

    def is_any_asked_to_stop(self, is_asked_to_stop: Callable[[], bool]) -> bool:
        """Whether any process has been asked to stop, so that all do or none; every process has to call this."""
        if self._accelerator.num_processes == 1:
            return is_asked_to_stop()
        asked = torch.tensor(float(is_asked_to_stop()), device=self._accelerator.device)
        return float(self._accelerator.reduce(asked, "sum")) > 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Unweighted mean loss of validation's prompt and completion tokens, in nats: comparable across PLWs."""
        self._learner.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self._accelerator.device)
        with self._explaining_memory():
            for cpu_batch in self._collate(self._validation, Weights(plw=1.0), [None] * len(self._validation)):
                batch = cpu_batch.to(self._accelerator.device)
                _, nll = self._learner(batch.tokens, batch.weights, batch.rows, **batch.context)
                sums += _by_side(nll, batch)
        self._learner.train()
        parallel.let_go(self._learner)
        return _means("eval", self._accelerator.reduce(sums, "sum").tolist())

    def checkpoint(self) -> Checkpoint:
        """A copy of what this process has to save of everything that changes."""
        return state.gather(self.step, self._trained, self._optimizer)

    def check_fit(self, saved: Saved) -> None:
        """Raise UserError for a checkpoint that this training cannot have saved."""
        state.check_fit(saved, self._trained, self._optimizer, self._total_steps)

    def load(self, saved: Saved | None) -> int:
        """Go on from the checkpoint that the first process has, if it has one; returns its step, or 0.

        Every process has to call this.
        """
        self.step = state.restore(saved, self._trained, self._optimizer)
        return self.step

    def _compile(self) -> None:
        """Have compiled layers compiled, by a batch that follows from the options alone.

        The compiler looks at sizes. If they were those of the step that training goes on from, a resumed training would
        end in other bits.
        """
        longest = self._config.max_tokens
        length = max(2, min(longest, 2048) // 2)  # so that two make no longer row than those that are to come
        collate = batches.pack if self._is_packed else batches.collate
        batch = collate([_completion(length)] * 2, Weights(plw=1.0)).to(self._accelerator.device)
        with self._explaining_memory(f"lower --max-tokens (now {longest}), or leave --compile out"):
            self._learner(batch.tokens, batch.weights, batch.rows, **batch.context)[0].backward()
        self._optimizer.zero_grad()

    def _peak_bytes(self, tokens: int) -> int | None:
        """The memory at the peak of a step on a row of so many tokens, all of which weigh something; None if too much.

        For `row_length.choose`, on a GPU.
        """
        longest, device = self._config.max_tokens, self._accelerator.device
        lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        batch = batches.pack([_completion(length) for length in lengths], Weights(plw=1.0)).to(device)
        learner = self._accelerator.unwrap_model(self._learner)  # with ddp, a process may fail alone
        with self._explaining_memory(self._less_for_averages()):
            state.make_state(self._optimizer)  # which is there in all steps but the first
        torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):  # the second row of a step finds the gradients of the first
                learner(batch.tokens, batch.weights, batch.rows, **batch.context)[0].backward()
        except torch.OutOfMemoryError:
            return None
        finally:
            self._optimizer.zero_grad()
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated()

    def _less_for_averages(self) -> str:
        """What to do where memory runs out in the optimiser; empty where no other option has smaller averages."""
        config, others = self._config, []
        if config.optimizer == "adamw" and config.parallel == "ddp":
            others.append("--optimizer adamw8bit")
        if config.method == "full":
            others.append("--method lora")
        if config.optimizer == "adamw" and config.method != "qlora":
            others.append("--parallel fsdp2 with more --processes")
        return f"{' or '.join(others)} needs less for AdamW's averages" if others else ""

    def _less_for_activations(self) -> str:
        """What to do where memory runs out in a forward or backward pass."""
        config = self._config
        option, value = "--micro-batch-examples", config.micro_batch_examples
        if self._is_packed and config.divisor_scope != "micro-batch":
            option, value = "--micro-batch-tokens", self._row_tokens
        # Under divisor-scope micro-batch, what is in one is part of the recipe.
        is_recipe = config.divisor_scope == "micro-batch"
        harmless = "" if is_recipe else ", which leaves the step's result as it is"
        lower = f"lower {option} (now {value}){harmless}, or --max-tokens (now {config.max_tokens})"
        if config.activation_checkpointing or config.compile:  # of which one alone can be had
            return lower
        return f"give --activation-checkpointing, which changes no result; or {lower}"

    @contextmanager
    def _explaining_memory(self, remedy: str = "") -> Iterator[None]:
        """Where memory runs out in the block, raise RunError that says what to do: by default, for activations."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no name of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            remedy = remedy or self._less_for_activations()
            raise RunError(
                f"out of memory after step {self.step}; {remedy}. What the device says: {first_line(error)}"
            ) from error


def _completion(tokens: int) -> Example:
    """An example of so many tokens, all of the completion, for trials of what a step needs."""
    return Example(np.zeros(tokens, np.int32), np.full(tokens, Segment.COMPLETION, np.int8))


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raise RunError with the first metric that is not a finite number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(
                f"{name} is {value} at step {step}; training stops there, and the last good checkpoint, if there is "
                f"one yet, is kept. Lower --learning-rate or --max-grad-norm, or look at the data of this step"
            )


def _by_side(nll: Tensor, batch: Batch) -> Tensor:
    """Prompt loss and tokens, completion loss and tokens, over the tokens that weigh something; float64 [4].

    nll: [B, T] unweighted losses, as the learner gives them.
    """
    nll = nll.flatten().double()
    sums = [nll[rows].sum() for rows in (batch.prompt_rows, batch.completion_rows)]
    counts = [nll.new_full((), len(rows)) for rows in (batch.prompt_rows, batch.completion_rows)]
    return torch.stack([sums[0], counts[0], sums[1], counts[1]])


def _means(prefix: str, sums: list[float]) -> dict[str, float]:
    """Means from the sums of `_by_side`; a side without tokens that weigh something has none."""
    sides = {"prompt_loss": sums[:2], "completion_loss": sums[2:]}
    return {f"{prefix}/{side}": total / count for side, (total, count) in sides.items() if count}
