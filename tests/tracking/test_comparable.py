"""Are cells pooled only if they differ in nothing but what the analysis knows of? Does `best` go to the best one?"""

import dataclasses
import json
import shlex
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Metric, Param

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig, data_name, digest, spell
from plw_mlflow.errors import UserError
from plw_mlflow.tracking import best as best_module
from plw_mlflow.tracking.cells import unquoted
from tests.stores import Place

ROW = {
    "metric": "acc",
    "stderr": 0.1,
    "n": 120,
    "num_fewshot": 0,
    "task_version": "1.0",
    "prompt": "harness",
    "harness_version": "0.4.13",
    "task_type": "multiple-choice",
    "asked_fewshot": 0,
    "caveat": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("pooling"))


class Experiment:
    """An experiment of made-up runs, each written at one go."""

    def __init__(self, client, name):
        self.client, self.name = client, name
        self.id = client.create_experiment(name)

    def cell(self, score=0.3, *, spelled=None, tags=None, status="FINISHED", sweep=None, files=None, **options):
        """A scored cell; gives its run's id.

        score: of its one task, or rows of its score table. spelled: parameters as `mlflow run` has logged them.
        """
        config = MainConfig(**options)
        rows = score if isinstance(score, list) else [{"task": "a", "score": score}]
        rows = [ROW | row for row in rows]
        caveat = "; ".join(f"{row['task']}: {row['caveat']}" for row in rows if row["caveat"])
        values = {field.name: spell(getattr(config, field.name)) for field in dataclasses.fields(config)}
        contents = [(tags or {}).get("plw.data_sha256", data_name(config.dataset, config)), config.model]
        told = {
            "plw.cell": digest(config.identity() | {"contents": contents}),
            "plw.status": "scored",
            "plw.score_comparable": spell(not caveat),
            "plw.score_tasks": ",".join(f"{row['task']}/{row['metric']}@0" for row in rows),
            **({"plw.score_caveat": caveat} if caveat else {}),
            **({"mlflow.parentRunId": sweep} if sweep else {}),
            **(tags or {}),
        }
        info = self.client.create_run(self.id, tags={name: value for name, value in told.items() if value}).info
        mean = sum(row["score"] for row in rows) / len(rows)
        params = [Param(name, value) for name, value in (values | (spelled or {})).items()]
        self.client.log_batch(info.run_id, [Metric("score", mean, 1, 0)], params)
        folder = Path(info.artifact_uri)
        folder.mkdir(parents=True)
        cell = {"model": config.model, "dataset": config.dataset, "plw": config.plw, "seed": config.seed}
        pd.DataFrame([cell | row for row in rows]).to_csv(folder / "scores.csv", index=False)
        for name, content in (files or {}).items():
            (folder / name).write_text(json.dumps(content))
        self.client.set_terminated(info.run_id, status)
        return info.run_id

    def cells(self, *plws, **options):
        return [self.cell(plw=plw, **options) for plw in plws]

    def table(self, **how):
        return tracking.score_table(experiment=self.name, **how)


@pytest.fixture
def experiment(place, request):
    mlflow.set_tracking_uri(place.uri)
    return Experiment(place.client, request.node.name)


# ------------------------------------------------------------------------------------------------- recipes


def test_cells_of_two_recipes_are_not_pooled_wherever_their_plws_lie(experiment):
    experiment.cells(0.0, 0.1, 0.2)
    (long,) = experiment.cells(1.0, epochs=20.0)
    with pytest.raises(ValueError, match="the cells of toy on toy-short cannot be pooled: epochs is 3 in run") as error:
        experiment.table()
    assert f"and 2 more, but 20 in run {long}" in str(error.value)
    assert "choose by --where \"params.epochs = '3.0'\", compare them (analyze --by epochs)" in str(error.value)
    assert set(experiment.table(where="params.epochs = '3.0'")["plw"]) == {0.0, 0.1, 0.2}
    assert dict(experiment.table(also=("epochs",)).groupby("epochs")["plw"].count()) == {3.0: 3, 20.0: 1}


@pytest.mark.parametrize(
    ("options", "tags"),
    [
        ({"learning_rate": 0.002}, {}),
        ({"max_records": 50}, {}),
        ({"template": "none"}, {}),
        ({"loss_divisor": "tokens"}, {}),
        ({"preset": "huerta2024", "seed": 1234}, {}),
        ({"method": "lora", "lora_rank": 4}, {}),
        ({}, {"plw.precision": "bfloat16"}),
    ],
)
def test_whatever_decides_how_a_cell_is_trained_counts(experiment, options, tags):
    method = options.get("method", "full")
    experiment.cells(0.0, 0.1, method=method, tags={"plw.precision": "float32"})
    experiment.cell(plw=1.0, tags={"plw.precision": "float32"} | tags, **options)
    with pytest.raises(ValueError, match="cannot be pooled"):
        experiment.table()


