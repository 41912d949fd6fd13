"""Are the data sets of a run its inputs, with their profile and template?"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from mlflow.store.tracking.dbmodels.models import SqlDataset

from plw_mlflow import tracking
from plw_mlflow.config import DataOptions, PrepareConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.weights import Weights
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


@pytest.mark.parametrize("scope", ["step", "example"])
@pytest.mark.parametrize("plw", [0.0, 0.01, 0.242, 1.0])
def test_the_share_that_a_cell_logs_is_that_of_a_count_by_hand(store, tmp_path, plw, scope):
    """A token is a byte here. An example's first one is never predicted, and each completion has an end of text."""
    records = [
        {"instruction": f"Say {number} times.", "input": "b" * (number % 3), "output": "c" * (number % 7 + 1)}
        for number in range(40)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepared = prepare.run(str(tmp_path / "mine.jsonl"), byte_tokenizer(), DataOptions(validation_share=0.3))
    with tracking.open_run(PrepareConfig(), "prepare") as run:
        share = prepared.prompt_share(Weights(plw, loss_divisor="weights", divisor_scope=scope))
        tracking.log_prompt_weight(run, plw, share)
    trained = [records[int(prepared.training.id(n).rpartition(":")[2]) - 1] for n in range(len(prepared.training))]
    assert 0 < len(trained) < 40  # the others are for validation
    prompts = [(ALPACA_WITH_INPUT if one["input"] else ALPACA_WITHOUT_INPUT).format(**one) for one in trained]
    of_prompts = [plw * (len(prompt) - 1) for prompt in prompts]
    of_completions = [len(one["output"]) + 1 for one in trained]
    if scope == "step":
        expected = sum(of_prompts) / (sum(of_prompts) + sum(of_completions))
    else:
        expected = np.mean([a / (a + b) for a, b in zip(of_prompts, of_completions, strict=True)])
    logged = store.get_run(run.id).data.metrics["prompt_share"]
    assert logged == pytest.approx(expected, rel=1e-12)
