"""What questions tell beside scores:  python -m benchmarks.questions --json FILE

Tables of simulated answers:

`pairs`: two runs answer the same questions, right or wrong, and disagree on a share of them. How often does a test find
a difference, where there is none (the level) and where there is one (the power): McNemar's by its mid-p, the same by
its exact p, and the two scores' own standard errors, as if they were of different questions?

`values`: the same of scores between 0 and 1, by the paired t test.

`seeds`: PLWs with several seeds each. A run's luck moves all its answers. The paired t test says whether these models
differ, which luck makes them do; the test with luck says whether PLW makes a difference.

`crossed`: a curve over PLW, fitted to the mean scores of runs (`fixed-tasks`), beside models of all single answers,
with questions crossed with runs. Do these find a curve more often?

    python -m benchmarks.questions --scores FOLDER/scores.csv --json FILE

does `pairs` and `values` on real answers instead, those of questions.parquet beside that file. For each task, questions
are drawn from those of two runs of one seed. On each, the two runs are exchanged by chance, so that there is no
difference between them, and one is planted. Then the same, without a planted difference, of the means over all seeds at
two PLWs, which the paired t test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from scipy import special, stats

from plw_mlflow.analysis import questions as asked
from plw_mlflow.analysis.statistics import paired
from plw_mlflow.analysis.statistics.optimum import LEVEL
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.transforms import Array, make_transform

SEED = 1234
PAIRS, TABLES = 20_000, 2_000  # simulated tables of two runs, and of many
RIGHT = 0.6  # share of right answers
PLANTED = (0.0, 0.01, 0.02, 0.03)
MOST_PAIRS = 12  # of real runs of a task, spread over all
DRAWS = 4_000  # of the questions of two real runs

Row = dict[str, Any]


# --------------------------------------------------------------------------------------------- two runs


def pairs() -> Iterator[Row]:
    """Right and wrong answers of two runs."""
    random = np.random.default_rng(SEED)
    for number, disagreement, gain in product((200, 1000), (0.05, 0.1, 0.2), PLANTED):
        shares = np.array([RIGHT - disagreement / 2, (disagreement + gain) / 2, (disagreement - gain) / 2])
        counts = random.multinomial(number, [*shares, 1 - shares.sum()], PAIRS).astype(float)
        yield {"questions": number, "disagreement": disagreement, "planted": gain, **rejections(counts, gain)}


def rejections(counts: Array, truth: float) -> Row:
    """Of tables, [B, 4]: how many questions both runs, only the first, only the second, and neither answer right.

    truth: the difference that the interval should hold.
    """
    both, gained, lost, _ = counts.T
    number = counts.sum(1)
    exact = np.minimum(1, 2 * stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))
    ends = np.array([paired.score_interval(*row) for row in np.stack([gained, lost, number], 1)[:DRAWS]])
    first, second = (both + gained) / number, (both + lost) / number
    error = np.sqrt((first * (1 - first) + second * (1 - second)) / (number - 1))
    with np.errstate(invalid="ignore"):  # where all answers are right
        unpaired = 2 * stats.norm.sf(np.abs(first - second) / error)
    return {
        "McNemar, mid-p": share(paired.mcnemar(gained, lost)),
        "McNemar, exact": share(exact),
        "unpaired": share(unpaired),
        "interval holds": float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()),
    }


def share(p: Array) -> float:
    """How many of these p-values reject."""
    return float((p < LEVEL).mean())


def values() -> Iterator[Row]:
    """Scores of 0 to 1, such as truthfulqa_mc2's, of two runs: a question is hard for both, and each adds its own."""
    random = np.random.default_rng(SEED + 1)
    for number, spread, gain in product((200, 800), (0.2, 0.5), PLANTED):
        hard = random.normal(0, 1.5, (DRAWS, number))
        first, second = (special.expit(hard + random.normal(0, spread, hard.shape)) for _ in range(2))
        yield {"questions": number, "spread": spread, "planted": gain, **t_rejections(first + gain, second)}


def t_rejections(first: Array, second: Array) -> Row:
    """Of tables of values, [B, Q] each: how often the paired t test and the unpaired errors reject."""
    number = first.shape[1]
    differences = first - second
    error = differences.std(1, ddof=1) / number**0.5
    own = np.sqrt((first.var(1, ddof=1) + second.var(1, ddof=1)) / number)
    size = np.abs(differences.mean(1))
    with np.errstate(invalid="ignore", divide="ignore"):  # where all answers are alike
        return {
            "paired t": share(2 * stats.t.sf(size / error, number - 1)),
            "unpaired": share(2 * stats.norm.sf(size / own)),
        }


# --------------------------------------------------------------------------------------------- several seeds


def seeds() -> Iterator[Row]:
    """PLWs with several seeds, of which the first two are compared; a difference of 0 or 2 points, of 500 questions."""
    for plws, number, luck in product((2, 10), (2, 3, 5), (0.0, 0.01, 0.02)):
        yield {"PLWs": plws, "seeds": number, "luck": luck, **_of_seeds(plws, number, luck)}


