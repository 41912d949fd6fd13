"""Is every question's score kept, and do questions add up to the scores?"""

import io
import math

import pandas as pd
import pytest
from lm_eval.api.model import LM

from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation import evaluate, questions, samples, scores
from plw_mlflow.evaluation.scores import Evaluation
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.toy import benchmarks
from tests import stubs

CELL = {"model": "toy", "dataset": "toy-short", "plw": 0.1, "seed": 7}


class Verbose(LM):
    """Prefers the longest answer."""

    def loglikelihood(self, requests):
        return [(float(len(request.args[1])), False) for request in requests]

    def generate_until(self, requests):
        raise AssertionError("no task here asks for this")

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no task here asks for this")


def read(content):
    return pd.read_parquet(io.BytesIO(content))


def test_all_questions_of_all_metrics_add_up_to_the_scores(shared):
    options = ScoreOptions(tasks="huerta2024-v1", data_dir=shared / "data/eval", limit=5)
    with pytest.warns(UserWarning, match="0-shot"):
        tasks = load_tasks(options)
    stub = stubs.Known(options.data_dir, stubs.guessing(1))
    evaluation = evaluate.score(stub, tasks, options, seed=1)
    found = read(questions.parquet(questions.table(evaluation, scores.table(evaluation, CELL))))
    assert dict(found[list(CELL)].iloc[0]) == CELL
    by_metric = found.groupby(["task", "metric"])["value"]
    assert {(score.task, score.metric) for score in evaluation.scores} == set(by_metric.groups)
    for score in evaluation.scores:
        if score.metric != "bleu":
            assert by_metric.mean()[score.task, score.metric] == pytest.approx(score.score), score
    assert set(found.groupby(["task", "metric"])["doc_id"].agg(tuple)) == {(0, 1, 2, 3, 4)}
    of_piqa = found[(found["task"] == "piqa") & (found["metric"] == "acc")]
    assert of_piqa["document"].nunique() == 5
    assert of_piqa["log_likelihoods"].map(len).eq(2).all()


def test_more_questions_are_kept_than_samples(monkeypatch):
    monkeypatch.setattr(samples, "MAX_DOCUMENTS", 20)
    options = ScoreOptions(tasks="toy_choice")
    tasks = load_tasks(options)
    evaluation = evaluate.score(Verbose(), tasks, options, seed=1)
    assert (len(evaluation.samples), len(evaluation.questions)) == (20, 120)
    asked = benchmarks.documents("toy_choice")
    by_length = [max(document["choices"], key=len) for document in asked]
    assert [row["prediction"] for row in evaluation.questions] == by_length
    assert [row["value"] for row in evaluation.questions] == [
        float(answer == document["answer"]) for answer, document in zip(by_length, asked, strict=True)
    ]


def test_bleu_has_a_value_for_each_sentence_and_a_metric_of_a_corpus_alone_has_none():
    assert questions.value("bleu", ("the cat sat on the mat", "the cat sat on the mat")) == pytest.approx(1)
    assert questions.value("ter", ("the cat", "a cat")) is None
    assert questions.value("rouge1_max", 25.0) == 0.25


def test_rows_of_other_tasks_can_be_added():
    first = questions.row("held_out", "bleu", 0, {"a": 1}, None, prompt="harness", prediction="yes")
    second = questions.row("held_out", "exact_match", 0, {"a": 1}, 1.0, prompt="harness", log_likelihoods=[-0.5])
    evaluation = Evaluation([], {}, questions=[first])
    evaluation.questions.append(second)
    found = read(questions.parquet(questions.table(evaluation, [CELL])))
    assert math.isnan(found["value"][0])
    assert found["value"][1] == 1
    assert list(found["document"]) == [second["document"]] * 2
    assert questions.row("held_out", "bleu", 0, {"a": 2}, None, prompt="")["document"] != second["document"]
