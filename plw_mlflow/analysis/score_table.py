"""Score tables: reading, checking, and bringing to one scale.

One row per model, data set, PLW, seed and task. The column prompt_share, where there is one, has the prompts' share of
the loss weight that the run was trained with. Mixed scales (BLEU in 0..100 beside accuracies in 0..1) change every
answer, so such a table is refused; nothing is guessed.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from plw_mlflow.errors import UserError, did_you_mean

MIN_PLWS = 3  # that a parabola can be fitted to
MOST_BYTES = 1 << 24  # of a score table; some 200,000 scores
MOST_COLUMNS = 1000

NAMES = ["model", "dataset", "task", "metric"]
COLUMNS = ["model", "dataset", "plw", "seed", "task", "metric", "score"]
SCORE = ["model", "dataset", "plw", "seed", "task"]  # what one score is of
RUN = SCORE[:-1]
WITHIN_RUNS = ("task", "metric", "task_type", "score", "stderr", "n", "plw", "prompt_share")
OPTIONAL_NUMBERS = ("stderr", "n", "prompt_share")
# How files begin that are taken for tables of scores and are none that can be read here.
OTHER_FILES = {
    b"PK\x03\x04": "an Excel file (or another zip archive)",
    b"\xd0\xcf\x11\xe0": "an Excel file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
OFF_LINE = 0.02
SCALES = ("none", "fraction", "minmax", "zscore")


def read_scores(path: Path, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read a score table from CSV, checked; each row is labelled by its line in the file, the header being line 1.

    also: columns that tell runs apart beside the table's own, as a learning rate may.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(_unreadable(Path(path), error)) from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES >> 20} MiB, which no score table needs; give another file")
    for start, kind in OTHER_FILES.items():
        if data.startswith(start):
            raise UserError(f"{path}: is {kind}, not a CSV file; save it as CSV in UTF-8")
    if data.lstrip()[:1] in (b"{", b"["):
        raise UserError(f"{path}: is JSON, not a CSV file; save it as CSV in UTF-8")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), skipinitialspace=True, strict=True)
        header = next(filter(None, reader), [])
        _check_header(path, header)
        lines, rows = [], []
        for row in filter(None, reader):
            line = reader.line_num
            if len(row) != len(header):
                raise UserError(
                    f"{path}, row {line}: {len(row)} fields, but the header has {len(header)}; mend the row"
                )
            lines.append(line)
            rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from None
    table = pd.DataFrame(rows, columns=header, index=lines)
    table.attrs = {"source": str(path), "file_sha256": hashlib.sha256(data).hexdigest()}
    return check(table, also)


def _check_header(path: Path, header: list[str]) -> None:
    """Raise UserError where the first row of a file is not that of a score table."""
    if not header:
        raise UserError(f"{path}: empty; a score table has the columns {','.join(COLUMNS)}")
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"{path}: its columns are separated by {name}, not by commas; "
                "save it as CSV with commas, and with points in its numbers"
            )
    if len(header) > MOST_COLUMNS:
        raise UserError(f"{path}: {len(header)} columns, where a score table has at most {MOST_COLUMNS}; drop some")


def _unreadable(path: Path, error: OSError) -> str:
    """Why a score file cannot be read, and what may have been meant."""
    if path.is_dir():
        tables = sorted(file.name for file in path.glob("*.csv"))[:3]
        within = f", such as {' or '.join(tables)} in it" if tables else "; there is none in it"
        return f"{path}: is a folder; give --scores a CSV file{within}"
    if not path.exists() and path.parent.is_dir():
        names = [file.name for file in path.parent.iterdir() if file.is_file()]
        if alike := difflib.get_close_matches(path.name, names, 1):
            return f"{path}: there is no such file; did you mean {path.parent / alike[0]}?"
    if not path.parent.is_dir():
        return f"{path}: there is no folder {path.parent}; give --scores a CSV file"
    return f"{path}: cannot be read ({error.strerror}); give --scores a CSV file"


def first(mask: Any) -> Any:
    """The label of the first row of which a mask holds."""
    return mask.index[np.argmax(mask)]


def check(table: pd.DataFrame, also: tuple[str, ...] = ()) -> pd.DataFrame:
    """A copy of a score table with columns typed, or a UserError that names its first fault and the row's label.

    also: as for `read_scores`.
    """
    _check_columns(table, also)
    if not table.index.is_unique:  # row labels name a fault, so each must mean one row
        table = table.reset_index(drop=True)
    typed = _typed(table, also)
    _check_scores(typed, also)
    return typed


def _check_columns(table: pd.DataFrame, also: tuple[str, ...]) -> None:
    """Raise UserError where columns are missing or doubled, cannot be compared by, or hold no scores."""
    source = table.attrs.get("source", "score table")
    if unknown := [column for column in also if column not in table]:
        raise UserError(f"{source}: no column {unknown[0]} to compare by; it has {', '.join(map(str, table))}")
    if within := [column for column in also if column in WITHIN_RUNS]:
        raise UserError(
            f"{source}: runs do not differ by {within[0]}, so curves cannot be compared by it; name another column"
        )
    if missing := [column for column in COLUMNS if column not in table]:
        has = ", ".join(repr(str(column)) for column in table.columns[:12]) + ", ..." * (len(table.columns) > 12)
        raise UserError(
            f"{source}: no column {', '.join(missing)}; a score table has {','.join(COLUMNS)}, and this one has {has}"
        )
    if not table.columns.is_unique:
        raise UserError(f"{source}: column {table.columns[table.columns.duplicated()][0]} occurs twice; keep one")
    if table.empty:
        raise UserError(f"{source}: holds no scores; run evaluate first, or give another table")


def _typed(table: pd.DataFrame, also: tuple[str, ...]) -> pd.DataFrame:
    """A copy with names as text and numbers as numbers. Raises UserError for the first value that is none."""
    source = table.attrs.get("source", "score table")

    def refuse(is_bad: Any, column: str, demand: str) -> None:
        if is_bad.any():
            row = first(is_bad)
            raise UserError(f"{source}, row {row}: {column} is {str(table[column][row])!r}, {demand}")

    def is_blank(column: str) -> Any:
        return table[column].isna() | (table[column].astype(str).str.strip() == "")

    typed = table.copy()
    for column in NAMES:
        refuse(is_blank(column), column, "a name is needed")
        typed[column] = table[column].astype(str)
    for column in ["plw", "seed", "score", *(column for column in OPTIONAL_NUMBERS if column in table)]:
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        may_be_blank = column in OPTIONAL_NUMBERS
        is_bad = ~np.isfinite(numbers) & ~(is_blank(column) & may_be_blank)
        refuse(is_bad, column, "but must be a finite number; mend the row")
        refuse(numbers.abs() > 1e12, column, "too large to be one; mend the row")
        if column != "score":
            refuse(numbers < 0, column, "but must be 0 or more; mend the row")
        if column == "prompt_share":
            refuse(numbers > 1, column, "but a share is at most 1; mend the row")
        typed[column] = numbers
    for column in also:
        refuse(is_blank(column), column, "but runs differ by it")
        numbers = pd.to_numeric(table[column], errors="coerce")
        if column not in NAMES and numbers.notna().all():  # 2e-5 and 0.00002 are one number
            typed[column] = numbers
    refuse(typed["seed"] % 1 != 0, "seed", "but must be a whole number; mend the row")
    typed["seed"] = typed["seed"].astype("int64")
    return typed


def _check_scores(typed: pd.DataFrame, also: tuple[str, ...]) -> None:
    """Raise UserError for tasks of two metrics, scores given twice, and data sets to which no curve can be fitted."""
    source = typed.attrs.get("source", "score table")
    for task, metrics in typed.groupby("task")["metric"].unique().items():
        if len(metrics) > 1:
            both = " and ".join(sorted(metrics))
            raise UserError(f"{source}: task {task} has the metrics {both}; choose one metric per task, drop the rest")
    key = list(dict.fromkeys([*SCORE, *also]))
    if (is_again := typed.duplicated(key)).any():
        row = first(is_again)
        same = typed.groupby(key).ngroup()
        earlier = first(same == same[row])
        raise UserError(f"{source}, row {row}: scores the same {', '.join(key)} as row {earlier}; keep one of them")
    for dataset, part in typed.groupby("dataset"):
        where = f"{source}: data set {dataset}"
        if (plws := part["plw"].nunique()) < MIN_PLWS:
            raise UserError(f"{where} has {plws} distinct PLW{'s' * (plws > 1)}; a curve needs {MIN_PLWS} or more")
        if part.groupby("task")["score"].nunique().max() == 1:
            raise UserError(f"{where} has constant scores within every task, nothing to fit; check the evaluation")


def check_ratios(table: pd.DataFrame, given: Mapping[str, float]) -> None:
    """Raise UserError where a generation ratio is given for a data set that the scores do not have."""
    known = sorted({*table["dataset"], *table.attrs.get("too_few_plws", [])})
    if unknown := [name for name in given if name not in known]:
        raise UserError(
            f"{table.attrs.get('source', 'score table')}: ratios names the data set {unknown[0]!r}, which is not among "
            f"the scores{did_you_mean(unknown[0], known)}; they are of {', '.join(known)}"
        )


def add_prompt_shares(table: pd.DataFrame, ratios: Mapping[str, float]) -> pd.DataFrame:
    """The table with the prompts' share of the loss weight filled in where it is not known and the ratio is.

    ratios: generation ratios, completion tokens over prompt tokens, by data set.
    """
    known = table["prompt_share"] if "prompt_share" in table else pd.Series(np.nan, table.index)
    plw = pd.to_numeric(table["plw"], errors="coerce")
    filled = table.assign(prompt_share=known.fillna(plw / (plw + table["dataset"].map(dict(ratios)))))
    filled.attrs = table.attrs
    return filled


def prompt_odds(part: pd.DataFrame) -> tuple[float, float] | None:
    """The loss weight of prompts over that of completions at PLW 0 and at PLW 1, of one data set; None if not known.

    It is linear in the PLW, so a line is laid through that of the runs: the mean, where models have other tokenizers.
    It is not known either where runs are off the line, by more than OFF_LINE of a share. So it is where each example's
    loss is divided by its own weights, or where the PLW itself is a share.
    """
    if "prompt_share" not in part or not part["prompt_share"].between(0, 1, inclusive="left").all():
        return None
    plw, share = part["plw"].to_numpy(float), part["prompt_share"].to_numpy(float)
    odds = share / (1 - share)
    if not odds[plw > 0].all():
        return None
    at_0 = float(odds[plw == 0].mean()) if (plw == 0).any() else 0.0
    slope = float(((odds - at_0)[plw > 0] / plw[plw > 0]).mean())
    line = at_0 + plw * slope
    is_off = np.abs(line / (1 + line) - share).max() > OFF_LINE
    return None if is_off or slope == 0 else (at_0, at_0 + slope)


def odds_of_rows(table: pd.DataFrame) -> pd.Series | None:
    """The loss weight of prompts over that of completions of each row's run; None where a data set's is not known."""
    odds = pd.Series(np.nan, table.index)
    for _, part in table.groupby("dataset"):
        if (ends := prompt_odds(part)) is None:
            return None
        odds[part.index] = ends[0] + part["plw"] * (ends[1] - ends[0])
    return odds


def in_prompt_odds(table: pd.DataFrame) -> pd.DataFrame:
    """The table with these odds in the place of its PLWs, so that rows of several data sets lie on one axis of shares.

    Raises UserError where they are not known.
    """
    odds = odds_of_rows(table)
    if odds is None:
        raise UserError("the prompts' share of the loss weight is not known for all data sets")
    return table.assign(plw=odds, prompt_share=odds / (1 + odds))


def fittable(table: pd.DataFrame) -> pd.DataFrame:
    """The data sets of a table that have PLWs enough for a curve; the others' names are kept for `remarks`.

    For tables gathered from many runs, where one stray cell must not spoil the rest. If none has enough, all are
    kept, for `check` to say so.
    """
    plws = table.groupby("dataset")["plw"].nunique()
    too_few = sorted(plws.index[plws < MIN_PLWS])
    if len(too_few) == len(plws):
        return table
    kept = table[~table["dataset"].isin(too_few)]
    kept.attrs = {**table.attrs, "too_few_plws": too_few}
    return kept


def remarks(table: pd.DataFrame) -> list[str]:
    """What a person must know of how a table was gathered, a line each: what was left out, and what else differs."""
    lines = []
    if too_few := table.attrs.get("too_few_plws"):
        lines.append(f"left out, with fewer than {MIN_PLWS} PLWs: {', '.join(too_few)}")
    lines += [f"left out: {cell}" for cell in table.attrs.get("left_out", [])]
    lines += [f"note: {note}" for note in table.attrs.get("notes", [])]
    return lines


def rescale(table: pd.DataFrame, scale: str) -> pd.DataFrame:
    """A checked table with its scores on one scale.

    `none` leaves them alone but refuses scores above 1 beside scores in 0..1 (0 itself may be either). Negative scores
    say that the table is on neither scale (z-scores, log-likelihoods), so nothing is refused and the fit notes it.
    `fraction` divides by 100 the tasks that have scores above 1. `minmax` maps each task's lowest and highest score,
    over all data sets, to 0 and 1; `zscore` subtracts its mean and divides by its standard deviation; a task whose
    scores are all equal becomes 0. A task with scores on both sides of 1 could be low percentages or a mix of units,
    which no rule can tell apart, so it is always refused.
    """
    source = table.attrs.get("source", "score table")
    if scale not in SCALES:
        raise UserError(f"scale is {scale!r}, but must be one of {', '.join(SCALES)}")
    above, within = table["score"] > 1, table["score"].between(0, 1, inclusive="right")
    if (table["score"] >= 0).all() or scale == "fraction":
        for task, rows in table.groupby("task")["score"]:
            if above[rows.index].any() and within[rows.index].any():
                low, high = first(within[rows.index]), first(above[rows.index])
                raise UserError(
                    f"{source}, row {high}: task {task} scores {rows[high]:g} here but {rows[low]:g} in row {low}, "
                    "so its scale is not clear; write all its scores as fractions"
                )
    scaled = [column for column in ("score", "stderr") if column in table]
    rescaled = table.copy()
    if scale in ("minmax", "zscore"):
        scores = table.groupby("task")["score"]
        if scale == "minmax":
            origin, unit = scores.transform("min"), scores.transform("max") - scores.transform("min")
        else:
            origin, unit = scores.transform("mean"), scores.transform("std", ddof=1)
        unit = unit.where(unit > 0, 1.0)
        rescaled[scaled] = table[scaled].div(unit, axis=0)
        rescaled["score"] -= origin / unit
        return rescaled
    if not above.any() or (scale == "none" and (table["score"] < 0).any()):
        return table
    if scale == "none":
        if within.any():
            high, low = first(above), first(within)
            raise UserError(
                f"{source}, row {high}: {table['task'][high]} scores {table['score'][high]:g} beside "
                f"{table['score'][low]:g} of {table['task'][low]} in row {low}; scales are mixed (0..100 beside 0..1): "
                "give --scale fraction to divide by 100 the tasks that exceed 1, or minmax or zscore"
            )
        return table
    if (table["score"] > 100).any():
        row = first(table["score"] > 100)
        raise UserError(f"{source}, row {row}: score {table['score'][row]:g} is no percentage; rescale it yourself")
    is_percent = table["task"].isin(table["task"][above])
    rescaled[scaled] = table[scaled].where(~is_percent, table[scaled] / 100)
    return rescaled


def widest_difference(table: pd.DataFrame, scale: str) -> float | None:
    """The largest difference that two scores of a task can have on a scale; None where the scale has no ends.

    table: a checked one on that scale. Scores within 0..1 are taken to end there, others within 0..100 there.
    """
    if scale == "minmax":
        return 1.0
    if scale == "zscore" or (table["score"] < 0).any():
        return None
    highest = table["score"].max()
    return 1.0 if highest <= 1 else 100.0 if highest <= 100 else None


def missing_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The scores a full grid of the table's models, data sets, PLWs, seeds and tasks would have and it has not."""
    grid = pd.MultiIndex.from_product([sorted(table[column].unique()) for column in SCORE], names=SCORE)
    return grid.difference(pd.MultiIndex.from_frame(table[SCORE])).to_frame(index=False)


def task_types(table: pd.DataFrame) -> dict[str, str]:
    """The type of each task, where the table has a column task_type. Raises UserError for a task of two types."""
    if "task_type" not in table:
        return {}
    given = table[table["task_type"].notna() & (table["task_type"].astype(str).str.strip() != "")]
    kinds = given["task_type"].astype(str).groupby(given["task"]).unique()
    for task, several in kinds.items():
        if len(several) > 1:
            source = table.attrs.get("source", "score table")
            raise UserError(f"{source}: task {task} has the types {' and '.join(sorted(several))}; keep one")
    return {str(task): kind[0] for task, kind in kinds.items()}
