"""Do a model's body and head make its own logits, and is a model refused whose parts are not known?"""

import pytest
import torch
from transformers import AutoConfig

from plw_mlflow.models import causal
from tests.conftest import tiny_llama
from tests.families import MAKERS_OF_LOGITS, tiny


@pytest.mark.parametrize("family", MAKERS_OF_LOGITS)
def test_body_and_head_make_each_familys_own_logits(family):
    model, tokens = tiny(family), torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        logits = causal.head(model).logits(causal.hidden_states(model, tokens))
        torch.testing.assert_close(logits, model(tokens).logits)


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


def test_a_model_whose_body_has_an_unknown_name_is_refused_by_type():
    model = tiny_llama()
    model.another_name = model._modules.pop("model")
    with pytest.raises(ValueError, match="llama has no part of a known name that gives hidden states"):
        causal.hidden_states(model, torch.arange(4).unsqueeze(0))


def test_a_model_without_a_head_is_refused_by_type():
    model = tiny_llama()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="llama has no head whose weights make its logits"):
        causal.head(model)


def test_the_limit_is_that_of_whichever_layers_have_one():
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    parts = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": scaling}
    config = AutoConfig.for_model("gemma3_text", rope_parameters=parts, max_position_embeddings=48)
    assert causal.length_limit(config) == 48
    assert causal.length_limit(tiny("gpt2").config) is None
