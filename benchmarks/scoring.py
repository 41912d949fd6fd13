"""Our scoring beside the harness's own HFLM:  python -m benchmarks.scoring --json FILE --data-dir DIR

Both answer the same requests with the same model in the same process. They take turns, as shared machines change their
speed. The seconds, from texts to answers, are medians of CPU time with one thread; on a GPU, of wall time. The peers
are HFLM with 64 requests at a time, and HFLM with the fastest of several numbers of requests, which is measured first.
All log-likelihoods and all generations are compared.

The cases are ARC-Challenge (4 options) without examples, with 5 examples that are the same for all questions, and with
5 examples of each question's own, as the harness draws them by default; PIQA (2 options); and greedy generation until
a line ends. Models whose window is too small leave the cases with examples out. `--data-dir` holds
arc_challenge_test.jsonl and piqa_valid.jsonl. The models `10M`, `100M` and `1B` are random LLaMAs of about so many
parameters, with the tokenizer of `toy`.

With `--tasks`, the questions are instead the first ones of tasks of the harness, and ours in float32, ours in bfloat16
and HFLM with the whole model in bfloat16 answer all of them once, `PART` questions at a time in turn. The table then
has the accuracy of each, how many of its answers differ from those of ours in float32, and how far its log-likelihoods
are from those: mean, mean of the absolute values, and the largest.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.loss_head import Row
from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation.scorer import Scorer
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import held, pretrained

EXAMPLES = 5
TRIED_SIZES = (8, 16, 32)  # requests at a time, beside 64
POSITIONS = 2048  # of the random models
PART = 50  # questions that everyone answers in turn, of tasks
RANDOM_MODELS = {"10M": (256, 8), "100M": (768, 12), "1B": (2048, 22)}  # hidden size and layers


@dataclass(frozen=True)
class Case:
    """Requests of one kind."""

    name: str
    kind: str  # the method of the language model that answers them
    requests: list[Instance]


def cases(folder: Path, questions: int) -> list[Case]:
    """The cases, of so many questions each."""
    arc = [json.loads(line) for line in (folder / "arc_challenge_test.jsonl").read_text().splitlines()]
    piqa = [json.loads(line) for line in (folder / "piqa_valid.jsonl").read_text().splitlines()][:questions]
    asked, spare = arc[:questions], arc[questions:]
    draw = random.Random(0)

    def text(row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\nAnswer:"

    def examples(rows: list[dict[str, Any]]) -> str:
        return "".join(f"{text(row)} {row['choices'][row['answer']]}\n\n" for row in rows)

    same = examples(spare[:EXAMPLES])
    own = [examples(draw.sample(spare, EXAMPLES)) for _ in asked]
    options = [(row, f" {choice}") for row in asked for choice in row["choices"]]
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 64}
    few_shot = f"{EXAMPLES}-shot, 4 options"
    return [
        _case("0-shot, 4 options", "loglikelihood", [(text(row), option) for row, option in options]),
        _case(
            f"{few_shot}, the same examples", "loglikelihood", [(same + text(row), option) for row, option in options]
        ),
        _case(
            f"{few_shot}, examples of its own",
            "loglikelihood",
            [
                (shots + text(row), f" {choice}")
                for shots, row in zip(own, asked, strict=True)
                for choice in row["choices"]
            ],
        ),
        _case(
            "0-shot, 2 options",
            "loglikelihood",
            [(f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for row in piqa for name in ("sol1", "sol2")],
        ),
        _case("generation", "generate_until", [(text(row), settings) for row in asked]),
    ]


def _case(name: str, kind: str, arguments: list[Any]) -> Case:
    requests = [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=("benchmark", number, 1))
        for number, given in enumerate(arguments)
    ]
    return Case(name, kind, requests)


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if name not in RANDOM_MODELS:
        return pretrained.load(name), pretrained.load_tokenizer(name)
    torch.manual_seed(0)
    tokenizer, (width, layers) = pretrained.load_tokenizer("toy"), RANDOM_MODELS[name]
    config = LlamaConfig(
        vocab_size=32 * width,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def held_in(model: Any, precision: Any) -> tuple[Any, Any]:
    """A model as ours scores it in a precision, and as HFLM does, on the GPU if there is one; float32 changes nothing.

    The first is the model itself, whose weights are rounded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "float32":
        return model.to(device), model.to(device)
    whole = copy.deepcopy(model).bfloat16().to(device)
    held.hold(model.requires_grad_(False), torch.bfloat16)
    return model.to(device), whole


