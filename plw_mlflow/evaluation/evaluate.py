"""Evaluate: benchmark scores of a model, by lm-evaluation-harness, as rows of the score table.

Tasks come from a named set (tasksets.py), or are the harness's own. With a data folder, those that benchmark_data.py
knows read their documents there. Prompts are the harness's, or stand in the fine-tuning template (prompting.py).
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from plw_mlflow.config import ScoreOptions
from plw_mlflow.environment import outputs
from plw_mlflow.errors import UserError, first_line
from plw_mlflow.evaluation import local_documents, task_sets
from plw_mlflow.evaluation.prompting import HARNESS, Wrapping
from plw_mlflow.evaluation.task_sets import Benchmark
from plw_mlflow.models import saved_adapters

TASKS_FOLDER = task_sets.OWN_TASKS
# The harness gives these on 0..100; the second line is TruthfulQA's.
PERCENT_METRICS = re.compile(r"bleu|chrf|ter|(bleu|rouge[12L])_(max|diff)")
# Of the standard errors of what is no mean over documents. The harness takes no more for BLEU either, but 100,000 for
# metrics such as Matthews' correlation.
BOOTSTRAP_ROUNDS = 100
# The per-sample log is for looking at, in MLflow's page: some documents of each task, of long texts the end.
LOGGED_SAMPLES = 200
LOGGED_CHARACTERS = 1000


@dataclass(frozen=True)
class Score:
    """One metric of one task; the score on 0..1."""

    task: str
    metric: str
    score: float
    stderr: float | None
    n: int  # documents scored
    num_fewshot: int
    task_version: str
    is_primary: bool  # it stands for its task in the score table, and counts in `score`
    prompt: str = HARNESS  # or "template NAME"
    harness_version: str = ""
    task_type: str = ""
    truncated: int = 0  # requests whose context was cut from the left to fit the model's window
    windowed: int = 0  # requests whose continuation alone is longer than the window, scored window by window
    asked_fewshot: int = 0  # the examples that the task or its set has before each question
    caveat: str = ""  # what was not done as the task or its set has it

    @property
    def key(self) -> str:
        """What the number is, as tasksets.key has it."""
        return task_sets.key(self.task, self.metric, self.asked_fewshot)


@dataclass(frozen=True)
class Evaluation:
    """All scores of one model."""

    scores: list[Score]
    results: dict[str, Any]  # the harness's own results, without its samples
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of the per-sample log
    not_run: dict[str, str] = field(default_factory=dict)  # tasks of the named sets that are not run, and why

    @property
    def primary(self) -> list[Score]:
        """One score per task."""
        return [score for score in self.scores if score.is_primary]

    @property
    def mean(self) -> float:
        """The unweighted mean over tasks: the cell's `score`."""
        return statistics.fmean(score.score for score in self.primary)


@dataclass(frozen=True)
class Tasks:
    """Benchmark tasks, ready to be run."""

    loaded: list[Any]  # the harness's task objects, their documents read
    manager: Any  # the harness's TaskManager they come from
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)  # how the named sets run their tasks
    lacking: dict[str, tuple[int, str]] = field(default_factory=dict)  # 0-shot tasks: shots asked for, file not there
    sha256: dict[str, dict[str, str]] = field(default_factory=dict)  # of the local files that a task has read
    not_run: dict[str, str] = field(default_factory=dict)


