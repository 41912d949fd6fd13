"""Train: the loop over steps, with its validation, metrics and checkpoints. What a step does is the trainer's.

Written on Accelerate rather than on transformers.Trainer because the divisor of the loss is the science of this package
and must be readable in one place (`Trainer._accumulate_gradients`).
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.environment import precision
from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.environment.progress import Progress
from plw_mlflow.models import adapters, causal, held
from plw_mlflow.training import arithmetic, attention, checkpoints, compilation, parallel, recomputation
from plw_mlflow.training.measured import Meter, Peak
from plw_mlflow.training.trainer import Trainer, check_finite

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    model: Any  # the trained model, with its adapters if it has any; None in processes other than the first
    steps: int
    resumed_from: int  # step of the checkpoint it went on from, 0 for none
    tokens_per_second: float  # of all processes, validation and checkpoints included, since it started or resumed


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
    peak: Peak | None = None,
) -> Trained:
    """Train a model on prepared examples, from the newest checkpoint of `cell` in `folder` if there is one.

    model: of several processes, the first one's counts, and the others' may be without numbers (`pretrained.outline`).
    cell: identifies the training; a checkpoint that names another is set aside, as is one whose tensors do not fit.
    begin: called before anything else is, with the step that training goes on from, 0 for none.
    log: called after every step with its metrics (losses in nats per token).
    before_save: called before each checkpoint, so that the caller can first save what belongs to earlier steps.
    peak: of this process's device (`measured.find_peak`); without one, `train/mfu` is not among the metrics.
    after_save: called with each checkpoint's folder once it is complete, by another thread.

    Every process that torchrun has started has to call this. The functions are called by the first one alone, and the
    folder is the first one's; with fsdp2 all of them write their shards there.

    Raises RunError at the first loss or gradient that is not finite, naming the step, and where memory runs out; the
    last checkpoint stays as it was. On SIGTERM to any process, the current step is finished and saved, and
    KeyboardInterrupt raised. Several processes do so on SIGINT, too: if one of them left at once, the others would wait
    for it in the middle of a step.
    """
    kind = precision.resolve(config.precision, config.model)
    accelerator = parallel.accelerator(kind)
    is_first = is_first_process()
    total_steps = batches.count_steps(len(prepared.training), config.batch_examples, config.epochs)
    model = adapters.adapt(model, config.method, config, config.seed).eval()
    if config.method in ("lora", "dora") and kind == "bfloat16":
        held.hold(model, torch.bfloat16)
    is_sharded = config.parallel == "fsdp2" and accelerator.num_processes > 1
    hollow = parallel.hollow_copy(model) if is_sharded and is_first else None
    with ExitStack() as stack:
        is_packed = config.packing and stack.enter_context(_packing(model))
        stack.enter_context(arithmetic.fewer_passes(model))
        if config.activation_checkpointing:
            stack.enter_context(recomputation.of_layers(model))
        if config.compile:
            stack.enter_context(compilation.of_layers(model, getattr(torch, kind)))
        trainer = Trainer(config, prepared, model, is_packed, total_steps, accelerator)
        meter = Meter(model, accelerator.device, peak)
        writers = None
        if is_sharded:
            folder = parallel.tell(folder.absolute())
            writers = stack.enter_context(parallel.writers(folder))
        first_step = trainer.load(checkpoints.load(folder, cell, trainer.check_fit) if is_first else None)
        begin(first_step)
        writer = checkpoints.Writer(folder, cell, config.keep, after_save, writers)
        stack.callback(writer.wait)
        is_asked_to_stop = stack.enter_context(_noting_signals(has_company=accelerator.num_processes > 1))
        started, tokens_seen = time.monotonic(), 0
        if first_step == 0:
            log(trainer.evaluate(), 0)
        progress = stack.enter_context(
            Progress(f"plw {config.plw:g}", total_steps, "steps", done=first_step, is_shown=is_first)
        )
        is_stopping = False
        order = batches.steps(
            len(prepared.training), config.batch_examples, seed=config.seed, first=first_step, total=total_steps
        )
        coming = (trainer.prepare([prepared.training[index] for index in indices]) for indices in order)
        following = next(coming, None)
        while (step := following) is not None:
            step_started = time.monotonic()
            begun = trainer.begin_step(step)
            following = next(coming, None)  # made here, where a GPU is still at work
            metrics = trainer.end_step(begun)
            is_stopping = trainer.is_any_asked_to_stop(is_asked_to_stop)
            tokens_seen += step.tokens
            metrics |= meter.metrics(step.own, step.tokens, time.monotonic() - step_started)
            is_saving = trainer.step % config.save_every == 0 or trainer.step == total_steps
            if is_saving or trainer.step % config.eval_every == 0:
                # Before each checkpoint too, as the step's own loss says nothing of the weights that the step has made.
                # Only before that of a signal there may be no time.
                metrics |= trainer.evaluate()
                check_finite(metrics, trainer.step)
            log(metrics, trainer.step)
            progress.update(
                1,
                loss=f"{metrics['train/loss']:.3f}",
                tokens_per_s=f"{metrics['train/tokens_per_second']:.0f}",
                memory_mib=f"{metrics['train/peak_memory_mib']:.0f}",
            )
            if is_saving or is_stopping:
                checkpoint = trainer.checkpoint()
                if is_first:
                    before_save()
                if is_first or is_sharded:
                    writer.save(checkpoint)
                del checkpoint  # which is as large as the state: the writer lets go of it when it is written
            if is_stopping:
                break
        writer.wait()
        if is_stopping or trainer.is_any_asked_to_stop(is_asked_to_stop):  # perhaps since the last step was taken
            raise KeyboardInterrupt
        seconds = time.monotonic() - started
        if is_sharded:
            weights = parallel.whole(dict(model.named_parameters()))
            model = parallel.fill_in(hollow, weights) if hollow is not None else None
    return Trained(model.eval() if is_first else None, total_steps, first_step, tokens_seen / seconds)


@contextmanager
def _packing(model: Any) -> Iterator[bool]:
    """Have the model take packed rows within the block, if it can; gives whether it does. A warning says why not."""
    unwrapped = causal.unwrap(model)
    # In the other processes the model may have no numbers yet.
    if reason := parallel.tell(attention.why_not(unwrapped) if is_first_process() else None):
        warnings.warn(f"{unwrapped.config.model_type}: {reason}; training on padded rows instead", stacklevel=4)
        yield False
        return
    with attention.over_examples(unwrapped):
        yield True


@contextmanager
def _noting_signals(*, has_company: bool) -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM, and in company SIGINT, end nothing; gives a function that says whether one has come.

    has_company: whether other processes train with this one.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # nobody else may handle signals
        yield lambda: False
        return
    wanted = (signal.SIGTERM, signal.SIGINT) if has_company else (signal.SIGTERM,)
    before = {each: signal.signal(each, lambda number, frame: noted.append(number)) for each in wanted}
    try:
        yield lambda: bool(noted)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
