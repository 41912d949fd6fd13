"""Is an adapter's folder the model that it stands for, and is a stranger's refused in one line?"""

import json
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from plw_mlflow.models import location, pretrained, saved_adapters
from tests.conftest import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two different adapters of toy."""
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(pretrained.load("toy"), settings).save_pretrained(str(folder))
    return folders


def test_an_adapters_folder_stands_for_its_base_with_it_merged(adapters):
    tokens = torch.arange(8).unsqueeze(0)
    attached = saved_adapters.attach(pretrained.load("toy"), adapters[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever loads it can do nothing about an old name in peft
        merged, tokenizer = pretrained.load_for_scoring(str(adapters[0]))
    torch.testing.assert_close(merged(tokens).logits, attached(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(tokens).logits, pretrained.load("toy")(tokens).logits, atol=0.1)
    assert tokenizer("Who?").input_ids == pretrained.load_tokenizer("toy")("Who?").input_ids


def test_adapters_that_cannot_be_used_are_told(tmp_path, adapters):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model: KeyError"):
        pretrained.load_for_scoring(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match=r"names no base model: base_model_name_or_path is empty"):
        pretrained.load_for_scoring(str(tmp_path))
    with pytest.raises(ValueError, match=r"the adapter of .* cannot be loaded"):
        saved_adapters.attach(pretrained.load("toy"), tmp_path)


@pytest.fixture
def own(tmp_path):
    """A folder of a base, and one of an adapter on it that says what it was trained on."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(pretrained.load(str(base)), settings).save_pretrained(str(folder))
    saved_adapters.note_base(folder, str(base), location.digest(str(base)))
    return base, folder


def _set(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_on_another_base_than_it_was_trained_on_is_refused(own):
    base, folder = own
    tokens = torch.arange(8).unsqueeze(0)
    expected = pretrained.load_for_scoring(str(folder))[0](tokens).logits
    changed = tiny_llama()
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(base)
    with pytest.raises(
        ValueError, match=r"was trained on [0-9a-f]{64}, but its base .* is [0-9a-f]{64}; name the right"
    ):
        pretrained.load_for_scoring(str(folder))
    with pytest.warns(UserWarning, match="so the scores may be of a model that nobody has trained"):
        given = pretrained.load_for_scoring(str(folder), str(base))[0](tokens).logits
    assert not torch.equal(given, expected)
    (folder / saved_adapters.BASE_FILE).unlink()  # as adapters from elsewhere have none
    assert torch.equal(pretrained.load_for_scoring(str(folder))[0](tokens).logits, given)


def test_a_base_that_has_another_place_now_is_found_by_its_name_or_given(own, monkeypatch):
    base, folder = own
    tokens = torch.arange(8).unsqueeze(0)
    expected = pretrained.load_for_scoring(str(folder))[0](tokens).logits
    _set(folder, base_model_name_or_path="/where/they/trained/base")  # the note has the right one
    assert torch.equal(pretrained.load_for_scoring(str(folder))[0](tokens).logits, expected)
    moved = base.rename(base.parent / "moved")
    with pytest.raises(ValueError, match=r"is not a folder on this machine; say by --base where it is now"):
        pretrained.load_for_scoring(str(folder))
    assert torch.equal(pretrained.load_for_scoring(str(folder), str(moved))[0](tokens).logits, expected)
    with pytest.raises(ValueError, match=r"base is an option for adapters, but there is no adapter_config.json in"):
        pretrained.load_for_scoring(str(moved), str(moved))


@pytest.mark.parametrize("base", [None, "", " ", [], 0, ".", "./base", "../base", "..", ["base"], 3, {"a": "b"}])
def test_an_adapter_does_not_take_whatever_is_here_as_its_base(base, own, monkeypatch):
    here, folder = own
    monkeypatch.chdir(here)
    _set(folder, base_model_name_or_path=base)
    with pytest.raises(ValueError, match=r"adapter_config.json names (no base model|its base by a relative path)"):
        pretrained.load_for_scoring(str(folder))


class _Marker:
    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return type(self._file).touch, (self._file,)


def _pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head": _Marker(folder / "was run")}, folder / "adapter_model.bin")


def _changed(**changes):
    """Damage to the weights of an adapter; None takes one away."""

    def damage(folder):
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        for name, weight in changes.items():
            name = f"base_model.model.model.layers.{name}.weight"
            weights.pop(name, None) if weight is None else weights.update({name: weight})
        save_file(weights, file)

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_pickled, "cannot be loaded: a file of its weights is damaged, or holds more than weights"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
        (partial(_set, peft_type="IA3"), "is of type IA3, which is not supported; plain LoRA is"),
        (partial(_set, peft_type=None), "is of type None"),
        (partial(_set, megatron_config={}, megatron_core="os"), ""),
        (partial(_set, megatron_config={"a": 1}, megatron_core="megatron.x"), "asks for megatron_config"),
        (partial(_set, layer_replication=[[0, 2]] * 9), "asks for layer_replication"),
        (partial(_set, alora_invocation_tokens=[1]), "asks for alora_invocation_tokens"),
        (partial(_set, r=10**9), "has rank 1000000000, but its weights have no such shape"),
        (partial(_set, rank_pattern={"q_proj": 10**9}), "has rank 1000000000, but its weights have no such shape"),
        (partial(_set, r="two"), "cannot be loaded: TypeError"),
        (partial(_set, target_modules=["q_proj"]), "it also has the weights .*lora_A"),
        (_changed(**{"1.mlp.up_proj.lora_A": None}), "lacks the weights .*up_proj.lora_A"),
        (_changed(**{"7.mlp.up_proj.lora_A": torch.ones(2, 24)}), "it also has the weights .*layers.7.mlp.up_proj"),
    ],
)
def test_a_strangers_adapter_is_refused_in_one_line(damage, expected, own):
    _, folder = own
    damage(folder)
    if not expected:  # a setting that is empty asks for nothing
        pretrained.load_for_scoring(str(folder))
        return
    with pytest.raises(ValueError, match=expected) as raised:
        pretrained.load_for_scoring(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (folder / "was run").exists()
