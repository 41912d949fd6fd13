"""Is what cannot be trained refused before the weights are loaded? Does only the first process open a run?"""

import json

import mlflow
import pytest

from plw_mlflow import cell, tracking
from plw_mlflow.config import EvaluateConfig, TrainConfig
from plw_mlflow.errors import UserError
from plw_mlflow.models import pretrained
from tests.conftest import byte_tokenizer, tiny_llama

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40}
LONG |= {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model's config and tokenizer, but without its weights."""
    tiny_llama(rope_parameters=LONG, max_position_embeddings=160).config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("the weights were asked for"))
    return tmp_path


def train(folder, answer="yes", **options):
    records = [{"instruction": "Say.", "output": answer}] * 2 + [{"instruction": "Say it.", "output": "yes"}] * 8
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = TrainConfig(
        model=str(folder / "model"),
        dataset=str(folder / "data.jsonl"),
        template="none",
        cache_dir=folder / "cache",
        **{"max_tokens": 160, **options},
    )
    cell.assist(config)


def test_examples_that_would_change_others_are_refused(folder):
    with pytest.raises(ValueError, match=r"an example has 66 tokens, but beyond 40 tokens .* --max-tokens to 40 or"):
        train(folder, answer="a" * 60)


def test_max_tokens_beyond_the_limit_does_no_harm_where_no_example_is_so_long(folder):
    with pytest.raises(pytest.fail.Exception, match="the weights were asked for"):
        train(folder)


def test_more_tokens_than_positions_are_refused(folder):
    with pytest.raises(ValueError, match=r"max-tokens is 161, but .*model has 160 positions"):
        train(folder, max_tokens=161)


def test_a_base_in_fewer_bits_is_refused_by_method_full(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"is stored in fewer bits \(gptq\), which method full cannot train"):
        train(folder, method="full")
    with pytest.raises(pytest.fail.Exception, match="the weights were asked for"):
        train(folder, method="lora")


def test_processes_other_than_the_first_take_part_in_the_training_and_open_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "open_run", lambda *_: pytest.fail("a run was opened"))
    trainings = []
    monkeypatch.setattr(cell.train, "run", lambda *arguments, **callbacks: trainings.append((arguments, callbacks)))
    config = TrainConfig(max_records=20, cache_dir=tmp_path / "cache", output=tmp_path / "output")
    cell.run(config)
    (((given, prepared, *_), callbacks),) = trainings
    assert given is config
    assert len(prepared.training) + len(prepared.validation) == 20
    assert callbacks == {}  # nothing is logged, and no checkpoint copied
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_run_that_is_no_cells_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        pass
    monkeypatch.setattr(cell.tracking, "load_model", lambda run: pytest.fail("the model is loaded"))
    with pytest.raises(UserError, match="is not the run of a cell"):
        cell.score_model(EvaluateConfig(run_id=run.info.run_id, checkpoint_dir=tmp_path))
