"""How far a step's gradient is from the true one, however the step is cut:  python -m benchmarks.exactness --json FILE

The training loop itself takes one optimiser step of 16 examples, as 1, 2 or 8 micro-batches a process, packed or
padded, in one process or in two (DDP, FSDP2), at each divisor and scope. Its gradient of all weights is compared with
an oracle: computed an example at a time, with all logits, in float64. The figure is the norm of the difference over the
norm of the gradient, the largest over the PLWs. Beside it stands the error that float32 makes in any case: that of the
same oracle computed in float32.

A second table has what may be added to the loop (`PARTS`), in one process with packed rows, in full and by LoRA. Each
figure is the root mean square over the PLWs and several steps, since in bfloat16 a single one may be near or far by
chance. Adapters begin with random numbers, as with zeros most gradients would be 0. For bfloat16, "plain" is the oracle
as transformers and peft compute it under autocast, on a base in bfloat16 for LoRA.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import click
import torch
from torch import Tensor, multiprocessing, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from plw_mlflow.config import DivisorScope, LossDivisor, TrainConfig
from plw_mlflow.data import batches, prepare
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.models import adapters, held, pretrained
from plw_mlflow.training import train

_adapt = adapters.adapt

EXAMPLES = 16
STEPS = 4  # over which the errors of parts are taken
PLWS = (0.0, 0.0005, 0.242, 1.0)
ACCUMULATIONS = (1, 2, 8)
SPREADS = ("1 process", "2, ddp", "2, fsdp2")
DIVISORS, SCOPES = get_args(LossDivisor), get_args(DivisorScope)
# What may be added to the loop: a method, and options of TrainConfig.
PARTS: list[tuple[str, dict[str, Any]]] = [
    *(("full", options) for options in ({}, {"activation_checkpointing": True}, {"compile": True})),
    ("full", {"precision": "bfloat16"}),
    ("full", {"precision": "bfloat16", "compile": True}),
    *(("lora", options) for options in ({}, {"activation_checkpointing": True}, {"compile": True})),
    ("lora", {"precision": "bfloat16"}),
    ("lora", {"precision": "bfloat16", "compile": True}),
]


@dataclass(frozen=True)
class Case:
    """One way to take the step."""

    spread: str
    accumulation: int  # micro-batches a process
    packing: bool
    divisor: str
    scope: str

    def __str__(self) -> str:
        rows = "packed" if self.packing else "padded"
        return f"{self.spread}, {self.accumulation} x {rows}, {self.divisor} by {self.scope}"

    @property
    def micro_batch_examples(self) -> int:
        return EXAMPLES // self.accumulation // (1 if self.spread == SPREADS[0] else 2)


def cases() -> list[Case]:
    every = itertools.product(SPREADS, ACCUMULATIONS, (True, False), DIVISORS, SCOPES)
    return [Case(*values) for values in every]


def inputs(model: str, dataset: str, data_options: dict[str, Any]) -> Prepared:
    """The examples of the step, and one for validation."""
    return _inputs(model, dataset, data_options, EXAMPLES)


def _inputs(model: str, dataset: str, data_options: dict[str, Any], count: int) -> Prepared:
    options: dict[str, Any] = {"model": model, "dataset": dataset, "max_records": 60 + 2 * (count - EXAMPLES)}
    prepared = prepare.run(dataset, pretrained.load_tokenizer(model), TrainConfig(**options | data_options))
    training = [prepared.training[index] for index in range(count)]
    return Prepared((), training, training[:1], {}, "", 0)  # type: ignore[arg-type]


def flat(gradients: Sequence[Tensor]) -> Tensor:
    whole = (g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)
    return torch.cat([g.detach().double().flatten() for g in whole])


def ours(
    case: Case,
    plw: float,
    load: Callable[[], Any],
    prepared: Prepared,
    **options: Any,
) -> Tensor:
    """The gradient with which the optimiser takes the step.

    options: of TrainConfig, beside those of the case; in float32 if they do not say otherwise.
    """
    config = TrainConfig(
        plw=plw,
        **{"precision": "float32"} | options,
        packing=case.packing,
        loss_divisor=case.divisor,  # type: ignore[arg-type]
        divisor_scope=case.scope,  # type: ignore[arg-type]
        parallel="fsdp2" if case.spread == SPREADS[2] else "ddp",
        batch_examples=EXAMPLES,
        micro_batch_examples=case.micro_batch_examples,
        micro_batch_tokens=row_tokens(case, prepared.training),
        max_tokens=max(len(example.tokens) for example in prepared.training),
        max_grad_norm=1e9,
        epochs=1,
    )
    gradients: list[Tensor] = []

    def record(optimizer: Any, *_: Any) -> None:
        # In the model's order, not the optimiser's, which keeps vectors apart.
        gradients.append(flat([parameter.grad for parameter in model.parameters() if parameter.requires_grad]))

    model = load()
    hook = register_optimizer_step_pre_hook(record)
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(adapters, "adapt", adapt):
            train.run(config, prepared, model, Path(folder))
    finally:
        hook.remove()
    return gradients[0]


def adapt(model: Any, method: Any, config: TrainConfig, seed: int) -> Any:
    """The model as a method trains it, with adapters that do not begin with zeros."""
    adapted = _adapt(model, method, config, seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapted


def row_tokens(case: Case, examples: Sequence[Example]) -> int | None:
    """The length of rows with which packing gives as many rows as the case has; None where examples are counted."""
    if not case.packing or case.scope == "micro-batch":
        return None
    rows = EXAMPLES // case.micro_batch_examples
    longest, total = max(len(e.tokens) for e in examples), sum(len(e.tokens) for e in examples)
    fits = (n for n in itertools.count(max(longest, total // rows)) if len(batches.fill(examples, n)) <= rows)
    return next(fits)


def oracle(case: Case, plw: float, model: Any, examples: Sequence[Example]) -> Tensor:
    """The same gradient, an example at a time, in the model's own precision."""
    size = {"step": EXAMPLES, "micro-batch": case.micro_batch_examples, "example": 1}[case.scope]
    (order,) = batches.steps(EXAMPLES, EXAMPLES, seed=TrainConfig().seed, first=0, total=1)
    groups = [order[start : start + size] for start in range(0, EXAMPLES, size)]
    model.zero_grad()
    for group in groups:
        weights = [token_weights(case.divisor, plw, examples[index]) for index in group]
        sides = [torch.from_numpy(examples[index].segment[1:] == Segment.COMPLETION).long() for index in group]
        if case.divisor == "segments":  # by side; a side that weighs nothing divides nothing
            divisors = torch.stack([(w != 0).sum() for w in by_side(torch.cat(weights), torch.cat(sides))])
        else:
            all_weights = torch.cat(weights)
            divisors = (all_weights.count_nonzero() if case.divisor == "tokens" else all_weights.sum()).expand(2)
        for index, weight, side in zip(group, weights, sides, strict=True):
            tokens = torch.from_numpy(examples[index].tokens).long()
            logits = model(tokens.unsqueeze(0)).logits[0, :-1]
            nll = nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            divided = torch.where(weight != 0, weight / divisors[side], 0.0) / len(groups)
            (nll @ divided.to(nll.dtype)).backward()
    return flat([parameter.grad for parameter in model.parameters() if parameter.requires_grad])


