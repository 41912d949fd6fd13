"""Our training beside transformers' Trainer and TRL's SFTTrainer on a CPU:  python -m benchmarks.training --json FILE

Each trains a LLaMA on the same examples, 32 a step, by AdamW with the same learning rate, in one thread. They take
turns in short stretches, as shared machines change their speed; each stretch is a process of its own, which has its own
peak of memory. It begins with a step of a few tokens an example, which shows the loss and is not counted. What is
printed are medians over the stretches:

    tokens per processor second    real tokens, without padding; other programs on the machine matter little
    tokens per second              the same by the clock
    MiB at the peak                of the whole process, about 700 of which are its imports
    loss of step 1                 which has to be the same for all that train the same loss

Ours are the trainer's default options. transformers' Trainer is shown with its default, 8 padded examples at a time;
with one at a time, which needs no padding; and grouped by length. Grouped, a step has examples of like lengths, so that
the steps are others than everybody's; those measured are spread evenly over the lengths. `PLWTrainer` is the same
Trainer with our loss, on packed rows of 8 examples and of one. TRL's settings are the fastest that were found
(`TRAINERS`). It knows no weight between 0 and 1, but is as fast at any, so that ours at PLW 0.1 stands beside TRL at 1
(whole texts), and the losses are compared at 1.

Shapes are 15M and 110M (of llama2.c's stories) and 135M (SmolLM2's), with random weights; `--model` adds another model.
The lengths of the examples are drawn from those of Alpaca (`LENGTHS`), or `--data` and `--tokenizer` give real ones.

TRL is needed here alone:  pip install --no-deps --target output/trl trl==1.16.0
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peers
from benchmarks.peers import Settings, Step
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches, prepare
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.models import pretrained
from plw_mlflow.training import train

MAX_TOKENS = 512
POOL = 1600  # examples from which steps are made
LEARNING_RATE = 1e-4
SAME_LOSS = 1e-4  # relative, in float32

SHAPES: dict[str, dict[str, Any]] = {
    "15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6}
    | {"num_attention_heads": 6, "num_key_value_heads": 6},
    "110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "num_key_value_heads": 12},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3},
}

# Quantiles of the tokens of prompts and of completions, drawn independently of each other: of the first 20,000 records
# of Alpaca (cleaned, 21 March 2023) in Alpaca's template, by LLaMA's tokenizer, as they are and with inverted prompts.
QUANTILES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
LENGTHS = {
    "alpaca": (
        (39, 44, 46, 48, 49, 52, 64, 71, 76, 84, 95, 135, 466),
        (2, 8, 13, 19, 29, 47, 67, 86, 107, 141, 177, 287, 456),
    ),
    "inverted": (
        (40, 68, 76, 84, 97, 115, 135, 154, 175, 209, 246, 356, 497),
        (2, 7, 9, 11, 12, 13, 14, 15, 17, 20, 24, 50, 163),
    ),
}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str  # a shape's name or a folder
    method: str
    data: str  # a key of LENGTHS
    step_examples: int = 32

    def __str__(self) -> str:
        return f"{Path(self.model).name} {self.method}, {self.data}"


@dataclass(frozen=True)
class Contestant:
    """Who trains it, and how."""

    who: str
    precision: str
    plw: float

    def __str__(self) -> str:
        return f"{self.who}, {self.precision}, plw {self.plw:g}"


@dataclass(frozen=True)
class Stretch:
    """Some steps of a contestant."""

    tokens: int  # real ones, of the steps that count
    processor_seconds: float
    seconds: float
    peak_mib: float
    first_loss: float


class Enough(Exception):
    """Ends a training that has been measured."""


def draw(data: str, vocabulary: int) -> list[Example]:
    """A pool of examples of random tokens, of Alpaca's lengths."""
    rng = np.random.default_rng(0)
    examples: list[Example] = []
    while len(examples) < POOL:
        prompt, completion = (round(np.interp(rng.random(), QUANTILES, lengths)) for lengths in LENGTHS[data])
        if prompt + completion > MAX_TOKENS:  # dropped, as by default
            continue
        tokens = rng.integers(3, vocabulary, prompt + completion, dtype=np.int32)
        segment = np.repeat(np.array([Segment.INSTRUCTION, Segment.COMPLETION], dtype=np.int8), [prompt, completion])
        examples.append(Example(tokens, segment))
    return examples


