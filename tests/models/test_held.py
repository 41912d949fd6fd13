"""Do linear layers held in bfloat16 give what autocast gives of float32 weights, and do those come back?"""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters, held, pretrained, saved_adapters
from plw_mlflow.training.learner import Learner
from tests.families import tiny

FAMILIES = ("gpt2", "gpt_neox", "qwen2", "gemma2", "mistral", "cohere", "phi", "opt", "llama")
TOKENS = torch.arange(3, 39).view(3, 12)


def saved(tmp_path, family="llama", **changes):
    model = tiny(family, **changes)
    model.save_pretrained(tmp_path)
    return model, str(tmp_path)


def whole_loaded_and_made(tmp_path, family, method):
    """A float32 model with adapters, one whose base was loaded in bfloat16, and one that was rounded afterwards."""
    saved(tmp_path, family)
    bases = pretrained.load(str(tmp_path)), pretrained.load(str(tmp_path), held_in=torch.bfloat16)
    whole, loaded = (moved(adapters.adapt(base, method, RecipeOptions(lora_rank=4), seed=1)) for base in bases)
    made = copy.deepcopy(whole)
    held.hold(made, torch.bfloat16)
    return whole, loaded, made


def gradients(model, kind=torch.bfloat16):
    """Losses, and the gradients of what is trained, as training in a type makes them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        total, nll = Learner(model)(TOKENS, torch.ones(TOKENS.shape))
    total.backward()
    return nll, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def flat(losses_and_gradients):
    return torch.cat([gradient.flatten() for gradient in losses_and_gradients[1].values()])


def moved(model):
    """The same model with adapters that do something: they begin by doing nothing."""
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=random)
    return model


@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16])
def test_linear_layers_alone_are_loaded_in_bfloat16(tmp_path, checkpoint):
    tiny("gemma2", tie_word_embeddings=True).to(checkpoint).save_pretrained(tmp_path)
    model, whole = pretrained.load(str(tmp_path), held_in=torch.bfloat16), pretrained.load(str(tmp_path))
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    for (name, layer), other in zip(model.named_modules(), whole.modules(), strict=True):
        for parameter, expected in zip(layer.parameters(recurse=False), other.parameters(recurse=False), strict=True):
            is_held = isinstance(layer, nn.Linear) and layer is not head
            kind = torch.bfloat16 if is_held else torch.float32
            assert parameter.dtype == kind, name
            torch.testing.assert_close(parameter, expected.to(kind), rtol=0, atol=0)
    assert held.is_held(model)
    assert not held.is_held(whole)


def test_nothing_is_held_in_what_is_loaded_afterwards(tmp_path):
    _, folder = saved(tmp_path)
    pretrained.load(folder, held_in=torch.bfloat16)
    assert not held.is_held(pretrained.load(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_autocast_to_the_bit(tmp_path, family):
    whole, loaded, made = whole_loaded_and_made(tmp_path, family, "lora")
    expected_nll, expected = gradients(whole)
    for model in (loaded, made):
        weights = {layer.weight.dtype for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D))}
        assert weights == {torch.float32, torch.bfloat16}
        nll, found = gradients(model)
        torch.testing.assert_close(nll, expected_nll, rtol=0, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dora_is_as_near_to_float32_as_with_autocast(tmp_path, family):
    """DoRA takes the norms of the rounded weights, where autocast takes those of the float32 ones."""
    whole, *others = whole_loaded_and_made(tmp_path, family, "dora")
    exact, expected = flat(gradients(whole, torch.float32)), flat(gradients(whole))
    for model in others:
        assert (flat(gradients(model)) - exact).norm() <= 1.2 * (expected - exact).norm()


def test_adapters_begin_in_float32_as_on_a_float32_base(tmp_path):
    _, folder = saved(tmp_path)
    for method in ("lora", "dora"):
        bases = pretrained.load(folder), pretrained.load(folder, held_in=torch.bfloat16)
        whole, loaded = (adapters.adapt(base, method, RecipeOptions(lora_rank=4), seed=1) for base in bases)
        for (name, parameter), expected in zip(loaded.named_parameters(), whole.parameters(), strict=True):
            if parameter.requires_grad:
                tolerance = 1e-2 if "magnitude" in name else 0
                torch.testing.assert_close(parameter, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_starts_from_the_float32_weights(tmp_path, method):
    _, folder = saved(tmp_path / "base")
    model = adapters.adapt(pretrained.load(folder, held_in=torch.bfloat16), method, RecipeOptions(lora_rank=4), seed=1)
    adapters.save(moved(model), tmp_path)
    merged = adapters.merge(model, tmp_path)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    expected = saved_adapters.attach(pretrained.load(folder), tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected(TOKENS).logits)


def test_trials_take_the_rounded_weights_in_float32(tmp_path):
    model, _ = saved(tmp_path)
    made = copy.deepcopy(model).requires_grad_(False)
    held.hold(made, torch.bfloat16)
    with pytest.raises(RuntimeError):
        made(TOKENS)
    with held.in_float32():
        found = made(TOKENS).logits
    for layer in held._linear(model):
        layer.weight.data = layer.weight.data.bfloat16().float()
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=0, atol=0)
