"""LoRA adapters of many PLWs over one base, beside a run for each:  python -m benchmarks.shared_base --json FILE

Ten runs of a sweep that differ in PLW alone have the same frozen base, the same examples in the same order, and the
same noise. So they could share a process. There are two ways, neither of which is part of the package:

    in turns    in every step, each adapter has its own forward and backward pass on the step's examples
    together    one pass for all of them: the rows stand in it once for each adapter, each copy with its own

Both are measured here beside training alone, as the package does, each way in a process of its own with one thread:

    start           processor seconds until the first step: imports, model, adapters
    step            processor seconds of an optimiser step of all adapters; alone, so many times one adapter's
    MiB             of the whole process at its peak
    difference      of the adapters' weights after the last step from those trained alone, relative (2-norm)

Of `together` the passes of the first step are made, without an optimiser; its difference is that of the gradients.
"""

from __future__ import annotations

import copy
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.training import draw, save_model
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.batches import Batch
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights
from plw_mlflow.models import adapters, causal, pretrained
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.training import arithmetic, attention, parallel
from plw_mlflow.training.learner import Learner
from plw_mlflow.training.trainer import Trainer

ROW_TOKENS = 4096


@dataclass(frozen=True)
class Way:
    """What is measured in a process."""

    name: str  # alone, in turns, together
    model: str  # toy or a folder
    plws: Sequence[float]
    examples: int  # of a step
    steps: int


@dataclass(frozen=True)
class Measured:
    """What a process has found."""

    start_seconds: float
    step_seconds: float  # the median step's, of all its adapters
    peak_mib: float
    weights: dict[float, dict[str, Tensor]]  # of the adapters by PLW; of `together`, the gradients


def config_of(plw: float, examples: int) -> TrainConfig:
    """The training of an adapter."""
    return TrainConfig(
        plw=plw,
        method="lora",
        precision="float32",
        lora_dropout=0.0,  # whose noise the way `together` would draw otherwise
        learning_rate=1e-3,
        warmup_ratio=0,
        batch_examples=examples,
        micro_batch_tokens=ROW_TOKENS,
        max_tokens=512,
    )


def twin(model: Any) -> Any:
    """A model of modules of its own, which hold the very same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@contextmanager
def ready(model: Any) -> Iterator[Any]:
    """A model as the trainer's loop has it, on packed rows."""
    with attention.over_examples(causal.unwrap(model)), arithmetic.fewer_passes(model):
        yield model


def measure(way: Way) -> Measured:
    """What a way needs; to be called in a new process."""
    torch.set_num_threads(1)
    base = pretrained.load(way.model).eval()
    pool = draw("alpaca", base.config.vocab_size)[: way.examples * way.steps]
    steps = [pool[start : start + way.examples] for start in range(0, len(pool), way.examples)]
    return together(way, base, steps[0]) if way.name == "together" else in_turns(way, base, steps)


