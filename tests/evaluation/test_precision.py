"""Is scoring in bfloat16 what training in bfloat16 computes, near float32, and never mixed with it?"""

import copy

import pytest
import torch

from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation import evaluate
from plw_mlflow.evaluation.scorer import Scorer
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import held, pretrained
from tests.conftest import byte_tokenizer
from tests.evaluation.test_scorer import FAMILIES, PAIRS, instances, make_model

TEXTS = [("Q: one and one? A:", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False})] * 2


def answers(model, tokenizer, precision):
    scorer = Scorer(model, tokenizer, precision=precision)
    return scorer.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)


@pytest.mark.filterwarnings("ignore:.*each is scored alone")
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32_and_another_number(family):
    model, tokenizer = make_model(family), byte_tokenizer(("Ġ", "s"), ("Ġs", "e"))
    exact = torch.tensor([ll for ll, _ in answers(model, tokenizer, "float32")])
    rounded = torch.tensor([ll for ll, _ in answers(model, tokenizer, "bfloat16")])
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_layers_held_in_bfloat16_give_the_same_bits(family):
    model, tokenizer = make_model(family), byte_tokenizer()
    holding = copy.deepcopy(model).requires_grad_(False)
    held.hold(holding, torch.bfloat16)
    assert held.is_held(holding)
    assert answers(holding, tokenizer, "bfloat16") == answers(model, tokenizer, "bfloat16")
    requests = instances("generate_until", *TEXTS)
    texts = [
        Scorer(each, tokenizer, precision="bfloat16").generate_until(requests, disable_tqdm=True)
        for each in (model, holding)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_requests_share_their_beginnings_in_bfloat16_where_they_do_in_float32(family):
    """Whether they can is tried in float32, where a wrong place of attention shows."""
    model = make_model(family).requires_grad_(False)
    held.hold(model, torch.bfloat16)
    expected = FAMILIES[family][1]
    if not expected:
        with pytest.warns(UserWarning, match="each is scored alone"):
            assert not Scorer(model, byte_tokenizer(), precision="bfloat16").shares_prefixes
    else:
        assert Scorer(model, byte_tokenizer(), precision="bfloat16").shares_prefixes


def test_answers_in_one_precision_are_not_taken_for_those_in_another(tmp_path):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    requests = instances("loglikelihood", *PAIRS)
    computed = []
    for precision in ("float32", "bfloat16", "float32", "bfloat16"):
        scorer = Scorer(model, tokenizer, None, tmp_path, precision)
        scorer.loglikelihood(requests, disable_tqdm=True)
        computed.append(scorer.computed)
    assert computed[0] == computed[1] > 0
    assert computed[2:] == [0, 0]


def test_a_score_names_its_arithmetic():
    options = ScoreOptions(tasks="toy_choice", limit=6)
    tokenizer, tasks = pretrained.load_tokenizer("toy"), load_tasks(options)
    for precision in ("float32", "bfloat16"):
        model = pretrained.load("toy")
        found = evaluate.run(model, tokenizer, tasks, options, seed=1, precision=precision)
        assert {score.precision for score in found.scores} == {precision}
        assert held.is_held(model) == (precision == "bfloat16")
