"""The replication's data and results:  python -m benchmarks.replication draw FOLDER --model MODEL

The replication (docs/replication.md) asks the study's question of a small real language model, with records of
AlpacaDataCleaned and the same records inverted, as the study made AlpacaDataShort. `draw` writes into FOLDER

    alpaca_cleaned.jsonl, alpaca_short.jsonl                    what the cells are trained on
    alpaca_cleaned_new.jsonl, alpaca_short_new.jsonl            what they are measured on: other records

The records are drawn once, without regard to PLW or seed. Only those are drawn that are no longer than the cells'
`--max-tokens` in both forms, and whose completion is not empty, so that both forms are of the same records.

`publish FOLDER --sweep RUN` writes what the finished cells of a sweep have found. What FOLDER has of other cells stays,
so that cells of several stores come together:

    scores.csv          a row for each cell and benchmark
    questions.parquet   a row for each cell, question and metric
    held_out.csv        a row for each cell, kind of new records and measure; the loss with its sign turned, so that
                        more is better in all of them
    cells.csv           a row for each cell: its options, and the seconds from its start to its end

`tables FOLDER` judges the registered hypotheses by what was published there, and prints the tables of
docs/replication.md.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import pandas as pd

from benchmarks.study import axes_table, best_of, markdown, p_value
from plw_mlflow import tracking
from plw_mlflow.analysis import analyze
from plw_mlflow.analysis.findings import ON_THESE
from plw_mlflow.analysis.questions import Row, in_brackets, reach, read_beside
from plw_mlflow.analysis.questions import compare as compare_questions
from plw_mlflow.analysis.score_table import RUN, read_scores
from plw_mlflow.analysis.statistics import design, fitting, lack_of_fit, task_curves
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.equivalence import assess_equivalence
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.config import HELD_OUT, DataOptions
from plw_mlflow.data import formats, inversion, prepare, sources, templates
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.evaluation import held_out
from plw_mlflow.models import pretrained
from plw_mlflow.transforms import make_transform

DRAW_SEED = 2401
TRAINED_ON, MEASURED_ON = 256, 128
MAX_TOKENS = 256
ENCODED_TOGETHER = 64
OF_A_CELL = {"seed": int, "plw": float}


@dataclass(frozen=True)
class Pair:
    """One record in both forms."""

    cleaned: Record
    short: Record


def draw(dataset: str, model: str, options: DataOptions, count: int) -> list[Pair]:
    """So many records of a data set, drawn at random among those that fit, in both forms."""
    tokenizer = pretrained.load_tokenizer(model)
    encoder = Encoder(tokenizer, templates.load(options.template, tokenizer), prompt_border=options.prompt_border)
    source = sources.find(dataset, prepare.cache_dir(options), options.data_dir)
    read = [
        formats.record(row, f"{source.prefix}:{number}", "alpaca")
        for number, row in enumerate(source.rows(options.max_characters), start=1)
    ]
    records = list({record.key(): record for record in read if isinstance(record, Record)}.values())
    random.Random(DRAW_SEED).shuffle(records)
    pairs = list(_fitting(records, encoder, options.max_tokens, count))
    if len(pairs) < count:
        raise click.ClickException(f"{dataset} has {len(pairs)} records that fit, and {count} are needed")
    return pairs


def _fitting(records: Sequence[Record], encoder: Encoder, max_tokens: int, count: int) -> Iterator[Pair]:
    """The first so many records that fit in both forms."""
    for start in range(0, len(records), ENCODED_TOGETHER):
        pairs = [Pair(record, _inverted(record, encoder)) for record in records[start : start + ENCODED_TOGETHER]]
        encoded = [list(encoder.encode([getattr(pair, form) for pair in pairs])) for form in ("cleaned", "short")]
        for pair, *both in zip(pairs, *encoded, strict=True):
            if all(not isinstance(one, Fault) and len(one.tokens) <= max_tokens for one in both):
                yield pair
                count -= 1
                if not count:
                    return


def _inverted(record: Record, encoder: Encoder) -> Record:
    instruction, input, completion = encoder.count([record.instruction, record.input, record.output])
    return inversion.invert(record, instruction + input, completion)


def write(pairs: Sequence[Pair], folder: Path, name: str) -> None:
    """Write one JSON line a record, in both forms: alpaca_cleanedNAME.jsonl and alpaca_shortNAME.jsonl."""
    for form in ("cleaned", "short"):
        records = [getattr(pair, form) for pair in pairs]
        lines = [
            json.dumps({"instruction": one.instruction, "input": one.input, "output": one.output}) for one in records
        ]
        (folder / f"alpaca_{form}{name}.jsonl").write_text("\n".join(lines) + "\n")


def held_out_table(questions: pd.DataFrame) -> pd.DataFrame:
    """A score table of the held-out sets: each measure of each set is a task.

    The loss is of all completion tokens of a set, in nats a token, with its sign turned. BLEU is the mean of that of
    the single texts.
    """
    rows = []
    for cell, part in questions[questions["task"].str.startswith(HELD_OUT)].groupby([*RUN, "task", "metric"]):
        task, metric = cell[-2:]
        score = float(part["value"].mean())
        if metric == held_out.COMPLETION_LOSS:
            likelihoods = part["log_likelihoods"].map(lambda numbers: numbers[0])
            score = float(likelihoods.sum() / (-likelihoods / part["value"]).sum())  # a value is the loss of a token
        rows.append(
            {**dict(zip(RUN, cell, strict=False)), "task": f"{task} {metric}", "metric": metric, "score": score}
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------- the hypotheses

SHORT, CLEANED = "alpaca_short.jsonl", "alpaca_cleaned.jsonl"
AS_GOOD_AS_NONE = 0.02  # a range of the fitted curve below this is no effect
HOLDS, FAILS, CANNOT_TELL = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """What the cells say of one hypothesis of docs/replication.md."""

    number: int
    says: str
    verdict: str
    found: str


def judge(scores: pd.DataFrame, questions: pd.DataFrame) -> list[Verdict]:
    """Judge the registered hypotheses. scores: of all cells. questions: of the same cells, as `compare` takes them."""
    grids = {grid.dataset: grid for grid in analyze.grids(scores)}
    against_0 = compare_questions(questions, 0.0).rows
    return [
        _short_data_have_a_peak(grids[SHORT]),
        _long_data_do_not_care(grids[CLEANED]),
        _nothing_is_worse_than_0(scores[scores["dataset"] == SHORT]),
        _some_prompt_weight_helps([row for row in against_0 if _is_of(row, SHORT, held_out.COMPLETION_LOSS)]),
        _all_prompt_weight_does_not_help(
            [
                row
                for row in against_0
                for dataset, metric in product((SHORT, CLEANED), (held_out.EXACT_MATCH, held_out.BLEU))
                if row.plw == 1 and _is_of(row, dataset, metric)
            ]
        ),
    ]


def _is_of(row: Row, dataset: str, metric: str) -> bool:
    """Whether a comparison is by that measure of new records of the kind that the cells were trained on."""
    return row.group["dataset"] == dataset and row.task == f"{HELD_OUT}{Path(dataset).stem}_new {metric}"


def _short_data_have_a_peak(grid: Grid) -> Verdict:
    fit = fitting.fit(ON_THESE, grid)
    bend, peak = fit.coefficients["w_p^2"], fit.optimum_plw
    is_peak = bend < 0 and peak is not None and 0 < peak < 1
    shape = f"highest at PLW {peak:.2g}" if is_peak else "no maximum between PLW 0 and 1"
    return Verdict(
        1,
        "on short data the score depends on PLW, with its maximum between 0 and 1",
        HOLDS if fit.joint_p < LEVEL and is_peak else FAILS if fit.joint_p < LEVEL else CANNOT_TELL,
        f"p = {fit.joint_p:.2g}; w_p² {bend:+.3f}; {shape}",
    )


def _long_data_do_not_care(grid: Grid) -> Verdict:
    found = assess_equivalence(grid, AS_GOOD_AS_NONE, tasks_are_fixed=True)
    assert found.p is not None
    assert found.smallest_margin is not None
    p = fitting.fit(ON_THESE, grid).joint_p
    return Verdict(
        2,
        f"on long data the fitted curve has a range below {AS_GOOD_AS_NONE:g}",
        HOLDS if found.p < LEVEL else FAILS if p < LEVEL else CANNOT_TELL,
        f"the range is {found.largest_difference:.4f}, and below {found.smallest_margin:.4f} (95 %); p = {p:.2g}",
    )


def _nothing_is_worse_than_0(scores: pd.DataFrame) -> Verdict:
    means = scores.groupby("plw")["score"].mean()
    listed = ", ".join(f"{mean:.4f} at {plw:g}" for plw, mean in means.items())
    return Verdict(
        3,
        "on short data PLW 0 has the lowest mean score",
        HOLDS if means.idxmin() == 0 else FAILS,
        f"{listed} (of these runs alone)",
    )


def _some_prompt_weight_helps(rows: Sequence[Row]) -> Verdict:
    best = min(rows, key=lambda row: row.found.difference)
    return Verdict(
        4,
        "on short data some PLW above 0 has a lower completion loss on new records",
        _of_differences([-row.found.difference for row in rows], [row.holm_p for row in rows]),
        f"least at PLW {best.plw:g}: {best.found.difference:+.4f} nats a token against PLW 0 (mean over records; "
        f"{reach(best.found.paired)}; p = {in_brackets(best.found.paired.p, best.holm_p)})",
    )


def _all_prompt_weight_does_not_help(rows: Sequence[Row]) -> Verdict:
    gain = _of_differences([row.found.difference for row in rows], [row.holm_p for row in rows])
    listed = "; ".join(
        f"{row.group['dataset'].removesuffix('.jsonl')}, {row.metric}: {row.found.difference:+.4f} "
        f"({reach(row.found.paired)})"
        for row in rows
    )
    return Verdict(
        5,
        "exact match and BLEU of PLW 1 on new records are not better than those of PLW 0",
        {HOLDS: FAILS, FAILS: HOLDS, CANNOT_TELL: CANNOT_TELL}[gain],
        listed,
    )


def _of_differences(gains: Sequence[float], holm_p: Sequence[float]) -> str:
    """Whether some gain is above 0: shown, none is, or not told apart from 0."""
    if any(gain > 0 and p < LEVEL for gain, p in zip(gains, holm_p, strict=True)):
        return HOLDS
    return CANNOT_TELL if any(gain > 0 for gain in gains) else FAILS


@click.group()
def main() -> None:
    """The replication's data and results (docs/replication.md)."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sweep", required=True, help="MLflow run of the sweep.")
