"""Does a logged adapter come back as the model that was trained, wherever the store is, and only on its own base?"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch

from plw_mlflow import tracking
from plw_mlflow.config import RecipeOptions, TrainConfig
from plw_mlflow.models import adapters, location, pretrained, saved_adapters
from plw_mlflow.tracking import logged_models
from tests.conftest import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.usefixtures("store")
TOKENS = torch.arange(2, 40).unsqueeze(0)
NAME = "plw-base"

# What users of MLflow do, in a process that knows nothing of this package.
LOAD = """
import json, sys, mlflow, torch
tokens = torch.arange(2, 40).unsqueeze(0)
parts = mlflow.transformers.load_model(sys.argv[1], return_type="components")
model = mlflow.pyfunc.load_model(sys.argv[1])
with torch.no_grad():
    logits = [one.eval()(tokens).logits.tolist() for one in (parts["model"], model.unwrap_python_model().model)]
texts = model.predict(["Who?"]) + [model.predict(["Who?"], params={"max_new_tokens": 2})[0]]
print(json.dumps({"logits": logits, "ids": parts["tokenizer"]("Who?").input_ids, "texts": texts}))
"""


def trained(base, method="lora", **recipe):
    """A model with adapters that do something, on the base of a folder."""
    model = adapters.adapt(pretrained.load(str(base)), method, RecipeOptions(lora_rank=2, **recipe), 1).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def logged(store, tmp_path):
    """The run of an adapter on a base's folder that it has logged, its base, and the trained model's logits."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model = trained(base)
    expected = model(TOKENS).logits.detach()
    config = TrainConfig(model=str(base), method="lora")
    adapter = tmp_path / "adapter"
    adapters.save(model, adapter)
    merged = adapters.merge(model, adapter)
    saved_adapters.note_base(adapter, str(base), location.digest(str(base)))
    merged.generation_config.eos_token_id = [1, 7]
    with tracking.open_run(config, "cell") as run:
        run.tag(base_model=location.digest(str(base)), save_precision="float32")
        tracking.log_adapter(run, adapter, merged, byte_tokenizer(), config, step=3)
    return run, base, expected


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_comes_back_after_its_store_was_moved(logged, store, tmp_path):
    """By MLflow in a new process, and by this package; by the whole model's methods, too."""
    run, _, expected = logged
    (output,) = store.get_run(run.id).outputs.model_outputs
    before = Path(store.get_logged_model(output.model_id).artifact_location.removeprefix("file://"))
    assert sum(file.stat().st_size for file in before.rglob("*.safetensors")) < 40_000  # the base has 60,000
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("mlflow.db", "mlruns"):
        shutil.move(tmp_path / name, moved / name)
    with sqlite3.connect(moved / "mlflow.db") as database:  # the store's own addresses, as whoever moves it has to
        for table, column in (("logged_models", "artifact_location"), ("model_versions", "storage_location")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(tmp_path), str(moved)))
    mlflow.set_tracking_uri(f"sqlite:///{moved}/mlflow.db")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, f"models:/{output.model_id}"],
        env=os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PYTHONPATH": ""},
        cwd=moved,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for logits in found["logits"]:
        close(logits, expected)
    assert found["ids"] == byte_tokenizer()("Who?").input_ids
    assert all(text.startswith("Who?") for text in found["texts"])
    assert len(found["texts"][1]) <= len("Who?") + 2 < len(found["texts"][0])  # a token is a byte

    model, tokenizer = tracking.load_model(tracking.Run(run.id))
    close(model(TOKENS).logits, expected)
    assert model.generation_config.eos_token_id == [1, 7]
    assert tokenizer("Who?").input_ids == byte_tokenizer()("Who?").input_ids


def test_its_version_says_what_it_is_and_its_files_what_they_need(logged, store):
    run, base, _ = logged
    name, version = store.get_run(run.id).data.tags["plw.model_version"].split("/")
    tags = store.get_model_version(name, version).tags
    assert (tags["plw.form"], tags["plw.base"]) == ("adapter", str(base))
    assert tags["plw.base_digest"] == location.digest(str(base))
    assert tags["plw.method"] == "lora"
    model = mlflow.models.Model.load(f"models:/{name}/{version}")
    assert model.signature.inputs.input_types() == [mlflow.types.DataType.string]
    assert "max_new_tokens" in [spec.name for spec in model.signature.params.params]
    assert tags["plw.sha256"] == store.get_run(run.id).data.tags["plw.model_sha256"]
    folder = Path(store.get_logged_model(run.model_id).artifact_location.removeprefix("file://"))
    (folder / "registered_model_meta").touch()  # as MLflow does where a model is loaded by its name
    assert tags["plw.sha256"] == logged_models.files_digest(folder)
    packages = {line.split("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert packages == {"mlflow", "torch", "transformers", "peft"}
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".bin", ".pt")]


