"""Do adapters train and nothing else, do they all bear on the output, and does a merged model give what was trained?"""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters, pretrained
from plw_mlflow.training.learner import Learner
from tests.conftest import tiny_llama
from tests.families import tiny

FAMILIES = ("gpt2", "gpt_neox", "qwen2", "qwen3", "mistral", "gemma", "phi", "opt", "mamba", "llama")
TOKENS = torch.arange(3, 39).view(3, 12)


def adapt(model, method="lora", seed=1, **recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft corrects some settings with a warning
        return adapters.adapt(model, method, RecipeOptions(lora_rank=4, **recipe), seed).eval()


def moved(model):
    """The same model with adapters that do something: they begin by doing nothing."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=random)
            if "magnitude" in name:
                parameter *= 1 + 0.1 * torch.rand(parameter.shape, generator=random)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_train_all_of_them_and_nothing_else(method, family):
    model = tiny(family)
    before = model(TOKENS).logits
    head = model.get_output_embeddings()
    model = adapt(model, method)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} != set()
    assert any("magnitude" in name for name in trained) == (method == "dora")
    assert head is model.get_base_model().get_output_embeddings()  # it has no adapter
    # DoRA divides each row by its norm and multiplies it again; Mamba's convolution rounds otherwise after an addition.
    rounding = 0 if method == "lora" and family != "mamba" else 1e-5
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=rounding, atol=rounding)

    total, _ = Learner(moved(model))(TOKENS, torch.ones(TOKENS.shape))
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == trained
    assert all(gradient.any() for gradient in gradients.values())


def test_a_full_method_leaves_the_model_alone():
    model = tiny_llama()
    assert adapters.adapt(model, "full", RecipeOptions(), 1) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_begin_as_their_seed_says():
    first, again, other = (
        [p for n, p in adapt(tiny_llama(), seed=seed).named_parameters() if "lora_A" in n] for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_a_trained_model_saves_as_a_plain_folder_with_its_own_logits(method, family, tmp_path):
    model = tiny(family)
    plain, base = type(model), model(TOKENS).logits
    model = moved(adapt(model, method))
    expected = model(TOKENS).logits.detach()
    assert method == "full" or (expected - base).norm() > 0.01 * base.norm()

    adapters.save(model, tmp_path / "adapter")
    merged = adapters.merge(model, tmp_path / "adapter")
    assert type(merged) is plain
    merged.save_pretrained(tmp_path)
    for loaded in (merged, AutoModelForCausalLM.from_pretrained(tmp_path), pretrained.load(str(tmp_path))):
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        is_tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert is_tied == loaded.config.tie_word_embeddings
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() == (method != "full")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_folder_gives_the_same_model_on_its_base(method, family, tmp_path):
    model = tiny(family)
    base = copy.deepcopy(model)
    trained = moved(adapt(model, method))
    expected = trained(TOKENS).logits.detach()
    adapters.save(trained, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("q_proj, v_proj", {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"}),
        ("layers.1.mlp.up_proj", {"model.layers.1.mlp.up_proj"}),
    ],
)
def test_target_layers_are_named_by_their_last_parts(told, expected):
    model = adapt(tiny_llama(), lora_targets=told)
    assert {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n} == {
        f"base_model.model.{name}" for name in expected
    }


def test_a_target_that_names_nothing_is_told_with_what_there_is():
    with pytest.raises(ValueError, match=r"'proj', but the linear layers of llama .* are down_proj, gate_proj, k"):
        adapters.targets(tiny_llama(), "q_proj,proj")
    with pytest.raises(ValueError, match="'lm_head', but"):
        adapters.targets(tiny_llama(), "lm_head")


def test_what_a_state_space_models_kernels_read_themselves_gets_no_adapter():
    assert {name.rpartition(".")[2] for name in adapters.targets(tiny("mamba"), "all-linear")} == {"in_proj"}
    with pytest.raises(ValueError, match=r"names 'dt_proj', .* are in_proj \(kernels read"):
        adapters.targets(tiny("mamba"), "dt_proj")
    assert "model.decoder.layers.0.self_attn.out_proj" in adapters.targets(tiny("opt"), "all-linear")


def test_qlora_trains_on_a_base_in_4_bits_and_merges_into_a_plain_model(tmp_path, monkeypatch):
    """On whatever device there is: bitsandbytes has slow kernels for CPUs, too.

    For some CPUs it has faster ones besides, which give no gradients; nobody trains there (`abilities.check_method`).
    """
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = pretrained.load(str(tmp_path / "base"), four_bit=torch.float32)
    layers = model.model.layers[0]
    assert layers.mlp.up_proj.weight.dtype == torch.uint8
    assert {model.lm_head.weight.dtype, layers.input_layernorm.weight.dtype} == {torch.float32}
    model = moved(adapt(model, "qlora"))
    tokens = TOKENS.to(model.device)
    total, _ = Learner(model)(tokens, torch.ones(tokens.shape, device=tokens.device))
    total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    expected = model(tokens).logits.detach().cpu()

    adapters.save(model, tmp_path / "adapter")
    merged = adapters.merge(model, tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    on_base = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
    assert (on_base - expected).norm() > 0.01 * expected.norm()  # the base was rounded