def publish(folder: Path, sweep: str) -> None:
    """Write what the finished cells of a sweep have found into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("scores.csv", "questions.parquet", "cells.csv")]
    scores, questions, cells = (
        beside(_read(file), new) if file.exists() else new for file, new in zip(files, _found(sweep), strict=True)
    )
    scores.to_csv(files[0], index=False)
    questions.to_parquet(files[1], index=False, compression="zstd")
    cells.sort_values(["seed", "dataset", "plw"]).to_csv(files[2], index=False)
    held_out_table(questions).to_csv(folder / "held_out.csv", index=False)


def _found(sweep: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores, questions and options of a sweep's finished cells."""
    rows = [{"run": one.run_id, "seconds": round(one.seconds)} | one.options for one in tracking.measured_before()]
    cells = pd.DataFrame(rows).astype(OF_A_CELL).drop_duplicates(RUN)
    scores = tracking.score_table(sweep=sweep)
    named = cells[RUN].assign(dataset=cells["dataset"].map(lambda dataset: Path(dataset).name))
    is_of_sweep = pd.MultiIndex.from_frame(named).isin(pd.MultiIndex.from_frame(scores[RUN]))
    return scores, tracking.questions(sweep=sweep).drop(columns="evaluation"), cells[is_of_sweep]


