"""Training on one NVIDIA GPU, measured:  python -m benchmarks.gpu --json FILE

It needs no MLflow and no network; lora8b, waits and qlora need peft. It takes under 8 minutes: each part has a process
of its own and a time limit, and gets no more than what is left of TOTAL_SECONDS, so the last ones may be left out. Rows
are written as they come, so that a part that fails costs no other one's figures. Its parts:

heads     the loss head, as it is and compiled, beside bare matrix products and full logits: milliseconds, peak MiB
waits     how often an optimiser step's host waits for the GPU before AdamW is queued, by torch's own watch
lora8b    whole optimiser steps of a random LLaMA of 8 billion parameters by LoRA, in packed rows of up to 4,096 tokens:
          seconds for a million tokens, beside the aim; MFU; peak MiB; each as it is and compiled
full8b    the same of all weights, with activation checkpointing, which leaves nothing to compile
full1b    the same of all weights of a LLaMA of 1.1 billion parameters
exact32   gradients of packed and padded steps against the float64 oracle of benchmarks.exactness; exact16 in bfloat16;
          compiled in float32, with compiled layers
resume    a training that was stopped and resumed beside an undisturbed one, to the bit, as it is and compiled
scoring   benchmarks.scoring in bfloat16; needs lm-evaluation-harness and `--data-dir` as that benchmark does
trainer   steps of the 1.1B shape beside transformers' own Trainer; not among the parts by default
qlora     the same on a base in 4 bits, and what is merged of it; needs bitsandbytes; not among the parts by default

`--tiny` is for a machine without a GPU: every part on tiny shapes. It shows that the parts run. Its times and sizes
mean nothing, and each of its rows says so.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import LlamaForCausalLM

from benchmarks import exactness
from benchmarks.loss_head import MIB, PROMPT_SHARE, Row
from benchmarks.shapes import llama
from plw_mlflow.config import TrainConfig
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.models import adapters, pretrained
from plw_mlflow.training import loss, measured, train
from plw_mlflow.training.trainer import Trainer

PARTS = "lora8b,full1b,full8b,heads,scoring,waits,resume,compiled,exact32,exact16"  # what is asked for first
TOTAL_SECONDS = 470  # for all parts
PART_SECONDS = {"lora8b": 150, "full8b": 100, "exact32": 60, "exact16": 60}  # the longest a part may take
OTHER_PART_SECONDS = 90
STEPS, WARM_UP = 7, 3
AIMS = {"8B lora": 16000, "8B full": 11500, "1.1B full": 70000}  # tokens a second on an H200
# Hidden size, inner size, layers, heads, key heads, vocabulary.
SHAPES = {
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
TINY_SHAPE = (64, 128, 2, 4, 2, 500)


@dataclass(frozen=True)
class Scale:
    """How large the measured things are."""

    is_tiny: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.is_tiny else "cuda"

    @property
    def head(self) -> tuple[int, int, tuple[int, ...]]:
        """Rows, width and vocabularies of the loss heads."""
        return (64, 32, (500,)) if self.is_tiny else (8192, 4096, (32000, 128256))

    def shape(self, size: str) -> tuple[int, ...]:
        return TINY_SHAPE if self.is_tiny else SHAPES[size]

    @property
    def batch(self) -> dict[str, Any]:
        """Options of optimiser steps of about 15,000 tokens in four rows."""
        if self.is_tiny:
            return {"batch_examples": 8, "micro_batch_examples": 2, "micro_batch_tokens": 400, "max_tokens": 200}
        return {"batch_examples": 128, "micro_batch_examples": 8, "micro_batch_tokens": 4096, "max_tokens": 512}


class Enough(Exception):
    """Ends a training that has been measured."""


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median."""
    taken = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        run()
        wait()
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[1:])


def peak(run: Callable[[], Any]) -> float:
    """MiB that `run` allocates at most beyond what is allocated before it; not a number without a GPU."""
    if not torch.cuda.is_available():
        return math.nan
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / MIB


