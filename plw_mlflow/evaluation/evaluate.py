"""Evaluate a model: have lm-evaluation-harness ask it the questions of benchmark tasks, and give its scores.

Prompts are the harness's own, or stand in the template of the fine-tuning (`prompting`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partialmethod
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from plw_mlflow.config import ScoreOptions
from plw_mlflow.environment import provenance
from plw_mlflow.environment.precision import Precision
from plw_mlflow.environment.progress import SECONDS_BEFORE_BAR
from plw_mlflow.evaluation import bleu, questions, samples, scores, task_sets
from plw_mlflow.evaluation.prompting import HARNESS, Wrapping
from plw_mlflow.evaluation.scores import Evaluation, Score
from plw_mlflow.evaluation.tasks import Tasks

if TYPE_CHECKING:
    from plw_mlflow.evaluation.held_out import HeldOut
    from plw_mlflow.evaluation.scorer import Scorer

# What is counted of requests that do not fit the model's window, and what a warning says of them.
CUTS = {
    "truncated": "with a context cut from the left to fit the model's window",
    "windowed": "with an answer longer than the model's window, scored window by window",
}

# The options that decide a score, beside the arithmetic.
SCORED_BY = ("tasks", "limit", "apply_template", "fewshot_seed", "eval_batch_tokens", "held_out")


def run(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    options: ScoreOptions,
    seed: int,
    keep: Path | None = None,
    wrapping: Wrapping | None = None,
    precision: Precision = "float32",
    held_out_sets: Sequence[HeldOut] = (),
) -> Evaluation:
    """Score a causal language model on tasks and held-out data sets, on the GPU if there is one.

    model: in bfloat16, its linear layers are rounded to that type, in place.
    keep: a folder for finished requests, from which a scoring that was killed goes on (unset: they are not kept).
    wrapping: what puts a prompt into the fine-tuning template (unset: prompts are the harness's own).
    precision: the type of the arithmetic.
    """
    import torch

    from plw_mlflow.evaluation.scorer import Scorer
    from plw_mlflow.models import held

    if precision != "float32":
        held.hold(model.requires_grad_(False), getattr(torch, precision), with_head=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness leaves a loaded model where it is
    scorer = Scorer(model.to(device), tokenizer, options.eval_batch_tokens, keep, precision)
    evaluation = score(scorer, tasks, options, seed, wrapping)
    return _with_held_out(evaluation, scorer, held_out_sets, seed) if held_out_sets else evaluation


def _with_held_out(evaluation: Evaluation, model: Scorer, sets: Sequence[HeldOut], seed: int) -> Evaluation:
    """An evaluation to which the scores of held-out sets are added, among the harness's results, too."""
    from plw_mlflow.evaluation import held_out

    found, rows = held_out.run(model, sets, seed)
    results = evaluation.results
    results["held_out"] = [
        {name: getattr(each.source, name) for name in ("name", "location", "sha256")} for each in sets
    ]
    for each in sets:
        results["benchmarks"][each.task] = {"documents": len(each.examples), "sha256": each.source.sha256}
        of_task = [score for score in found if score.task == each.task]
        results["results"][each.task] = {f"{score.metric},none": score.score for score in of_task}
    described = [replace(score, precision=model.precision) for score in found]
    return replace(evaluation, scores=evaluation.scores + described, questions=evaluation.questions + rows)


def score(
    language_model: Any, tasks: Tasks, options: ScoreOptions, seed: int, wrapping: Wrapping | None = None
) -> Evaluation:
    """Score one of the harness's language models on tasks.

    Its attribute `precision`, if it has one, is the type of its arithmetic.
    """
    if wrapping is not None:
        language_model.apply_chat_template = wrapping  # where the harness looks for it
    results, samples_by_task = _ask(language_model, tasks, options.limit, seed, is_wrapped=wrapping is not None)
    for task, of_task in samples_by_task.items():
        for filter_name, pairs in bleu.pairs_by_filter(of_task).items():
            results["results"][task][f"bleu_stderr,{filter_name}"] = 100 * bleu.standard_error(pairs, seed)
    results["cut"] = {name: dict(getattr(language_model, name, {})) for name in CUTS}
    results["documents_sha256"] = tasks.sha256
    results["benchmarks"] = {task.task_name: benchmark_contents(task) for task in tasks.loaded}
    # By which the same scores are computed again.
    results["scoring"] = {name: getattr(options, name) for name in SCORED_BY} | {
        "precision": getattr(language_model, "precision", "")
    }
    _warn_of_cuts(results["cut"])
    prompt = HARNESS if wrapping is None else wrapping.kind
    output_types = {task.task_name: task.OUTPUT_TYPE for task in tasks.loaded}
    precision = getattr(language_model, "precision", "")
    described = [
        replace(_describe(bare, tasks, results, output_types[bare.task], prompt), precision=precision)
        for bare in scores.of_results(results, tasks.benchmarks)
    ]
    primary = {each.task: each.metric for each in described if each.is_primary}
    rows = [
        row
        for task in tasks.loaded
        if task.task_name in primary
        for row in samples.rows(task, primary[task.task_name], prompt, samples_by_task[task.task_name])
    ]
    asked = [
        row for task in tasks.loaded for row in questions.rows(task, prompt, samples_by_task.get(task.task_name, []))
    ]
    return Evaluation(described, results, rows, asked, tasks.not_run)


def benchmark_contents(task: Any) -> dict[str, Any]:
    """What identifies the documents of a task of the harness: how many there are, and the SHA-256 of their JSON."""
    sha256 = hashlib.sha256()
    for document in task.eval_docs:
        sha256.update(questions.json_of(document) + b"\n")
    return {"documents": len(task.eval_docs), "sha256": sha256.hexdigest()}


def _ask(
    language_model: Any, tasks: Tasks, limit: int | None, seed: int, *, is_wrapped: bool
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The harness's results, as JSON has them, and its samples by task."""
    from lm_eval import evaluator

    evaluator.add_env_info = lambda results: None  # it starts pip and others, for seconds; environment.json says it
    evaluator.get_git_commit_hash = provenance.commit  # its own is of the folder it runs in, where git may complain
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    bleu.without_standard_error(tasks.loaded)
    with redirect_stdout(StringIO()), _bars_only_when_slow():  # it prints that it bootstraps, whoever reads the output
        results: Any = evaluator.simple_evaluate(
            language_model,
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            limit=limit,
            # Of what is no mean over documents. The harness's own number for metrics such as Matthews' correlation is
            # 100,000; for BLEU it takes no more than these either.
            bootstrap_iters=bleu.ROUNDS,
            apply_chat_template=is_wrapped,
            fewshot_as_multiturn=False,  # a template holds one instruction: few-shot examples are part of it
            random_seed=seed,
            numpy_random_seed=seed % 2**32,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert results is not None  # None is the answer to processes other than the first, of which there are none
    samples_by_task = results.pop("samples")
    return json.loads(json.dumps(results, default=str)), samples_by_task


@contextmanager
def _bars_only_when_slow() -> Iterator[None]:
    """Have progress bars appear only in a terminal, and only for what takes several seconds.

    The harness shows one for each task, mostly for a fraction of a second, and has no setting for that.
    """
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, delay=SECONDS_BEFORE_BAR, disable=None)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _describe(bare: Score, tasks: Tasks, results: dict[str, Any], output_type: str, prompt: str) -> Score:
    """A score, completed by what the harness's numbers do not say: its task's type, its prompt, what was left out."""
    benchmark = tasks.benchmarks.get(bare.task)
    documents = results["n-samples"][bare.task]
    caveats = []
    asked_fewshot = bare.num_fewshot
    if bare.task in tasks.without_examples:
        asked_fewshot, files = tasks.without_examples[bare.task]
        caveats.append(f"0-shot, not {asked_fewshot}: no {files}")
    if documents["effective"] < documents["original"]:
        caveats.append(f"only the first {documents['effective']} of {documents['original']} documents")
    return replace(
        bare,
        prompt=prompt,
        harness_version=version("lm_eval"),
        task_type=(benchmark and benchmark.task_type) or task_sets.task_type(bare.task, output_type),
        asked_fewshot=asked_fewshot,
        caveat="; ".join(caveats),
        **{name: counts.get(bare.task, 0) for name, counts in results["cut"].items()},
    )


def _warn_of_cuts(cuts: dict[str, dict[str, int]]) -> None:
    for name, counts in cuts.items():
        if counts:
            tasks = ", ".join(f"{count} of {task}" for task, count in sorted(counts.items()))
            warnings.warn(f"requests {CUTS[name]}: {tasks}", stacklevel=3)
