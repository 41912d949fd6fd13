"""Does a sweep end with PLW against score, the verdicts, and an account of its cells?"""

from types import SimpleNamespace

import pandas as pd

from plw_mlflow.config import MainConfig
from plw_mlflow.sweep import ending
from plw_mlflow.sweep.grid import Cell


def rows(*scores):
    columns = ["model", "dataset", "plw", "seed", "task", "score", "stderr"]
    return pd.DataFrame([("m", *row) for row in scores], columns=columns)


def test_a_cell_is_the_mean_of_its_tasks_and_its_error_that_of_its_questions():
    table = rows(("short", 0.0, 1, "a", 0.2, 0.03), ("short", 0.0, 1, "b", 0.4, 0.04), ("long", 0.1, 1, "a", 0.5, 0.01))
    assert [line.split() for line in ending.means(table).splitlines()] == [
        ["PLW", "long", "short"],
        ["0", "0.3000", "±", "0.0250"],  # sqrt(0.03^2 + 0.04^2) / 2
        ["0.1", "0.5000", "±", "0.0100"],
    ]


def test_of_several_seeds_the_error_is_that_of_their_mean():
    table = rows(*(("short", 0.1, seed, "a", score, 0.9) for seed, score in ((1, 0.1), (2, 0.3))))
    assert ending.means(table).split()[-3:] == ["0.2000", "±", "0.1000"]  # the SD is 0.1 * sqrt(2)


def test_failures_are_listed_with_their_reasons_as_many_as_a_description_holds():
    cells = [Cell(MainConfig(), f"cell {number}", str(number), str(number)) for number in range(12)]
    account = SimpleNamespace(cells=cells, finished=[], failed=cells, failure=lambda cell: f"{cell.name} ({'x' * 900})")
    (text,) = ending._failures(account)
    lines = text.splitlines()
    assert lines[0] == "Failed:"
    assert lines[-1] == "- and 2 more"
    assert all(len(line) <= ending.FAILURE_CHARACTERS + 2 for line in lines)
    assert ending._counts(account) == "0 of 12 cells finished, 12 failed"
    one = SimpleNamespace(cells=cells[:1], finished=cells[:1], failed=[])
    assert ending._counts(one) == "1 of 1 cell finished"
    assert ending._failures(SimpleNamespace(failed=[])) == []


def test_the_best_is_the_highest_mean_of_cells_that_differ_in_their_seed_alone():
    table = rows(*(("short", 0.1, seed, "a", score, 0.1) for seed, score in ((1, 0.1), (2, 0.9))))
    table = pd.concat([table, rows(("short", 0.5, 1, "a", 0.6, 0.1), ("long", 0.0, 1, "a", 0.55, 0.1))])
    assert ending._best(table, ()) == {"best_score": 0.6, "best_plw": 0.5}
