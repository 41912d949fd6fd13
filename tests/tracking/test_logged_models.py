"""Are models registered under names of their content, and loaded without running what lies among their files?"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from plw_mlflow import tracking
from plw_mlflow.config import DataOptions, TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.sources import Source
from plw_mlflow.tracking import logged_models
from tests.conftest import byte_tokenizer, tiny_llama
from tests.tracking.helpers import add_scores

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize(
    ("options", "files", "expected"),
    [
        ({}, {}, "plw-toy-toy-short"),
        ({"dataset": "toy-long", "mix": "toy-short"}, {}, "plw-toy-toy-long-0.5-toy-short"),
        ({"dataset": "a/train.jsonl"}, {"a/train.jsonl": "1"}, "plw-toy-train-11111111"),
        ({"dataset": "b/train.jsonl"}, {"b/train.jsonl": "2"}, "plw-toy-train-22222222"),
        ({"dataset": "b/指令 集.jsonl"}, {"b/指令 集.jsonl": "2"}, "plw-toy-指令-集-22222222"),
        (
            {"dataset": "!.csv", "mix": "toy-short"},
            {"!.csv": "3", "toy-short": "4"},
            "plw-toy-unnamed-0.5-toy-short-33333333",
        ),
        ({"dataset": "x" * 200 + ".csv"}, {"x" * 200 + ".csv": "3"}, f"plw-toy-{'x' * 64}-33333333"),
        ({"model": "a/b/base", "base": "5" * 64}, {}, "plw-base-55555555-toy-short"),
        ({"model": "org/base@v1", "base": "org/base@" + "6" * 40}, {}, "plw-base-66666666-toy-short"),
        ({"model": "llama-7b", "base": "huggyllama/llama-7b@4782"}, {}, "plw-llama-7b-toy-short"),
    ],
)
def test_registered_models_are_named_by_content(store, monkeypatch, options, files, expected):
    """By the names alone, two files of one name would share one registered model and its alias `best`."""
    monkeypatch.setattr(logged_models, "_log_files", lambda *_: ("m-1", "0" * 64))
    monkeypatch.setattr(logged_models.cards, "write", lambda *_: None)
    monkeypatch.setattr(mlflow, "register_model", lambda *_, **__: SimpleNamespace(version=1))
    config = TrainConfig(**{name: value for name, value in options.items() if name != "base"})
    run = tracking.Run(store.create_run("0").info.run_id)
    run.tag(base_model=options.get("base", "f" * 64))
    sources = [Source(name, name, sha * 64, "", "", False, iter) for name, sha in files.items()]
    tracking.log_model(run, None, None, config, sources)
    assert store.get_run(run.id).data.tags["plw.model_version"] == f"{expected}/1"


def test_a_name_in_any_script_can_be_registered(store):
    name = "plw-toy-指令-集-22222222"
    store.create_registered_model(name)
    version = store.create_model_version(name, "runs:/0/model").version
    store.set_registered_model_alias(name, "best", version)
    assert store.get_model_version_by_alias(name, "best").name == name
    assert [one.version for one in store.search_model_versions(f"name = '{name}'")] == [version]


def test_a_registered_model_comes_back_by_version_and_alias(store):
    model, tokens = tiny_llama(), torch.arange(6).unsqueeze(0)
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        prepared = prepare.run("toy-short", byte_tokenizer(), DataOptions(max_records=20))
        tracking.log_data(run, prepared)
        for step, loss in ((0, 14.8), (1, 9.0), (2, 5.4)):
            run.curves.log_step({"train/loss": loss, "eval/prompt_loss": loss}, step)
        run.curves.flush()
        tracking.log_model(run, model, byte_tokenizer(), config, prepared.sources, step=2)
        run.tag(cell="c", precision="bfloat16")
        add_scores(run, ("a", 0.25))
    check_page_of_logged_model(store, run.id)
    store.set_registered_model_alias("plw-tiny-toy-short", "best", "1")
    for uri in ("models:/plw-tiny-toy-short/1", "models:/plw-tiny-toy-short@best", f"models:/{run.model_id}"):
        assert tracking.trained_in(uri) == "bfloat16"
        loaded, tokenizer = tracking.load_registered(uri)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
    served = mlflow.pyfunc.load_model("models:/plw-tiny-toy-short@best")
    assert {"max_new_tokens", "do_sample", "temperature", "top_p"} == {
        spec.name for spec in served.metadata.signature.params.params
    }
    short, long = (served.predict(["Who?"], params={"max_new_tokens": n})[0] for n in (2, 9))
    assert len(short) < len(long)
    assert served.predict(served.input_example, params={"max_new_tokens": 2})  # as the card says
    for unknown in ("models:/plw-tiny-toy-short/7", "models:/plw-tiny-toy-short"):
        assert tracking.trained_in(unknown) is None
        with pytest.raises(ValueError, match=rf"model {unknown} cannot be loaded: .*not found"):
            tracking.load_registered(unknown)


def check_page_of_logged_model(store, run_id):
    """The losses are the last ones, and each score is of its benchmark."""
    (output,) = store.get_run(run_id).outputs.model_outputs
    metrics = store.get_logged_model(output.model_id).metrics
    assert {metric.key: (metric.step, metric.value) for metric in metrics} == {
        "train/loss": (2, 5.4),
        "eval/prompt_loss": (2, 5.4),
        "a/acc": (0, 0.25),
        "a/acc_stderr": (0, 0.1),
        "score": (0, 0.25),
    }
    assert {metric.key: metric.dataset_name for metric in metrics if metric.dataset_name} == {
        "a/acc": "a",
        "a/acc_stderr": "a",
    }
    inputs = store.get_run(run_id).inputs.dataset_inputs
    contexts = {one.dataset.name: {tag.key: tag.value for tag in one.tags} for one in inputs}
    assert contexts["toy-short"]["mlflow.data.context"] == "training"
    assert contexts["a"] == {"mlflow.data.context": "evaluation", "version": "1.0"}


@pytest.fixture
def registered(store):
    """The folder in the store of a model that is registered as plw-tiny-toy-short, version 1, and its run."""
    config = TrainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), config)
    return Path(store.get_logged_model(run.model_id).artifact_location.removeprefix("file://")), run


def _edit_mlmodel(**changes):
    """Damage to what MLflow says of a logged model's flavour transformers."""

    def damage(folder):
        told = yaml.safe_load((folder / "MLmodel").read_text())
        told["flavors"]["transformers"] |= changes
        (folder / "MLmodel").write_text(yaml.safe_dump(told))

    return damage


