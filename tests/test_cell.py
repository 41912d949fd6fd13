"""Is what cannot be trained refused before the weights are loaded? Does only the first process open a run?

Is a trained model scored with the very weights that are kept of it?
"""

import json
from types import SimpleNamespace

import mlflow
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from plw_mlflow import cell, sweep, tracking
from plw_mlflow.config import EvaluateConfig, MainConfig, SweepConfig, TrainConfig
from plw_mlflow.errors import UserError
from plw_mlflow.models import adapters, held, location, pretrained
from tests.conftest import byte_tokenizer, tiny_llama
from tests.stores import make_store

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


@pytest.mark.parametrize(("run", "config"), [(cell.run, TrainConfig), (sweep.run, SweepConfig)])
def test_layers_that_cannot_be_computed_again_are_refused_before_a_run_is_opened(run, config, tmp_path, monkeypatch):
    AutoConfig.for_model("openai-gpt").save_pretrained(tmp_path)
    for name in ("open_run", "open_sweep"):
        monkeypatch.setattr(tracking, name, lambda *_: pytest.fail("a run was opened"))
    monkeypatch.setattr(tracking, "finished_before", dict)
    with pytest.raises(UserError, match=r"activation-checkpointing is not to be had with a model of type openai-gpt"):
        run(config(model=str(tmp_path), activation_checkpointing=True))


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


@pytest.mark.parametrize(
    ("tag", "options", "expected"),
    [
        ("bfloat16", {}, "bfloat16"),  # of the cell, whatever this device is fast at
        ("float32", {}, "float32"),
        (None, {}, "float32"),  # a run of an older version
        ("bfloat16", {"eval_precision": "float32"}, "float32"),
    ],
)
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_cell_is_scored_in_the_arithmetic_of_its_training(tag, options, expected, is_fast, monkeypatch):
    monkeypatch.setattr(cell.precision, "has_fast_bfloat16", lambda: is_fast)
    run = SimpleNamespace(read_tag={"precision": tag}.get)
    assert cell._arithmetic(EvaluateConfig(run_id="r", **options), run) == expected
    trained_in = {"precision": tag} if tag else {}
    assert cell._arithmetic_of_cell(MainConfig(model="owner/model", **trained_in, **options)) == (
        expected if tag else "bfloat16" if is_fast else "float32"
    )


def test_other_models_are_scored_in_what_is_fast_here(monkeypatch):
    monkeypatch.setattr(cell.precision, "has_fast_bfloat16", lambda: True)
    assert cell._arithmetic(EvaluateConfig(model="owner/model"), None) == "bfloat16"
    assert cell._arithmetic(EvaluateConfig(model="toy"), None) == "float32"
    monkeypatch.setattr(cell.tracking, "trained_in", lambda model: "float32")
    assert cell._arithmetic(EvaluateConfig(model="models:/name/1"), None) == "float32"


def test_a_gpu_without_bfloat16_scores_a_cell_in_float32_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    run = SimpleNamespace(read_tag=lambda name: "bfloat16")
    with pytest.warns(UserWarning, match=r"Old GPU.* was trained in bfloat16, and is scored in float32 here"):
        assert cell._arithmetic(EvaluateConfig(run_id="r"), run) == "float32"
    mlflow.set_tracking_uri(make_store(tmp_path))
    monkeypatch.setattr(cell, "_prepare", lambda config: pytest.fail("the data are read"))
    with pytest.raises(UserError, match="bfloat16 is not to be had on this GPU"):
        cell.run(MainConfig(eval_precision="bfloat16", precision="float32", checkpoint_dir=tmp_path))


