"""Held-out data sets: their scores by hand, in a cell, and again in an evaluation of its run."""

import json
import math

import pytest
import torch

from plw_mlflow.config import DataOptions, ScoreOptions
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import evaluate, held_out
from plw_mlflow.evaluation.measures import completion, prompt
from plw_mlflow.evaluation.scorer import Scorer
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import pretrained

RECORDS = [
    {"instruction": "Where does Ana live?", "input": "", "output": "Ana lives in Oslo."},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Say the word again.", "input": "tree", "output": "tree"},
]


@pytest.fixture(scope="module")
def toy():
    return pretrained.load("toy").eval(), pretrained.load_tokenizer("toy")


@pytest.fixture
def new_file(tmp_path):
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@pytest.fixture
def options(tmp_path):
    return DataOptions(cache_dir=tmp_path / "cache")


def test_all_records_are_taken_in_their_order(toy, new_file, options):
    (found,) = held_out.read([str(new_file)], toy[1], options)
    assert (found.task, found.prompt) == ("held_out_new", "template alpaca")
    assert found.numbers == [1, 2, 3]
    texts = [toy[1].decode(completion(example), skip_special_tokens=True).strip() for example in found.examples]
    assert texts == [record["output"] for record in RECORDS]


def test_a_limit_takes_the_first_records(toy, new_file, options):
    (found,) = held_out.read([str(new_file)], toy[1], options, limit=2)
    assert found.numbers == [1, 2]


def test_options_that_choose_among_the_cells_own_records_do_not_choose_here(toy, new_file, tmp_path):
    chosen = DataOptions(cache_dir=tmp_path / "cache", max_records=1, invert=True, mix="toy-short", mix_share=0.3)
    (found,) = held_out.read([str(new_file)], toy[1], chosen)
    assert len(found.examples) == len(RECORDS)


def test_the_format_that_is_given_is_that_of_a_held_out_file_too(toy, new_file, tmp_path):
    rows = [{**record, "prompt": record["instruction"], "completion": record["output"]} for record in RECORDS]
    new_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(cache_dir=tmp_path / "cache", format="prompt-completion")
    (found,) = held_out.read([str(new_file)], toy[1], options)
    assert len(found.examples) == len(RECORDS)
    with pytest.raises(UserError, match="say which with --format"):
        held_out.read([str(new_file)], toy[1], DataOptions(cache_dir=tmp_path / "cache"))


def test_of_a_conversation_the_last_answer_is_measured(toy, tmp_path):
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    chat = tmp_path / "chat.jinja"
    chat.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")
    options = DataOptions(cache_dir=tmp_path / "cache", template=str(chat), completion_turns="every")
    (found,) = held_out.read([str(file)], toy[1], options)
    (example,) = found.examples
    assert toy[1].decode(completion(example), skip_special_tokens=True) == "Second."
    assert "First." in toy[1].decode(prompt(example))


def test_records_whose_completion_is_cut_away_are_left_out_and_told(toy, new_file, tmp_path):
    rows = [{"prompt": "One? " * 40, "completion": "Alone."}, {"prompt": "One?", "completion": "Yes."}] * 2
    new_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(cache_dir=tmp_path / "cache", template="none", max_tokens=30, on_long="truncate")
    with pytest.warns(UserWarning, match="2 records without a prompt or a completion .* the first of them record 1"):
        (found,) = held_out.read([str(new_file)], toy[1], options)
    assert found.numbers == [2, 4]


def test_two_sets_of_one_name_are_refused(toy, new_file, options):
    with pytest.raises(UserError, match="different names"):
        held_out.read([str(new_file), str(new_file)], toy[1], options)


def test_the_loss_is_that_of_all_completion_tokens(toy, new_file, options):
    model, tokenizer = toy
    sets = held_out.read([str(new_file)], tokenizer, options)
    scores, rows = held_out.run(Scorer(model, tokenizer), sets, seed=1)
    losses, counts = [], []
    for example in sets[0].examples:
        tokens = torch.tensor([example.tokens.tolist()])
        start, end = len(prompt(example)), len(prompt(example)) + len(completion(example))
        with torch.no_grad():
            log_probabilities = model(tokens).logits[0].double().log_softmax(-1)
        picked = log_probabilities[start - 1 : end - 1].gather(1, tokens[0, start:end, None])
        losses.append(-float(picked.sum()))
        counts.append(end - start)
    found = {score.metric: score for score in scores}
    expected = sum(losses) / sum(counts)
    assert found["completion_loss"].score == pytest.approx(expected, rel=1e-5)
    residuals = [loss - expected * count for loss, count in zip(losses, counts, strict=True)]
    mean = sum(residuals) / 3
    deviation = math.sqrt(sum((residual - mean) ** 2 for residual in residuals) / 2)
    assert found["completion_loss"].stderr == pytest.approx(deviation * math.sqrt(3) / sum(counts), rel=1e-4)
    of_loss = [row["value"] for row in rows if row["metric"] == "completion_loss"]
    assert of_loss == pytest.approx([loss / count for loss, count in zip(losses, counts, strict=True)], rel=1e-5)
    assert not any(score.is_primary for score in scores)


def test_texts_are_those_that_the_model_writes_itself(toy, new_file, options):
    model, tokenizer = toy
    sets = held_out.read([str(new_file)], tokenizer, options)
    _, rows = held_out.run(Scorer(model, tokenizer), sets, seed=1)
    written = [row["prediction"] for row in rows if row["metric"] == "exact_match"]
    longest = max(len(completion(example)) for example in sets[0].examples)
    for example, text in zip(sets[0].examples, written, strict=True):
        tokens = torch.tensor([prompt(example).tolist()])
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=longest
        )[0, tokens.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_exact_matches_are_counted(toy, new_file, options):
    model, tokenizer = toy
    sets = held_out.read([str(new_file)], tokenizer, options)
    answers = iter([[record["output"] for record in RECORDS[:2]] + ["no"]])

    class Knowing(Scorer):
        def greedy_texts(self, *given, **named):
            return next(answers)

    scores, _ = held_out.run(Knowing(model, tokenizer), sets, seed=1)
    found = {score.metric: score.score for score in scores}
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert 0 < found["bleu"] < 1


def test_records_that_are_trained_on_are_named(toy, new_file, options):
    sets = held_out.read([str(new_file)], toy[1], options)
    with pytest.warns(UserWarning, match="2 of the 3 examples of held_out_new are in the training data"):
        held_out.warn_of_overlap(sets, sets[0].examples[:2])


def test_an_evaluation_has_them_beside_its_benchmarks(toy, new_file, options):
    model, tokenizer = toy
    sets = held_out.read([str(new_file)], tokenizer, options)
    asked = ScoreOptions(tasks="toy_choice", limit=1)
    evaluation = evaluate.run(model, tokenizer, load_tasks(asked), asked, seed=1, held_out_sets=sets)
    assert [score.task for score in evaluation.primary] == ["toy_choice"]
    metrics = [score.metric for score in evaluation.scores if score.task == "held_out_new"]
    assert metrics == ["completion_loss", "exact_match", "bleu"]
    assert evaluation.results["benchmarks"]["held_out_new"]["documents"] == len(RECORDS)
    assert {row["task"] for row in evaluation.questions} == {"toy_choice", "held_out_new"}
