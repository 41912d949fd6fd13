"""The replication's data and results:  python -m benchmarks.replication draw FOLDER --model MODEL

The replication (docs/replication.md) asks the study's question of a small real language model, with records of
AlpacaDataCleaned and the same records inverted, as the study made AlpacaDataShort. `draw` writes into FOLDER

    alpaca_cleaned.jsonl, alpaca_short.jsonl                    what the cells are trained on
    alpaca_cleaned_new.jsonl, alpaca_short_new.jsonl            what they are measured on: other records

The records are drawn once, without regard to PLW or seed. Only those are drawn that are no longer than the cells'
`--max-tokens` in both forms, and whose completion is not empty, so that both forms are of the same records.

`publish FOLDER --sweep RUN` writes what the finished cells of a sweep have found:

    scores.csv          a row for each cell and benchmark
    questions.parquet   a row for each cell, question and metric
    held_out.csv        a row for each cell, kind of new records and measure; the loss with its sign turned, so that
                        more is better in all of them

`curves FILE` fits a parabola on w_p to each measure of a held_out.csv, over all runs of a data set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

from plw_mlflow import tracking
from plw_mlflow.analysis.score_table import RUN
from plw_mlflow.analysis.statistics import design, task_curves
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


def curve_table(scores: pd.DataFrame) -> pd.DataFrame:
    """The parabola on w_p of each task of a score table, fitted over all runs of a data set."""
    rows = []
    for dataset, part in scores.groupby("dataset"):
        grid = design.grid(part, str(dataset), make_transform("w_p", part["plw"]))
        for curve in task_curves.fit_task_curves(grid):
            rows.append(
                {
                    "dataset": dataset,
                    "task": curve.task,
                    **curve.coefficients,
                    "free": curve.degrees_of_freedom,
                    "joint_p": curve.joint_p,
                    "peak": curve.optimum_plw,
                    "best_plw": curve.best_plw,
                    "interior_probability": curve.interior_probability,
                }
            )
    return pd.DataFrame(rows)


@click.group()
def main() -> None:
    """The replication's data and results (docs/replication.md)."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sweep", required=True, help="MLflow run of the sweep.")
def publish(folder: Path, sweep: str) -> None:
    """Write what the finished cells of a sweep have found into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = tracking.questions(sweep=sweep)
    tracking.score_table(sweep=sweep).to_csv(folder / "scores.csv", index=False)
    questions.drop(columns="evaluation").to_parquet(folder / "questions.parquet", index=False, compression="zstd")
    held_out_table(questions).to_csv(folder / "held_out.csv", index=False)


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def curves(file: Path) -> None:
    """Print the parabola of each measure of FILE, a held_out.csv."""
    print(curve_table(pd.read_csv(file)).to_string(index=False, float_format="{:.4g}".format))


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
