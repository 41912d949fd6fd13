"""Do the functions that stand in for peft's and transformers' modules give what those give, and only where they may?"""

import copy

import pytest
import torch

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters, causal, held
from plw_mlflow.training import arithmetic
from plw_mlflow.training.learner import Learner
from tests.families import tiny

TOKENS = torch.arange(3, 39).view(3, 12)
WEIGHTS = torch.linspace(0, 1, 36).view(3, 12)


def adapted(family, method="lora", **recipe):
    """A model of two layers with adapters that do something: they begin by doing nothing."""
    layers = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    model = adapters.adapt(tiny(family, **layers), method, RecipeOptions(lora_rank=4, **recipe), seed=1)
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=random)
    return model


def gradients(model, kind=torch.float32):
    """The loss of each token, and the gradients of what is trained, as one vector."""
    model = copy.deepcopy(model)  # also holds that a copy of a model computes as the model does
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
        total, nll = Learner(model)(TOKENS, WEIGHTS)
    total.backward()
    return nll, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def in_block(model, kind=torch.float32):
    with arithmetic.fewer_passes(model):
        return gradients(model, kind)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_losses_and_gradients_are_those_of_the_modules_in_float64(family, method):
    model = adapted(family, method).double()
    for found, expected in zip(in_block(model), gradients(model), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_is_as_near_to_float32_as_the_modules(family, method):
    model = adapted(family, method)
    (_, exact), (_, modules) = gradients(model), gradients(model, torch.bfloat16)
    _, found = in_block(model, torch.bfloat16)
    assert (found - exact).norm() < 1.2 * (modules - exact).norm()


def test_a_base_that_is_held_gives_what_a_float32_one_gives():
    model = adapted("llama")
    rounded = copy.deepcopy(model)
    held.hold(rounded, torch.bfloat16)
    for found, expected in zip(in_block(rounded, torch.bfloat16), in_block(model, torch.bfloat16), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "method", "recipe", "expected"),
    [
        ("llama", "lora", {}, {"Linear": 14, "LlamaRMSNorm": 5}),
        ("llama", "full", {}, {"LlamaRMSNorm": 5}),
        ("llama", "dora", {}, {"LlamaRMSNorm": 5}),
        ("llama", "lora", {"lora_dropout": 0.1}, {"LlamaRMSNorm": 5}),
        ("gemma2", "lora", {}, {"Linear": 14}),  # whose norms multiply by 1 + weight
        ("gpt2", "lora", {}, {}),
    ],
)
def test_only_what_is_recognised_is_replaced_and_only_for_a_while(family, method, recipe, expected):
    model = adapted(family, method, **recipe)
    with arithmetic.fewer_passes(model):
        names = [type(layer).__name__ for layer in model.modules() if "forward" in vars(layer)]
    assert {name: names.count(name) for name in names} == expected
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_float32_outputs_of_norms_stay_float32():
    """Qwen 3's norms of queries and keys, which do not go into products."""
    model = tiny("qwen3")
    with arithmetic.fewer_passes(model), torch.autocast("cpu", torch.bfloat16):
        attention = causal.body(model).layers[0].self_attn
        assert attention.q_norm(torch.ones(1, 3, 2, 8, dtype=torch.bfloat16)).dtype == torch.float32
        assert causal.body(model).norm(torch.ones(1, 3, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_norms_that_take_a_gate_beside_their_input_are_left_to_their_own_modules(family):
    model = tiny(family)
    expected = gradients(model)
    assert any("RMSNormGated" in type(layer).__name__ for layer in model.modules())
    for found, of_modules in zip(in_block(model), expected, strict=True):
        torch.testing.assert_close(found, of_modules)
