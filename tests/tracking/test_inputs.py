"""Are the data sets of a run its inputs, with their profile and template?"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from mlflow.store.tracking.dbmodels.models import SqlDataset

from plw_mlflow import cell, tracking
from plw_mlflow.config import DataOptions, PrepareConfig, TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.errors import UserError
from plw_mlflow.study import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from plw_mlflow.tracking import inputs
from tests.conftest import byte_tokenizer

pytestmark = pytest.mark.usefixtures("store")


def test_every_data_set_is_an_input_and_the_profile_a_table_and_a_figure(store, tmp_path):
    rows = [{"instruction": f"Add {number}.", "output": str(number)} for number in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(mix=str(tmp_path / "sums.jsonl"))
    prepared = prepare.run("toy-short", byte_tokenizer(), options)
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        tracking.log_data(run, prepared)
    found = store.get_run(run.id)
    inputs = {one.dataset.name: one.dataset.digest for one in found.inputs.dataset_inputs}
    assert inputs == {
        name: source.sha256[:36]
        for name, source in zip(("toy-short + 0.5 sums", "sums"), prepared.sources, strict=True)
    }
    assert found.data.tags["plw.data_sha256"] == ",".join(source.sha256 for source in prepared.sources)
    profile = store.download_artifacts(run.id, "profile.json", str(tmp_path))
    assert json.loads(Path(profile).read_text()) == dataclasses.asdict(prepared.profile)
    assert Path(store.download_artifacts(run.id, "profile.png", str(tmp_path))).read_bytes().startswith(b"\x89PNG")


def test_runs_that_log_a_new_data_set_at_the_same_moment_all_have_it(store, tmp_path):
    prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(max_records=5))
    other = store.create_run("0")
    dataset = inputs.MetaDataset(
        inputs.CodeDatasetSource({}), name=prepared.profile.name, digest=prepared.sources[0].sha256[:36]
    )

    @sqlalchemy.event.listens_for(SqlDataset, "before_insert", once=True)
    def log_in_the_other_run_first(*_):
        store.log_inputs(other.info.run_id, [inputs.DatasetInput(dataset._to_mlflow_entity())])

    with tracking.open_run(PrepareConfig(), "prepare") as run:
        tracking.log_data(run, prepared)
    names = [
        [one.dataset.name for one in store.get_run(run_id).inputs.dataset_inputs]
        for run_id in (other.info.run_id, run.id)
    ]
    assert names == [["toy-short"], ["toy-short"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [("mine.jinja", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), ("alpaca", "not this file")],
)
def test_a_template_that_is_a_file_is_kept_with_the_run(store, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(template=name, max_records=5))
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        tracking.log_data(run, prepared)
    kept = [item.path for item in store.list_artifacts(run.id, "template")]
    assert kept == ([f"template/{name}"] if name.endswith(".jinja") else [])
    for path in kept:
        assert Path(store.download_artifacts(run.id, path, str(tmp_path))).read_text() == content


def share_by_hand(divisor, scope, plw, prompts, completions):
    """As docs/plw.md has it. prompts, completions: of each example, the tokens that are predicted."""
    if divisor == "share":
        return plw
    if divisor == "segments":
        return plw / (1 + plw)
    of_prompts, of_completions = plw * prompts, completions
    if scope == "example":
        by = prompts + completions if divisor == "tokens" else of_prompts + of_completions
        of_prompts, of_completions = of_prompts / by, of_completions / by
    return of_prompts.sum() / (of_prompts.sum() + of_completions.sum())


@pytest.mark.parametrize("plw", [0.0, 0.01, 0.242, 1.0])
@pytest.mark.parametrize("scope", ["step", "micro-batch", "example"])
@pytest.mark.parametrize("divisor", ["weights", "tokens", "segments", "share"])
def test_the_share_that_a_cell_logs_is_that_of_a_count_by_hand(store, tmp_path, monkeypatch, divisor, scope, plw):
    """A token is a byte here. An example's first one is never predicted, and each completion has an end of text.

    The cell goes as far as its training, and ends there.
    """
    records = [
        {"instruction": f"Say {number} times.", "input": "b" * (number % 3), "output": "c" * (number % 7 * 30 + 1)}
        for number in range(40)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = []

    def end(config, prepared, tokenizer):
        given.append(prepared.training)
        raise UserError("the training begins")

    monkeypatch.setattr(cell, "_load_model", end)
    monkeypatch.setattr(tracking, "log_data", lambda run, prepared: None)  # which draws a figure
    config = TrainConfig(
        plw=plw,
        loss_divisor=divisor,
        divisor_scope=scope,
        dataset=str(tmp_path / "mine.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        validation_share=0.3,
        cache_dir=tmp_path / "cache",
    )
    with pytest.raises(UserError, match="the training begins"), tracking.open_run(config, "cell") as run:
        cell.lead(config, run)
    (training,) = given
    trained = [records[int(training.id(n).rpartition(":")[2]) - 1] for n in range(len(training))]
    assert 0 < len(trained) < 40  # the others are for validation
    texts = [(ALPACA_WITH_INPUT if one["input"] else ALPACA_WITHOUT_INPUT).format(**one) for one in trained]
    prompts = np.array([len(text) - 1 for text in texts])
    completions = np.array([len(one["output"]) + 1 for one in trained])
    expected = share_by_hand(divisor, scope, plw, prompts, completions)
    logged = store.get_run(run.id).data.metrics["prompt_share"]
    assert logged == pytest.approx(expected, rel=1e-12)
