"""Do the mechanism measures measure what they say? Against other ways to compute them, on tiny models."""

import copy
import math

import numpy as np
import pytest
import sacrebleu
import torch
from peft import LoraConfig, get_peft_model

from plw_mlflow.config import MEASURES, DataOptions
from plw_mlflow.data.pieces import Segment
from plw_mlflow.evaluation import measures
from plw_mlflow.models import pretrained
from tests.conftest import EOS, byte_tokenizer, make_example, tiny_llama

AROUND, ASKED, GIVEN = Segment.TEMPLATE, Segment.INSTRUCTION, Segment.COMPLETION


def changed(model, scale=0.01):
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


def test_weight_distance_is_the_norm_of_all_differences_and_of_each_layers():
    base = tiny_llama()
    model = changed(base)
    found = measures.weight_distance(model, base)
    differences = {
        name: (p - q).flatten() for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True)
    }
    assert found["weight_distance"] == pytest.approx(torch.cat(list(differences.values())).norm().item(), rel=1e-5)
    first = torch.cat([d for name, d in differences.items() if ".layers.0." in name]).norm().item()
    assert found["weight_distance_by_layer/layer_00"] == pytest.approx(first, rel=1e-5)
    parts = {name.rpartition("/")[2] for name in found} - {"weight_distance"}
    assert parts == {"layer_00", "layer_01", "embed_tokens", "norm", "lm_head"}
    squares = sum(value**2 for name, value in found.items() if "/" in name)
    assert math.sqrt(squares) == pytest.approx(found["weight_distance"])


def test_weight_distance_of_adapters_is_that_of_their_scaled_product():
    base = tiny_llama()
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), settings)
    layers = [layer.self_attn.q_proj for layer in adapted.get_base_model().model.layers]
    products = [2 * q.lora_B["default"].weight @ q.lora_A["default"].weight for q in layers]  # alpha / r is 2
    expected = math.sqrt(sum(product.pow(2).sum().item() for product in products))
    found = measures.weight_distance(adapted.merge_and_unload(), base)
    assert found["weight_distance"] == pytest.approx(expected, rel=1e-4)
    assert found["weight_distance_by_layer/lm_head"] == 0


def test_tied_weights_count_once_and_rows_the_base_has_not_count_nowhere():
    base = tiny_llama(tied=True)
    model = copy.deepcopy(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 3
    assert measures.weight_distance(model, base)["weight_distance"] == pytest.approx(3)
    with pytest.raises(ValueError, match=r"differ in weights: lm_head\.weight"):
        measures.weight_distance(tiny_llama(), base)


def test_divergence_is_that_of_all_prompt_positions():
    base = tiny_llama()
    model = changed(base, 0.1)
    prompts = [np.array([0, 7, 9, 30], np.int32), np.array([0, 5], np.int32)]
    by_token = []
    for tokens in prompts:
        for end in range(1, len(tokens) + 1):  # every position by itself
            given = torch.tensor(tokens[None, :end].astype(np.int64))
            ours, theirs = (one(given).logits[0, -1].double().softmax(0) for one in (model, base))
            by_token.append((ours * (ours / theirs).log()).sum().item())
    assert measures.divergence(model, base, prompts) == pytest.approx(sum(by_token) / 6, rel=1e-4)
    assert measures.divergence(base, base, prompts) == 0


def test_prompt_and_completion_part_where_the_completion_begins():
    example = make_example([0, 4, 5, 6, 7, EOS, 8], [AROUND, ASKED, AROUND, GIVEN, GIVEN, GIVEN, AROUND])
    assert measures.prompt(example).tolist() == [0, 4, 5]
    assert measures.completion(example).tolist() == [6, 7, EOS]
    assert measures.prompt(make_example([0, 4], [AROUND, ASKED])).tolist() == [0, 4]


def test_answers_are_what_the_model_gives_to_each_prompt_alone():
    """In padded batches as one by one by the model's logits, up to the end of text or to what max_tokens leaves."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with torch.no_grad():  # so that some answers end, and some do not
        model.lm_head.weight[EOS] *= 1.5
    draw = np.random.default_rng(0)
    examples = [
        make_example([0, *draw.integers(2, 200, length - 1), 9, EOS], [AROUND] + [ASKED] * (length - 1) + [GIVEN] * 2)
        for length in draw.integers(2, 12, 24)
    ]
    found = measures.generate(model, tokenizer, examples, max_tokens=20)
    for example, (answer, has_ended) in zip(examples, found, strict=True):
        tokens = measures.prompt(example).tolist()
        expected = []
        while len(tokens) < 20:
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == EOS:
                break
            tokens.append(token)
            expected.append(token)
        assert (answer, has_ended) == (expected, len(tokens) < 20)
    assert 0 < sum(has_ended for _, has_ended in found) < 24


def test_what_is_known_by_heart_has_bleu_1(monkeypatch):
    tokenizer = byte_tokenizer()
    texts = ["the cat sat on the mat", "a dog ran home at noon"]
    ids = [tokenizer(text).input_ids for text in texts]
    examples = [make_example([0, 3, *some, EOS], [AROUND, ASKED] + [GIVEN] * (len(some) + 1)) for some in ids]
    monkeypatch.setattr(measures, "generate", lambda *_: [(some, True) for some in ids])
    assert measures.memorisation(None, tokenizer, examples, 64) == pytest.approx(1)
    monkeypatch.setattr(measures, "generate", lambda *_: [(ids[0], True), (ids[0], True)])
    expected = sacrebleu.corpus_bleu([texts[0]] * 2, [texts]).score / 100
    assert measures.memorisation(None, tokenizer, examples, 64) == pytest.approx(expected)


def test_stability_is_relative():
    assert measures.relative_deviation([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert measures.relative_deviation([10.0, 20.0, 30.0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two steps at least, and the run has 1"):
        measures.relative_deviation([1.0])


def test_all_measures_of_a_model_that_is_its_base():
    options = DataOptions(max_records=60, max_tokens=128)
    model, tokenizer = pretrained.load("toy"), pretrained.load_tokenizer("toy")
    found = measures.run(MEASURES, model, tokenizer, "toy", "toy-short", options, 4, [2.0, 1.0])
    assert {name for name in found if "/" not in name} == {*MEASURES, "length_cut"}
    assert (found["weight_distance"], found["kl"]) == (0, 0)
    assert 0 <= found["memorisation"] < 0.5  # of what it has never seen
    assert 0 < found["length"] < 128


def test_measures_of_validation_examples_are_refused_where_there_are_none():
    measures.check(MEASURES, 1)
    measures.check(["stability", "memorisation"], 0)
    with pytest.raises(ValueError, match="kl and length would be of validation examples, of which there are none"):
        measures.check(["kl", "stability", "length"], 0)