class Head:
    """A loss head in bfloat16, as training has it: a trained head is float32 and cast, a frozen one is not."""

    def __init__(self, scale: Scale, vocabulary: int, trains: bool, plw: float) -> None:
        torch.manual_seed(0)
        self.device, (rows, width, _) = scale.device, scale.head
        self.hidden = torch.randn(rows, width, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        head = torch.randn(vocabulary, width, device=self.device).mul_(width**-0.5)
        self.head = head.requires_grad_() if trains else head.bfloat16()
        self.targets = torch.randint(vocabulary, (rows,), device=self.device)
        self.weights = torch.where(torch.rand(rows, device=self.device) < PROMPT_SHARE, plw, 1.0)
        self.rows = self.weights.nonzero().squeeze(1)
        self._kept, self._cast = self.hidden.detach()[self.rows], self.head.detach().bfloat16()

    def ours(self, *, is_fused: bool = False) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            total, _ = loss.weighted_nll(
                self.hidden, self.head, None, self.targets, self.weights, self.rows, is_fused=is_fused
            )
        self._backward(total)

    def compiled(self) -> None:
        self.ours(is_fused=True)

    def full_logits(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
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


def heads(report: Callable[..., None], scale: Scale) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(512, 4096, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.randn(4096, 4096, device=scale.device)
    expected = total.double() + left.T.double() @ right.double()
    loss._add_product(total, left.T, right, 2**20)
    report("the head's gradient", "relative error", float((total - expected).norm() / expected.norm()), "none", 0.0)
    for vocabulary, trains, plw in itertools.product(scale.head[2], (False, True), (0.0, 0.242)):
        head = Head(scale, vocabulary, trains, plw)
        case = f"{'trained' if trains else 'frozen'} head of {vocabulary}, plw {plw:g}"
        bare = milliseconds(head.bare_products)
        for name, run in (("", head.ours), (", compiled", head.compiled)):
            own = milliseconds(run)
            report(case + name, "ms", own, "bare products", bare)
            report(case + name, "ms", own, "full logits", milliseconds(head.full_logits))
            report(case + name, "MiB", peak(run), "full logits", peak(head.full_logits))


def examples(count: int, vocabulary: int, longest: int) -> list[Example]:
    """Examples of random tokens, whose lengths are spread about as Alpaca's with the LLaMA tokenizer (mean 115)."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(math.log(95), 0.6, count), 16, longest).astype(int)
    made = []
    for length in lengths:
        segment = np.full(length, int(Segment.COMPLETION), np.int8)
        segment[: int(PROMPT_SHARE * length)] = int(Segment.INSTRUCTION)
        made.append(Example(draw.integers(3, vocabulary, length).astype(np.int32), segment))
    return made


def random_llama(scale: Scale, size: str) -> Any:
    config = llama(scale.shape(size), max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(scale.device):
        return LlamaForCausalLM(config).eval()


def inputs(scale: Scale, size: str) -> Prepared:
    drawn = examples((STEPS + 1) * scale.batch["batch_examples"], scale.shape(size)[-1], scale.batch["max_tokens"])
    return Prepared((), drawn, drawn[:8], {}, "", 0)  # type: ignore[arg-type]


def recipe(scale: Scale, **options: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"plw": 0.242, "precision": "bfloat16", "learning_rate": 1e-5, "epochs": 1, "packing": True}
    return TrainConfig(**fixed | scale.batch | options)


def measure_steps(config: TrainConfig, prepared: Prepared, model: Any) -> dict[str, float]:
    """Medians over optimiser steps of their metrics; those of peaks are the last."""
    rows: list[dict[str, float]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if step > WARM_UP:
            rows.append(metrics)
        if step == STEPS:
            raise Enough

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        device_peak = measured.find_peak(model, "bfloat16", config.max_tokens)
        train.run(config, prepared, model, Path(folder), log, peak=device_peak)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[-1] if name in rows[0]}
    return medians | {"train/peak_memory_mib": rows[-1]["train/peak_memory_mib"]}


def steps(report: Callable[..., None], scale: Scale, size: str, method: str, variants: list[dict[str, Any]]) -> None:
    prepared, aim = inputs(scale, size), AIMS[f"{size} {method}"]
    for options in variants:
        case = ", ".join([f"{size} {method}", *(name.replace("_", " ") for name in options)])
        started = time.monotonic()
        try:
            config = recipe(scale, method=method, save_every=10**6, eval_every=10**6, **options)
            found = measure_steps(config, prepared, random_llama(scale, size))
        except Exception as error:  # the other variants still run
            print(f"{case}: {traceback.format_exc() if scale.is_tiny else repr(error)[:500]}", flush=True)
        else:
            report(case, "s per 1M tokens", 1e6 / found["train/tokens_per_second"], f"aim of {aim} tok/s", 1e6 / aim)
            report(case, "MiB", found["train/peak_memory_mib"], "none", 0.0)
            report(case, "MFU", found.get("train/mfu", math.nan), "none", 0.0)
            report(case, "padding share", found.get("train/padding_share", math.nan), "none", 0.0)
        print(f"{case}: {time.monotonic() - started:.0f} s in all", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def waits(report: Callable[..., None], scale: Scale) -> None:
    """By `torch.cuda.set_sync_debug_mode`, which knows of most ways in which a host waits for its GPU."""
    found: list[str] = []
    begin_step = Trainer.begin_step

    def watched(trainer: Trainer, step: Any) -> Any:
        if not torch.cuda.is_available():
            return begin_step(trainer, step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return begin_step(trainer, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                if trainer.step >= WARM_UP:
                    found.extend(str(w.message) + f" {w.filename}:{w.lineno}" for w in caught if "synchron" in str(w))

    Trainer.begin_step = watched  # type: ignore[method-assign,assignment]
    try:
        for method in ("full", "lora"):
            found.clear()
            config = recipe(scale, method=method, save_every=10**6, eval_every=10**6)
            measure_steps(config, inputs(scale, "1.1B"), random_llama(scale, "1.1B"))
            report(f"1.1B {method}", "waits a step", len(found) / (STEPS - WARM_UP), "none", 0.0)
            print("\n".join(dict.fromkeys(found)), flush=True)
    finally:
        Trainer.begin_step = begin_step  # type: ignore[method-assign]


def exact(report: Callable[..., None], precision: str, *, is_compiled: bool = False) -> None:
    """The relative error of a step's gradient."""
    prepared = exactness.inputs("toy", "toy-short", {"on_bad_record": "skip"})
    true_model, plain = pretrained.load("toy").double(), pretrained.load("toy")
    for case in exactness.cases():
        if case.spread != exactness.SPREADS[0] or case.accumulation != 2 or case.divisor != "weights":
            continue
        if is_compiled and case.scope != "step":
            continue
        errors, floors = [], []
        for plw in (0.242,) if is_compiled else exactness.PLWS:
            true = exactness.oracle(case, plw, true_model, prepared.training)
            own = exactness.ours(
                case, plw, lambda: pretrained.load("toy"), prepared, precision=precision, compile=is_compiled
            ).cpu()
            single = exactness.oracle(case, plw, plain, prepared.training)
            errors.append(float((own - true).norm() / true.norm()))
            floors.append(float((single - true).norm() / true.norm()))
        name = f"{case}, {precision}" + ", compiled" * is_compiled
        report(name, "relative error", max(errors), "float32, plain, CPU", max(floors))


def resume(report: Callable[..., None]) -> None:
    """The largest difference of the weights of a resumed training, and of a repeated one, from an undisturbed one's."""
    prepared = exactness.inputs("toy", "toy-short", {"on_bad_record": "skip"})

    def training(config: TrainConfig, folder: str, stop: int | None = None) -> Any:
        def log(metrics: dict[str, float], step: int) -> None:
            if step == stop:
                raise Enough

        return train.run(config, prepared, pretrained.load("toy"), Path(folder), log).model

    for is_compiled in (False, True):
        config = TrainConfig(
            epochs=6, batch_examples=8, micro_batch_examples=4, save_every=4, eval_every=99, compile=is_compiled
        )
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c:
            undisturbed, again = training(config, a), training(config, b)
            with suppress(Enough):
                training(config, c, stop=6)
            resumed = training(config, c)
        for name, other in (("again", again), ("resumed", resumed)):
            pairs = zip(undisturbed.parameters(), other.parameters(), strict=True)
            report(
                f"training {name}" + ", compiled" * is_compiled,
                "largest difference",
                max(float((x - y).detach().abs().max()) for x, y in pairs),
                "none",
                0.0,
            )


def scoring(report: Callable[..., None], scale: Scale, folder: Path | None) -> None:
    """The rows of benchmarks.scoring."""
    if folder is None:
        print("scoring needs --data-dir", flush=True)
        return
    from benchmarks import scoring as theirs  # needs lm-evaluation-harness

    with tempfile.NamedTemporaryFile() as file:
        name, questions = ("10M", 4) if scale.is_tiny else ("1B", 40)
        assert theirs.main.callback is not None
        theirs.main.callback(Path(file.name), folder, name, questions, 3, "bfloat16", None)
        for row in json.loads(Path(file.name).read_text()):
            report(row["case"], row["metric"], row["ours"], row["peer"], row["peer_value"])


def trainer_speed(scale: Scale, prepared: Prepared, model: Any, vocabulary_pad: int = 0) -> tuple[float, float]:
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
            wait()
            self.ends.append((time.monotonic(), tokens))

    rows = []
    for index in range(STEPS * recipe(scale).batch_examples):
        example = prepared.training[index]
        ids = torch.from_numpy(example.tokens)
        is_completion = torch.from_numpy(example.segment) == int(Segment.COMPLETION)
        rows.append({"input_ids": ids, "labels": ids.where(is_completion, -100), "mask": torch.ones_like(ids)})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=recipe(scale).batch_examples // 8,
            max_steps=STEPS,
            bf16=True,
            use_cpu=scale.is_tiny,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[clock]).train()
    # The loader is some batches ahead at the end of a step; over several steps that cancels.
    (start, before), (end, after) = clock.ends[WARM_UP - 1], clock.ends[-1]
    return (after - before) / (end - start), measured.peak_memory_mib(torch.device(scale.device))


def trainer(report: Callable[..., None], scale: Scale) -> None:
    prepared = inputs(scale, "1.1B")
    own = measure_steps(recipe(scale, method="full"), prepared, random_llama(scale, "1.1B"))
    rate, mib = trainer_speed(scale, prepared, random_llama(scale, "1.1B").train())
    report("1.1B full", "s per 1M tokens", 1e6 / own["train/tokens_per_second"], "Trainer", 1e6 / rate)
    report("1.1B full", "MiB", own["train/peak_memory_mib"], "Trainer", mib)


def qlora(report: Callable[..., None], scale: Scale) -> None:
    base, prepared = recipe(scale, method="lora", learning_rate=1e-3), inputs(scale, "1.1B")
    quantised = replace(base, method="qlora")
    with tempfile.TemporaryDirectory() as saved:
        random_llama(scale, "1.1B").bfloat16().save_pretrained(saved)
        plain = measure_steps(base, prepared, pretrained.load(saved).to(scale.device))
        four_bit = measure_steps(quantised, prepared, pretrained.load(saved, four_bit=torch.bfloat16))
        times = [1e6 / found["train/tokens_per_second"] for found in (four_bit, plain)]
        report("1.1B qlora", "s per 1M tokens", times[0], "lora", times[1])
        name = "train/peak_memory_mib"
        report("1.1B qlora", "MiB", four_bit[name], "lora", plain[name])
        trained = train.run(
            replace(quantised, epochs=0.2, warmup_ratio=0.0),
            prepared,
            pretrained.load(saved, four_bit=torch.bfloat16),
            Path(saved) / "checkpoints",
        ).model
        tokens = torch.from_numpy(prepared.validation[0].tokens).long().to(scale.device).unsqueeze(0)
        with torch.no_grad(), torch.autocast(scale.device, torch.bfloat16):
            before = trained(tokens).logits.float()
        merged = adapters.merge(trained, Path(saved) / "adapter").to(scale.device)
        with torch.no_grad(), torch.autocast(scale.device, torch.bfloat16):
            after = merged(tokens).logits.float()
        report(
            "1.1B qlora, merged", "relative change of logits", float((after - before).norm() / before.norm()), "", 0.0
        )


def older_varlen(kernel: Callable[..., Any], query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    """The kernel of torch before 2.12, with key heads that several query heads share."""
    if options.pop("enable_gqa"):
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    return kernel(query, key, value, *rest, **options)


def measure(part: str, scale: Scale, folder: Path | None, file: Path, device: str) -> None:
    """Measure one part, and add each of its rows to the file as it comes."""

    def report(*row: str | float) -> None:
        last = Row(*row)  # type: ignore[arg-type]
        if math.isnan(last.ours):  # as memory without a GPU
            return
        print(f"{last.case:<58}{last.metric:<20}{last.ours:>11.4g}  {last.peer:<22}{last.peer_value:>11.4g}", end="")
        print(f"  ratio {last.ratio:.2f}" if last.ours and last.peer_value else "", flush=True)
        rows = json.loads(file.read_text())
        rows.append(asdict(last) | {"ratio": last.ratio if last.ours else None, "device": device})
        file.write_text(json.dumps(rows, indent=2) + "\n")

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        varlen.varlen_attn = functools.partial(older_varlen, varlen.varlen_attn)
    plain: dict[str, Any] = {}
    compiled, checkpointing = {"compile": True}, {"activation_checkpointing": True}
    runs: dict[str, Callable[[], None]] = {
        "heads": lambda: heads(report, scale),
        "waits": lambda: waits(report, scale),
        "lora8b": lambda: steps(report, scale, "8B", "lora", [compiled, plain, checkpointing]),
        "full8b": lambda: steps(report, scale, "8B", "full", [checkpointing]),
        "full1b": lambda: steps(report, scale, "1.1B", "full", [compiled, plain]),
        "exact32": lambda: exact(report, "float32"),
        "exact16": lambda: exact(report, "bfloat16"),
        "compiled": lambda: exact(report, "float32", is_compiled=True),
        "resume": lambda: resume(report),
        "scoring": lambda: scoring(report, scale, folder),
        "trainer": lambda: trainer(report, scale),
        "qlora": lambda: qlora(report, scale),
    }
    try:
        runs[part]()
    except Exception:  # a GPU is paid by the minute: what was measured is kept, and the other parts still run
        print(traceback.format_exc(), flush=True)


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--data-dir", "folder", type=click.Path(path_type=Path, exists=True), help="For scoring.")
@click.option("--parts", default=PARTS, show_default=True)
@click.option("--tiny", "is_tiny", is_flag=True, help="On a CPU, to see that it runs.")
def main(file: Path, folder: Path | None, parts: str, is_tiny: bool) -> None:
    if not is_tiny and not torch.cuda.is_available():
        raise click.UsageError("there is no GPU; --tiny shows on a CPU that the parts run")
    device = "a CPU, tiny shapes: measures nothing" if is_tiny else torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}", flush=True)
    file.write_text("[]\n")
    begun = time.monotonic()
    for part in parts.split(","):
        started = time.monotonic()
        limit = min(PART_SECONDS.get(part, OTHER_PART_SECONDS), TOTAL_SECONDS - (started - begun))
        if limit < 1 and not is_tiny:
            print(f"{part}: left out, as no time is left", flush=True)
            continue
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(part, Scale(is_tiny), folder, file, device)
        )
        process.start()
        process.join(None if is_tiny else limit)
        ended = "" if process.exitcode == 0 else f", which ended with {process.exitcode or 'too little time'}"
        if process.is_alive():
            process.kill()
            process.join()
        print(f"{part}: {time.monotonic() - started:.0f} s{ended}", flush=True)


if __name__ == "__main__":
    main()