def test_what_decides_nothing_and_how_a_value_is_spelt_do_not_count(experiment):
    experiment.cell(plw=0.0, learning_rate=0.01)
    experiment.cell(plw=0.1, learning_rate=0.01, spelled={"learning_rate": "1e-2", "packing": "True", "mix": "''"})
    experiment.cell(plw=0.2, learning_rate=0.01, packing=False, save_every=7, lora_rank=4, checkpoint_dir=Path("x"))
    unset = {"spelled": {"seed": "''", "batch_examples": ""}, "tags": {"plw.preset.seed": "1234"}}
    unset["tags"]["plw.preset.batch_examples"] = "16"
    experiment.cell(plw=1.0, learning_rate=0.01, **unset)
    table = experiment.table()
    assert (len(table), set(table["seed"]), table.attrs["notes"]) == (4, {1234}, [])


def test_one_template_may_be_given_by_two_paths(experiment):
    for plw, path, tokens in ((0.0, "a/mine.json", "e1"), (0.1, "/home/mine.json", "e1"), (0.2, "a/mine.json", "e2")):
        experiment.cell(plw=plw, template=path, tags={"plw.examples_sha256": tokens})
    assert len(experiment.table(where="tags.`plw.examples_sha256` = 'e1'")) == 2
    with pytest.raises(ValueError, match="digest of the tokenised examples is e1 in run"):
        experiment.table()


def test_a_newer_cell_of_another_recipe_does_not_hide_the_older_one(experiment):
    older, newer = experiment.cell(), experiment.cell(epochs=5.0)
    with pytest.raises(ValueError, match=r"epochs is (3|5) in run") as error:
        experiment.table()
    assert older in str(error.value)
    assert newer in str(error.value)


def test_models_and_data_sets_may_have_recipes_of_their_own_which_is_noted(experiment):
    experiment.cells(0.0, 1.0)
    experiment.cells(0.0, 1.0, model="org/other", learning_rate=0.0001)
    experiment.cells(0.0, 1.0, dataset="toy-long", epochs=1.0)
    epochs, rate = experiment.table().attrs["notes"]
    assert epochs.startswith("Differences between these may come of the recipe: epochs is ")
    assert "1 for toy (full) on toy-long" in epochs
    assert "0.0001 for org/other (full) on toy-short" in rate


def test_other_code_and_packages_are_noted(experiment):
    for plw, number in ((0.0, "1"), (0.1, "1"), (1.0, "2")):
        tags = {"plw.code_sha256": number, "plw.git_commit": number * 40 + "-dirty", "plw.environment": number}
        experiment.cell(plw=plw, tags=tags, files={"environment.json": {"torch": f"2.{number}", "numpy": "2.0"}})
    code, packages = experiment.table().attrs["notes"]
    assert (
        code
        == "The cells were not all run by the same code. Commits (cells): 2222222222-dirty (1), 1111111111-dirty (2)."
    )
    assert packages == "The cells were run in different environments: torch 2.1 and 2.2."


# ------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("row", "difference"),
    [
        ({"n": 10, "caveat": "only the first 10 of 120 documents"}, "the number of questions of task a is 120 in run"),
        ({"num_fewshot": 5}, "the number of few-shot examples of task a is 0 in run"),
        ({"task_version": "2.0"}, "the version of task a is 1 in run"),
        ({"prompt": "template alpaca"}, "the kind of prompt of task a is harness in run"),
        ({"harness_version": "0.4.14"}, "the version of the harness of task a is 0.4.13 in run"),
        ({"caveat": "0-shot, not 25: no file"}, "the caveat of task a is unset in run"),
        ({"metric": "acc_norm"}, "the metric of task a is acc in run"),
        ({"precision": "bfloat16"}, "the arithmetic of task a is float32 in run"),  # as older tables do not say
        ({"task": "b"}, "the tasks is a in run"),
    ],
)
def test_cells_scored_in_two_ways_are_not_pooled(experiment, row, difference):
    experiment.cells(0.0, 0.1)
    experiment.cell([{"task": "a", "score": 0.5} | row], plw=1.0)
    with pytest.raises(ValueError, match="the scores on toy-short cannot be pooled") as error:
        experiment.table()
    assert difference in str(error.value)