def _of_another_flavour(folder):
    told = yaml.safe_load((folder / "MLmodel").read_text())
    del told["flavors"]["transformers"]
    (folder / "MLmodel").write_text(yaml.safe_dump(told))


def _with_code(folder):
    file = folder / "model/config.json"
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "model/mine.py").write_text(f"open({str(folder / 'was run')!r}, 'w')\n")


def _with_a_number_that_is_none(folder):
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


STRANGE = [
    (_of_another_flavour, "is of the flavour python_function; models of the flavour transformers are loaded"),
    (_edit_mlmodel(task="summarization"), "is for the task summarization"),
    (_edit_mlmodel(model_binary="../../elsewhere"), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=[]), "lacks its own weights or its tokenizer"),
    (_edit_mlmodel(components=3), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("[1"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").write_text("3"), "its MLmodel is damaged"),
    (lambda folder: (folder / "MLmodel").unlink(), "its MLmodel is damaged"),
    (lambda folder: shutil.rmtree(folder / "components"), "lacks the folder components/tokenizer"),
    (_with_code, "'models:/.*/model' cannot be loaded: it needs program code of its own, which is not run"),
    (_with_a_number_that_is_none, "model 'models:/.*/model' is damaged: 1 numbers of lm_head.weight"),
]


def test_a_strangers_logged_model_is_refused_in_one_line(registered, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, run = registered
    shutil.copytree(folder, tmp_path / "kept")
    for damage, expected in STRANGE:  # one after another, as it takes a second to log a model
        damage(folder)
        for load in (
            lambda: tracking.load_registered("models:/plw-tiny-toy-short/1"),
            lambda: tracking.load_model(run),
        ):
            with pytest.raises(ValueError, match=expected) as raised:
                load()
            assert "models:/" in str(raised.value)
            assert "\n" not in str(raised.value)
        assert not (folder / "was run").exists()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_logged_model_is_read_and_not_written(is_here, registered, monkeypatch, tmp_path):
    """From a store on this machine in its place, from another by a copy that is then removed."""
    folder, run = registered
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if not is_here:
        monkeypatch.setattr("plw_mlflow.tracking.logged_models.LocalArtifactRepository", type(None))
    model, tokenizer = tracking.load_model(run)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(scratch.iterdir()) == []
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokens = torch.arange(6).unsqueeze(0)
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids
