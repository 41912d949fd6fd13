"""Is the loss the model's own, does LoRA train adapters alone, and does an export load as what was trained?"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from plw_mlflow import models
from plw_mlflow.config import RecipeOptions
from tests.conftest import byte_tokenizer, tiny_llama

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


# Families by how they make logits of hidden states: caps and scales that show on models so small.
MAKERS_OF_LOGITS = {
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": None},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32},
    "gptj": {"n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4},  # its head has a bias
    "granite": {"logits_scaling": 4.0},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
}


def tiny(family, **changes):
    """A random model of a family, the same every time."""
    torch.manual_seed(0)
    settings = SIZES | MAKERS_OF_LOGITS.get(family, {}) | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


FAMILIES = {"llama, untied": tiny_llama, "llama, tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture
def rows():
    """Tokens and attention of three rows of different lengths, padded on the right."""
    tokens = torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(tokens)
    attention[1, 7:] = attention[2, 3:] = 0
    return tokens * attention, attention


def adapted(model, **recipe):
    """A model with adapters that do something: LoRA begins with a product of 0."""
    model = models.adapt(model, RecipeOptions(lora_rank=4, **recipe), seed=1).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_the_learners_loss_and_gradients_are_the_models_own(model, rows):
    tokens, attention = rows
    labels = tokens.masked_fill(attention == 0, -100)
    own = model(tokens, attention_mask=attention, labels=labels).loss
    own.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    weights = attention.float()
    weights[:, 0] = 0
    total, nll = models.Learner(model)(tokens, weights, attention_mask=attention)
    (total / weights.sum()).backward()
    torch.testing.assert_close(total / weights.sum(), own)
    torch.testing.assert_close(nll.sum(), total)
    assert nll.shape == (3, 11)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_lora_trains_its_adapters_and_nothing_else(model, rows):
    tokens, attention = rows
    before = model(tokens).logits
    head = model.get_output_embeddings()
    model = models.adapt(model, RecipeOptions(lora_rank=4), seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} != set()
    assert head is model.get_base_model().get_output_embeddings()  # it has no adapter
    torch.testing.assert_close(model.eval()(tokens).logits, before, rtol=0, atol=0)  # they begin by doing nothing

    total, _ = models.Learner(model)(tokens, attention.float(), attention_mask=attention)
    total.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_adapters_begin_as_their_seed_says():
    first, again, other = (
        [p for n, p in models.adapt(tiny_llama(), RecipeOptions(), seed).named_parameters() if "lora_A" in n]
        for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_trained_model_saves_as_a_plain_folder_with_its_own_logits(model, rows, method, tmp_path):
    tokens, attention = rows
    plain = type(model)
    if method == "lora":
        model = adapted(model)
    expected = model(tokens, attention_mask=attention).logits.detach()

    merged = models.merge(model, tmp_path / "adapter")
    assert type(merged) is plain
    merged.save_pretrained(tmp_path)
    for loaded in (merged, AutoModelForCausalLM.from_pretrained(tmp_path), models.load(str(tmp_path))):
        torch.testing.assert_close(loaded(tokens, attention_mask=attention).logits, expected, rtol=1e-5, atol=1e-5)
        is_tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert is_tied == loaded.config.tie_word_embeddings
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() == (method == "lora")


def test_the_adapter_folder_gives_the_same_model_on_its_base(model, rows, tmp_path):
    from peft import PeftModel

    base = copy.deepcopy(model)
    trained = adapted(model)
    expected = trained(rows[0]).logits.detach()
    models.merge(trained, tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(rows[0]).logits, expected)


def test_weights_are_float32_whatever_the_checkpoint(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in models.load(str(tmp_path)).parameters()} == {torch.float32}


def test_an_encoder_decoder_model_is_refused_by_name(tmp_path):
    config = T5Config(vocab_size=60, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("family", MAKERS_OF_LOGITS)
def test_the_loss_follows_each_familys_own_logits(family, tmp_path):
    """Losses and gradients beside those of the model's own full logits in float64."""
    tiny(family).save_pretrained(tmp_path)
    model = models.load(str(tmp_path))
    reference = copy.deepcopy(model).double()
    tokens = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # some are 0
    weights[:, 0] = 0

    logits = reference(tokens).logits[:, :-1].flatten(0, 1)
    expected_nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    expected = (expected_nll * weights[:, 1:]).sum()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}

    total, nll = models.Learner(model)(tokens, weights, attention_mask=torch.ones_like(tokens))
    total.backward()
    torch.testing.assert_close(total, expected, check_dtype=False)
    torch.testing.assert_close(nll, expected_nll.where(weights[:, 1:] != 0, 0), check_dtype=False)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        # The softmax does not see a shift, so a key's bias has no gradient but what rounding makes.
        assert error < 1e-5 or gradients[name].norm() < 1e-5, name


@pytest.mark.parametrize(
    ("family", "changes"),
    [("cohere", {"logit_scale": 1.0}), ("gemma2", {"head_dim": 8, "final_logit_softcapping": None})],
)
def test_without_a_scale_or_a_cap_the_loss_is_another(family, changes):
    """The test above would pass by chance if neither changed the logits much."""
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        logits, plain = tiny(family)(tokens).logits, tiny(family, **changes)(tokens).logits
    assert (logits - plain).norm() > 0.3 * plain.norm()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("hyperclovax", {"logits_scaling": 4.0}),  # multiplies by what Granite divides by
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "logit_scale": 0.5}),  # does not scale at all
    ],
)
def test_a_model_that_makes_its_logits_otherwise_is_refused_by_name(family, changes, tmp_path):
    tiny(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{family} changes its logits in a way that the loss does not follow"):
        models.load(str(tmp_path))


def _lacking_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _of_another_shape(folder):
    weights = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(50, 24)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_lacking_head, "lacks weights, among them lm_head.weight"),
        (_of_another_shape, "cannot be loaded"),
        (_cut_short, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*no file named"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: .*not a valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "x"})),
            "cannot be loaded: .*`x`",
        ),
        (lambda folder: (folder / "config.json").unlink(), "holds no model: it has no config.json"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(damage, expected, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=expected) as raised:
        models.load(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("load", [models.load, models.load_tokenizer])
@pytest.mark.parametrize("name", ["no/such/folder", "./none", "/none", "nobody/nothing", "nothing@main", "not a name"])
def test_an_unknown_name_is_refused_in_one_line(load, name):
    with pytest.raises(ValueError, match=r"is not a folder on this machine|cannot be loaded") as raised:
        load(name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer .* cannot be loaded"):
        models.load_tokenizer(str(tmp_path))


def test_another_tokenizer_may_be_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert models.load_tokenizer(str(tmp_path / "model"), str(tmp_path / "tokenizer")).eos_token == "</s>"


def test_a_digest_follows_the_weights_and_nothing_else(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("notes")
    assert models.digest(str(tmp_path / "a")) == models.digest(str(tmp_path / "b"))
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "b")
    assert models.digest(str(tmp_path / "a")) != models.digest(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name@abc123", ("org/name", "abc123")),
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("toy", (str(models.TOY_FOLDER), None)),
    ],
)
def test_a_name_may_pin_a_revision(name, expected):
    found = models.locate(name)
    assert (found.path, found.revision) == expected


def test_the_real_llama_weights_load(shared):
    model = models.load(str(shared / "data/models/stories260K-hf"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