def cut(example: Example, number: int) -> Example:
    """A few tokens on both sides of where the completion begins, more or fewer by the number."""
    border = int((example.segment != Segment.COMPLETION).sum())
    part = slice(max(0, border - 4 - number % 7), border + 4 + number % 5)
    return Example(example.tokens[part], example.segment[part])


def read(data: str, file: Path, tokenizer: str, cache: Path) -> list[Example]:
    """A pool of a file's examples."""
    options = TrainConfig(
        dataset=str(file),
        invert=data == "inverted",
        max_tokens=MAX_TOKENS,
        max_records=2 * POOL,
        on_bad_record="skip",
        cache_dir=cache,
    )
    prepared = prepare.run(str(file), pretrained.load_tokenizer(tokenizer), options)
    return [prepared.training[index] for index in range(POOL)]


def ours(folder: Path, config: TrainConfig, steps: Sequence[Step], settings: Settings, report: peers.Report) -> None:
    """Train by the package's own trainer, in the order that is given; `settings` is for the peers."""
    wanted = list(itertools.chain.from_iterable(steps))
    order = itertools.chain.from_iterable(
        batches.steps(len(wanted), config.batch_examples, seed=config.seed, first=0, total=len(steps))
    )
    training: list[Any] = [None] * len(wanted)
    for example, index in zip(wanted, order, strict=True):
        training[index] = example

    def log(metrics: dict[str, float], step: int) -> None:
        if step > 0:
            report(metrics["train/loss"])
        if step == len(steps):
            raise Enough  # instead of a checkpoint

    prepared = Prepared((), training, [], {}, "", 0)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        train.run(config, prepared, pretrained.load(str(folder)), Path(scratch), log)


@dataclass(frozen=True)
class Trainer:
    """One that takes part, and how it is set up."""

    run: Callable[[Path, TrainConfig, Sequence[Step], Settings, peers.Report], None]
    settings: Settings
    is_grouped: bool = False


# Trainer pads 8 examples to a row's length by default. The other settings are the fastest of those that were tried.
TRAINERS = {
    "ours": Trainer(ours, Settings()),
    "Trainer": Trainer(peers.trainer, Settings(micro_batch_examples=8)),
    "Trainer, one at a time": Trainer(peers.trainer, Settings(micro_batch_examples=1)),
    "Trainer, grouped": Trainer(peers.trainer, Settings(micro_batch_examples=4), is_grouped=True),
    "PLWTrainer": Trainer(peers.plw_trainer, Settings(micro_batch_examples=8)),
    "PLWTrainer, one at a time": Trainer(peers.plw_trainer, Settings(micro_batch_examples=1)),
    "TRL, packed": Trainer(peers.trl_packed, Settings(row_tokens=512)),
    "TRL, grouped": Trainer(peers.trl_padded, Settings(micro_batch_examples=4), is_grouped=True),
}


def stretch(case: Case, contestant: Contestant, folder: Path, pool: Sequence[Example], steps: int) -> Stretch:
    """Have a contestant take so many steps after the first, in a process of its own."""
    return _in_a_process(partial(take_steps, case, contestant, folder, pool, steps))


def take_steps(case: Case, contestant: Contestant, folder: Path, pool: Sequence[Example], count: int) -> Stretch:
    """What `stretch` gives, taken in this process."""
    config = TrainConfig(
        plw=contestant.plw,
        method=case.method,  # type: ignore[arg-type]
        precision=contestant.precision,  # type: ignore[arg-type]
        learning_rate=LEARNING_RATE,
        warmup_ratio=0,
        batch_examples=case.step_examples,
        max_tokens=MAX_TOKENS,
        epochs=1,
        eval_every=10**6,
        save_every=10**6,
    )
    examples = pool[: case.step_examples * (count + 1)]
    first, *rest = (
        examples[start : start + case.step_examples] for start in range(0, len(examples), case.step_examples)
    )
    first = [cut(example, number) for number, example in enumerate(first)]
    trainer = TRAINERS[contestant.who]
    steps = peers.grouped(first, pool, count) if trainer.is_grouped else [first, *rest]
    ends: list[tuple[float, float]] = []
    losses: list[float] = []

    def report(loss: float) -> None:
        ends.append((time.process_time(), time.perf_counter()))
        losses.append(loss)

    with suppress(Enough):
        trainer.run(folder, config, steps, trainer.settings, report)
    return Stretch(
        tokens=sum(len(example.tokens) for step in steps[1:] for example in step),
        processor_seconds=ends[-1][0] - ends[0][0],
        seconds=ends[-1][1] - ends[0][1],
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        first_loss=losses[0],
    )