def fits(case: Case, model: Any, tokenizer: Any) -> bool:
    """Whether almost all requests fit the model's window. Others are cut on the left and share no beginning."""
    window = model.config.max_position_embeddings
    lengths = [len(tokenizer(request.args[0], verbose=False).input_ids) for request in case.requests]
    return sum(length > 0.9 * window for length in lengths) < 0.05 * len(lengths)


def measure(
    models: tuple[Any, Any], tokenizer: Any, case: Case, repeats: int, precision: Any
) -> tuple[dict[str, float], list[Any], list[Any]]:
    """Median seconds of ours and of both peers, and the answers of ours and of the peer with 64 requests.

    models: as `held_in` gives them.
    """

    def ours() -> list[Any]:
        scorer = Scorer(models[0], tokenizer, precision=precision)
        return list(getattr(scorer, case.kind)(case.requests, disable_tqdm=True))

    def peer(size: int) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            harness = _harness(models[1], tokenizer, size)
            return list(getattr(harness, case.kind)(case.requests, disable_tqdm=True))

        return run

    best = min(TRIED_SIZES, key=lambda size: _seconds(peer(size))[0])
    everyone = {"ours": ours, "HFLM, 64 at a time": peer(64), f"HFLM, {best} at a time": peer(best)}
    taken: dict[str, list[float]] = {who: [] for who in everyone}
    answers: dict[str, list[Any]] = {}
    for _ in range(repeats):
        for who, run in everyone.items():
            seconds, answers[who] = _seconds(run)
            taken[who].append(seconds)
    return (
        {who: statistics.median(times) for who, times in taken.items()},
        answers["ours"],
        answers["HFLM, 64 at a time"],
    )


def _harness(model: Any, tokenizer: Any, size: int) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_batch_size=None)


