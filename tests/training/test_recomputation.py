"""Does computing layers again in the backward pass leave every bit as it was, and is it refused where it cannot be?"""

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig

from plw_mlflow.data.tokens import Example
from plw_mlflow.training import recomputation
from tests.conftest import tiny_llama
from tests.families import tiny
from tests.training.test_train import EXAMPLES, first_step, run


def dropping(method):
    """Options of a method, and a model, such that every forward pass draws random numbers."""
    model = tiny_llama(tied=True, attention_dropout=0.2)
    return {"model": model, "method": method, "lora_dropout": 0.3 if method in ("lora", "dora") else 0.0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_a_training_with_dropout_ends_in_the_same_bits(method, packing, precision, tmp_path, request):
    AcceleratorState._reset_state()  # which has one precision for a process's life
    request.addfinalizer(AcceleratorState._reset_state)
    options = {"packing": packing, "precision": precision, "epochs": 2, "batch_examples": 4, "micro_batch_examples": 2}
    kept, computed_again = (
        run(tmp_path / str(again), activation_checkpointing=again, **dropping(method), **options).model
        for again in (False, True)
    )
    expected = dict(kept.named_parameters())
    assert not all(map(torch.equal, tiny_llama(tied=True).parameters(), expected.values()))  # it has learnt something
    for name, parameter in computed_again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    inner = computed_again.get_base_model() if method != "full" else computed_again
    assert not inner.is_gradient_checkpointing  # it is as it was before


@pytest.mark.filterwarnings("ignore:mamba.*training on padded rows")
@pytest.mark.parametrize("family", ["cohere", "gemma2", "gpt2", "gpt_neox", "mamba", "mistral", "opt", "phi", "qwen3"])
def test_a_step_has_the_same_gradients_to_the_bit_in_many_families(family, tmp_path):
    training = [Example(example.tokens % 60, example.segment) for example in EXAMPLES]  # whose vocabulary is small
    steps = [
        first_step(tmp_path / str(again), model=tiny(family), training=training, validation=[], **options)
        for again, options in ((False, {}), (True, {"activation_checkpointing": True}))
    ]
    assert steps[0][0] == steps[1][0]
    for name, gradient in steps[0][1].items():
        assert torch.equal(steps[1][1][name], gradient), name


@pytest.mark.parametrize(("again", "passes"), [(False, 1), (True, 2)])
def test_each_layer_is_computed_twice(again, passes, tmp_path):
    model = tiny_llama()
    computed = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: computed.append(torch.is_grad_enabled()))
    first_step(tmp_path, model=model, validation=[], activation_checkpointing=again)
    assert computed.count(True) == passes


def test_a_model_that_has_no_such_layers_is_refused_by_its_settings_alone():
    with pytest.raises(ValueError, match=r"activation-checkpointing is not to be had with a model of type ctrl"):
        recomputation.check(AutoConfig.for_model("ctrl"))
    recomputation.check(AutoConfig.for_model("llama"))


def test_nor_is_a_model_whose_layers_turn_out_to_be_of_another_kind():
    model = tiny_llama()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="whose layers transformers cannot compute again"):
        recomputation.of_layers(model).__enter__()