def _in_a_process(work: Callable[[], Any]) -> Any:
    """What `work` gives in a process that is forked from this one, in which torch has computed nothing yet."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        sending.send(work())

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise click.ClickException("a stretch has failed; what happened stands above") from None
    finally:
        process.join()


def save_model(shape: str, folder: Path) -> None:
    """Write a LLaMA of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder)


def bare_products(size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """GFLOP per processor second of products of square matrices, by type: what no training can exceed."""
    taken: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _ in range(repeats + 1):
        for name, times in taken.items():
            left, right = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
            started = time.process_time()
            _ = left @ right
            times.append(time.process_time() - started)
    return {name: 2e-9 * size**3 / statistics.median(times[1:]) for name, times in taken.items()}


def contestants(precisions: Sequence[str], plws: Sequence[float], names: Sequence[str]) -> list[Contestant]:
    """Those that train each case: ours at each PLW, Trainer at the one between, TRL at 1."""
    middle = _middle(plws)
    chosen = []
    for precision, name in itertools.product(precisions, names):
        of_name = plws if name == "ours" else [1.0 if name.startswith("TRL") else middle]
        chosen += [Contestant(name, precision, plw) for plw in of_name]
    return chosen


@dataclass(frozen=True)
class Figures:
    """Medians over a contestant's stretches."""

    speed: float  # real tokens per processor second
    clock_speed: float  # real tokens per second
    peak_mib: float
    first_loss: float

    @classmethod
    def of(cls, stretches: Sequence[Stretch]) -> Figures:
        return cls(
            statistics.median(s.tokens / s.processor_seconds for s in stretches),
            statistics.median(s.tokens / s.seconds for s in stretches),
            statistics.median(s.peak_mib for s in stretches),
            stretches[0].first_loss,
        )


def measure(
    case: Case, chosen: Sequence[Contestant], folder: Path, pool: Sequence[Example], steps: int, rounds: int
) -> dict[Contestant, Figures]:
    """The figures of each contestant; in every round each has one stretch."""
    stretches: dict[Contestant, list[Stretch]] = {contestant: [] for contestant in chosen}
    for _ in range(rounds):
        for contestant in chosen:
            stretches[contestant].append(stretch(case, contestant, folder, pool, steps))
    return {contestant: Figures.of(taken) for contestant, taken in stretches.items()}


def compare(case: Case, figures: dict[Contestant, Figures], plw: float) -> list[dict[str, Any]]:
    """Rows of ours at a PLW beside everybody else in the same precision, and of everybody in their best precision."""
    rows: list[dict[str, Any]] = []
    for other, theirs in figures.items():
        own = figures[Contestant("ours", other.precision, plw)]
        if other.who != "ours" or other.plw != plw:
            rows += _rows(f"{case}, {other.precision}, plw {plw:g}", own, f"{other.who}, plw {other.plw:g}", theirs)
        like = figures.get(Contestant("ours", other.precision, other.plw))
        if other.who != "ours" and like is not None:
            row: dict[str, Any] = {"case": f"{case}, {other.precision}, plw {other.plw:g}", "metric": "loss of step 1"}
            row |= {"ours": like.first_loss, "peer": other.who, "peer_value": theirs.first_loss}
            rows.append(row | {"ratio": theirs.first_loss / like.first_loss})
    best: dict[str, tuple[Contestant, Figures]] = {}
    for contestant, theirs in figures.items():
        if contestant.who == "ours" and contestant.plw != plw:
            continue
        if contestant.who not in best or theirs.speed > best[contestant.who][1].speed:
            best[contestant.who] = contestant, theirs
    own = best.pop("ours")[1]
    for other, theirs in best.values():
        rows += _rows(f"{case}, each in its best precision, plw {plw:g}", own, str(other), theirs)
    return rows


def _rows(case: str, own: Figures, peer: str, theirs: Figures) -> list[dict[str, Any]]:
    compared = {
        "tokens per processor second": (own.speed, theirs.speed, own.speed / theirs.speed),
        "tokens per second": (own.clock_speed, theirs.clock_speed, own.clock_speed / theirs.clock_speed),
        "MiB at the peak": (own.peak_mib, theirs.peak_mib, theirs.peak_mib / own.peak_mib),
    }
    return [
        {"case": case, "metric": metric, "ours": mine, "peer": peer, "peer_value": value, "ratio": ratio}
        for metric, (mine, value, ratio) in compared.items()
    ]


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def show(case: Case, figures: dict[Contestant, Figures], rows: Sequence[dict[str, Any]]) -> None:
    """Print what was measured of a case, and how much faster ours is."""
    print(f"\n{case!s:<40}{'tokens/CPU s':>13}{'tokens/s':>10}{'MiB':>8}{'loss':>9}")
    for contestant, each in figures.items():
        print(f"{contestant!s:<40}{each.speed:>13.0f}{each.clock_speed:>10.0f}{each.peak_mib:>8.0f}", end="")
        print(f"{each.first_loss:>9.5f}", flush=True)
    for row in rows:
        if row["metric"] == "tokens per processor second" and not row["peer"].startswith("ours"):
            print(f"    {row['case']}: {row['ratio']:.2f} times {row['peer']}", flush=True)


def _values(kind: Callable[[str], Any]) -> Callable[..., list[Any]]:
    return lambda context, option, text: [kind(part.strip()) for part in text.split(",")]


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option(
    "--shapes", default="15M,110M,135M", show_default=True, callback=_values(str), help="None: an empty text."
)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Folder of one more model.")
@click.option("--methods", default="full,lora", show_default=True, callback=_values(str))
@click.option("--lengths", default="alpaca,inverted", show_default=True, callback=_values(str))
@click.option("--precisions", default="float32,bfloat16", show_default=True, callback=_values(str))
@click.option("--plw", "plws", default="0,0.1,1", show_default=True, callback=_values(float), help="Of ours.")
@click.option("--trainers", default=";".join(TRAINERS), show_default=True, help="Separated by semicolons.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Alpaca records, instead of drawn lengths.")
@click.option("--tokenizer", default="", help="Folder or hub id; with --data (default: the model's own).")
@click.option("--examples", default=32, show_default=True, help="Examples of a step.")
@click.option("--steps", default=2, show_default=True, help="Steps of a stretch that count.")
@click.option("--rounds", default=3, show_default=True, help="Stretches of each trainer.")
@click.option("--trl", type=click.Path(path_type=Path), default="output/trl", show_default=True, help="Where TRL is.")
def main(
    file: Path,
    shapes: list[str],
    model: Path | None,
    methods: list[str],
    lengths: list[str],
    precisions: list[str],
    plws: list[float],
    trainers: str,
    data: Path | None,
    tokenizer: str,
    examples: int,
    steps: int,
    rounds: int,
    trl: Path,
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as processes are forked
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of the peers' own code
    names = trainers.split(";")
    if not _import_trl(trl):
        names = [name for name in names if not name.startswith("TRL")]
        print(f"TRL is left out; it is to be had by: pip install --no-deps --target {trl} trl==1.16.0", flush=True)
    products = _in_a_process(bare_products)
    print(
        ", ".join(f"{value:.0f} GFLOP per processor second in {name}" for name, value in products.items()), "(products)"
    )
    ratio = products["bfloat16"] / products["float32"]
    row: dict[str, Any] = {"case": "bare product", "metric": "GFLOP per processor second", "peer": "float32"}
    rows = [row | {"ours": products["bfloat16"], "peer_value": products["float32"], "ratio": ratio}]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for shape in filter(None, shapes):
            models[shape] = Path(scratch, shape)
            _in_a_process(partial(save_model, shape, models[shape]))
        models |= {} if model is None else {model.name: model}
        for (name, folder), kind in itertools.product(models.items(), lengths):
            vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
            pool = read(kind, data, tokenizer or str(folder), Path(scratch)) if data else draw(kind, vocabulary)
            for method in methods:
                case = Case(name, method, kind, examples)
                chosen = contestants(precisions, plws, names)
                figures = measure(case, chosen, folder, pool, steps, rounds)
                new = compare(case, figures, _middle(plws))
                show(case, figures, new)
                rows += new
                wrong += [f"{row['case']}: {row['peer']}" for row in new if is_wrong(row)]
                file.write_text(json.dumps(rows, indent=2) + "\n")
    if wrong:
        raise click.ClickException(f"the loss of step 1 is not ours: {'; '.join(wrong)}")


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a peer's loss differs from ours by more than the sums of float32 explain."""
    return row["metric"] == "loss of step 1" and "float32" in row["case"] and abs(row["ratio"] - 1) > SAME_LOSS


def _import_trl(folder: Path) -> bool:
    """Import TRL, if it is there, before processes are forked."""
    sys.path.append(str(folder))
    if importlib.util.find_spec("trl") is None:
        return False
    import trl.trainer.sft_trainer  # noqa: F401

    return True


if __name__ == "__main__":
    main()
