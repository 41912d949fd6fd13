"""Training on one NVIDIA GPU, measured:  python -m benchmarks.gpu --json FILE --data-dir DIR --tokenizer DIR

It needs no MLflow. Its parts, any of which can be left out:

heads   the loss head beside bare matrix products and beside full logits: milliseconds, and MiB at the peak
exact32 gradients of packed and padded steps against the float64 oracle of benchmarks.exactness; exact16 in bfloat16
resume  a training that was stopped and resumed beside an undisturbed one, to the bit
steps   whole optimiser steps on Alpaca, packed, padded, and by transformers' own Trainer with prompts masked, of random
        LLaMAs of 1.1 billion parameters (full) and of 7 (LoRA)
qlora   the same on a base in 4 bits, and what is merged of it
curve   one epoch of Alpaca by a small model, whose end is compared with a CPU's by hand

`--data-dir` holds alpaca_data.json[.gz], `--tokenizer` a LLaMA tokenizer, `--small` the curve's model.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import exactness
from benchmarks.loss_head import MIB, PROMPT_SHARE, Row
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.models import adapters, pretrained
from plw_mlflow.training import loss, train

ROWS, WIDTH, VOCABULARIES = 8192, 4096, (32000, 128256)
WIDTHS = {"1.1B": (2048, 5632, 22, 32, 4), "7B": (4096, 11008, 32, 32, 32)}  # hidden, inner, layers, heads, key heads
STEPS, WARM_UP = 8, 2
BATCH_EXAMPLES = 64
BATCH: dict[str, Any] = {
    "batch_examples": BATCH_EXAMPLES,
    "micro_batch_examples": 8,
    "max_tokens": 512,
    "on_long": "truncate",
    "epochs": 1,
    "on_bad_record": "skip",
}


class Enough(Exception):
    """Ends a training that has been measured."""


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median, by the device's own clock."""
    taken = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[1:])


def peak(run: Callable[[], Any]) -> float:
    """MiB that `run` allocates at most beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


class Head:
    """A loss head in bfloat16, as training has it: a trained head is float32 and cast, a frozen one is not."""

    def __init__(self, vocabulary: int, trains: bool, plw: float) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        head = torch.randn(vocabulary, WIDTH, device="cuda").mul_(WIDTH**-0.5)
        self.head = head.requires_grad_() if trains else head.bfloat16()
        self.targets = torch.randint(vocabulary, (ROWS,), device="cuda")
        self.weights = torch.where(torch.rand(ROWS, device="cuda") < PROMPT_SHARE, plw, 1.0)
        self._kept, self._cast = self.hidden.detach()[self.weights != 0], self.head.detach().bfloat16()

    def ours(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            total, _ = loss.weighted_nll(self.hidden, self.head, None, self.targets, self.weights)
        self._backward(total)

    def full_logits(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = nn.functional.linear(self.hidden, self.head)
        self._backward(nn.functional.cross_entropy(logits.float(), self.targets, reduction="none") @ self.weights)

    def bare_products(self) -> None:
        logits = self._kept @ self._cast.T
        _ = logits @ self._cast
        if self.head.requires_grad:
            _ = logits.T @ self._kept

    def _backward(self, total: torch.Tensor) -> None:
        (total / self.weights.sum()).backward()
        self.hidden.grad = self.head.grad = None


def heads(report: Callable[..., None]) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.randn(4096, 4096, device="cuda")
    expected = total.double() + left.T.double() @ right.double()
    loss._add_product(total, left.T, right, 2**20)
    report("the head's gradient", "relative error", float((total - expected).norm() / expected.norm()), "none", 0.0)
    for vocabulary, trains, plw in itertools.product(VOCABULARIES, (False, True), (0.0, 0.242)):
        head = Head(vocabulary, trains, plw)
        case = f"{'trained' if trains else 'frozen'} head of {vocabulary}, plw {plw:g}"
        own = milliseconds(head.ours)
        report(case, "ms", own, "bare products", milliseconds(head.bare_products))
        report(case, "ms", own, "full logits", milliseconds(head.full_logits))
        report(case, "MiB", peak(head.ours), "full logits", peak(head.full_logits))
        mib = loss.BUDGET_BYTES_CUDA // MIB
        for other in (mib // 4, mib * 2):
            with patch.object(loss, "BUDGET_BYTES_CUDA", other * MIB):
                report(f"{case}, budget {mib} MiB", "ms", own, f"budget {other} MiB", milliseconds(head.ours))


def exact(report: Callable[..., None], precision: str) -> None:
    """The relative error of a step's gradient."""
    prepared = exactness.inputs("toy", "toy-short", {"on_bad_record": "skip"})
    true_model, plain = pretrained.load("toy").double(), pretrained.load("toy")
    for case in exactness.cases():
        if case.spread != exactness.SPREADS[0] or case.accumulation != 2 or case.divisor != "weights":
            continue
        errors, floors = [], []
        for plw in exactness.PLWS:
            true = exactness.oracle(case, plw, true_model, prepared.training)
            own = exactness.ours(case, plw, lambda: pretrained.load("toy"), prepared, precision).cpu()
            single = exactness.oracle(case, plw, plain, prepared.training)
            errors.append(float((own - true).norm() / true.norm()))
            floors.append(float((single - true).norm() / true.norm()))
        report(f"{case}, {precision}", "relative error", max(errors), "float32, plain, CPU", max(floors))


