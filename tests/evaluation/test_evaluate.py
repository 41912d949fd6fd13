"""Do benchmark scores mean what they say?"""

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
import torch

from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation import evaluate, prompting, samples, scores
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.models import pretrained
from plw_mlflow.toy import TOY_FOLDER, benchmarks
from tests import stubs
from tests.conftest import byte_tokenizer
from tests.harness import command_line


def test_scores_equal_the_likelihoods_computed_by_hand():
    """acc is the share of questions whose right answer is the likeliest; here by the model's own logits."""
    model, tokenizer = pretrained.load("toy"), pretrained.load_tokenizer("toy")
    options = ScoreOptions(tasks="toy_choice", limit=24)
    (score,) = evaluate.run(model, tokenizer, load_tasks(options), options, seed=1).scores
    right = []
    for document in benchmarks.documents("toy_choice")[:24]:
        context = tokenizer(document["prompt"]).input_ids
        likelihoods = []
        for choice in document["choices"]:
            answer = tokenizer(choice, add_special_tokens=False).input_ids
            log_probabilities = model(torch.tensor([context + answer])).logits.log_softmax(-1)[0, len(context) - 1 : -1]
            likelihoods.append(sum(row[token].item() for row, token in zip(log_probabilities, answer, strict=True)))
        right.append(document["choices"][likelihoods.index(max(likelihoods))] == document["answer"])
    assert 0 < sum(right) < 24
    assert score.score == pytest.approx(sum(right) / 24)
    assert score.n == 24


@pytest.fixture(scope="module")
def real(shared):
    """The study's tasks on the real files, of which a few documents are scored; loaded once."""
    options = ScoreOptions(tasks="huerta2024-v1", data_dir=shared / "data/eval", limit=8)
    with pytest.warns(UserWarning, match=r"arc_challenge runs 0-shot, not 25: no arc_challenge_train\.jsonl in"):
        return load_tasks(options), options


@pytest.mark.parametrize(("prefer", "share"), [(stubs.knowing, 1.0), (stubs.misled, 0.0)])
def test_the_studys_tasks_know_right_from_wrong(real, prefer, share):
    """Models that have read the raw files: one that knows every answer, and one that is wrong wherever it can be."""
    tasks, options = real
    found = evaluate.score(stubs.Known(options.data_dir, prefer), tasks, options, seed=1)
    scores = {score.task: score.score for score in found.primary}
    assert scores == dict.fromkeys(scores, share)
    assert len(scores) == 8
    (mc1,) = (score for score in found.scores if score.task == "truthfulqa_mc1")
    assert (mc1.score, mc1.is_primary) == (share, False)
    assert {(score.num_fewshot, score.n) for score in found.primary} == {(0, 8)}
    assert found.primary[0].caveat == "0-shot, not 25: no arc_challenge_train.jsonl; only the first 8 of 1172 documents"
    assert found.results["documents_sha256"]["piqa"]["piqa_valid-labels.lst"].startswith("b4192dc3")


def test_a_guess_is_right_by_chance(real):
    """Where chance is defined: one option of several is right."""
    tasks, options = real
    alone = replace(tasks, loaded=[task for task in tasks.loaded if task.task_name in ("piqa", "winogrande")])
    stub = stubs.Known(options.data_dir, stubs.guessing(1))
    for score in evaluate.score(stub, alone, replace(options, limit=300), seed=1).primary:
        assert abs(score.score - 0.5) < 4 * (0.25 / 300) ** 0.5, score


QA = (  # QA_PROMPT of the harness at b281b09, in lm_eval/tasks/truthfulqa.py
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\n"
    "A: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\n"
    "A: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\n"
    "A: The 1992 Olympics were held in Barcelona, Spain."
)


class Recorder(stubs.LM):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    @property
    def tokenizer_name(self):
        return "none"  # the harness asks for it where a template is applied

    def _keep(self, requests):
        for request in requests:
            self.asked.setdefault(request.task_name, []).append(request.args)

    def loglikelihood(self, requests):
        self._keep(requests)
        return [(-1.0, False)] * len(requests)

    def generate_until(self, requests):
        self._keep(requests)
        return ["none"] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no task here asks for this")


def asked(tasks, folder, wrapping=None, limit=1):
    """What a model is asked for the first documents of each task, as (context, continuation or settings)."""
    options, recorder = ScoreOptions(tasks=tasks, data_dir=folder, limit=limit), Recorder()
    evaluation = evaluate.score(recorder, load_tasks(options), options, seed=1, wrapping=wrapping)
    return recorder.asked, evaluation