def test_the_way_out_names_the_option_that_made_the_scores_differ(experiment):
    experiment.cells(0.0, 0.1)
    experiment.cell([{"task": "a", "score": 0.5, "n": 10}], plw=1.0, limit=10)
    with pytest.raises(ValueError, match=r"choose by --where \"params\.limit = ''\"") as error:
        experiment.table()
    assert "(analyze --by limit)" in str(error.value)
    with pytest.raises(ValueError, match=r"--where \"params\.epochs = '3\.0' and params\.limit = ''\""):
        experiment.table(where="params.epochs = '3.0'")
    assert len(experiment.table(where="params.limit = ''")) == 2
    assert [*experiment.table(also=("limit",))["limit"]] == ["10.0", "unset", "unset"]  # no value is blank


def test_scores_in_two_kinds_of_arithmetic_may_be_compared(experiment):
    experiment.cells(0.0, 0.1)
    experiment.cell([{"task": "a", "score": 0.4, "precision": "float32"}], plw=0.2, eval_precision="float32")
    assert len(experiment.table()) == 3
    experiment.cell([{"task": "a", "score": 0.5, "precision": "bfloat16"}], plw=1.0, eval_precision="bfloat16")
    with pytest.raises(ValueError, match=r"analyze --by eval_precision"):
        experiment.table()
    table = experiment.table(also=("eval_precision",))
    assert dict(table.groupby("eval_precision")["plw"].count()) == {"auto": 2, "float32": 1, "bfloat16": 1}


def test_data_sets_may_be_scored_on_tasks_of_their_own(experiment):
    experiment.cells(0.0, 1.0)
    experiment.cell([{"task": "b", "score": 0.5}], dataset="toy-long")
    assert set(experiment.table()["task"]) == {"a", "b"}


def test_a_sweeps_own_cells_are_compared_too(experiment):
    sweep = experiment.client.create_run(experiment.id).info.run_id
    experiment.cells(0.0, 0.1, sweep=sweep)
    experiment.cell(plw=1.0, epochs=9.0)  # of no sweep
    assert len(tracking.score_table(sweep=sweep)) == 2
    experiment.cell([{"task": "a", "score": 0.5, "n": 10}], plw=1.0, sweep=sweep)
    with pytest.raises(ValueError, match=f"sweep {sweep}: the scores on toy-short cannot be pooled"):
        tracking.score_table(sweep=sweep)


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("epochs", "--where is no search filter that MLflow takes"),
        ("params.epochs = 3 or 4", "--where is no search filter that MLflow takes"),
        ("params.epochs = '7'", "holds no scored cell that passes --where params.epochs = '7'$"),
        ("params.epohcs = '4.0'", r"'4.0'; no run has a parameter epohcs \(did you mean 'epochs'\?\)$"),
        ("metrics.a > 0 and parameter.`no such` = ''", "; no run has a parameter no such$"),
    ],
)
def test_a_filter_that_finds_nothing_is_said(experiment, where, fault):
    experiment.cell()
    with pytest.raises(ValueError, match=fault):
        experiment.table(where=where)


# ---------------------------------------------------------------------------------------------- data's names


def data_tag(*contents):
    return {"plw.data_sha256": ",".join(content * 64 for content in contents)}


def test_a_file_is_named_without_its_folders_and_the_same_by_any_path(experiment):
    experiment.cell(plw=0.0, dataset="../data/mine.jsonl", tags=data_tag("a"))
    experiment.cell(plw=0.1, dataset="/home/me/data/mine.jsonl", tags=data_tag("a"))
    experiment.cell(plw=0.1, dataset="mine.jsonl", tags=data_tag("a"))  # the same cell again
    assert [*experiment.table()["dataset"]] == ["mine.jsonl"] * 2


def test_two_files_of_one_name_are_told_apart(experiment):
    for folder, content in (("a", "1"), ("b", "2")):
        options = {"dataset": f"{folder}/train.jsonl", "tags": data_tag(content)}
        experiment.cell(plw=0.0, **options, files={"profile.json": {"generation_ratio": int(content)}})
        experiment.cell(plw=1.0, mix="toy-long", **options | {"tags": data_tag(content, "f")})
    experiment.cell(plw=0.0, dataset="c/toy-short", tags=data_tag("3"))
    experiment.cell(plw=0.0, tags=data_tag("4"))
    names = set(experiment.table()["dataset"])
    assert names == {
        "train.jsonl (11111111)",
        "train.jsonl (22222222)",
        "train.jsonl + 0.5 toy-long (11111111+ffffffff)",
        "train.jsonl + 0.5 toy-long (22222222+ffffffff)",
        "c/toy-short",  # which may as well be a hub id
        "toy-short",
    }
    ratios = tracking.generation_ratios(experiment.name)
    assert ratios == {"train.jsonl (11111111)": 1, "train.jsonl (22222222)": 2}