def load_tasks(options: ScoreOptions) -> Tasks:
    """The tasks that `options.tasks` names.

    Raises UserError for an unknown task (with the nearest names), or one whose documents cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    from lm_eval.tasks._index import Entry, Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    datasets.disable_progress_bars()  # some tasks pass over their documents several times, a bar each
    task_sets.check(options.tasks)
    benchmarks = {one.task: one for one in task_sets.select(options.tasks)}
    manager = _manager(list(benchmarks))
    index = manager.task_index
    lacking, sha256 = {}, {}
    for name in {leaf: None for task in benchmarks for leaf in _leaves(task, index)}:
        changes: dict[str, Any] = {}
        shots = benchmarks[name].num_fewshot if name in benchmarks else None
        if shots is not None:
            changes["num_fewshot"] = shots
        if options.data_dir is not None and name in local_documents.LOCAL:
            config = load_yaml(index[name].yaml_path) | changes
            documents = local_documents.find(name, options.data_dir)
            changes |= local_documents.overrides(config, documents)
            sha256[name] = documents.sha256
            wanted = config.get("num_fewshot") or 0
            if documents.examples is not None and len(documents.examples) <= wanted:  # one may be the question itself
                raise UserError(
                    f"task {name} draws {wanted} examples, but {local_documents.examples_files(name)} in "
                    f"{options.data_dir} has {len(documents.examples)}"
                )
            if wanted and documents.examples is None:
                lacking[name] = wanted, local_documents.examples_files(name)
        if changes:
            config = load_yaml(index[name].yaml_path) | changes
            index[name] = Entry(name, Kind.TASK, yaml_path=None, cfg=config, tags=index[name].tags)
    try:
        loaded = list(manager.load(list(benchmarks))["tasks"].values())
    except (ConnectionError, OSError) as error:  # the hub, or a file
        raise UserError(
            f"the documents of {options.tasks} cannot be read: {first_line(error)}; "
            "without a network, give local files by --data-dir"
        ) from None
    except ImportError as error:
        raise UserError(
            f"the tasks {options.tasks} need a package that is not installed: {first_line(error)}; install it, or "
            "leave the task out"
        ) from None
    for task in loaded:
        if True not in task.higher_is_better().values():
            raise UserError(f"task {task.config.task} has no metric of which more is better, so it gives no score")
    for name, (shots, files) in lacking.items():
        warnings.warn(f"{name} runs 0-shot, not {shots}: no {files} in {options.data_dir}", stacklevel=2)
    return Tasks(loaded, manager, benchmarks, lacking, sha256, task_sets.not_run(options.tasks))


def _manager(wanted: list[str]) -> Any:
    """The harness's TaskManager for these tasks. Raises UserError where one of them is unknown.

    Reading the whole index takes seconds. Most tasks lie in a folder whose name theirs begins with; only a group or a
    tag may have parts elsewhere.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    folders = [path for path in Path(lm_eval.tasks.__file__).parent.iterdir() if path.is_dir()]
    nearby = [path for path in folders if any(name.startswith(path.name) for name in wanted)]
    if any(name.startswith("wmt") for name in wanted):
        nearby += [path for path in folders if path.name == "translation"]
    manager = TaskManager(include_path=[*sorted(nearby), TASKS_FOLDER], include_defaults=False)
    known = {name for name, entry in manager.task_index.items() if entry.kind in (Kind.TASK, Kind.PY_TASK)}
    if set(wanted) <= known:
        return manager
    manager = TaskManager(include_path=TASKS_FOLDER)
    task_sets.check_known(wanted, manager.task_index)
    return manager


def _leaves(name: str, index: dict[str, Any]) -> Iterator[str]:
    """The tasks that a name of the harness's index stands for: itself, or those of a group or tag."""
    from lm_eval.tasks._index import Kind

    entry = index.get(name)
    if entry is None:
        return  # a group may define a task of its own within itself
    if entry.kind == Kind.TAG:
        yield from sorted(entry.tags)
    elif entry.kind == Kind.GROUP:
        parts = entry.cfg.get("task") or []
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _leaves(part if isinstance(part, str) else part.get("task") or part.get("group", ""), index)
    else:
        yield name


def run(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    options: ScoreOptions,
    seed: int,
    keep: Path | None = None,
    wrapping: Wrapping | None = None,
) -> Evaluation:
    """Score a causal language model on tasks, on the GPU if there is one.

    keep: a folder for finished requests, from which a scoring that was killed goes on (unset: they are not kept).
    wrapping: what puts a prompt into the fine-tuning template (unset: prompts are the harness's own).
    """
    import torch

    from plw_mlflow.evaluation.scorer import Scorer

    device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness leaves a loaded model where it is
    scorer = Scorer(model.to(device), tokenizer, options.eval_batch_tokens, keep)
    return score(scorer, tasks, options, seed, wrapping)


def run_adapters(
    base: Any, tokenizer: Any, adapters: Sequence[Path], tasks: Tasks, options: ScoreOptions, seed: int
) -> Iterator[tuple[Path, Evaluation]]:
    """Score folders of LoRA adapters one after another, each on the one loaded base, which ends as it was."""
    for folder in adapters:
        with saved_adapters.attached(base, folder) as adapted:
            yield folder, run(adapted, tokenizer, tasks, options, seed)


