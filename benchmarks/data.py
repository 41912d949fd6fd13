"""Preparing data beside datasets.map:  python -m benchmarks.data --json FILE

Reading, putting into the template, tokenising and storing with the same tokenizer, and then the same again, which finds
what was stored. Each measurement is made in a process of its own, so that peak memory is its own; imports and loading
the tokenizer are not counted. The peer is what most trainers do, at its best (batched): it tokenises each text whole,
and its prompt once more to mask it. Ours tokenises each text whole, and its three parts alone to measure them.

The study's data and tokenizer:  --dataset alpaca_data.json.gz --tokenizer FOLDER
"""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click


def generate(path: Path, records: int) -> None:
    """Write so many instruction records of random words, about 20 words each, one a line."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 8))) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(records):
            texts = (" ".join(rng.choices(words, k=rng.randint(low, high))) for low, high in ((4, 10), (4, 26)))
            file.write(json.dumps(dict(zip(("instruction", "output"), texts, strict=True))) + "\n")


def measure(who: str, dataset: Path, tokenizer: str, cache: Path) -> dict[str, float]:
    """Seconds of work, and the peak memory of the process in MiB."""
    from plw_mlflow.models import pretrained

    loaded = pretrained.load_tokenizer("toy", tokenizer or None)
    seconds = (ours if who == "ours" else peer)(dataset, loaded, cache)
    return {"seconds": seconds, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ours(dataset: Path, tokenizer: object, cache: Path) -> float:
    """Seconds that `prepare` takes."""
    from plw_mlflow.config import DataOptions
    from plw_mlflow.data import prepare

    started = time.perf_counter()
    prepare.run(str(dataset), tokenizer, DataOptions(empty_completion="keep", cache_dir=cache))
    return time.perf_counter() - started


def peer(dataset: Path, tokenizer: object, cache: Path) -> float:
    """Seconds that `datasets` takes."""
    import datasets

    from plw_mlflow.study import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT

    def tokenise(batch: dict[str, list[str]], tokenizer: object) -> dict[str, list[list[int]]]:
        inputs = batch.get("input") or [""] * len(batch["instruction"])
        prompts = [
            (ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT).format(instruction=instruction, input=given)
            for instruction, given in zip(batch["instruction"], inputs, strict=True)
        ]
        texts = [prompt + output + tokenizer.eos_token for prompt, output in zip(prompts, batch["output"], strict=True)]  # type: ignore[attr-defined]
        tokens = tokenizer(texts)["input_ids"]  # type: ignore[operator]
        borders = map(len, tokenizer(prompts)["input_ids"])  # type: ignore[operator]
        labels = [[-100] * border + whole[border:] for border, whole in zip(borders, tokens, strict=True)]
        return {"input_ids": tokens, "labels": labels}

    datasets.disable_progress_bars()
    started = time.perf_counter()
    table = datasets.load_dataset("json", data_files=str(dataset), split="train", cache_dir=str(cache / "peer"))
    table.map(tokenise, batched=True, fn_kwargs={"tokenizer": tokenizer}, remove_columns=table.column_names)
    return time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--dataset", type=click.Path(path_type=Path, exists=True), help="Alpaca records (default: generated).")
@click.option("--tokenizer", default="", help="Folder or hub id (default: the toy laboratory's).")
@click.option("--records", default=52_002, show_default=True, help="Generated records, where no dataset is given.")
@click.option(
    "--many", default=2_000_000, show_default=True, help="Generated records of the case that is about memory."
)
def main(file: Path, dataset: Path | None, tokenizer: str, records: int, many: int) -> None:
    rows = []
    print(f"{'case':<44}{'metric':<9}{'ours':>10}{'datasets':>10}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        few_path, many_path = dataset or Path(scratch, "few.jsonl"), Path(scratch, "many.jsonl")
        if dataset is None:
            generate(few_path, records)
        generate(many_path, many)
        for path, name, which in (
            (few_path, dataset.name if dataset else f"{records:,} generated records", tokenizer),
            (many_path, f"{many:,} generated records", ""),
        ):
            for call in ("first call", "second call"):
                both = [
                    processes.submit(measure, who, path, which, Path(scratch, "cache")).result()
                    for who in ("ours", "peer")
                ]
                for metric in both[0]:
                    case, mine, theirs = f"{name}, {call}", both[0][metric], both[1][metric]
                    row = {"case": case, "metric": metric, "ours": mine, "peer": "datasets.map", "peer_value": theirs}
                    rows.append(row | {"ratio": theirs / mine})
                    print(f"{case:<44}{metric:<9}{mine:>10.2f}{theirs:>10.2f}   ratio {theirs / mine:.2f}", flush=True)
    file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
