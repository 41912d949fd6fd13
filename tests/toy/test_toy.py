"""The toy laboratory keeps its promises: determinism, ratios, held-out people, right answers, shipped weights."""

import hashlib
import json
import re
from random import Random

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from plw_mlflow.evaluation.task_sets import OWN_TASKS
from plw_mlflow.study import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from plw_mlflow.toy import TOY_FOLDER, benchmarks, instructions, pretraining, world

SETS = ("toy-short", "toy-long")
BENCHMARKS = ("toy_choice", "toy_short", "toy_long")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY_FOLDER)


@pytest.fixture(scope="module")
def corpus():
    return pretraining.corpus(5000, seed=1234)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("toy-short", "7af3809a1db1d62fb877a7e357afb39cc5c85eec46e11547cf74a09e4ef78319"),
        ("toy-long", "2c6ff02ef21096cc23dc163ac899c3a77e2aee2428cd7fc1e210f7a48bc6c505"),
    ],
)
def test_rows_are_the_same_on_every_machine(name, expected):
    text = json.dumps(instructions.rows(name))
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(ValueError, match="'toy-medium'; there are toy-short, toy-long"):
        instructions.rows("toy-medium")


@pytest.mark.parametrize(("name", "low", "high"), [("toy-short", 0, 0.3), ("toy-long", 2, float("inf"))])
def test_generation_ratio(name, low, high, tokenizer):
    def count(texts):
        return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])

    rows = instructions.rows(name)
    prompt = count([row["instruction"] for row in rows]) + count([row["input"] for row in rows])
    assert low < count([row["output"] for row in rows]) / prompt < high


@pytest.mark.parametrize("name", SETS)
def test_rows_never_name_the_held_out(name):
    text = " ".join(" ".join(row.values()) for row in instructions.rows(name))
    assert not [person.name for person in world.held_out_people() if person.name in text]
    assert all(person.name in text for person in world.known_people())


@pytest.mark.parametrize("name", SETS)
def test_rows_have_an_instruction_and_an_output(name):
    assert all(row["instruction"] and row["output"] for row in instructions.rows(name))


def test_corpus_is_reproducible_and_tells_of_everybody(corpus):
    assert corpus == pretraining.corpus(5000, seed=1234) != pretraining.corpus(5000, seed=1235)
    text = "\n".join(corpus)
    assert all(person.name in text for person in world.people())


def test_corpus_holds_neither_template_nor_benchmark(corpus):
    text = "\n".join(corpus)
    assert not [piece for piece in ("###", "Below is", "Response", "Predict the prompt") if piece in text]
    questions = [doc["prompt"].split("\n")[3] for task in BENCHMARKS for doc in benchmarks.documents(task)]
    assert not [question for question in questions if question in text]
    for person in world.held_out_people():  # no question of any kind about the held-out
        for kind in world.KINDS.values():
            assert not [q for q in kind.questions if q.format(name=person.name) in text]


def test_no_name_or_value_can_be_taken_for_another():
    values = [value for kind in world.KINDS.values() for value in kind.values]
    names = [person.name for person in world.people()]
    assert len({*values, *names}) == len(values) + len(names)
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_biography_states_each_fact_once():
    person = world.people()[0]
    text = world.biography(person, list(world.KINDS), Random("test"))
    assert text.startswith(person.name)
    assert all(len(re.findall(rf"\b{value}\b", text)) == 1 for value in person.facts.values())


class Knows(LM):
    """A language model that looks the answers up in the world, through prompts alone."""

    def answer(self, prompt):
        asked = prompt.removeprefix(ALPACA_WITHOUT_INPUT.split("{")[0]).removesuffix("\n\n### Response:")
        person = next(person for person in world.held_out_people() if person.name in asked)
        for kind, facts in world.KINDS.items():
            if asked in [question.format(name=person.name) for question in facts.questions]:
                return person.facts[kind]
        return next(doc["answer"] for doc in benchmarks.documents("toy_long") if asked in doc["prompt"])

    def loglikelihood(self, requests):
        return [(float(choice == self.answer(prompt)), True) for prompt, choice in (r.args for r in requests)]

    def generate_until(self, requests):
        return [f"{self.answer(request.args[0])}" for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.fixture(scope="module")
def results():
    manager = TaskManager(include_path=str(OWN_TASKS), include_defaults=False)
    tasks = ["toy_choice", "toy_short", "toy_long"]
    return lm_eval.simple_evaluate(model=Knows(), tasks=tasks, task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize(
    ("task", "metric", "expected"),
    [("toy_choice", "acc", 1), ("toy_short", "acc", 1), ("toy_long", "bleu", 100)],
)
def test_who_knows_scores_full_marks(results, task, metric, expected):
    assert results["results"][task][f"{metric},none"] == pytest.approx(expected)
    assert results["n-samples"][task]["effective"] >= 100


def test_prompts_are_alpacas(results):
    """The prompt a benchmark sends is the template around its instruction: no space, shot or delimiter besides."""
    for task in BENCHMARKS:
        for sample in results["samples"][task]:
            prompt = sample["arguments"][0][0]
            instruction = prompt.split("### Instruction:\n")[1].split("\n")[0]
            assert prompt == ALPACA_WITHOUT_INPUT.format(instruction=instruction)


@pytest.mark.parametrize(
    "text", ["", " ", "Mira  lives\n\n\tin Åse 🦆.", "\x00\x7f</b>", "ﬁ½ 日本語", ALPACA_WITH_INPUT]
)
def test_tokenizer_keeps_any_text(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_template_costs_few_tokens(tokenizer):
    assert len(tokenizer(ALPACA_WITH_INPUT)["input_ids"]) <= 52  # LLaMA's tokenizer: about 51


def test_shipped_weights_are_those_recorded():
    made = json.loads((TOY_FOLDER / "made.json").read_text())
    weights = (TOY_FOLDER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == made["sha256"]
    assert len(weights) < 4e6


def test_shipped_base_has_read_the_corpus(tokenizer):
    """Loaded without a word on types it is float32, and its loss on the corpus is near the recorded one."""
    model = AutoModelForCausalLM.from_pretrained(TOY_FOLDER)
    assert str(model.dtype) == "torch.float32"
    losses = []
    for text in pretraining.corpus(20, seed=99):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 2  # nats per token; a uniform guess is 6.9