@pytest.fixture
def trained(tmp_path):
    """A cell of a model that is trained in bfloat16: what it keeps in the end, for options of saving."""

    def keep(again=(), **options):
        """again: steps that further processes go on from, each after the one before was killed."""
        adapter = tmp_path / "adapter"
        tiny_llama().save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
        options = {"eval_precision": "float32"} | options
        torch.manual_seed(5)
        config = MainConfig(model=base, precision="bfloat16", output=tmp_path / "output", **options)
        model = adapters.adapt(pretrained.load(base), config.method, config, 1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        tokenizer = byte_tokenizer()
        prepared = SimpleNamespace(training=[], sources=[])
        with tracking.open_run(config, "cell") as run:
            run.tag(base_model=location.digest(base))
            adapter.mkdir(exist_ok=True)
            merged = cell._merge(config, model, adapter, tokenizer, prepared, location.digest(base), False)
            before = {name: weight.clone() for name, weight in merged.state_dict().items()}
            for resumed_from in (0, *again):
                now = SimpleNamespace(steps=1, resumed_from=resumed_from)
                cell._keep(config, run, merged, adapter, tokenizer, prepared, now)
        return run, before, merged

    mlflow.set_tracking_uri(make_store(tmp_path))
    return keep


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"method": "full"}, torch.bfloat16),
        ({"method": "full", "save_precision": "float32"}, torch.float32),
        ({"method": "lora", "log_model": "merged"}, torch.bfloat16),
    ],
)
def test_a_whole_model_is_scored_as_it_is_logged_and_exported(options, kind, trained, tmp_path):
    run, before, kept = trained(**options)
    loaded, _ = tracking.load_model(run)
    exported = weights_of(tmp_path / "output/model")
    config = json.loads((tmp_path / "output/model/config.json").read_text())
    assert config["dtype"] == str(kind).removeprefix("torch.")
    assert mlflow.get_run(run.id).data.tags["plw.save_precision"] == config["dtype"]
    for name, weight in before.items():
        assert exported[name].dtype == kind
        for found in (exported[name], loaded.state_dict()[name], kept.state_dict()[name]):
            assert torch.equal(found.float(), weight.to(kind).float())  # rounded once
    assert {weight.dtype for weight in kept.parameters()} == {torch.float32}
    # What is computed and in no file is not rounded.
    assert torch.equal(kept.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)


def test_a_model_is_logged_again_only_where_a_process_has_trained(trained):
    run, *_ = trained(method="full", again=(1,))
    assert len(run.client.get_run(run.id).outputs.model_outputs) == 1
    assert run.model_id is not None
    run, *_ = trained(method="full", again=(1, 0))
    assert len(run.client.get_run(run.id).outputs.model_outputs) == 2


@pytest.mark.parametrize("save_precision", ["auto", "bfloat16"])
def test_an_adapter_is_scored_as_it_is_logged(save_precision, trained, tmp_path):
    """In float32, unless it is told to be rounded; the exported whole model is rounded as others are."""
    run, before, kept = trained(method="lora", save_precision=save_precision)
    loaded, _ = tracking.load_model(run)
    for name, weight in before.items():
        assert torch.equal(kept.state_dict()[name], weight)
        torch.testing.assert_close(loaded.state_dict()[name], weight)
    kind = torch.float32 if save_precision == "auto" else torch.bfloat16
    assert {weight.dtype for weight in weights_of(tmp_path / "output/adapter").values()} == {kind}
    assert {weight.dtype for weight in weights_of(tmp_path / "output/model").values()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"method": "full"}, {"method": "lora"}, {"method": "lora", "log_model": "merged"}])
def test_a_model_that_is_scored_in_bfloat16_holds_it_from_the_merging_on(options, trained, tmp_path):
    """Its linear layers are then never all in float32, and are what they would be if they were rounded later."""
    _, _, whole = trained(**options)
    exported = weights_of(tmp_path / "output/model")
    _, _, kept = trained(**options, eval_precision="bfloat16")
    if options["method"] == "lora":
        assert kept.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for model in (whole, kept):  # as the scorer does
        held.hold(model.requires_grad_(False), torch.bfloat16, with_head=True)
    for name, weight in kept.state_dict().items():
        assert weight.dtype == whole.state_dict()[name].dtype, name
        assert torch.equal(weight, whole.state_dict()[name]), name
        assert torch.equal(weights_of(tmp_path / "output/model")[name], exported[name])


def test_nothing_is_merged_where_nobody_needs_the_whole_model(tmp_path, monkeypatch):
    mlflow.set_tracking_uri(make_store(tmp_path))
    monkeypatch.setattr(adapters, "merge", lambda *_, **__: pytest.fail("the adapters were merged"))
    config = TrainConfig(method="lora", max_records=20, epochs=1, checkpoint_dir=tmp_path / "checkpoints")
    with tracking.open_run(config, "cell") as run:
        cell.lead(config, run)
    model, _ = tracking.load_model(tracking.Run(run.id))
    assert model.generation_config.eos_token_id is not None


def test_a_model_that_is_not_to_be_logged_is_exported_all_the_same(trained, tmp_path):
    run, _, _ = trained(method="lora", log_model="none")
    assert not mlflow.get_run(run.id).outputs.model_outputs
    assert mlflow.get_run(run.id).data.tags["plw.status"] == "trained"
    assert run.client.list_artifacts(run.id, "adapter") == []
    assert (tmp_path / "output/model/model.safetensors").is_file()
    assert (tmp_path / "output/adapter/plw-base.json").is_file()
