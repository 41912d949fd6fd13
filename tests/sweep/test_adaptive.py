"""Does an adaptive sweep run few cells, say why it chose them, and come to the same ones whatever happens to it?"""

import json
import zlib
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest

from plw_mlflow import sweep, tracking
from plw_mlflow.analysis import analyze
from plw_mlflow.config import MainConfig, SweepConfig, spell
from plw_mlflow.evaluation.scores import Evaluation, Score, table
from plw_mlflow.study import PUBLISHED_PLWS
from plw_mlflow.sweep import adaptive, ending, local
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.sweep.running import Ended
from plw_mlflow.tracking.cells import cell_columns
from plw_mlflow.transforms import EXPONENT
from tests.stores import Place

TASKS = ("a", "b", "c", "d", "e")
LEFT = dict.fromkeys(PUBLISHED_PLWS, 2)


def score(plw, seed, task, *, slope=0.3, bend=-0.45, noise=0.03):
    """A score by formula: a parabola on w_p, with noise that is the cell's own."""
    w = plw**EXPONENT
    random = np.random.default_rng(zlib.crc32(f"{plw:g} {seed} {task}".encode()))
    return 0.3 + 0.05 * TASKS.index(task) + slope * w + bend * w**2 + noise * random.standard_normal()


def grid_of(points, tasks=TASKS, **curve):
    rows = [
        {"model": "m", "dataset": "d", "plw": plw, "seed": seed, "task": task, "metric": "acc"}
        | {"score": score(plw, seed, task, **curve)}
        for plw, seed in points
        for task in tasks
    ]
    (grid,) = analyze.grids(pd.DataFrame(rows))
    return grid


def every(plws, *seeds):
    return [(plw, seed) for plw in plws for seed in seeds]


# ------------------------------------------------------------------------------------------------- a single choice


def test_the_first_plws_are_spread_over_the_transformed_axis():
    assert adaptive.first_plws(PUBLISHED_PLWS) == [0.0, 0.02463, 0.2463, 1.0]
    assert adaptive.first_plws([1.0, 0.9, 0.8, 0.7, 0.6]) == [0.6, 0.7, 0.9, 1.0]


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:2], TASKS[:1]])
def test_a_choice_is_of_what_is_left_and_ends_when_the_interval_is_narrow(tasks):
    begun = grid_of(every((0.0, 0.02463, 0.2463, 1.0), 1), tasks)
    left = {0.05: 1, 0.5: 2}
    choice = adaptive.choose(begun, left, 9, 1e-6)
    assert sorted(choice.plws) == [0.05, 0.5, 0.5]
    has_too_few_runs = len(tasks) > 1
    assert bool(adaptive.choose(begun, left, 1, 10.0).plws) == has_too_few_runs
    assert choice.expected_error < choice.error
    whole = grid_of(every(PUBLISHED_PLWS, 1, 2), tasks)
    fit = analyze.lead_fit(whole)
    width = fit.optimum_set[0][1] - fit.optimum_set[0][0]
    end = adaptive.choose(whole, left, 1, width * 1.01)
    assert (end.plws, end.width) == ([], pytest.approx(width))
    assert f"{width:.3g} wide" in end.why
    assert adaptive.choose(whole, left, 1, width * 0.99).plws
    assert "every cell of the grid" in adaptive.choose(whole, {}, 1, width * 0.99).why


def test_no_cell_is_chosen_to_locate_an_optimum_that_is_ruled_out_unless_runs_are_too_few_to_tell():
    rising = {"slope": 0.3, "bend": 0.1}
    choice = adaptive.choose(grid_of(every((0.0, 0.02463, 0.2463, 1.0), 1), **rising), LEFT, 1, 0.1)
    assert choice.plws == [0.002236]  # the farthest on w_p from those tried
    assert "4 runs are too few to rule it out" in choice.why
    choice = adaptive.choose(grid_of(every(PUBLISHED_PLWS, 1, 2), **rising), LEFT, 1, 0.1)
    assert choice.plws == []
    assert "a maximum inside the range has probability" in choice.why


def test_where_no_parabola_describes_the_scores_cells_are_spread_over_the_range():
    """A narrow interval of a curve's peak means nothing there, however few runs it takes."""
    peaked = grid_of(every(PUBLISHED_PLWS, 1, 2))
    scores = peaked.scores + np.where(peaked.runs["plw"] == 0.1, 0.5, 0.0)[:, None]
    choice = adaptive.choose(replace(peaked, scores=scores), {0.1: 1, 0.05: 1, 0.02: 1}, 2, 10.0)
    assert len(choice.plws) == 2
    assert choice.why.startswith("no parabola describes these scores (lack of fit: p = ")
    assert choice.why.endswith("; these are the farthest on w_p from those tried")
    assert adaptive.choose(peaked, {0.1: 1, 0.05: 1, 0.02: 1}, 2, 10.0).plws == []
    located = adaptive.choose(peaked, {0.1: 1, 0.05: 1, 0.02: 1}, 2, 1e-6)
    unfitted = adaptive.choose(grid_of(every((0.0, 0.1, 1.0), 1), noise=0.0), {0.5: 1}, 1, 0.1)
    assert sorted([choice, unfitted, located], key=adaptive._breadth) == [choice, located, unfitted]


