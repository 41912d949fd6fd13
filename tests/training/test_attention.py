"""Does a packed example come out as it does alone, in every family that can be packed, and are the others found out?"""

import copy

import pytest
import torch
from torch import nn

from plw_mlflow.data import batches
from plw_mlflow.data.weights import Weights
from plw_mlflow.training import attention
from plw_mlflow.training.learner import Learner
from tests.conftest import make_example
from tests.families import tiny

WEIGHTS = Weights(plw=0.25, template_weight=0.5, completion_weight=1.0)
# Windows and caps that show in examples of so few tokens, and grouped heads (SIZES has two heads for one key).
PACKED = {
    "afmoe": {"head_dim": 8, "sliding_window": 3, "num_experts": 4, "moe_intermediate_size": 8, "num_dense_layers": 1},
    "gemma2": {"head_dim": 8, "sliding_window": 3, "attn_logit_softcapping": 0.5, "num_hidden_layers": 2},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3, "num_hidden_layers": 2, "layer_types": None},
    "gpt2": {},
    "gpt_neox": {},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4},
    "llama": {},
    "mistral": {"sliding_window": 3},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "phi": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
# The last three attend to windows that are longer than the examples of the trial.
NOT_PACKED = {
    "bloom": {"n_head": 2, "n_layer": 1},
    "falcon": {},
    "mamba": {},
    "stablelm": {},
    "doge": {"keep_window_size": 1000},
    "llama4_text": {"attention_chunk_size": 1000},
    "phimoe": {"sliding_window": 1000, "num_local_experts": 4},
}


def examples():
    """Three of 9, 2 and 6 tokens, the first longer than the windows by far."""
    random = torch.Generator().manual_seed(1)
    return [
        make_example(torch.randint(2, 60, (length,), generator=random).tolist(), [0, 1] + [3] * (length - 2))
        for length in (9, 2, 6)
    ]


def step(model, batch):
    """Loss per target that weighs something, and the gradients."""
    model = copy.deepcopy(model)
    total, nll = Learner(model)(batch.tokens, batch.weights, batch.rows, **batch.context)
    total.backward()
    return nll.flatten()[batch.rows], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", PACKED)
def test_packed_examples_come_out_as_padded_ones(family):
    model = tiny(family, **PACKED[family])
    assert attention.why_not(model) is None
    expected_nll, expected = step(model, batches.collate(examples(), WEIGHTS))
    with attention.over_examples(model):
        nll, found = step(model, batches.pack(examples(), WEIGHTS))
    torch.testing.assert_close(nll, expected_nll)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", NOT_PACKED)
def test_models_that_cannot_be_packed_are_found_out(family):
    model = tiny(family, **NOT_PACKED[family])
    before = model.config._attn_implementation
    assert attention.why_not(model)
    assert model.config._attn_implementation == before


def test_a_window_that_only_masks_have_is_told():
    expected = "it attends to 1000 tokens at most by its masks alone, and packed rows have no masks"
    assert attention.why_not(tiny("phimoe", **NOT_PACKED["phimoe"])) == expected


def test_outputs_that_are_no_numbers_are_not_taken_for_equal():
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    assert attention.why_not(model) == "an example packed behind another gives something else than alone"


def test_the_model_is_as_it_was_afterwards():
    model = tiny("llama")
    tokens = torch.arange(8).unsqueeze(0)
    expected = model(tokens).logits
    with pytest.raises(KeyError), attention.over_examples(model):
        raise KeyError
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


def test_dropout_is_applied_within_examples():
    """Attention dropout of nearly 1 leaves nearly nothing of what the values are."""
    query = torch.ones(1, 1, 6, 4)
    borders = torch.tensor([0, 4, 6], dtype=torch.int32)
    told = {"cu_seq_lens_q": borders, "max_length_q": 4}
    whole, _ = attention._attend(nn.Module(), query, query, query, None, **told)
    torch.testing.assert_close(whole, torch.ones(1, 6, 1, 4))
    torch.manual_seed(0)
    dropped, _ = attention._attend(nn.Module(), query, query, query, None, dropout=0.99, **told)
    assert (dropped == 0).float().mean() > 0.8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and PLW_TEST_GPU=1")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_kernel_on_a_gpu_agrees_with_a_call_per_example(family):
    model = tiny(family, hidden_size=64, intermediate_size=64, **PACKED[family]).cuda()
    batch = batches.pack(examples(), WEIGHTS).to(torch.device("cuda"))
    with attention.over_examples(model):
        expected, _ = step(model, batch)
        with torch.autocast("cuda", torch.bfloat16):
            found, _ = step(model, batch)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # of bfloat16
