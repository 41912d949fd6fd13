"""Is dropout set wherever a model has one?"""

import pytest
import torch
from transformers import AutoConfig

from plw_mlflow.models import pretrained
from plw_mlflow.models.dropout import set_dropout
from tests.families import tiny


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop"}),
        ("gpt_neox", {"hidden_dropout", "attention_dropout"}),
        ("llama", {"attention_dropout"}),
        ("opt", {"dropout", "attention_dropout"}),
        ("phi", {"resid_pdrop", "embd_pdrop", "attention_dropout"}),
        ("qwen3", {"attention_dropout"}),
    ],
)
def test_every_dropout_of_a_model_is_set(family, expected, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    model, plain = pretrained.load(str(tmp_path), dropout=0.4), pretrained.load(str(tmp_path))
    before, after = plain.config.to_dict(), model.config.to_dict()
    assert {name for name in after if after[name] != before[name]} == expected
    assert {after[name] for name in expected} == {0.4}

    tokens = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_config_within_the_config_is_seen():
    with pytest.raises(ValueError, match=r"mpt takes no attn_pdrop of 0.4"):  # it is of the attention's own config
        set_dropout(AutoConfig.for_model("mpt"), 0.4)


def test_a_model_without_dropout_is_refused_by_name(tmp_path):
    tiny("mamba").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mamba has no dropout to set"):
        pretrained.load(str(tmp_path), dropout=0.1)
