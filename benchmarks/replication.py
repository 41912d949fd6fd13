"""The replication's data:  python -m benchmarks.replication FOLDER --model FOLDER

The replication (docs/replication.md) asks the study's question of a small real language model, with records of
AlpacaDataCleaned and the same records inverted, as the study made AlpacaDataShort. This writes into FOLDER

    alpaca_cleaned.jsonl, alpaca_short.jsonl                    what the cells are trained on
    alpaca_cleaned_new.jsonl, alpaca_short_new.jsonl            what they are measured on: other records

The records are drawn once, without regard to PLW or seed. Only those are drawn that are no longer than the cells'
`--max-tokens` in both forms, and whose completion is not empty, so that both forms are of the same records.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from plw_mlflow.config import DataOptions
from plw_mlflow.data import formats, inversion, prepare, sources, templates
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.models import pretrained

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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Model whose tokenizer counts the tokens.")
@click.option("--dataset", default="AlpacaDataCleaned", show_default=True, help="Data set, or a file of it.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with a local copy of the data set.")
def main(folder: Path, model: str, dataset: str, data_dir: Path | None) -> None:
    """Draw the replication's records and write them into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    options = DataOptions(data_dir=data_dir, max_tokens=MAX_TOKENS)
    pairs = draw(dataset, model, options, TRAINED_ON + MEASURED_ON)
    write(pairs[:TRAINED_ON], folder, "")
    write(pairs[TRAINED_ON:], folder, "_new")
    print(f"{TRAINED_ON} records to train on and {MEASURED_ON} to measure on, in both forms, in {folder}")


if __name__ == "__main__":
    main()
