"""Does a dry run say what a sweep will take, by what was measured and by nothing else?"""

from dataclasses import replace

import pytest

from plw_mlflow.config import MainConfig, SweepConfig, spell
from plw_mlflow.sweep import dry_run
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking import Measured
from tests.stores import Place

CELLS = [Cell(MainConfig(plw=plw), f"plw {plw:g}", f"cell{plw:g}", "") for plw in (0.0, 0.1, 0.5, 1.0)]
LEFT = {cell.identity: "left" for cell in CELLS}


@pytest.fixture(autouse=True)
def _stored(monkeypatch):
    monkeypatch.setattr(Measured, "stored_bytes", lambda self: 2**20 * int(self.run_id))


def measured(run_id, seconds, **options):
    config = replace(MainConfig(plw=0.3, seed=7), **options)
    return Measured(run_id, {name: spell(value) for name, value in vars(config).items()}, seconds)


def text(cells, *known, states=LEFT, **options):
    return dry_run.text(SweepConfig(**options), cells, states, known)


def test_time_disk_and_gpu_hours_are_those_of_measured_cells():
    told = text(CELLS, measured("3", 3600), measured("5", 1800), measured("7", 7200), jobs=2, gpus_per_cell=4)
    assert told.splitlines()[4:] == [
        "4 cells: 4 left",
        "expected for 4 of the 4 cells that are to be run:",
        "  time: 2.0 h, 2 at a time",
        "  disk: 12.0 MiB in the store",
        "  GPU hours: 16",
        "  4 by 3 finished cells with the same options but for PLW and seed: 60 min each",
    ]


def test_cells_that_are_most_alike_count():
    other_options, other_data = measured("1", 10, epochs=9.0), measured("1", 20, dataset="toy-long")
    assert dry_run.basis(CELLS[0], [other_data, other_options]).cells == (other_options,)
    assert dry_run.basis(CELLS[0], [other_data]).cells == (other_data,)
    assert dry_run.basis(CELLS[0], [measured("1", 10, method="lora")]) is None


def test_where_nothing_was_measured_no_number_is_given():
    told = text(CELLS, measured("1", 10, method="lora"))
    assert "time" not in told
    assert "run one first" in told
    assert "--model toy --dataset toy-short --method full --seed 1234 --plw 0.0" in told


def test_finished_and_failed_cells_are_not_to_be_run():
    states = LEFT | {"cell0": "finished", "cell0.1": "failed"}
    assert "2 cells that are to be run" in text(CELLS, measured("1", 10), states=states)
    assert "3 cells that are to be run" in text(CELLS, measured("1", 10), states=states, retry_failed=True)
    one = text(CELLS[:1], measured("1", 10))
    assert "1 cell: 1 left\nexpected for 1 of the 1 cell that is to be run:" in one
    assert "\n1 cell cannot be forecast, as no cell of the same model and method is finished" in text(CELLS[:1])
    assert text(CELLS, states=dict.fromkeys(LEFT, "finished")).endswith("4 cells: 4 finished\nnothing is to be run")


def test_an_option_without_effect_is_told_before_the_cells(tmp_path):
    arguments = ("--plw", "0.1", "--dataset", "toy-short", "--lora-rank", "4,8", "--dry-run")
    out, _ = Place(tmp_path).run("sweep", *arguments)
    assert out.startswith("sweep of 1 cell\nnote: lora-rank is 4,8, but has no effect with --method full\n")