def _of_seeds(plws: int, number: int, luck: float, questions: int = 500) -> Row:
    random = np.random.default_rng([SEED, plws, number, round(1000 * luck)])
    found: dict[tuple[str, float], list[float]] = {}
    # A run is right where hardness, what the PLW and what the run make of the question, and luck are above a threshold.
    spread = np.sqrt(1 + 0.1**2 + 0.2**2)
    per_point = spread / stats.norm.pdf(stats.norm.isf(RIGHT))  # of a score of 1, on the scale of hardness
    for _ in range(TABLES):
        margin = random.normal(0, 1, questions) + random.normal(0, 0.1, (plws, 1, questions))
        margin = margin + random.normal(0, 0.2, (plws, number, questions))
        margin += random.normal(0, luck, (plws, number, 1)) * per_point - spread * stats.norm.isf(RIGHT)
        for gain in (0.0, 0.02):
            right = (margin + gain * per_point * (np.arange(plws) == 0)[:, None, None] > 0).astype(float)
            noise = np.repeat([paired.answer_noise(of_plw) for of_plw in right], number)
            labels = np.repeat(np.arange(plws), number).tolist(), np.tile(np.arange(number), plws).tolist()
            result = paired.compare([right[0]], [right[1]], paired.luck_of(right.mean(2).ravel(), noise, *labels))
            assert result.with_luck is not None
            tests = {"paired t": result.paired, "with luck": result.with_luck, "unpaired": result.unpaired}
            for name, tested in tests.items():
                found.setdefault((name, gain), []).append(tested.p)
    return {f"{name}, {'level' if gain == 0 else 'power'}": share(np.array(p)) for (name, gain), p in found.items()}


# --------------------------------------------------------------------------------------------- curves


def crossed() -> Iterator[Row]:
    """Is there a curve over the published PLWs, of 1500 questions? Luck is as a share of the noise of answers."""
    for runs, luck in product((1, 2), (0.0, 0.5, 1.0)):
        yield {"runs": runs * len(PUBLISHED_PLWS), "luck": luck, **_of_curves(runs, luck)}