def beside(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The rows of both tables, but for those of old whose cell is in new."""
    cells = [pd.MultiIndex.from_frame(table[RUN]) for table in (old, new)]
    return pd.concat([old[~cells[0].isin(cells[1])], new], ignore_index=True)


def _read(file: Path) -> pd.DataFrame:
    return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str).astype(OF_A_CELL)


# ---------------------------------------------------------------------------------------------------- the tables


def mean_table(scores: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of each task, a column each in the order of the scores, by data set and PLW."""
    means = scores.pivot_table(index=["dataset", "plw"], columns="task", values="score", aggfunc="mean")
    return means[list(scores["task"].unique())]


def means(table: pd.DataFrame) -> str:
    """Means by data set and PLW as a table of a page, a loss with its own sign."""
    rows = [
        [
            _short(dataset),
            f"{plw:g}",
            *(f"{-mean if 'loss' in task else mean:.4f}" for task, mean in zip(table.columns, row, strict=True)),
        ]
        for (dataset, plw), row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return markdown(["trained on", "PLW", *table.columns], rows)


def curves(scores: pd.DataFrame) -> str:
    """The parabola on w_p of each task, fitted over all runs of a data set, as a table of a page."""
    rows = []
    for (dataset, _), part in scores.groupby(["dataset", "task"]):
        grid = design.grid(part, str(dataset), make_transform("w_p", part["plw"]))
        for curve in task_curves.fit_task_curves(grid):
            misfit = lack_of_fit.lack_of_fit(grid)
            rows.append(
                [
                    _short(str(dataset)),
                    curve.task,
                    *(f"{curve.coefficients[term]:+.4f}" for term in ("w_p", "w_p^2")),
                    p_value(curve.joint_p),
                    "" if misfit is None else p_value(misfit.p),
                    best_of(curve),
                ]
            )
    return markdown(["trained on", "measured by", "w_p", "w_p²", "p", "lack of fit, p", "best PLW (95 %, delta)"], rows)


def judged(verdicts: Sequence[Verdict]) -> str:
    """The hypotheses' verdicts as a table of a page."""
    return markdown(
        ["", "hypothesis", "verdict", "found"],
        [[str(one.number), one.says, f"**{one.verdict}**", one.found] for one in verdicts],
    )


def _short(dataset: str) -> str:
    return Path(dataset).stem.removeprefix("alpaca_")


def new_records(held_out_scores: pd.DataFrame) -> pd.DataFrame:
    """The same scores, with tasks by the names that a page has for them."""
    names = held_out_scores["task"].str.removeprefix(HELD_OUT).str.replace("_new ", ": ").str.replace("_", " ")
    return held_out_scores.assign(task=names.str.removeprefix("alpaca "))


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def tables(folder: Path) -> None:
    """Judge the registered hypotheses by what was published in FOLDER, and print the tables of docs/replication.md."""
    file = folder / "scores.csv"
    scores, new = read_scores(file), new_records(pd.read_csv(folder / "held_out.csv"))
    for name, table in (
        ("verdicts", judged(judge(scores, read_beside(file)))),
        ("benchmarks", means(mean_table(scores).assign(mean=lambda table: table.mean(axis="columns")))),
        ("benchmarks_curves", curves(scores)),
        ("new_records", means(mean_table(new))),
        ("new_records_curves", curves(new)),
        ("axes", axes_table({f"{len(scores.groupby(RUN))} runs": (scores, sorted(scores["dataset"].unique()))})),
    ):
        print(f"<!-- {name} -->\n{table}\n<!-- end -->\n")


@main.command(name="draw")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Model whose tokenizer counts the tokens.")
@click.option("--dataset", default="AlpacaDataCleaned", show_default=True, help="Data set, or a file of it.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with a local copy of the data set.")
def draw_all(folder: Path, model: str, dataset: str, data_dir: Path | None) -> None:
    """Draw the replication's records and write them into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    options = DataOptions(data_dir=data_dir, max_tokens=MAX_TOKENS)
    pairs = draw(dataset, model, options, TRAINED_ON + MEASURED_ON)
    write(pairs[:TRAINED_ON], folder, "")
    write(pairs[TRAINED_ON:], folder, "_new")
    print(f"{TRAINED_ON} records to train on and {MEASURED_ON} to measure on, in both forms, in {folder}")


if __name__ == "__main__":
    main()