def in_turns(way: Way, base: Any, steps: Sequence[Sequence[Example]]) -> Measured:
    """Every step of one adapter after the other; of one PLW, that is training alone."""
    accelerator = parallel.accelerator("float32")
    with ExitStack() as stack:
        trainers, models = {}, {}
        for plw in way.plws:
            config = config_of(plw, way.examples)
            models[plw] = stack.enter_context(ready(adapters.adapt(twin(base), "lora", config, config.seed)))
            prepared = Prepared((), steps[0], [], {}, "", 0)  # type: ignore[arg-type]
            trainers[plw] = Trainer(config, prepared, models[plw], True, len(steps), accelerator)
        start, taken = time.process_time(), []
        for step in steps:
            began = time.process_time()
            for trainer in trainers.values():
                trainer.end_step(trainer.begin_step(trainer.prepare(step)))
            taken.append(time.process_time() - began)
    return Measured(
        start,
        sorted(taken)[len(taken) // 2],
        peak_mib(),
        {plw: {name: weight.detach() for name, weight in of_adapter(models[plw]).items()} for plw in way.plws},
    )


class Stacked(nn.Module):
    """A frozen linear layer with an adapter for each of N equal parts of its rows."""

    lora_A: nn.Parameter  # [N, rank, in], as peft names it
    lora_B: nn.Parameter  # [N, out, rank]

    def __init__(self, layer: Any, number: int) -> None:
        super().__init__()
        self.base, self.scale = layer.get_base_layer(), layer.scaling["default"]
        for side in ("lora_A", "lora_B"):
            weight = getattr(layer, side)["default"].weight.detach()
            self.register_parameter(side, nn.Parameter(weight.expand(number, *weight.shape).clone()))

    def forward(self, rows: Tensor) -> Tensor:
        parts = rows.view(len(self.lora_A), -1, rows.shape[-1])  # [N, T, in], where rows are [1, N T, in]
        product = parts @ self.lora_A.mT @ self.lora_B.mT
        return self.base(rows) + self.scale * product.view(*rows.shape[:-1], -1)


def together(way: Way, base: Any, step: Sequence[Example]) -> Measured:
    """The passes of a step of all adapters at once."""
    number, config = len(way.plws), config_of(0, way.examples)
    model = adapters.adapt(base, "lora", config, config.seed)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        model.set_submodule(name, Stacked(layer, number))
    with ready(model):
        learner = Learner(model).train()
        start = time.process_time()
        rows = batches.fill(step, max(1, ROW_TOKENS // number), multiple=1)
        for _ in range(2):  # the second time is measured, as other ways have a first step that counts less
            learner.zero_grad()
            began = time.process_time()
            divisors = [float(batches.pack(step, Weights(plw)).weights.sum()) for plw in way.plws]
            for examples in rows:
                batch = repeated(examples, way.plws, divisors)
                total, _ = learner(batch.tokens, batch.weights, None, **batch.context)
                total.backward()
            taken = time.process_time() - began
    gradients = {
        plw: {
            f"{name}.{side}": getattr(model.get_submodule(name), side).grad[index]
            for name in layers
            for side in ("lora_A", "lora_B")
        }
        for index, plw in enumerate(way.plws)
    }
    return Measured(start, taken, peak_mib(), gradients)


def repeated(examples: Sequence[Example], plws: Sequence[float], divisors: Sequence[float]) -> Batch:
    """A packed row of the examples once for each PLW, with its weights, divided."""
    row = batches.pack([*examples] * len(plws), Weights(1.0))
    weights = [batches.pack(examples, Weights(plw)).weights / by for plw, by in zip(plws, divisors, strict=True)]
    return Batch(**{**row.__dict__, "weights": torch.cat(weights, dim=1)})


def of_adapter(model: Any) -> dict[str, Tensor]:
    """The weights of an adapter, by the names that `together` gives them."""
    return {
        f"{name}.{side}": getattr(layer, side)["default"].weight
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
        for side in ("lora_A", "lora_B")
    }


def first_gradients(way: Way) -> dict[float, dict[str, Tensor]]:
    """The gradients of the first step of each adapter alone."""
    torch.set_num_threads(1)
    base, found = pretrained.load(way.model).eval(), {}
    step = draw("alpaca", base.config.vocab_size)[: way.examples]
    for plw in way.plws:
        config = config_of(plw, way.examples)
        model = adapters.adapt(twin(base), "lora", config, config.seed)
        with ready(model):
            batch = batches.pack(step, Weights(plw))
            total, _ = Learner(model).train()(batch.tokens, batch.weights, batch.rows, **batch.context)
            (total / batch.weights.sum()).backward()
        found[plw] = {name: weight.grad for name, weight in of_adapter(model).items() if weight.grad is not None}
    return found


def peak_mib() -> float:
    """The peak of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def difference(these: dict[float, dict[str, Tensor]], those: dict[float, dict[str, Tensor]]) -> float:
    """The largest relative difference of an adapter."""
    found = []
    for plw, weights in these.items():
        mine, theirs = (torch.cat([part[name].flatten() for name in sorted(weights)]) for part in (weights, those[plw]))
        found.append(float((mine - theirs).norm() / theirs.norm()))
    return max(found)


def in_a_process(work: Any, way: Way) -> Any:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, way).result()


def compare(shape: str, model: str, plws: Sequence[float], examples: int, steps: int) -> list[dict[str, Any]]:
    """Rows of the table for a model."""
    alone = {plw: in_a_process(measure, Way("alone", model, [plw], examples, steps)) for plw in plws}
    one = next(iter(alone.values()))
    weights = {plw: measured.weights[plw] for plw, measured in alone.items()}
    start = sum(measured.start_seconds for measured in alone.values())
    rows = [Row(shape, "alone", start, sum(m.step_seconds for m in alone.values()), one.peak_mib, 1.0, 0.0)]
    for name in ("in turns", "together"):
        way = Way(name, model, plws, examples, steps)
        found = in_a_process(measure, way)
        right = in_a_process(first_gradients, way) if name == "together" else weights
        apart = difference(found.weights, right)
        ratio = found.peak_mib / one.peak_mib
        rows.append(Row(shape, name, found.start_seconds, found.step_seconds, found.peak_mib, ratio, apart))
    return [asdict(row) for row in rows]


@dataclass(frozen=True)
class Row:
    """A way with a model."""

    shape: str
    way: str
    start_seconds: float
    step_seconds: float
    peak_mib: float
    peak_ratio: float  # to one run's
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.shape:<6}{self.way:<10}{self.start_seconds:>8.1f}{self.step_seconds:>9.2f}{self.peak_mib:>8.0f}"
            f"{self.peak_ratio:>7.2f}{self.difference:>10.1e}"
        )


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--shapes", default="toy:16:5,15M:16:3,135M:4:2", show_default=True, help="SHAPE:EXAMPLES:STEPS of each.")
@click.option(
    "--adapters", "number", default=len(PUBLISHED_PLWS), show_default=True, help="How many of the published PLWs."
)
def main(file: Path, shapes: str, number: int) -> None:
    rows: list[dict[str, Any]] = []
    print(f"{'shape':<6}{'way':<10}{'start':>8}{'step':>9}{'MiB':>8}{'ratio':>7}{'difference':>11}")
    with tempfile.TemporaryDirectory() as scratch:
        for entry in shapes.split(","):
            shape, examples, steps = entry.split(":")
            model = shape if shape == "toy" else str(Path(scratch, shape))
            if shape != "toy":
                save_model(shape, Path(model))
            new = compare(shape, model, PUBLISHED_PLWS[:number], int(examples), int(steps))
            print("\n".join(str(Row(**row)) for row in new), flush=True)
            rows += new
            file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