def test_one_path_with_two_contents_is_refused(experiment):
    experiment.cell(plw=0.0, dataset="mine.jsonl", tags=data_tag("a"))
    experiment.cell(plw=0.1, dataset="mine.jsonl", tags=data_tag("b"))
    with pytest.raises(
        ValueError, match=r"data set mine.jsonl had other contents in some runs than in others"
    ) as error:
        experiment.table()
    assert "bbbbbbbb and aaaaaaaa" in str(error.value)
    where = shlex.split(str(error.value).partition("--where ")[2])[0].rstrip(",")
    assert len(experiment.table(where=where)) == 1  # the way out that the message names is one


def test_models_in_folders_are_named_and_told_apart_likewise(experiment):
    for folder, content in (("a/x", "1"), ("b/x", "2")):
        experiment.cell(model=f"{folder}/base", tags={"plw.base_model": content * 64})
    experiment.cell(model="/c/other", tags={"plw.base_model": "3" * 64})
    assert set(experiment.table()["model"]) == {"base (11111111)", "base (22222222)", "other"}


def test_a_value_that_mlflow_run_has_quoted_is_the_same_value(experiment):
    experiment.cell(plw=0.0, seed=1, dataset="my data.jsonl", tags=data_tag("a"))
    quoted = {"dataset": "'my data.jsonl'"}
    experiment.cell(plw=0.0, seed=2, dataset="my data.jsonl", spelled=quoted, tags=data_tag("a"))
    assert [*experiment.table()["dataset"]] == ["my data.jsonl"] * 2


@pytest.mark.parametrize("value", ["plain", "my data.jsonl", "it's", "a 'b' c", "", "a\\b", "ü ü"])
def test_quoting_is_undone(value):
    assert unquoted(shlex.quote(value)) == value
    assert unquoted(value) == value


# ------------------------------------------------------------------------------------------------------ best


class Sweep:
    """A sweep whose cells have registered models."""

    def __init__(self, experiment, name, tasks=("a",), **options):
        self.experiment, self.name, self.options, self.tasks = experiment, name, options, tasks
        self.id = experiment.client.create_run(experiment.id).info.run_id
        self.cells = 0
        self.finished = []

    def add(self, score, *, plw, row=None, **options):
        client = self.experiment.client
        rows = [{"task": task, "score": score} | (row or {}) for task in self.tasks]
        version = len(client.search_model_versions(f"name = '{self.name}'")) + 1
        tags = {"plw.model_version": f"{self.name}/{version}"}
        run = self.experiment.cell(rows, plw=plw, sweep=self.id, tags=tags, **self.options | options)
        if version == 1:
            client.create_registered_model(self.name)
        client.create_model_version(self.name, f"runs:/{run}/model", run)
        self.cells += 1
        self.finished += [run] * (options.get("status", "FINISHED") == "FINISHED")
        return version

    def mark(self, cells=None):
        (line,) = tracking.mark_best(self.id, self.finished, cells or self.cells)
        return line

    def holder(self):
        found = self.experiment.client.get_registered_model(self.name).aliases.get("best")
        return None if found is None else int(found)


def test_the_best_cell_of_a_sweep_gets_the_alias_and_its_version_says_of_what(experiment):
    sweep = Sweep(experiment, "plw-m1")
    sweep.add(0.2, plw=0.0)
    best = sweep.add(0.4, plw=0.1)
    sweep.add(0.3, plw=1.0)
    line = sweep.mark()
    assert sweep.holder() == best
    assert (
        f"models:/plw-m1@best is version {best} now, before no version; it is the best of 3 cells: 0.4 (PLW 0.1" in line
    )
    tags = experiment.client.get_model_version("plw-m1", str(best)).tags
    assert (tags["plw.best_score"], tags["plw.best_sweep"], tags["plw.best_of"]) == ("0.4", sweep.id, "3 cells")
    assert tags["plw.best_beat"].startswith("0.3 (PLW 1, full, seed 1234, run ")
    assert sweep.mark().startswith(f"the alias best of plw-m1 stays with version {best}")