def test_scores_that_cannot_be_fitted_lead_to_plws_between_those_tried():
    exact = grid_of(every((0.0, 0.1, 1.0), 1), noise=0.0)
    choice = adaptive.choose(exact, {0.05: 1, 0.01: 1, 0.5: 1}, 2, 0.1)
    assert choice.plws == [0.01, 0.5]
    assert "cannot be fitted" in choice.why


# ------------------------------------------------------------------------------------------------- whole sweeps


class Formula:
    """An engine whose cells are finished at once, with scores by formula."""

    poll_seconds = 0.0

    def __init__(self, client):
        self.client, self.begun, self.over = client, [], []

    def room(self, running):
        return 1 - running

    def start(self, cells, _):
        for begun in cells:
            self.begun.append((begun.cell.config.plw, begun.cell.config.seed))
            finish(self.client, begun)
            self.over.append(begun)

    def ended(self):
        ended = [Ended(begun, 0, SimpleNamespace(exists=lambda: False)) for begun in self.over]
        self.over = []
        return ended

    def end(self, patience):
        pass


def finish(client, begun):
    config = begun.cell.config
    params = {field.name: spell(getattr(config, field.name)) for field in fields(MainConfig)}
    entities = [mlflow.entities.Param(name, value) for name, value in params.items()]
    tags = {"plw.cell": begun.cell.identity, "plw.status": "scored", "plw.score_tasks": "a"}
    client.log_batch(begun.run_id, params=entities, tags=[mlflow.entities.RunTag(*item) for item in tags.items()])
    scores = [Score(task, "acc", score(config.plw, config.seed, task), 0.1, 5, 0, "1.0", True) for task in TASKS]
    rows = table(Evaluation(scores, {}, []), cell_columns(params))
    client.log_text(begun.run_id, pd.DataFrame(rows).to_csv(index=False), "scores.csv")
    client.set_terminated(begun.run_id, "FINISHED")


def decisions(run):
    return mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/decisions.json")


def test_an_adaptive_sweep_runs_a_part_of_the_grid_and_says_why(tmp_path, monkeypatch, capsys):
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    monkeypatch.setattr(ending, "end", lambda config, account, decided: account.sweep.run.describe("\n".join(decided)))
    engine = Formula(place.client)
    monkeypatch.setattr(local, "Local", lambda config: engine)
    config = SweepConfig(dataset="toy-short", seed="1,2", width=0.2, adaptive=True)
    sweep.run(config)
    assert [plw for plw, _ in engine.begun[:4]] == adaptive.first_plws(PUBLISHED_PLWS)
    assert len(set(engine.begun)) == len(engine.begun)
    assert 7 <= len(engine.begun) < 20
    (run,) = [run for run in place.runs() if "plw.grid" in run.data.tags]
    entries = decisions(run)
    assert sum(len(entry["choice"]["plws"]) for entry in entries) == len(engine.begun)
    assert entries[-1]["choice"]["plws"] == []
    assert entries[-1]["choice"]["width"] <= 0.2
    shown = capsys.readouterr().out
    for entry in entries:
        assert entry["choice"]["why"] in shown
    assert entries[-1]["choice"]["why"] in run.data.tags["mlflow.note.content"]
    before = len(engine.begun)
    sweep.run(config)
    assert len(engine.begun) == before
    assert decisions(run) == entries


class Memory:
    """A sweep and its account without a store: cells that are run are finished at once."""

    def __init__(self, monkeypatch, **options):
        values = {"dataset": "toy-short", "seed": "1,2,3", "width": 0.02, "adaptive": True} | options
        self.config = SweepConfig(**values)
        self.whole = [
            Cell(config, config.cell_name(), f"{config.dataset} {config.plw:g} {config.seed}", "")
            for config in self.config.cells()
        ]
        self.finished, self.file, self.run = [], None, SimpleNamespace(id="run")
        self.sole, self.adopt = lambda what: nullcontext(), lambda: None
        monkeypatch.setattr(tracking, "score_table", self._table)

    def read_json(self, name):
        return json.loads(json.dumps(self.file))

    def write_json(self, name, content):
        self.file = content

    def finished_attempt(self, cell):
        return SimpleNamespace(run_id=cell.identity)

    def _table(self, *, sweep, also, only):
        rows = [
            {"model": "m", "dataset": cell.config.dataset, "plw": cell.config.plw, "seed": cell.config.seed}
            | {"task": task, "metric": "acc", "score": score(cell.config.plw, cell.config.seed, task)}
            for cell in self.finished
            if cell.identity in only
            for task in TASKS
        ]
        return pd.DataFrame(rows)

    def chooser(self, **options):
        return adaptive.Chooser(replace(self.config, **options), self.whole, self)

    def run_all(self, chooser, rounds=100):
        """Run the cells of so many rounds, at most."""
        for _ in range(rounds):
            self.finished += [cell for cell in chooser.cells if cell not in self.finished]
            if not chooser.go_on(self):
                break
        return [cell.identity for cell in chooser.cells]