def _seconds(run: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    answers = run()
    return clock() - started, answers


def differences(case: Case, ours: list[Any], theirs: list[Any]) -> str:
    """How far the answers are apart."""
    if case.kind == "generate_until":
        return f"{sum(a != b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} texts differ"
    largest = max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    flags = sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    return f"{len(ours)} log-likelihoods differ by {largest:.1e} at most (relative), {flags} greedy flags differ"


@dataclass(frozen=True)
class Part:
    """What everyone has answered of some questions of a task."""

    right: dict[str, list[bool]]  # by who answered: of each question
    chosen: dict[str, list[int]]  # the option with the highest log-likelihood
    log_likelihoods: dict[str, list[float]]  # of each option of each question
    seconds: dict[str, float]


def parts(task: Any, questions: int) -> list[list[list[Instance]]]:
    """The requests of a task's first questions, in parts of `PART` questions; each question has a list of them."""
    task.build_all_requests(limit=questions, rank=0, world_size=1)
    of_document = itertools.groupby(task.instances, lambda instance: instance.doc_id)
    by_question = [list(group) for _, group in of_document]
    return [by_question[start : start + PART] for start in range(0, len(by_question), PART)]


def ask(task: Any, everyone: dict[str, Any], part: list[list[Instance]]) -> Part:
    """Have every language model, by name, answer some questions of a task."""
    requests = [request for question in part for request in question]
    found = Part({}, {}, {}, {})
    for who, language_model in everyone.items():
        seconds, answers = _seconds(partial(language_model.loglikelihood, requests, disable_tqdm=True))
        rest = iter(answers)
        by_question = [list(itertools.islice(rest, len(question))) for question in part]
        documents = [question[0].doc for question in part]
        found.right[who] = [
            bool(task.process_results(document, of_question)["acc"])
            for document, of_question in zip(documents, by_question, strict=True)
        ]
        found.chosen[who] = [max(range(len(each)), key=lambda n: each[n][0]) for each in by_question]
        found.log_likelihoods[who] = [log_likelihood for log_likelihood, _ in answers]
        found.seconds[who] = seconds
    return found


def summary(case: str, answered: list[Part]) -> list[Row]:
    """Print the table of a task, and give its rows: the second one's seconds beside those of the others."""
    exact, ours, *_ = everyone = list(answered[0].seconds)
    seconds = {who: sum(part.seconds[who] for part in answered) for who in everyone}
    options = sum(len(part.log_likelihoods[exact]) for part in answered)
    for who in everyone:
        right = [value for part in answered for value in part.right[who]]
        changed = sum(a != b for part in answered for a, b in zip(part.chosen[who], part.chosen[exact], strict=True))
        apart = [
            a - b
            for part in answered
            for a, b in zip(part.log_likelihoods[who], part.log_likelihoods[exact], strict=True)
        ]
        print(
            f"{case:<28}{who:<26}{sum(right) / len(right):>8.4f}{changed:>5} of {len(right)} answers changed, "
            f"log-likelihoods {sum(apart) / options:+.4f}, {sum(map(abs, apart)) / options:.4f}, "
            f"{max(map(abs, apart)):.3f}, {seconds[who]:>7.1f} s",
            flush=True,
        )
    return [Row(case, "seconds", seconds[ours], who, seconds[who]) for who in everyone if who != ours]


def in_both_precisions(name: str, listed: str, folder: Path, questions: int) -> list[Row]:
    """The rows of a model on tasks, in float32 and in bfloat16."""
    exact, tokenizer = load(name)
    ours, whole = held_in(copy.deepcopy(exact), "bfloat16")
    exact = exact.to(ours.device)
    tasks = load_tasks(ScoreOptions(tasks=listed, data_dir=folder, limit=questions))
    best = _best_size(whole, tokenizer, parts(tasks.loaded[0], questions)[0])
    everyone = {
        "ours, float32": Scorer(exact, tokenizer),
        "ours, bfloat16": Scorer(ours, tokenizer, precision="bfloat16"),
        f"HFLM, bfloat16, {best} at a time": _harness(whole, tokenizer, best),
    }
    rows = []
    for task in tasks.loaded:
        answered = [ask(task, everyone, part) for part in parts(task, questions)]
        rows += summary(f"{Path(name).name}: {task.config.task}", answered)
    return rows


def _best_size(model: Any, tokenizer: Any, part: list[list[Instance]]) -> int:
    """The number of requests at a time with which HFLM answers a few questions the fastest."""
    few = [request for question in part[:16] for request in question]
    sizes = (*TRIED_SIZES, 64)
    return min(
        sizes,
        key=lambda size: _seconds(lambda: _harness(model, tokenizer, size).loglikelihood(few, disable_tqdm=True))[0],
    )


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option(
    "--data-dir",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with the benchmarks' files.",
)
@click.option(
    "--model", "names", default="toy", show_default=True, help="toy, folders, hub ids, 10M, 100M; comma-separated."
)
@click.option("--questions", default=100, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on a GPU alone.")
@click.option("--tasks", help="Tasks of the harness, comma-separated, in place of the cases.")
def main(
    file: Path, folder: Path, names: str, questions: int, repeats: int, precision: str | None, tasks: str | None
) -> None:
    precision = precision or ("bfloat16" if torch.cuda.is_available() else "float32")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in names.split(","):
        if tasks is not None:
            rows += in_both_precisions(name, tasks, folder, questions)
            continue
        model, tokenizer = load(name)
        models = held_in(model, precision)
        for case in cases(folder, questions):
            if not fits(case, model, tokenizer):
                continue
            taken, ours, theirs = measure(models, tokenizer, case, repeats, precision)
            for peer, seconds in list(taken.items())[1:]:
                rows.append(Row(f"{Path(name).name}: {case.name}", "seconds", taken["ours"], peer, seconds))
                row = rows[-1]
                print(f"{row.case:<52}{row.ours:>8.2f}  {row.peer:<22}{row.peer_value:>8.2f}", end="")
                print(f"  ratio {row.ratio:.2f}", flush=True)
            print(f"    {differences(case, ours, theirs)}", flush=True)
    file.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
