"""Are adapters merged into the base's weights as its files have them, rounded neither before nor on the way?"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters, held, pretrained, saved_adapters, stored
from tests.conftest import tiny_llama
from tests.families import tiny

TOKENS = torch.arange(3, 39).view(3, 12)


def saved(folder, model=None, **options):
    """The name of a folder that holds a model in float32."""
    (model or tiny_llama()).save_pretrained(folder, **options)
    return str(folder)


def trained(base, method="lora", targets="all-linear"):
    """A base held in bfloat16 with adapters that do something, and the same adapters on the base in float32."""
    both = []
    for held_in in (torch.bfloat16, None):
        model = pretrained.load(base, held_in=held_in)
        model = adapters.adapt(model, method, RecipeOptions(lora_rank=4, lora_targets=targets), 1)
        random = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=random)
        both.append(model.eval())
    return both


def merged(model, folder, *held_in):
    adapters.save(model, folder)
    return adapters.merge(model, folder, *held_in)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "targets"), [("lora", "all-linear"), ("lora", "q_proj"), ("dora", "all-linear")])
def test_a_held_base_is_merged_as_its_files_have_it(method, targets, family, tmp_path):
    """Bit by bit as a base in float32, also in layers that have no adapter."""
    if (family, targets) == ("gpt2", "q_proj"):
        targets = "c_proj"
    base = saved(tmp_path / "base", tiny(family))
    model, whole = trained(base, method, targets)
    for one, other in zip(
        model.parameters(), whole.parameters(), strict=True
    ):  # DoRA's norms begin as the rounded rows'
        if other.requires_grad:
            other.data.copy_(one.data)
    assert held.is_held(model.get_base_model())
    found = merged(model, tmp_path / "one")
    expected = merged(whole, tmp_path / "two").state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    # The same sums, rounded once: right after training, and when the adapters are loaded again.
    model, _ = trained(base, method, targets)
    rounded = merged(model, tmp_path / "three", torch.bfloat16)
    loaded, _ = pretrained.load_adapted(tmp_path / "one", base, held_in=torch.bfloat16)
    for again, of in ((rounded, tmp_path / "three"), (loaded, tmp_path / "one")):
        expected = saved_adapters.attach(pretrained.load(base), of).merge_and_unload()
        held.hold(expected.requires_grad_(False), torch.bfloat16, with_head=True)
        assert held.is_held(again)
        for name, weight in again.state_dict().items():
            assert weight.dtype == expected.state_dict()[name].dtype, name
            assert torch.equal(weight, expected.state_dict()[name]), name


@pytest.mark.parametrize("beginning", ["pissa", "olora", "gaussian"])
def test_adapters_that_begin_by_changing_their_base_are_merged_into_what_they_make_of_it(beginning, tmp_path):
    base = saved(tmp_path / "base")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=beginning)
    model = get_peft_model(pretrained.load(base), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = model.merge_and_unload().state_dict()
    for held_in in (None, torch.bfloat16):
        loaded, _ = pretrained.load_adapted(tmp_path / "adapter", base, held_in=held_in)
        for name, weight in loaded.state_dict().items():
            torch.testing.assert_close(
                weight, expected[name].to(weight.dtype), rtol=1e-2 if held_in else 1e-4, atol=1e-5
            )
        assert held.is_held(loaded) == (held_in is not None)


def test_shards_are_read_one_weight_at_a_time(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = pretrained.load(base, held_in=torch.bfloat16)
    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("the whole base is loaded"))
    for name, weight in tiny_llama().state_dict().items():
        assert torch.equal(stored.Stored(base).read(name, model.state_dict()[name]), weight)


def test_a_base_whose_files_have_other_names_is_loaded_again(tmp_path):
    base = saved(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    model = pretrained.load(base, held_in=torch.bfloat16)
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, file, {"format": "pt"})
    for name, weight in tiny_llama().state_dict().items():
        assert torch.equal(stored.Stored(base).read(name, model.state_dict()[name]), weight)


def test_a_base_that_has_changed_during_the_training_is_told(tmp_path):
    base = saved(tmp_path / "base")
    model, _ = trained(base)
    other = copy.deepcopy(tiny_llama())
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    saved(tmp_path / "base", other)
    with pytest.raises(
        ValueError, match=r"has changed since it was loaded: model.layers.1.mlp.up_proj.weight has other"
    ):
        adapters.merge(model, tmp_path)