def score(
    language_model: Any, tasks: Tasks, options: ScoreOptions, seed: int, wrapping: Wrapping | None = None
) -> Evaluation:
    """Score one of the harness's language models on tasks."""
    from lm_eval import evaluator

    evaluator.add_env_info = lambda results: None  # it starts pip and others, for seconds; environment.json says it
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    _leave_bootstrapping_to_us(tasks.loaded)
    if wrapping is not None:
        language_model.apply_chat_template = wrapping  # where the harness looks for it
    with redirect_stdout(StringIO()):  # it says when it bootstraps, and to whom is not clear
        found: Any = evaluator.simple_evaluate(
            language_model,
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            apply_chat_template=wrapping is not None,
            fewshot_as_multiturn=False,  # a template holds one instruction: few-shot examples are part of it
            random_seed=seed,
            numpy_random_seed=seed % 2**32,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None  # None is the answer to processes other than the first, of which there are none
    samples = found.pop("samples")
    results = json.loads(json.dumps(found, default=str))
    for task in tasks.loaded:
        for key, pairs in _bleu_pairs(samples[task.task_name]).items():
            results["results"][task.task_name][f"bleu_stderr,{key}"] = 100 * bleu_stderr(pairs, seed)
    cut = {name: getattr(language_model, name, {}) for name in ("truncated", "windowed")}
    results["cut"] = {name: dict(counts) for name, counts in cut.items()}
    results["documents_sha256"] = tasks.sha256
    kinds = {
        task.task_name: task_sets.task_type(task.task_name) or task_sets.TASK_TYPE_OF_OUTPUT.get(task.OUTPUT_TYPE, "")
        for task in tasks.loaded
    }
    prompt = HARNESS if wrapping is None else wrapping.kind
    scores = [
        replace(
            one,
            prompt=prompt,
            harness_version=version("lm_eval"),
            task_type=_benchmark(one.task, tasks.benchmarks).task_type
            or task_sets.task_type(one.task)
            or kinds[one.task],
            asked_fewshot=tasks.lacking[one.task][0] if one.task in tasks.lacking else one.num_fewshot,
            caveat="; ".join(_caveats(one.task, results["n-samples"][one.task], tasks)),
            **{name: counts.get(one.task, 0) for name, counts in cut.items()},
        )
        for one in _scores(results, tasks.benchmarks)
    ]
    _warn_of_cuts(cut)
    primary = {one.task: one.metric for one in scores if one.is_primary}
    rows = [
        row
        for task in tasks.loaded
        if task.task_name in primary
        for row in _sample_rows(task, primary[task.task_name], prompt, samples[task.task_name])
    ]
    return Evaluation(scores, results, rows, tasks.not_run)


def _leave_bootstrapping_to_us(loaded: list[Any]) -> None:
    """Have the harness compute corpus BLEU, but not its standard error.

    It tokenises the whole corpus anew a hundred times: two minutes for a WMT test set. It does so for the functions
    it knows, and so not for this one.
    """
    from lm_eval.api.metrics import bleu

    def corpus_bleu(pairs: Any) -> Any:
        return bleu(pairs)

    for task in loaded:
        if task.aggregation().get("bleu") is bleu:
            task.aggregation()["bleu"] = corpus_bleu


def _bleu_pairs(samples: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Targets and predictions whose corpus BLEU is a metric, by filter."""
    found: dict[str, list[tuple[str, str]]] = {}
    for sample in samples:
        if isinstance(sample.get("bleu"), list | tuple):
            found.setdefault(sample["filter"], []).append((str(sample["bleu"][0]), str(sample["bleu"][1])))
    return {key: pairs for key, pairs in found.items() if len(pairs) > 1}


def bleu_stderr(pairs: list[tuple[str, str]], seed: int, rounds: int = BOOTSTRAP_ROUNDS) -> float:
    """The bootstrapped standard error of corpus BLEU, as a fraction; pairs: target and prediction of each sentence.

    Corpus BLEU is a function of sums over sentences, so that drawing anew sums rows and tokenises nothing.
    """
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU

    sentence = BLEU(effective_order=True)  # it changes the sentences' scores, which are not used, not their counts
    rows = [sentence.sentence_score(prediction, [target]) for target, prediction in pairs]
    counts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])
    draw = np.random.default_rng(seed)
    scores = []
    for _ in range(rounds):
        sums = counts[draw.integers(len(counts), size=len(counts))].sum(0).tolist()
        scores.append(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score / 100)
    return statistics.stdev(scores)


def _benchmark(task: str, benchmarks: dict[str, Benchmark]) -> Benchmark:
    return benchmarks.get(task) or Benchmark(task)


def _caveats(task: str, documents: dict[str, int], tasks: Tasks) -> Iterator[str]:
    if task in tasks.lacking:
        shots, files = tasks.lacking[task]
        yield f"0-shot, not {shots}: no {files}"
    if documents["effective"] < documents["original"]:
        yield f"only the first {documents['effective']} of {documents['original']} documents"


def _warn_of_cuts(cut: dict[str, dict[str, int]]) -> None:
    what = {
        "truncated": "with a context cut from the left to fit the model's window",
        "windowed": "with an answer longer than the model's window, scored window by window",
    }
    for name, counts in cut.items():
        if counts:
            tasks = ", ".join(f"{count} of {task}" for task, count in sorted(counts.items()))
            warnings.warn(f"requests {what[name]}: {tasks}", stacklevel=3)


def _scores(results: dict[str, Any], benchmarks: dict[str, Benchmark] | None = None) -> list[Score]:
    """The harness's results as rows. Its keys are "METRIC,FILTER"; a filter other than "none" is part of the name.

    benchmarks: what a set says of a task. Of a task of no set, the first metric on 0..1 of which more is better is the
    primary one. Raises UserError for a task without: it has no score to average.
    """
    scores = []
    for task, values in results["results"].items():
        if task not in results["n-samples"]:
            continue  # a group, whose tasks have rows of their own
        rises = results["higher_is_better"].get(task, {})
        benchmark = _benchmark(task, benchmarks or {})
        has_primary = False
        for key in (key for key in values if "," in key and "_stderr," not in key):
            metric, kind = key.split(",")
            name = metric if kind == "none" else f"{metric}-{kind}"
            scale = 100 if PERCENT_METRICS.fullmatch(metric) else 1
            score = values[key] / scale
            if 1 < score < 1 + 1e-9:  # sacreBLEU gives 100.00000000000004 for a perfect translation
                score = 1.0
            stderr = values.get(f"{metric}_stderr,{kind}")
            is_primary = (
                not has_primary
                and benchmark.is_scored
                and benchmark.metric in (None, name)
                and rises.get(metric) is True
                and 0 <= score <= 1
            )
            has_primary |= is_primary
            scores.append(
                Score(
                    task=task,
                    metric=name,
                    score=score,
                    stderr=stderr / scale if isinstance(stderr, float) else None,
                    n=results["n-samples"][task]["effective"],
                    num_fewshot=results["n-shot"].get(task) or 0,
                    task_version=str(results["versions"].get(task)),
                    is_primary=is_primary,
                )
            )
        if benchmark.is_scored and not has_primary:
            raise UserError(f"task {task} has no metric on 0 to 1 of which more is better, so it gives no score")
    return scores


def _sample_rows(task: Any, primary: str, prompt: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the per-sample log: the first documents of a task, as its primary metric sees them."""
    metric, _, kind = primary.partition("-")
    for sample in [one for one in samples if one["filter"] == (kind or "none")][:LOGGED_SAMPLES]:
        answers = sample["filtered_resps"]
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(sample["doc"])
            gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
            target = choices[gold] if isinstance(gold, int) else gold
            prediction = choices[_preferred(choices, [answer[0] for answer in answers], metric)]
        else:
            target = sample["target"]
            prediction = answers[0] if isinstance(answers[0], str) else f"log-likelihood {answers[0]}"
        yield {
            "task": task.task_name,
            "document": sample["doc_id"],
            "prompt": prompt,
            "question": str(sample["arguments"][0][0])[-LOGGED_CHARACTERS:],
            "target": str(target)[:LOGGED_CHARACTERS],
            "prediction": str(prediction)[:LOGGED_CHARACTERS],
            "metric": primary,
            "score": _sample_score(metric, sample.get(metric)),
        }


def _preferred(choices: list[str], log_likelihoods: list[float], metric: str) -> int:
    """The option that a model prefers, as the metric sees it: by log-likelihood, or that by character or byte."""
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    weighed = [
        log_likelihood / length
        for log_likelihood, length in zip(log_likelihoods, lengths.get(metric, [1] * len(choices)), strict=False)
    ]
    return weighed.index(max(weighed))


def _sample_score(metric: str, value: Any) -> float | None:
    """A document's own score on 0..1; of a metric of the whole corpus, BLEU alone has one, that of the sentence."""
    if metric == "bleu":
        import sacrebleu

        target, prediction = value
        return float(sacrebleu.sentence_bleu(prediction, [target]).score / 100)
    try:
        return float(value) / (100 if PERCENT_METRICS.fullmatch(metric) else 1)
    except (TypeError, ValueError):
        return None


def table(evaluation: Evaluation, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the score table: `cell` (model, dataset, plw, seed) with each task's primary score."""
    return [
        cell | {key: value for key, value in asdict(score).items() if key != "is_primary"}
        for score in evaluation.primary
    ]


def write(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Write rows of the score table to FOLDER/scores.csv, if there is a folder."""
    if folder is None:
        return
    text = StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({name: outputs.no_formula(value) for name, value in row.items()} for row in rows)
    outputs.write(folder, {"scores.csv": text.getvalue().encode()})


def table_text(evaluation: Evaluation) -> str:
    """The scores as a person reads them."""
    lines = [f"{'task':<28}{'metric':<14}{'score':>8}{'stderr':>9}{'n':>7}"]
    for score in evaluation.scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        lines.append(f"{score.task:<28}{score.metric:<14}{score.score:>8.4f}{stderr:>9}{score.n:>7}")
    lines.append(f"{'score (mean over tasks)':<42}{evaluation.mean:>8.4f}")
    lines += [f"{task} is not run: {reason}" for task, reason in evaluation.not_run.items()]
    return "\n".join(lines)