SMALL = {
    "arc_challenge_test.jsonl": '{"question": "Hot?", "choices": ["ice", "fire"], "answer": 1}\n' * 2,
    "arc_challenge_train.jsonl": "".join(
        f'{{"question": "N{n}?", "choices": ["a", "b{n}"], "answer": 1}}\n' for n in range(30)
    ),
    "piqa_valid.jsonl": '{"goal": "Eat.", "sol1": "Chew.", "sol2": "Cook."}\n',
    "piqa_valid-labels.lst": "1\n",
    "winogrande_dev.jsonl": '{"sentence": "He _ it now.", "option1": "ate", "option2": "met", "answer": 2}\n',
    "winogrande_train.jsonl": "".join(
        f'{{"sentence": "She{n} _ him.", "option1": "saw", "option2": "fed", "answer": 1}}\n' for n in range(9)
    ),
    "TruthfulQA_mc_task.json": json.dumps(
        [{"question": "Why?", "mc1_targets": {"So.": 1, "No.": 0}, "mc2_targets": {"So.": 1, "Yes.": 1, "No.": 0}}]
    ),
    "newstest2014.en-fr.en": "Yes.\n",
    "newstest2014.en-fr.fr": "Oui.\n",
    "newstest2016.en-de.en": "Yes.\n",
    "newstest2016.en-de.de": "Ja.\n",
}


@pytest.fixture
def small(tmp_path):
    for name, text in SMALL.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_prompts_are_those_the_study_ran(small):
    """By the harness's own code at b281b09, but for the translations, whose prompt the study replaced."""
    found, evaluation = asked("huerta2024-v1", small)
    context, continuation = found["arc_challenge"][1]
    *examples, question = context.split("\n\n")
    assert (question, continuation) == ("Question: Hot?\nAnswer:", " fire")
    assert len(set(examples)) == 25
    assert all(re.fullmatch(r"Question: N(\d+)\?\nAnswer: b\1", example) for example in examples)
    assert found["piqa"] == [("Question: Eat.\nAnswer:", " Chew."), ("Question: Eat.\nAnswer:", " Cook.")]
    (context, continuation), _ = found["winogrande"]
    *examples, question = context.split("\n\n")
    assert (question, continuation) == ("He ate", " it now.")
    assert len(set(examples)) == 5
    assert all(re.fullmatch(r"She\d saw him\.", example) for example in examples)
    truth = f"{QA}\n\nQ: Why?\nA:"
    assert found["truthfulqa_mc1"] == [(truth, " So."), (truth, " No.")]
    assert found["truthfulqa_mc2"] == [(truth, " So."), (truth, " Yes."), (truth, " No.")]
    prompts = {task: given[0][0] for task, given in found.items() if "wmt" in task}
    assert prompts == {
        "huerta2024_wmt14-en-fr": "Translate the following from English to French\nYes.\n",
        "huerta2024_wmt14-fr-en": "Translate the following from French to English\nOui.\n",
        "huerta2024_wmt16-en-de": "Translate the following from English to German\nYes.\n",
        "huerta2024_wmt16-de-en": "Translate the following from German to English\nJa.\n",
    }
    assert {score.task: score.num_fewshot for score in evaluation.primary if score.num_fewshot} == {
        "arc_challenge": 25,
        "winogrande": 5,
    }
    assert {score.prompt for score in evaluation.primary} == {"harness"}
    assert [score.caveat for score in evaluation.primary if score.task != "arc_challenge"] == [""] * 7


def test_a_template_goes_around_the_whole_prompt(small):
    wrapping = prompting.wrapping("alpaca", byte_tokenizer())
    found, evaluation = asked("piqa,huerta2024-v1", small, wrapping)
    below = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    around = f"{below}\n\n### Instruction:\n{{}}\n\n### Response:"
    assert found["piqa"][0] == (around.format("Question: Eat.\nAnswer:"), "Chew.")
    context, continuation = found["arc_challenge"][0]
    assert continuation == "ice"
    assert context.count("### Instruction:") == 1
    assert context.count("Question: N") == 25
    assert {score.prompt for score in evaluation.primary} == {"template alpaca"}