def test_a_sweep_goes_on_to_the_cells_of_an_undisturbed_one(monkeypatch):
    undisturbed = Memory(monkeypatch)
    cells = undisturbed.run_all(undisturbed.chooser())
    assert 9 < len(cells) < 30
    broken = Memory(monkeypatch)
    assert broken.run_all(broken.chooser(), rounds=3) == cells[:7]  # the last of them are decided on, and not run
    assert broken.run_all(broken.chooser()) == cells
    assert broken.file == undisturbed.file
    broken.file = None  # lost, but for the scores
    assert broken.run_all(broken.chooser()) == cells
    assert broken.file == undisturbed.file


def test_processes_on_one_sweep_come_to_the_same_cells(monkeypatch):
    alone = Memory(monkeypatch)
    cells = alone.run_all(alone.chooser())
    shared = Memory(monkeypatch)
    one, other = shared.chooser(), shared.chooser()
    while True:  # now the one decides and the other follows, now the other way round
        shared.finished += [cell for cell in one.cells if cell not in shared.finished]
        further = one.go_on(shared)
        assert other.go_on(shared) == further
        one, other = other, one
        if not further:
            break
    assert [cell.identity for cell in one.cells] == [cell.identity for cell in other.cells] == cells


def test_another_width_goes_on_with_the_same_sweep(monkeypatch):
    memory = Memory(monkeypatch, width=0.05)
    wide = memory.run_all(memory.chooser())
    narrow = memory.run_all(memory.chooser(width=0.02))
    assert narrow[: len(wide)] == wide
    assert len(narrow) > len(wide)
    assert memory.run_all(memory.chooser(width=0.05)) == narrow


def test_a_budget_ends_a_sweep_of_two_data_sets_and_jobs_make_rounds_larger(monkeypatch):
    memory = Memory(monkeypatch, dataset="toy-short,toy-long", budget=11, width=0.0001)
    assert len(memory.run_all(memory.chooser())) == 11
    ends = {entry["dataset"]: entry["choice"]["why"] for entry in memory.file if not entry["choice"]["plws"]}
    assert set(ends) == {"toy-short", "toy-long"}
    assert all("the budget is spent, 11 of 11 cells" in why for why in ends.values())
    memory = Memory(monkeypatch, budget=12, width=0.0001, jobs=5)
    memory.run_all(memory.chooser())
    assert [len(entry["choice"]["plws"]) for entry in memory.file] == [4, 5, 3, 0]


def test_a_data_set_all_of_whose_cells_fail_ends(monkeypatch):
    memory = Memory(monkeypatch)
    chooser = memory.chooser()
    assert chooser.go_on(memory) == []
    assert memory.file[-1]["choice"]["why"] == "all its cells have failed"


def test_a_data_set_goes_on_after_a_cell_that_has_failed_but_not_without_end(monkeypatch):
    memory = Memory(monkeypatch)
    chooser = memory.chooser()
    memory.finished = list(chooser.cells)
    failed = chooser.go_on(memory)
    further = chooser.go_on(memory)
    assert further
    assert not {cell.identity for cell in failed} & {cell.identity for cell in further}
    assert chooser.go_on(memory)
    assert chooser.go_on(memory) == []
    assert memory.file[-1]["choice"]["why"] == "all cells of its last 3 rounds have failed"


def test_what_cannot_be_adaptive_is_refused(monkeypatch):
    memory = Memory(monkeypatch, dataset="toy-short,toy-long", budget=7)
    with pytest.raises(ValueError, match="budget is 7 cells, but the first round of adaptive takes 8"):
        adaptive.check(memory.config, memory.whole)
    with pytest.raises(ValueError, match="more than 4 values of plw"):
        SweepConfig(adaptive=True, plw="0,0.1,0.5,1")
    with pytest.raises(ValueError, match=r"width is 0\.1, but that is for adaptive"):
        SweepConfig(width=0.1)


def test_cells_of_several_models_are_chosen_together():
    cells = [
        Cell(MainConfig(plw=plw, seed=seed, method=method), "", f"{plw} {seed} {method}", "")
        for plw in PUBLISHED_PLWS
        for seed in (1, 2)
        for method in ("full", "lora")
    ]
    assert "begins with 8 of them" in adaptive.foretell(SweepConfig(adaptive=True), cells)
    with pytest.raises(ValueError, match="budget is 7"):
        adaptive.check(SweepConfig(adaptive=True, budget=7), cells)