def _of_curves(number: int, luck: float, questions: int = 1500) -> Row:
    random = np.random.default_rng([SEED, number, round(10 * luck)])
    plws = np.repeat(PUBLISHED_PLWS, number)
    w = make_transform("w_p", plws)(plws)
    x = np.stack([np.ones_like(w), w, w**2], 1)
    shape = 4 * (w - w**2)  # a peak of 1 inside
    noise = 0.005  # about the SD of a run's score of so many answers, of questions that are mostly easy or hard
    found: dict[tuple[str, float], list[Array]] = {}
    for gain in (0.0, 0.025):
        for _ in range(4):
            hard = random.normal(0.5, 3, (TABLES // 4, 1, questions)).astype(np.float32)
            slope = special.expit(hard) * (1 - special.expit(hard))
            per_point = 1 / slope.mean((1, 2), keepdims=True)  # of a score of 1, in logits
            skill = gain * shape[:, None] * per_point
            skill = skill + random.normal(0, luck * noise, (len(hard), len(w), 1)) * per_point
            right = random.random((len(hard), len(w), questions), dtype=np.float32) < special.expit(hard + skill)
            for name, p in curve_tests(right, x).items():
                found.setdefault((name, gain), []).append(p)
    return {
        f"{name}, {'level' if gain == 0 else 'power'}": share(np.concatenate(p)) for (name, gain), p in found.items()
    }


def curve_tests(right: Array, x: Array) -> dict[str, Array]:
    """Tests of slope and bend by mean scores, and by answers with questions crossed with runs; right: [B, R, Q]."""
    runs, questions = right.shape[1:]
    scores, of_question = right.mean(2), right.mean(1)
    # What a balanced linear mixed model knows: the variance of answers around questions and runs, as of a score, ...
    whole = right.mean((1, 2))
    squares = whole * runs * questions - runs * (of_question**2).sum(1) - questions * (scores**2).sum(1)
    answers = (squares + runs * questions * whole**2) / (runs - 1) / (questions - 1) / questions
    logits = special.logit(scores)  # rises with the total, which is all that a Rasch model takes of a run's answers
    tests = {}
    for name, y in (("means", scores), ("logits of totals", logits)):
        explained, variance = _curve(y, x)
        tests[name] = stats.f.sf(explained / variance, 2, runs - 3)
    explained, variance = _curve(scores, x)
    # ... so that the luck of runs is what their residuals have beyond it, and none where they have less (REML).
    pooled = (variance * (runs - 3) + answers * (runs - 1) * (questions - 1)) / (
        runs - 3 + (runs - 1) * (questions - 1)
    )
    is_less = variance < answers
    freedom = np.where(is_less, (runs - 1) * (questions - 1), runs - 3)
    tests["crossed"] = stats.f.sf(explained / np.where(is_less, pooled, variance), 2, freedom)
    tests["crossed, no luck"] = stats.chi2.sf(2 * explained / answers, 2)
    return tests


def _curve(scores: Array, x: Array) -> tuple[Array, Array]:
    """The mean square that slope and bend explain of scores, [B, R], and that of the residuals."""
    around_mean = ((scores - scores.mean(1, keepdims=True)) ** 2).sum(1)
    residual = ((scores - scores @ (x @ np.linalg.pinv(x)).T) ** 2).sum(1)
    return (around_mean - residual) / 2, residual / (len(x) - 3)


# --------------------------------------------------------------------------------------------- real answers


def real(scores: Path) -> Iterator[Row]:
    """Level and power on the questions of real runs, for each data set, model and task."""
    questions = asked.read_beside(scores)
    metrics = questions.attrs["metrics"]
    questions = questions[questions["metric"] == questions["task"].map(metrics)].dropna(subset="value")
    for (dataset, model, task), part in questions.groupby(["dataset", "model", "task"]):
        wide = part.pivot_table(index="doc_id", columns=["seed", "plw"], values="value").dropna(axis=1)
        head = {"dataset": dataset, "model": model, "task": task, "questions": len(wide)}
        by_number = _by_number_of_seeds(wide)
        if not by_number:
            print(f"left out: {dataset}, {model}, {task}: no seed has all questions at two PLWs")
        for number, every in by_number.items():
            places = np.unique(np.linspace(0, len(every) - 1, MOST_PAIRS).round().astype(int))
            chosen = [every[place] for place in places]
            are_counted = number == 1 and np.isin(chosen, (0, 1)).all()  # right and wrong answers, for McNemar's test
            of_pair = _of_counts if are_counted else _of_values
            for gain in PLANTED if number == 1 else PLANTED[:1]:  # means of right and wrong answers move by jumps
                if are_counted and gain >= min(_wrong(*pair) for pair in chosen):  # too few can become right
                    continue
                found = [of_pair(first, second, gain) for first, second in chosen]
                yield head | {"seeds": number, "pairs": len(chosen), "planted": gain} | _means(found)


def _by_number_of_seeds(wide: pd.DataFrame) -> dict[int, list[tuple[Array, Array]]]:
    """Pairs of PLWs, by how many seeds' answers each has the mean of: those of a single seed, and of all of them.

    wide: a column for each seed and PLW, a row for each question.
    """
    seeds = wide.columns.unique("seed")
    ones = [pair for seed in seeds for pair in combinations(wide[seed].to_numpy().T, 2)]
    whole = wide.T.groupby(level="plw").filter(lambda runs: len(runs) == len(seeds))
    means = whole.groupby(level="plw").mean().to_numpy()
    found = {1: ones} | ({len(seeds): list(combinations(means, 2))} if len(seeds) > 1 else {})
    return {number: every for number, every in found.items() if every}


def _wrong(first: Array, second: Array) -> float:
    """The share of answers of two runs that are wrong, and so can become right."""
    return float(1 - (first + second).mean() / 2)


def _of_counts(first: Array, second: Array, gain: float) -> Row:
    """On right and wrong answers drawn from those of two runs, exchanged by chance, with a difference planted."""
    right, one = float((first * second).mean()), float((first != second).mean()) / 2
    chance = gain / _wrong(first, second)  # with which wrong answers of the first of them become right
    neither = (1 - right - 2 * one) * (1 - chance)
    shares = [right + one * chance, one + (1 - right - 2 * one) * chance, one * (1 - chance), neither]
    drawn = np.random.default_rng(SEED).multinomial(len(first), shares, DRAWS)
    found = rejections(drawn.astype(float), gain)
    return {"disagreement": 2 * one, "paired": found["McNemar, mid-p"], "unpaired": found["unpaired"]}


def _of_values(first: Array, second: Array, gain: float) -> Row:
    """The same of answers that are between right and wrong, or means of several seeds'."""
    random, number = np.random.default_rng(SEED), len(first)
    drawn = random.integers(number, size=(DRAWS, number))
    is_other = random.random(drawn.shape) < 0.5
    mine, theirs = first[drawn], second[drawn]
    found = t_rejections(np.where(is_other, theirs, mine) + gain, np.where(is_other, mine, theirs))
    return {"disagreement": float((first != second).mean()), "paired": found["paired t"], "unpaired": found["unpaired"]}


def _means(rows: list[Row]) -> Row:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@click.command(help=__doc__)
@click.option("--scores", type=click.Path(path_type=Path), help="Score table with questions.parquet beside it.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="File for all rows.")
def main(scores: Path | None, file: Path | None) -> None:
    made = {"real": real(scores)} if scores else {each.__name__: each() for each in (pairs, values, seeds, crossed)}
    tables = {name: list(rows) for name, rows in made.items()}
    for name, rows in tables.items():
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3f}'.format)}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