def token_weights(divisor: str, plw: float, example: Example) -> Tensor:
    """float64 [T - 1] weights of an example's predicted tokens. GoLLIE's share makes a token's depend on the others."""
    is_completion = torch.from_numpy(example.segment[1:] == Segment.COMPLETION)
    if divisor != "share":
        return torch.where(is_completion, torch.tensor(1.0, dtype=torch.float64), plw)
    completion = int(is_completion.sum())
    odds = plw / (1 - plw) if plw < 1 else 1.0
    of_prompt_token = odds * completion / (len(is_completion) - completion)
    return torch.where(is_completion, torch.tensor(float(plw < 1), dtype=torch.float64), of_prompt_token)


def by_side(values: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    return values[sides == 0], values[sides == 1]


def measure(
    rank: int, spread: str, load: Callable[[], Any], plws: Sequence[float], prepared: Prepared
) -> list[tuple[Case, float, float]]:
    """Each case of a spread with the largest errors over the PLWs, ours and that of float32; empty but on rank 0."""
    exact, single = load().double(), load()
    rows = []
    oracles: dict[tuple[Any, ...], tuple[Tensor, float]] = {}
    for case in cases():
        if case.spread != spread:
            continue
        errors = []
        for plw in plws:
            size = case.micro_batch_examples if case.scope == "micro-batch" else 0
            key = (plw, case.divisor, case.scope, size)
            gradient = ours(case, plw, load, prepared)
            if rank != 0:
                continue
            if key not in oracles:
                true = oracle(case, plw, exact, prepared.training)
                plain = oracle(case, plw, single, prepared.training)
                oracles[key] = true, float((plain - true).norm() / true.norm())
            true, floor = oracles[key]
            errors.append((float((gradient - true).norm() / true.norm()), floor))
        if errors:
            rows.append((case, max(error for error, _ in errors), max(floor for _, floor in errors)))
    return rows


def measure_part(method: str, options: dict[str, Any], model: str, prepared: Prepared) -> list[float]:
    """A part's error, that of the plain computation, and the part's distance from the loop without it (in float32)."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    kind = getattr(torch, options.get("precision", "float32"))
    case = Case(SPREADS[0], 2, True, "weights", "step")
    load = partial(pretrained.load, model)
    exact, plain = (adapt(load(), method, TrainConfig(), TrainConfig().seed).eval() for _ in range(2))
    if method == "lora" and kind == torch.bfloat16:
        held.hold(plain, kind)
    exact = exact.double()
    # Compiling takes a good part of a minute each time.
    plws, steps = ((0.242,), 1) if "compile" in options else (PLWS, STEPS)
    errors = []
    for plw, start in itertools.product(plws, range(0, steps * EXAMPLES, EXAMPLES)):
        examples: Any = [prepared.training[start + index] for index in range(EXAMPLES)]
        step = replace(prepared, training=examples)
        found = ours(case, plw, load, step, method=method, **options)
        true = oracle(case, plw, exact, step.training)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            theirs = oracle(case, plw, plain, step.training)
        without = ours(case, plw, load, step, method=method) if kind == torch.float32 and options else found
        compared = ((found, true), (theirs, true), (found, without))
        errors.append([float((left - right).norm() / true.norm()) for left, right in compared])
    return torch.tensor(errors).square().mean(0).sqrt().tolist()


def in_a_process(
    rank: int, spread: str, port: int, model: str, plws: Sequence[float], prepared: Prepared, file: str
) -> None:
    torch.set_num_threads(1)
    if spread != SPREADS[0]:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TQDM_DISABLE"] = "1"
    rows = measure(rank, spread, partial(pretrained.load, model), plws, prepared)
    if rank == 0:
        torch.save(rows, file)


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--model", default="toy", show_default=True)
@click.option("--dataset", default="toy-short", show_default=True)
@click.option("--spreads", default=";".join(SPREADS), show_default=True, help="Separated by semicolons; may be empty.")
@click.option("--plws", default=",".join(map(str, PLWS)), show_default=True, help="Of the first table.")
@click.option("--parts/--no-parts", default=True, show_default=True, help="Whether to measure the second table.")
def main(file: Path, model: str, dataset: str, spreads: str, plws: str, parts: bool) -> None:
    prepared = inputs(model, dataset, {"on_bad_record": "skip"})
    rows = []
    print(f"{'step taken by':<52}{'relative error of the gradient':>31}{'float32, plain':>16}")
    for spread in filter(None, spreads.split(";")):
        with socket.socket() as free, tempfile.NamedTemporaryFile() as answer:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            arguments = (spread, port, model, list(map(float, plws.split(","))), prepared, answer.name)
            multiprocessing.spawn(in_a_process, arguments, nprocs=1 if spread == SPREADS[0] else 2)
            for case, error, floor in torch.load(answer.name, weights_only=False):
                print(f"{case!s:<52}{error:>31.1e}{floor:>16.1e}", flush=True)
                row = {"case": str(case), "metric": "relative error of the gradient", "ours": error}
                rows.append(row | {"peer": "the oracle in float32", "peer_value": floor, "ratio": floor / error})
    several = _inputs(model, dataset, {"on_bad_record": "skip"}, STEPS * EXAMPLES)
    processes = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    print(f"\n{'part of the loop, 1 process, packed':<52}{'error':>9}{'plain':>9}{'from the loop without it':>26}")
    for method, options in PARTS if parts else []:
        name = ", ".join(
            [method, "float32"][: 1 if "precision" in options else 2]
            + [value if name == "precision" else name for name, value in options.items()]
        )
        error, plain, distance = processes.submit(measure_part, method, options, model, several).result()
        print(f"{name:<52}{error:>9.1e}{plain:>9.1e}{distance:>26.1e}", flush=True)
        row = {"case": name, "metric": "relative error of the gradient", "ours": error}
        rows.append(row | {"peer": "plain computation", "peer_value": plain, "ratio": plain / error})
        if "precision" not in options and options:
            row |= {"metric": "relative difference of the gradient", "ours": distance, "peer": "the loop without it"}
            rows.append(row | {"peer_value": 0.0, "ratio": None})
    file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
