"""Does our language model give the harness what the harness's own gives it, and lose nothing when it is killed?"""

import random
import time
from multiprocessing import get_context

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from plw_mlflow.evaluation import prefix_trees
from plw_mlflow.evaluation.answer_store import AnswerStore
from plw_mlflow.evaluation.scorer import Scorer
from tests.conftest import BOS, EOS, VOCABULARY, byte_tokenizer

WINDOW = 96  # positions of the tiny models
SIZES = {
    "vocab_size": VOCABULARY + 2,  # with two merges
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.3,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": BOS,
}
# What is special about each, and whether requests can share their computation in it.
FAMILIES = {
    "llama": ({}, True),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": WINDOW}, True),  # learned positions
    "mistral": ({"sliding_window": 40}, True),
    "gemma2": ({"sliding_window": 40, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}, True),
    "granite": ({"logits_scaling": 3.0, "embedding_multiplier": 2.0}, True),
    "cohere": ({"logit_scale": 0.4}, True),
    "bloom": ({"n_layer": 2, "n_head": 4}, False),  # positions are counted from the mask
    "mamba": ({"state_size": 4}, False),
}


def make_model(family, **changes):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family][0] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def instances(kind, *arguments, task="task"):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=(task, number, 1))
        for number, given in enumerate(arguments)
    ]


def harness(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5, max_batch_size=None)


def ours(model, tokenizer, *args, shares=True, **kwargs):
    if shares:
        scorer = Scorer(model, tokenizer, *args, **kwargs)
    else:
        with pytest.warns(UserWarning, match="each is scored alone, which takes longer"):
            scorer = Scorer(model, tokenizer, *args, **kwargs)
    assert scorer.shares_prefixes is shares
    return scorer


