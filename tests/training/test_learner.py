"""Is the learner's loss the model's own, and is an example refused that would change the losses of others?"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from plw_mlflow.data import batches
from plw_mlflow.data.weights import Weights
from plw_mlflow.models import causal, pretrained
from plw_mlflow.training import attention
from plw_mlflow.training.learner import Learner
from tests.conftest import make_example, tiny_llama
from tests.families import MAKERS_OF_LOGITS, tiny


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


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
    total, nll = Learner(model)(tokens, weights, attention_mask=attention)
    (total / weights.sum()).backward()
    torch.testing.assert_close(total / weights.sum(), own)
    torch.testing.assert_close(nll.sum(), total)
    assert nll.shape == (3, 12)
    assert not nll[:, -1].any()  # nothing follows
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", MAKERS_OF_LOGITS)
def test_the_loss_follows_each_familys_own_logits(family, tmp_path):
    """Losses and gradients beside those of the model's own full logits in float64."""
    tiny(family).save_pretrained(tmp_path)
    model = pretrained.load(str(tmp_path))
    reference = copy.deepcopy(model).double()
    tokens = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # some are 0
    weights[:, 0] = 0

    logits = reference(tokens).logits[:, :-1].flatten(0, 1)
    expected_nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    expected = (expected_nll * weights[:, 1:]).sum()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}

    total, nll = Learner(model)(tokens, weights, attention_mask=torch.ones_like(tokens))
    total.backward()
    torch.testing.assert_close(total, expected, check_dtype=False)
    torch.testing.assert_close(nll[:, :-1], expected_nll.where(weights[:, 1:] != 0, 0), check_dtype=False)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        # The softmax does not see a shift, so a key's bias has no gradient but what rounding makes.
        assert error < 1e-5 or gradients[name].norm() < 1e-5, name


def _rope(kind, **changes):
    """A random model whose positions are scaled, with a limit of 16 tokens where there is one."""
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "original_max_position_embeddings": 16}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 16
    positions = 16 if kind == "dynamic" else 64
    return tiny_llama(rope_parameters=scaling | changes, max_position_embeddings=positions)


def _examples(*lengths):
    random = torch.Generator().manual_seed(1)
    return [
        make_example(torch.randint(2, 200, (length,), generator=random).tolist(), [3] * length) for length in lengths
    ]


def _losses_of_the_first(model, examples):
    """The losses of an example alone, padded beside the others, and packed before them."""
    learner, weights = Learner(model).eval(), Weights(1, 1, 1)
    several = [batches.collate(examples[:1], weights), batches.collate(examples, weights)]
    with torch.no_grad():
        found = [learner(batch.tokens, batch.weights, **batch.context)[1] for batch in several]
        batch = batches.pack(examples, weights)
        with attention.over_examples(model):
            found.append(learner(batch.tokens, batch.weights, **batch.context)[1])
    return [nll[0, : len(examples[0].tokens) - 1] for nll in found]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_an_example_that_would_change_the_losses_of_others_is_refused(kind):
    model = _rope(kind)
    assert causal.length_limit(model.config) == 16
    alone, padded, packed = _losses_of_the_first(model, _examples(9, 16, 5))
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(packed, alone)
    expected = "an example has 17 tokens, but beyond 16 tokens the position frequencies of this llama"
    with pytest.raises(ValueError, match=f"{expected}.*; set --max-tokens to 16 or less"):
        _losses_of_the_first(model, _examples(9, 17, 5))
    # The refusal is not for nothing.
    tokens = torch.arange(2, 19).unsqueeze(0)
    with torch.no_grad():
        part, whole = model.model(tokens[:, :9]).last_hidden_state, model.model(tokens).last_hidden_state
    assert (whole[:, :9] - part).norm() > 0.005 * part.norm()


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_frequencies_that_stay_the_same_have_no_limit(kind):
    model = _rope(kind)
    assert causal.length_limit(model.config) is None
    alone, padded, packed = _losses_of_the_first(model, _examples(9, 40, 5))
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(packed, alone)
