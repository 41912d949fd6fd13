"""Do packed rows follow the model's size on a CPU, and is the longest one that fits on a GPU found, and found once?"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from plw_mlflow.config import TrainConfig
from plw_mlflow.data.batches import pack
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.weights import Weights
from plw_mlflow.models import adapters, causal, pretrained
from plw_mlflow.training import arithmetic, attention, parallel, row_length
from plw_mlflow.training.trainer import Trainer
from tests.conftest import tiny_llama
from tests.training.test_train import EXAMPLES, first_step

GIB = 2**30


def shape(hidden, layers):
    return LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4)


@pytest.mark.parametrize(
    ("settings", "precision", "again", "expected"),
    [
        (shape(768, 12), "float32", False, GIB // (768 * 12 * 90)),  # 1,294 tokens for 110 million parameters
        (shape(768, 12), "bfloat16", False, GIB // (768 * 12 * 60)),
        (shape(2048, 16), "float32", True, GIB // (2048 * (16 * 4 + 90))),
        (shape(4096, 32), "float32", False, 1024),  # never less than this
        (shape(64, 2), "float32", False, 8192),  # never more than what the options ask for
    ],
)
def test_a_row_on_a_cpu_follows_the_models_size(settings, precision, again, expected):
    found = row_length.on_cpu(settings, precision, is_computed_again=again, longest=512, most=8192)
    assert found == expected


def test_the_toy_model_keeps_its_rows_and_an_example_always_fits():
    options = {"is_computed_again": False, "longest": 512, "most": 8192}
    assert row_length.on_cpu(pretrained.load_config("toy"), "float32", **options) == 8192
    large = shape(4096, 32)
    assert row_length.on_cpu(large, "float32", is_computed_again=False, longest=3000, most=9000) == 3000


def kept_bytes(model, tokens, precision):
    """What the backward pass of one example's hidden states needs beside the weights."""
    example = type(EXAMPLES[0])(EXAMPLES[0].tokens[:1].repeat(tokens), EXAMPLES[0].segment[:1].repeat(tokens))
    batch = pack([example], Weights(plw=1.0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inner = causal.unwrap(model)
    with (
        attention.over_examples(inner),
        arithmetic.fewer_passes(model),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        states = causal.hidden_states(model, batch.tokens, **batch.context)
        assert states.requires_grad
        return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_is_near_what_the_backward_pass_keeps(method, precision):
    model = tiny_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=3)
    model = adapters.adapt(model, method, TrainConfig(method=method, lora_rank=2), seed=1).train()
    # The difference, as some of what is kept does not depend on the tokens.
    measured = (kept_bytes(model, 96, precision) - kept_bytes(model, 32, precision)) / 64
    assert 0.6 < measured / (row_length.LAYER_BYTES[precision] * 96 * 3) < 1.1


class Device:
    """Memory that a step on a row takes, up to an end."""

    def __init__(self, total, fixed, token):
        self.total, self.fixed, self.token, self.asked = total, fixed, token, []

    def peak_bytes(self, tokens):
        self.asked.append(tokens)
        needed = self.fixed + self.token * tokens
        return needed if needed <= self.total else None


@pytest.mark.parametrize("may_fail", [True, False])
@pytest.mark.parametrize("fixed", [0, 40 * GIB, 70 * GIB])
def test_the_longest_row_that_fits_is_found(fixed, may_fail):
    device = Device(80 * GIB, fixed, 2**20)
    found = row_length.found(device.peak_bytes, device.total, longest=512, most=10**6, may_fail=may_fail)
    share = (fixed + found * 2**20) / device.total
    assert share == pytest.approx(0.9 if may_fail else max(0.8, (fixed + 512 * 2**20) / device.total), abs=0.001)
    assert max(device.asked) <= (found if may_fail else 1024)


def test_a_row_holds_no_more_than_a_step_and_no_less_than_an_example():
    roomy, narrow = Device(80 * GIB, 0, 2**20), Device(GIB, GIB, 2**20)
    assert row_length.found(roomy.peak_bytes, roomy.total, longest=512, most=8192, may_fail=True) == 8192
    assert row_length.found(narrow.peak_bytes, narrow.total, longest=512, most=8192, may_fail=True) == 512


def test_a_row_that_does_not_fit_after_all_is_shortened_until_one_does():
    device = Device(80 * GIB, 0, 2**20)
    found = row_length.found(
        lambda tokens: device.peak_bytes(tokens if tokens <= 1024 else 2 * tokens),  # more than it seemed
        device.total,
        longest=512,
        most=10**6,
        may_fail=True,
    )
    assert device.total / 2 * 0.8 < found * 2**20 <= device.total / 2


def test_what_was_found_is_remembered_for_the_same_circumstances_alone(tmp_path):
    file = tmp_path / "cache" / "rows.json"
    assert row_length.recall(file, {"method": "lora"}) == 0
    row_length.remember(file, {"method": "lora"}, 1000)
    row_length.remember(file, {"method": "full"}, 2000)
    assert [row_length.recall(file, {"method": name}) for name in ("lora", "full", "dora")] == [1000, 2000, 0]
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(json.loads(file.read_text()), "1000"))):
        file.write_text(damaged)
        assert row_length.recall(file, {"method": "lora"}) == 0
        row_length.remember(file, {"method": "lora"}, 3000)
        assert row_length.recall(file, {"method": "lora"}) == 3000
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(UserWarning, match=r"cannot be written to .* will be looked for again"):
        row_length.remember(tmp_path / "taken" / "rows.json", {}, 1000)