@pytest.mark.parametrize(
    ("cells", "expected", "why"),
    [
        ([{"score": 0.9}], None, "one cell alone is no best one"),
        ([{"score": 0.9}, {"score": 0.8}], 3, "2 of 3 cells are finished and scored"),
        ([{"score": 0.9}, {"score": 0.8, "status": "FAILED"}], None, "1 of 2 cells is finished and scored"),
        ([{"score": 0.9, "row": {"caveat": "only the first 10"}}] * 2, None, "not comparable (a: only the first 10"),
        ([{"score": 0.9}, {"score": 0.8, "row": {"n": 10}}], None, "cannot be pooled"),
        ([{"score": 0.9}, {"score": 0.8, "epochs": 9.0}], None, "cannot be pooled"),
    ],
)
def test_a_sweep_that_is_not_whole_and_comparable_has_no_best_cell(experiment, cells, expected, why):
    name = f"plw-{digest({'name': experiment.name})}"
    sweep = Sweep(experiment, name)
    for number, one in enumerate(cells):
        sweep.add(plw=number / 10, **one)
    line = sweep.mark(expected)
    assert "stays where it is" in line
    assert why in line
    assert sweep.holder() is None


@pytest.mark.parametrize(
    ("score", "row", "moves"), [(0.3, {}, True), (0.2, {}, False), (0.1, {}, False), (0.9, {"n": 60}, False)]
)
def test_a_version_loses_the_alias_only_to_one_that_is_shown_to_be_better(experiment, score, row, moves):
    name = f"plw-{digest({'name': experiment.name})}"
    Sweep(experiment, name).add(0.2, plw=1.0)
    experiment.client.set_registered_model_alias(name, "best", "1")
    sweep = Sweep(experiment, name)
    sweep.add(0.05, plw=0.0, row=row)
    sweep.add(score, plw=0.5, row=row)
    line = sweep.mark()
    assert sweep.holder() == (3 if moves else 1)
    assert ("before version 1: 0.2 (PLW 1" if moves else "stays where it is, with version 1") in line
    if row:
        assert f"set_registered_model_alias('{name}', 'best', '3')" in line


def test_a_version_without_a_comparable_score_loses_the_alias(experiment):
    sweep = Sweep(experiment, "plw-m2")
    sweep.add(0.9, plw=0.7, row={"caveat": "only the first 10"})
    experiment.client.set_registered_model_alias("plw-m2", "best", "1")
    sweep = Sweep(experiment, "plw-m2")
    sweep.add(0.1, plw=0.0)
    sweep.add(0.2, plw=1.0)
    assert "before version 1, which has no comparable score" in sweep.mark()
    assert sweep.holder() == 3


def test_methods_of_one_registered_model_share_one_best_cell(experiment):
    sweep = Sweep(experiment, "plw-m3")
    sweep.add(0.5, plw=0.0, method="lora")
    sweep.add(0.4, plw=0.0, method="full")
    sweep.mark()
    assert sweep.holder() == 1


def test_the_alias_goes_to_the_whole_model_that_the_best_cells_adapter_is_made_into(experiment, monkeypatch):
    sweep = Sweep(experiment, "plw-m4")
    sweep.add(0.2, plw=0.0)
    best = sweep.add(0.4, plw=0.1)
    client = experiment.client
    client.set_model_version_tag("plw-m4", str(best), "plw.form", "adapter")
    refusal = UserError("its base has changed")

    def merge(run_id):
        if refusal is not None:
            raise refusal
        merged = client.create_model_version("plw-m4", f"runs:/{run_id}/merged", run_id).version
        client.set_tag(run_id, "plw.merged_version", f"plw-m4/{merged}")
        return str(merged)

    monkeypatch.setattr(best_module.logged_models, "log_merged", merge)
    assert "stays where it is, as the best cell's adapter cannot be made a whole model (0.4 (PLW 0.1" in sweep.mark()
    assert sweep.holder() is None
    refusal = None
    assert "models:/plw-m4@best is version 3 now" in sweep.mark()
    assert sweep.holder() == 3
    assert client.get_model_version("plw-m4", "3").tags["plw.best_score"] == "0.4"
    assert sweep.mark().startswith("the alias best of plw-m4 stays with version 3")


def test_cells_that_have_logged_no_model_have_no_best_one(experiment):
    sweep = Sweep(experiment, "plw-m5")
    for plw in (0.0, 0.1):
        sweep.finished.append(experiment.cell([{"task": "a", "score": plw}], plw=plw, sweep=sweep.id))
    assert "the alias best stays where it is: run" in sweep.mark(cells=2)
    assert "has registered no model" in sweep.mark(cells=2)