FEW_SHOT = "Q: one and one? A: two\n\nQ: two and two? A: "
PAIRS = [
    *((FEW_SHOT + f"four\n\nQ: {n}? A:", f" {option}") for n in ("three", "ten") for option in ("six", "seven", "se")),
    *(("Is it so?", option) for option in (" y", " n", " no", " no")),  # options of one token, and one twice
    *((f"The dog and the {noun} ran because it", " was quick") for noun in ("cat", "fox")),  # contexts of one answer
    ("trailing blanks  ", "go to the answer"),
    ("", "no context"),
    ("", "<s>begins"),
    ("<s>Is it", " so?"),
    ("x" * 90, " too long together"),
    ("x" * 200, " far too long"),
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_the_harnesss(family, bos):
    model, tokenizer = make_model(family), byte_tokenizer(("Ġ", "s"), ("Ġs", "e"), bos=bos)
    requests = instances("loglikelihood", *PAIRS)
    expected = harness(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    scorer = ours(model, tokenizer, shares=FAMILIES[family][1])
    found = scorer.loglikelihood(requests, disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert scorer.truncated == {"task": 2}
    assert not scorer.windowed


def test_the_likeliest_tokens_are_said_to_be_greedy():
    model, tokenizer = make_model("llama"), byte_tokenizer()
    pairs, expected = [], []
    for number in range(12):
        context = f"{FEW_SHOT}{number}"
        likeliest = model(torch.tensor([tokenizer(context).input_ids])).logits[0, -1].argmax().item()
        for letter in map(chr, range(ord("!"), ord("~"))):
            pairs.append((context, letter))
            expected.append(tokenizer(letter).input_ids == [likeliest])
    assert 0 < sum(expected) < 12
    found = ours(model, tokenizer).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_rolling_log_likelihoods_are_the_harnesss(family):
    model, tokenizer = make_model(family), byte_tokenizer()
    texts = [("short",), ("exactly a window " * 10)[:WINDOW], "more than one window " * 10, "short"]
    requests = instances("loglikelihood_rolling", *((text,) if isinstance(text, str) else text for text in texts))
    expected = harness(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours(model, tokenizer, shares=FAMILIES[family][1]).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generations_are_the_harnesss(family):
    model, tokenizer = make_model(family), byte_tokenizer(bos=True)
    prompts = [f"{FEW_SHOT[:n]}{n}" for n in (5, 17, 17, 30, 44)] + ["x" * 200]
    lengths = {"until": ["\n"], "do_sample": False, "max_gen_toks": 24}
    # Letters that a random model is bound to say after a while, at different times.
    stops = {"until": ["e", "q", "Zx"], "max_gen_toks": 32}
    requests = instances("generate_until", *((prompt, kind) for kind in (lengths, stops) for prompt in prompts))
    expected = harness(model, tokenizer).generate_until(requests, disable_tqdm=True)
    scorer = ours(model, tokenizer, shares=FAMILIES[family][1])
    found = scorer.generate_until(requests, disable_tqdm=True)
    assert found == expected
    assert len(set(map(len, found))) > 1
    assert scorer.truncated == {"task": 2}
    assert scorer.computed == 10  # two requests occur twice


def test_a_models_own_generation_settings_are_followed():
    model, tokenizer = make_model("llama"), byte_tokenizer()
    requests = instances("generate_until", ("Once", {"until": ["\n"], "max_gen_toks": 24}))
    plain = ours(model, tokenizer).generate_until(requests, disable_tqdm=True)
    model.generation_config.repetition_penalty = 5.0
    expected = harness(model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert expected != plain
    assert ours(model, tokenizer).generate_until(requests, disable_tqdm=True) == expected


def test_sampled_generations_are_not_taken_for_one_another():
    model, tokenizer = make_model("llama"), byte_tokenizer()
    settings = {"until": ["\n"], "max_gen_toks": 24, "do_sample": True, "temperature": 1.0}
    found = ours(model, tokenizer).generate_until(instances("generate_until", *[("Once", settings)] * 8), True)
    assert len(set(found)) > 1


def test_attached_adapters_are_scored_as_they_are():
    model, tokenizer = make_model("llama"), byte_tokenizer()
    requests = instances("loglikelihood", *PAIRS)
    base = ours(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    expected = harness(adapted, tokenizer).loglikelihood(requests, disable_tqdm=True)
    found = ours(adapted, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], rel=1e-5)
    assert [ll for ll, _ in found] != pytest.approx([ll for ll, _ in base], rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_an_answer_longer_than_the_window_is_scored_window_by_window(family):
    """HFLM stops at it. By hand: the context and the answer in windows, of which the answer's tokens are summed."""
    model, tokenizer = make_model(family), byte_tokenizer()
    context, answer = "Why is that so?", " because" * 30
    scorer = ours(model, tokenizer, shares=FAMILIES[family][1])
    requests = instances("loglikelihood", (context, answer), (context, " short"))
    (found, is_greedy), _ = scorer.loglikelihood(requests, disable_tqdm=True)
    tokens = torch.tensor(tokenizer(context + answer).input_ids)
    predicted, total = 1, 0.0  # the first token is given
    while predicted < len(tokens):
        last = min(predicted + WINDOW, len(tokens))
        window = tokens[max(0, last - 1 - WINDOW) : last]
        log_probabilities = model(window[:-1].unsqueeze(0)).logits[0].log_softmax(-1)
        for place in range(max(predicted, len(context)), last):
            row = place - 1 - (last - len(window))
            total += log_probabilities[row, tokens[place]].item()
        predicted = last
    assert found == pytest.approx(total, rel=1e-5)
    assert not is_greedy
    assert scorer.windowed == {"task": 1}
    assert not scorer.truncated


def test_a_long_request_changes_no_short_one():
    """Of a model whose position frequencies follow the longest text of its batch."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    longrope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    model, tokenizer = make_model("llama", rope_parameters=longrope), byte_tokenizer()
    pairs = [
        ("Is it?", " yes"),
        ("Is it?", " no"),
        ("long " * 12, "text"),
        ("Why is that?", " so"),
        ("more " * 10, "s"),
    ]
    settings = {"until": ["e"], "max_gen_toks": 8}
    texts = [("Is it?", settings), ("long " * 12, settings), ("more " * 3, settings), ("Why?", settings)]

    def answers(scorer, pairs, texts):
        scored = scorer.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
        return [ll for ll, _ in scored], scorer.generate_until(instances("generate_until", *texts), disable_tqdm=True)

    together = answers(Scorer(model, tokenizer), pairs, texts)
    alone = (
        [answers(Scorer(model, tokenizer), [pair], []) for pair in pairs],
        [answers(Scorer(model, tokenizer), [], [text]) for text in texts],
    )
    assert together[0] == pytest.approx([lls[0] for lls, _ in alone[0]], rel=1e-5)
    assert together[1] == [written[0] for _, written in alone[1]]


def test_requests_share_their_beginnings(monkeypatch):
    """The work, in tokens that go through the model: every distinct prefix once."""
    model, tokenizer = make_model("llama"), byte_tokenizer()
    scorer = ours(model, tokenizer)
    computed = []
    original = prefix_trees.inputs

    def count(batch, *args):
        computed.extend(map(len, batch))
        return original(batch, *args)

    monkeypatch.setattr(prefix_trees, "inputs", count)
    questions = [("k" * 50, option) for option in ("one", "two", "three", "four")]
    scorer.loglikelihood(instances("loglikelihood", *questions, *questions), disable_tqdm=True)
    assert sum(computed) == 50 + 2 + 1 + 4 + 3  # the last token is no input, and t is shared by two and three


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_batches_are_halved_where_memory_is_short(family, monkeypatch):
    model, tokenizer = make_model(family), byte_tokenizer()
    requests = instances("loglikelihood", *PAIRS)
    texts = instances("generate_until", *((FEW_SHOT + str(n), {"until": ["e"], "max_gen_toks": 16}) for n in range(9)))
    shares = FAMILIES[family][1]
    expected = ours(model, tokenizer, shares=shares)
    expected = expected.loglikelihood(requests, True), expected.generate_until(texts, True)
    scorer = ours(model, tokenizer, shares=shares)
    forward = model.base_model.forward

    def short_of_memory(input_ids, **kwargs):
        if input_ids.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", short_of_memory)
    with pytest.warns(UserWarning, match="CUDA out of memory.*going on with .* tokens at once"):
        found = scorer.loglikelihood(requests, True)
    assert scorer.generate_until(texts, True) == expected[1]
    assert scorer.batch_tokens < 2048
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected[0]], rel=1e-5)


def test_memory_that_holds_no_single_request_is_an_error(monkeypatch):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    scorer = ours(model, tokenizer)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.base_model, "forward", out_of_memory)
    requests = instances("loglikelihood", *PAIRS[:6])
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="going on with 1024 tokens"):
        scorer.loglikelihood(requests, True)


def test_a_window_without_room_for_the_answer_is_told():
    scorer = ours(make_model("llama"), byte_tokenizer())
    with pytest.raises(ValueError, match=f"task long asks for answers of {WINDOW} tokens.*has {WINDOW}"):
        scorer.generate_until(instances("generate_until", ("x", {"max_gen_toks": WINDOW}), task="long"))


# Going on after a kill.

MANY = [(f"Question {n} is {'long ' * (n % 7)}?", f" {option}") for n in range(40) for option in ("yes", "no", "maybe")]


def score_slowly(folder, pipe):
    """Score MANY, then generate; tells of every batch when it is computed, and at last of all answers."""
    scorer = Scorer(make_model("llama"), byte_tokenizer(), 128, folder)

    def slowed(compute):
        def run(*args):
            results = compute(*args)
            pipe.send(len(results))
            time.sleep(0.02)  # a kill may come before the batch is written down, or after
            return results

        return run

    scorer._score_trees, scorer._generate = slowed(scorer._score_trees), slowed(scorer._generate)
    scores = scorer.loglikelihood(instances("loglikelihood", *MANY), True)
    settings = {"until": ["e"], "max_gen_toks": 16}
    texts = scorer.generate_until(instances("generate_until", *((context, settings) for context, _ in MANY)), True)
    pipe.send([scores, texts, scorer.computed])


@pytest.fixture(scope="module")
def start():
    """Starts `score_slowly` in a process of its own; these are forked from one that has imported all they need."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.evaluation.test_scorer"])

    def start_one(folder):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=score_slowly, args=(folder, sender))
        process.start()
        sender.close()  # so that the pipe ends when the process does
        return process, receiver

    return start_one


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_scoring_goes_on_where_it_was(start, tmp_path, seed):
    """Killed at random moments, it ends with the numbers of an undisturbed one, and has done no request twice."""
    chance = random.Random(seed)
    undisturbed, told = start(tmp_path / "whole")
    while isinstance(expected := told.recv(), int):
        pass
    undisturbed.join()
    kept = 0
    for batches in (chance.randrange(1, 8), chance.randrange(1, 8), None):
        process, told = start(tmp_path / "killed")
        if batches is None:
            break
        for _ in range(batches):
            assert isinstance(told.recv(), int)  # there are enough batches for three processes
        time.sleep(chance.random() * 0.03)
        process.kill()
        process.join()
        (file,) = (tmp_path / "killed").iterdir()
        assert AnswerStore(file).kept > kept or batches == 1
        kept = AnswerStore(file).kept
        with file.open("ab") as torn:
            torn.write(b'{"00": [-1.5, fal')  # what a kill in mid-write leaves
    computed = []
    while isinstance(found := told.recv(), int):
        computed.append(found)
    process.join()
    assert found[:2] == expected[:2]  # to the bit, as the batches are the same
    assert kept > 0
    assert found[2] == sum(computed) == expected[2] - kept


def test_other_requests_take_over_what_they_have_in_common(tmp_path):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    first = ours(model, tokenizer, None, tmp_path)
    first.loglikelihood(instances("loglikelihood", *PAIRS[:6]), True)
    second = ours(model, tokenizer, None, tmp_path)
    found = second.loglikelihood(instances("loglikelihood", *PAIRS), True)
    expected = ours(model, tokenizer)
    assert [ll for ll, _ in found] == pytest.approx(
        [ll for ll, _ in expected.loglikelihood(instances("loglikelihood", *PAIRS), True)], rel=1e-5
    )
    assert second.computed == expected.computed - first.computed


def test_another_model_has_answers_of_its_own(tmp_path):
    tokenizer = byte_tokenizer()
    requests = instances("loglikelihood", *PAIRS)
    model = make_model("llama")
    first = ours(model, tokenizer, None, tmp_path).loglikelihood(requests, True)
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1
    other = ours(model, tokenizer, None, tmp_path)
    assert other.loglikelihood(requests, True) != first
    assert other.answers.kept == 0


def test_answers_come_back_as_they_were(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    given = {"a": [-0.1 - 0.2, True], "b": "naïve\ntext\u2028"}
    AnswerStore(file).add(given)
    back = AnswerStore(file)
    assert {key: back[key] for key in given} == given
    assert back.kept == 2