def test_a_base_that_has_changed_is_refused_before_its_weights_are_loaded(logged, store, monkeypatch, tmp_path):
    run, base, expected = logged
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere)
    model = pretrained.load(str(base))
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(base)
    uri = f"models:/{run.model_id}"
    with monkeypatch.context() as patched:
        patched.setattr(pretrained, "load", lambda *_, **__: pytest.fail("the weights were loaded"))
        for given in (None, str(base)):
            with pytest.raises(
                ValueError, match=r"was trained on \w{64}, but its base .*/base is \w{64}; name the"
            ) as bad:
                tracking.load_model(run, given)
            assert "\n" not in str(bad.value)
            assert uri in str(bad.value)
    with pytest.raises(ValueError, match=r"was trained on \w{64}, but its base .*/base is \w{64}"):
        mlflow.pyfunc.load_model(uri)

    # The right one may lie elsewhere.
    close(tracking.load_model(run, str(elsewhere))[0](TOKENS).logits, expected)
    close(
        mlflow.pyfunc.load_model(uri, model_config={"base": str(elsewhere)}).unwrap_python_model().model(TOKENS).logits,
        expected,
    )
    parts = mlflow.transformers.load_model(uri, return_type="components", base_model_path=str(elsewhere))
    close(parts["model"].eval()(TOKENS).logits, expected)
    shutil.rmtree(base)
    with pytest.raises(
        ValueError, match=r"base that cannot be found: .* is not a folder on this machine; say by --base"
    ):
        tracking.load_model(run)


def test_a_base_of_the_hub_is_loaded_by_its_commit(store, tmp_path, monkeypatch):
    """From the hub's cache, in which a newer commit lies, too."""
    commits = {"a" * 40: tiny_llama(), "b" * 40: tiny_llama(intermediate_size=40)}
    cache = tmp_path / "hub"
    for commit, model in commits.items():
        folder = cache / "models--org--base/snapshots" / commit
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    (cache / "models--org--base/refs").mkdir()
    (cache / "models--org--base/refs/main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    base = f"org/base@{'a' * 40}"
    assert location.digest(base) == base
    model = trained(base)
    expected = model(TOKENS).logits.detach()
    adapter = tmp_path / "adapter"
    adapters.save(model, adapter)
    merged = adapters.merge(model, adapter)
    saved_adapters.note_base(adapter, base, location.digest(base))
    config = TrainConfig(model=base, method="lora")
    with tracking.open_run(config, "cell") as run:
        run.tag(base_model=base)
        tracking.log_adapter(run, adapter, merged, byte_tokenizer(), config)
    close(tracking.load_model(run)[0](TOKENS).logits, expected)
    parts = mlflow.transformers.load_model(f"models:/{run.model_id}", return_type="components")
    close(parts["model"].eval()(TOKENS).logits, expected)
    close(mlflow.pyfunc.load_model(f"models:/{run.model_id}").unwrap_python_model().model(TOKENS).logits, expected)


def test_the_best_cells_adapter_becomes_a_whole_model(logged, store):
    run, _, expected = logged
    version = logged_models.log_merged(run.id)
    name, first = store.get_run(run.id).data.tags["plw.model_version"].split("/")
    assert (first, version, logged_models.log_merged(run.id)) == ("1", "2", "2")
    tags = store.get_model_version(name, "2").tags
    assert (tags["plw.form"], tags["plw.merged_from"], tags["plw.method"]) == ("whole model", "1", "lora")
    for number, form in (("1", "adapter, which needs its base"), ("2", "whole model in float32")):
        assert f"- form: {form}\n" in store.get_model_version(name, number).description
    loaded, _ = tracking.load_registered(f"models:/{name}/2")
    close(loaded(TOKENS).logits, expected)
    assert loaded.generation_config.eos_token_id == [1, 7]
    with pytest.raises(ValueError, match=r"base is an option for adapters, but models:/.*/2 is a whole model"):
        tracking.load_registered(f"models:/{name}/2", "toy")
    assert tracking.load_model(tracking.Run(run.id))  # still the adapter, which was scored
    assert [output.step for output in store.get_run(run.id).outputs.model_outputs] == [3, 3]


def test_a_pickle_in_place_of_an_adapters_weights_is_not_read(logged, store):
    run, _, _ = logged
    folder = Path(store.get_logged_model(run.model_id).artifact_location.removeprefix("file://")) / "peft"
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"model models:/.* lacks the file peft/adapter_model.safetensors"):
        tracking.load_model(run)


def test_a_run_that_was_told_to_log_no_model_says_so(store):
    with tracking.open_run(TrainConfig(log_model="none"), "cell") as run:
        pass
    with pytest.raises(ValueError, match=r"has logged no model, as it was told to \(--log-model none\)"):
        tracking.load_model(run)