@pytest.mark.parametrize(("others", "trials"), [([1500], 0), ([0, 1500], 2)])
def test_processes_try_together_where_one_of_them_remembers_nothing(others, trials, tmp_path, monkeypatch):
    """One of fsdp2 that tried alone would wait for the others for ever. The shortest row of all counts."""
    joined = SimpleNamespace(device=SimpleNamespace(type="cuda"), num_processes=2)
    monkeypatch.setattr(row_length, "_least", lambda own, _: min(own, others.pop(0)))
    monkeypatch.setattr(row_length, "recall", lambda *_: 2000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    config = TrainConfig(micro_batch_tokens="auto", parallel="fsdp2", cache_dir=tmp_path, batch_examples=64)
    device = Device(80 * GIB, 0, 2**20)
    assert row_length.choose(config, tiny_llama(), joined, device.peak_bytes) == 1500
    assert len(device.asked) == trials
    assert not others


def test_a_trial_is_a_step_on_a_row_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """The part of the trial that needs no GPU: its memory is that of the row it was given, as torch's CUDA counts."""
    tokens = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: sum(tokens))
    model = tiny_llama()
    model.model.embed_tokens.register_forward_hook(lambda part, given, made: tokens.append(given[0].numel()))
    config = TrainConfig(max_tokens=32)
    with attention.over_examples(model):
        trainer = Trainer(
            config, Prepared((), EXAMPLES, EXAMPLES[:1], {}, "", 0), model, True, 1, parallel.accelerator("float32")
        )
        for row in (96, 110):  # the latter ends with a short example
            assert trainer._peak_bytes(row) == 2 * row  # a second row of the step finds the gradients of the first
            tokens.clear()
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", math.nan)
        model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
        assert trainer._peak_bytes(96) is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auto_is_the_default_on_a_cpu(tmp_path):
    default, auto = (first_step(tmp_path / str(value), micro_batch_tokens=value) for value in (None, "auto"))
    assert default[0] == auto[0]
    assert all(map(torch.equal, default[1].values(), auto[1].values()))


def test_other_families_have_sizes_too():
    for family in ("gpt2", "gpt_neox", "opt", "mamba", "gemma3_text", "bloom", "mpt", "falcon"):
        found = row_length.on_cpu(
            AutoConfig.for_model(family), "float32", is_computed_again=False, longest=512, most=8192
        )
        assert 1024 <= found <= 8192, family
