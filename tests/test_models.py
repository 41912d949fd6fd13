"""Is the loss the model's own, and is a model refused of which it is not?"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from plw_mlflow import models
from tests.conftest import byte_tokenizer, tiny_llama
from tests.families import tiny


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


# Families by how they make logits of hidden states.
MAKERS_OF_LOGITS = ("cohere", "gemma2", "gemma3_text", "gpt2", "gptj", "granite", "mistral", "qwen2")
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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "none"}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(file, content, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer of model .* cannot be loaded") as raised:
        models.load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


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
        ("llama-2-7b", ("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9")),
    ],
)
def test_a_name_may_pin_a_revision(name, expected):
    found = models.locate(name)
    assert (found.path, found.revision) == expected


def test_the_real_llama_weights_load(shared):
    model = models.load(str(shared / "data/models/stories260K-hf"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
