"""Is [PAD] added where there is no padding token, with the mean of the other rows, and what does it change?"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from plw_mlflow.models import pad_token
from tests.conftest import VOCABULARY, byte_tokenizer, tiny_llama
from tests.families import tiny


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_is_added_that_is_the_mean_of_the_others(tied, tmp_path):
    model, tokenizer = tiny_llama(tied=tied), byte_tokenizer()
    before = [part.weight.clone() for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert pad_token.add(model, tokenizer)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", VOCABULARY)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == VOCABULARY + 1
    assert loaded.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path).pad_token_id == VOCABULARY
    for rows, part in zip(before, (loaded.get_input_embeddings(), loaded.get_output_embeddings()), strict=True):
        torch.testing.assert_close(part.weight, torch.cat([rows, rows.mean(0, keepdim=True)]))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_it_is_one_class_more_in_the_softmax():
    """By hand: its logit is the mean of all others, so each loss grows by log(1 + exp(mean logit) / sum exp logits)."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokens = torch.arange(2, 30).unsqueeze(0)
    logits = model(tokens).logits[0, :-1]
    loss = cross_entropy(logits, tokens[0, 1:], reduction="none")
    pad_token.add(model, tokenizer)
    after = cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    expected = loss + torch.log1p((logits.mean(1) - logits.logsumexp(1)).exp())
    torch.testing.assert_close(after, expected)
    assert (after > loss).all()


def test_a_bias_has_its_mean_too():
    model, tokenizer = tiny("gptj", vocab_size=VOCABULARY), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    expected = model.lm_head.bias.mean()
    pad_token.add(model, tokenizer)
    torch.testing.assert_close(model.lm_head.bias[-1], expected)


def test_a_spare_row_is_used_where_the_model_has_one():
    model, tokenizer = tiny_llama(vocab_size=VOCABULARY + 3), byte_tokenizer()
    weight = model.get_input_embeddings().weight
    expected = torch.cat([weight[:VOCABULARY], weight[VOCABULARY + 1 :]]).mean(0)
    pad_token.add(model, tokenizer)
    assert len(model.get_input_embeddings().weight) == VOCABULARY + 3
    torch.testing.assert_close(model.get_input_embeddings().weight[VOCABULARY], expected)


def test_a_tokenizer_that_has_a_padding_token_keeps_it():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.pad_token = "</s>"
    assert not pad_token.add(model, tokenizer)
    assert len(model.get_input_embeddings().weight) == VOCABULARY


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCABULARY} tokens, but the model knows only 60"):
        pad_token.add(tiny("mistral"), byte_tokenizer())