def resume(report: Callable[..., None]) -> None:
    """The largest difference of the weights of a resumed training, and of a repeated one, from an undisturbed one's."""
    prepared = exactness.inputs("toy", "toy-short", {"on_bad_record": "skip"})
    config = TrainConfig(epochs=6, batch_examples=8, micro_batch_examples=4, save_every=4, eval_every=99)

    def training(folder: str, stop: int | None = None) -> Any:
        def log(metrics: dict[str, float], step: int) -> None:
            if step == stop:
                raise Enough

        return train.run(config, prepared, pretrained.load("toy"), Path(folder), log).model

    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c:
        undisturbed, again = training(a), training(b)
        with suppress(Enough):
            training(c, stop=6)
        resumed = training(c)
    for name, other in (("again", again), ("resumed", resumed)):
        pairs = zip(undisturbed.parameters(), other.parameters(), strict=True)
        report(
            f"training {name}",
            "largest difference",
            max(float((x - y).detach().abs().max()) for x, y in pairs),
            "none",
            0.0,
        )


def random_llama(size: str) -> Any:
    hidden, inner, layers, heads_, key_heads = WIDTHS[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads_,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def alpaca(folder: Path, tokenizer: Any, options: TrainConfig) -> Prepared:
    prepared = prepare.run("AlpacaData", tokenizer, replace(options, data_dir=folder))
    return replace(prepared, validation=[prepared.validation[i] for i in range(8)])  # type: ignore[arg-type]


def speed(config: TrainConfig, prepared: Prepared, model: Any) -> tuple[float, float]:
    """Tokens a second of our optimiser steps, their median, and the MiB of the whole at the peak."""
    rates: list[float] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if step > WARM_UP:
            rates.append(metrics["train/tokens_per_second"])
        if step == STEPS:
            raise Enough

    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        train.run(config, prepared, model, Path(folder), log)
    return statistics.median(rates), torch.cuda.max_memory_allocated() / MIB


def trainer_speed(prepared: Prepared, model: Any, vocabulary_pad: int = 0) -> tuple[float, float]:
    """The same by transformers' Trainer: its padding, prompts masked, bfloat16, its default optimiser."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = 0

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        nonlocal tokens
        tokens += sum(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            parts = [row[name].long() for row in rows]
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        return {
            "input_ids": padded("input_ids", vocabulary_pad),
            "labels": padded("labels", -100),
            "attention_mask": padded("mask", 0),
        }

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, int]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append((time.monotonic(), tokens))

    rows = []
    for index in range(STEPS * BATCH_EXAMPLES):
        example = prepared.training[index]
        ids = torch.from_numpy(example.tokens)
        is_completion = torch.from_numpy(example.segment) == int(Segment.COMPLETION)
        rows.append({"input_ids": ids, "labels": ids.where(is_completion, -100), "mask": torch.ones_like(ids)})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            max_steps=STEPS,
            bf16=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
        torch.cuda.reset_peak_memory_stats()
        Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[clock]).train()
    # The loader is some batches ahead at the end of a step; over several steps that cancels.
    (start, before), (end, after) = clock.ends[WARM_UP - 1], clock.ends[-1]
    return (after - before) / (end - start), torch.cuda.max_memory_allocated() / MIB


def steps(report: Callable[..., None], folder: Path, tokenizer: Any) -> None:
    for size, method in (("1.1B", "full"), ("7B", "lora")):
        base = TrainConfig(plw=0.242, method=method, learning_rate=1e-5, max_records=3000, **BATCH)  # type: ignore[arg-type]
        prepared = alpaca(folder, tokenizer, base)
        speeds = {}
        for name, change in (
            ("packed", {"packing": True}),
            ("packed, plw 0", {"packing": True, "plw": 0.0}),
            ("padded", {"packing": False}),
        ):
            speeds[name] = speed(replace(base, **change), prepared, random_llama(size))
            torch.cuda.empty_cache()
        model = adapters.adapt(random_llama(size), base.method, base, 0) if method == "lora" else random_llama(size)
        speeds["Trainer"] = trainer_speed(prepared, model.train())
        del model
        torch.cuda.empty_cache()
        own = speeds.pop("packed")
        for peer, (rate, mib) in speeds.items():
            # In every row less is better: hence times.
            report(f"{size} {method}, packed", "s per 1M tokens", 1e6 / own[0], peer, 1e6 / rate)
            report(f"{size} {method}, packed", "MiB", own[1], peer, mib)


def qlora(report: Callable[..., None], folder: Path, tokenizer: Any) -> None:
    base = TrainConfig(plw=0.242, method="lora", learning_rate=1e-3, max_records=3000, **BATCH)
    prepared = alpaca(folder, tokenizer, base)
    with tempfile.TemporaryDirectory() as saved:
        random_llama("1.1B").bfloat16().save_pretrained(saved)
        plain = speed(base, prepared, pretrained.load(saved).cuda())
        torch.cuda.empty_cache()
        quantised = speed(replace(base, method="qlora"), prepared, pretrained.load(saved, four_bit=torch.bfloat16))
        report("1.1B qlora, packed", "s per 1M tokens", 1e6 / quantised[0], "lora", 1e6 / plain[0])
        report("1.1B qlora, packed", "MiB", quantised[1], "lora", plain[1])
        short = replace(base, method="qlora", epochs=0.2, warmup_ratio=0.0)
        curve: dict[int, float] = {}
        checkpoints = Path(saved) / "checkpoints"
        trained = train.run(
            short,
            prepared,
            pretrained.load(saved, four_bit=torch.bfloat16),
            checkpoints,
            lambda metrics, step: curve.update({step: metrics.get("eval/completion_loss", curve.get(step - 1, 0.0))}),
        ).model
        report("1.1B qlora", "completion loss", curve[max(curve)], "before", curve[0])
        tokens = torch.from_numpy(prepared.validation[0].tokens).long().cuda().unsqueeze(0)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            before = trained(tokens).logits.float()
        merged = adapters.merge(trained, Path(saved) / "adapter").cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            after = merged(tokens).logits.float()
        report(
            "1.1B qlora, merged", "relative change of logits", float((after - before).norm() / before.norm()), "", 0.0
        )


def curve(report: Callable[..., None], folder: Path, small: Path) -> None:
    """The losses at the end of the curve in the figure of docs/training.md."""
    tokenizer = pretrained.load_tokenizer(str(small))
    config = TrainConfig(
        plw=0.242,
        learning_rate=0.002,
        epochs=1,
        batch_examples=64,
        max_tokens=256,
        on_long="truncate",
        on_bad_record="skip",
        eval_every=100,
        save_every=10000,
        data_dir=folder,
    )
    prepared = prepare.run("AlpacaData", tokenizer, config)
    last: dict[str, float] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as saved:
        train.run(
            config, prepared, pretrained.load(str(small)), Path(saved), lambda metrics, step: last.update(metrics)
        )
    print(f"{time.monotonic() - started:.0f} s")
    for side, cpu_loss in (("prompt", 0.593), ("completion", 2.015)):
        report("curve, plw 0.242", f"{side} loss", last[f"eval/{side}_loss"], "CPU", cpu_loss)


def older_varlen(kernel: Callable[..., Any], query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    """The kernel of torch before 2.12, with key heads that several query heads share."""
    if options.pop("enable_gqa"):
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    return kernel(query, key, value, *rest, **options)


def measure(part: str, folder: Path, tokenizer_folder: Path, small: Path) -> list[Row]:
    """The rows of one part, printed as they come; in a process of its own, which has one precision."""
    rows: list[Row] = []

    def report(*row: str | float) -> None:
        rows.append(Row(*row))  # type: ignore[arg-type]
        last = rows[-1]
        print(f"{last.case:<58}{last.metric:<20}{last.ours:>11.4g}  {last.peer:<20}{last.peer_value:>11.4g}", end="")
        print(f"  ratio {last.ratio:.2f}" if last.ours else "", flush=True)

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        varlen.varlen_attn = functools.partial(older_varlen, varlen.varlen_attn)
    runs: dict[str, Callable[[], None]] = {
        "heads": lambda: heads(report),
        "exact32": lambda: exact(report, "float32"),
        "exact16": lambda: exact(report, "bfloat16"),
        "resume": lambda: resume(report),
        "steps": lambda: steps(report, folder, pretrained.load_tokenizer(str(tokenizer_folder))),
        "qlora": lambda: qlora(report, folder, pretrained.load_tokenizer(str(tokenizer_folder))),
        "curve": lambda: curve(report, folder, small),
    }
    started = time.monotonic()
    try:
        runs[part]()
    except Exception:  # a GPU is paid by the minute: what was measured is kept, and the other parts still run
        print(traceback.format_exc())
    print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--data-dir", "folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--tokenizer", "tokenizer_folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--small", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--parts", default="heads,exact32,exact16,resume,steps,qlora,curve", show_default=True)
def main(file: Path, folder: Path, tokenizer_folder: Path, small: Path, parts: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}; torch {torch.__version__}", flush=True)
    rows = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for part in parts.split(","):
            part_rows = processes.submit(measure, part, folder, tokenizer_folder, small).result()
            rows += [asdict(row) | {"device": device} for row in part_rows]
            file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