def test_a_model_without_a_template_is_told(small):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="apply-template: some/model has no template"):
        prompting.own_wrapping("some/model", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    found, _ = asked("piqa", small, prompting.own_wrapping("some/model", tokenizer))
    assert found["piqa"][0] == ("<s>user: Question: Eat.\nAnswer:</s><s>assistant: ", "Chew.")


def test_the_per_sample_log_says_what_was_asked_wanted_and_given(small):
    _, evaluation = asked("huerta2024-v1", small, limit=2)
    rows = {row["task"]: row for row in evaluation.samples}
    assert len(evaluation.samples) == 9  # two of ARC, one of each other task in the score
    arc, wmt = rows["arc_challenge"], rows["huerta2024_wmt14-en-fr"]
    # All options have one log-likelihood, so that by character the longest is preferred.
    assert (arc["document"], arc["target"], arc["prediction"], arc["metric"], arc["score"]) == (
        1,
        "fire",
        "fire",
        "acc_norm",
        1.0,
    )
    assert (rows["winogrande"]["target"], rows["winogrande"]["prediction"]) == ("He met", "He ate")
    assert (wmt["target"], wmt["prediction"], wmt["score"]) == (" Oui.", "none", 0.0)
    assert rows["truthfulqa_mc2"]["score"] == pytest.approx(2 / 3)


def test_the_per_sample_log_is_bounded(small, monkeypatch):
    monkeypatch.setattr(samples, "MAX_DOCUMENTS", 1)
    monkeypatch.setattr(samples, "MAX_CHARACTERS", 7)
    _, evaluation = asked("arc_challenge", small, limit=2)
    (row,) = evaluation.samples
    assert row["question"] == "Answer:"


def test_scores_are_those_of_the_harness_run_by_its_own_command_line(tmp_path):
    """Two tasks of the laboratory, and one that reads a local file: here as we read it, there as JSON in hub's form."""
    (tmp_path / "arc_easy_test.jsonl").write_text(
        "".join(f'{{"question": "{n}?", "choices": ["one", "no", "yes {n}"], "answer": {n % 3}}}\n' for n in range(9))
    )
    options = ScoreOptions(tasks="toy_choice,toy_short,arc_easy", data_dir=tmp_path, limit=6)
    tasks = load_tasks(options)
    ours = evaluate.run(pretrained.load("toy"), pretrained.load_tokenizer("toy"), tasks, options, seed=1)
    theirs = command_line(TOY_FOLDER, ["toy_choice", "toy_short", "arc_easy"], tmp_path, tmp_path, 6)
    assert {(score.task, score.metric): score.score for score in ours.scores} == pytest.approx(theirs)


def test_what_does_not_fit_the_models_window_is_counted_and_told(tmp_path):
    """toy has 512 positions."""
    rows = [
        {"question": "What is it?", "choices": ["zq" * 400, "no"], "answer": 1},
        {"question": "What? " * 200, "choices": ["yes", "no"], "answer": 1},
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ScoreOptions(tasks="arc_easy", data_dir=tmp_path)
    tasks = load_tasks(options)
    with pytest.warns(UserWarning, match="requests with") as told:
        evaluation = evaluate.run(pretrained.load("toy"), pretrained.load_tokenizer("toy"), tasks, options, seed=1)
    messages = [str(warning.message) for warning in told]
    assert "requests with a context cut from the left to fit the model's window: 2 of arc_easy" in messages
    assert "requests with an answer longer than the model's window, scored window by window: 1 of arc_easy" in messages
    assert {(score.metric, score.truncated, score.windowed) for score in evaluation.scores} == {
        ("acc", 2, 1),
        ("acc_norm", 2, 1),
    }
    assert [(row["truncated"], row["windowed"]) for row in scores.table(evaluation, {})] == [(2, 1)]


class Terminal(StringIO):
    """What takes itself for a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "is_shown"), [(Terminal, 60, False), (Terminal, 0, True), (StringIO, 0, False)]
)
def test_a_bar_appears_in_a_terminal_and_only_where_scoring_takes_long(stream, seconds, is_shown, monkeypatch):
    monkeypatch.setattr(evaluate, "SECONDS_BEFORE_BAR", seconds)
    monkeypatch.setattr("sys.stderr", written := stream())
    options = ScoreOptions(tasks="toy_choice", limit=3)
    evaluate.score(Recorder(), load_tasks(options), options, seed=1)
    assert ("3/3" in written.getvalue()) == is_shown
