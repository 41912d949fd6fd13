"""Do benchmark scores mean what they say?"""

import json
import re
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import sacrebleu
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation import evaluate, prompting
from plw_mlflow.models import location, pretrained, saved_adapters
from plw_mlflow.toy import TOY_FOLDER, benchmarks
from tests import stubs
from tests.conftest import byte_tokenizer, tiny_llama
from tests.harness import command_line


def results(**tasks):
    """Results as the harness gives them: task=(metrics, documents)."""
    return {
        "results": {task: {"alias": task, **metrics} for task, (metrics, _) in tasks.items()},
        "n-samples": {task: {"original": 9, "effective": n} for task, (_, n) in tasks.items() if n},
        "n-shot": {task: 0 for task in tasks},
        "higher_is_better": {
            task: {"acc": True, "acc_norm": True, "bleu": True, "exact_match": True} for task in tasks
        },
        "versions": {task: 1.0 for task in tasks},
    }


def test_bleu_becomes_a_fraction_and_the_first_metric_stands_for_its_task():
    found = evaluate._scores(
        results(
            choice=({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2}, 4),
            translation=({"bleu,none": 20.0, "bleu_stderr,none": 3.0}, 8),
            unknown_error=({"exact_match,none": 0.1, "exact_match_stderr,none": "N/A"}, 8),
            group=({"acc,none": 0.9}, None),
        )
    )
    evaluation = evaluate.Evaluation(found, {})
    assert [(s.task, s.metric, s.score, s.stderr, s.n) for s in evaluation.primary] == [
        ("choice", "acc", 0.5, 0.1, 4),
        ("translation", "bleu", 0.2, 0.03, 8),
        ("unknown_error", "exact_match", 0.1, None, 8),
    ]
    assert [s.metric for s in found] == ["acc", "acc_norm", "bleu", "exact_match"]
    assert evaluation.mean == pytest.approx((0.5 + 0.2 + 0.1) / 3)


def test_the_primary_metric_is_one_of_which_more_is_better():
    found = results(lambada=({"perplexity,none": 20.0, "acc,none": 0.4}, 9))
    found["higher_is_better"]["lambada"] = {"perplexity": False, "acc": True}
    assert [(s.metric, s.is_primary) for s in evaluate._scores(found)] == [("perplexity", False), ("acc", True)]
    found["higher_is_better"]["lambada"] = {"perplexity": False, "acc": False}
    with pytest.raises(ValueError, match="task lambada has no metric on 0 to 1"):
        evaluate._scores(found)


def test_filters_of_one_metric_have_names_of_their_own():
    found = results(gsm8k=({"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.3}, 9))
    assert [(s.metric, s.score, s.is_primary) for s in evaluate._scores(found)] == [
        ("exact_match-strict-match", 0.1, True),
        ("exact_match-flexible-extract", 0.3, False),
    ]


@pytest.fixture
def arc(tmp_path):
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [str(2 * n), "none", "many"], "answer": 0} for n in range(1, 4)
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_local_file_gives_the_harness_its_own_task(arc):
    (task,) = evaluate.load_tasks(ScoreOptions(tasks="arc_easy", data_dir=arc)).loaded
    document = next(iter(task.test_docs()))
    assert task.doc_to_text(document) == "Question: What is 1 and 1?\nAnswer:"
    assert task.doc_to_choice(document) == ["2", "none", "many"]
    assert task.doc_to_target(document) == 0
    assert [metric["metric"] for metric in task.config.metric_list] == ["acc", "acc_norm"]


def test_scores_equal_the_likelihoods_computed_by_hand():
    """acc is the share of questions whose right answer is the likeliest; here by the model's own logits."""
    model, tokenizer = pretrained.load("toy"), pretrained.load_tokenizer("toy")
    options = ScoreOptions(tasks="toy_choice", limit=24)
    (score,) = evaluate.run(model, tokenizer, evaluate.load_tasks(options), options, seed=1).scores
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
        return evaluate.load_tasks(options), options


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
    evaluation = evaluate.score(recorder, evaluate.load_tasks(options), options, seed=1, wrapping=wrapping)
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
    monkeypatch.setattr(evaluate, "LOGGED_SAMPLES", 1)
    monkeypatch.setattr(evaluate, "LOGGED_CHARACTERS", 7)
    _, evaluation = asked("arc_challenge", small, limit=2)
    (row,) = evaluation.samples
    assert row["question"] == "Answer:"


def test_the_standard_error_of_bleu_is_that_of_whole_corpora_drawn_anew():
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "run", "home"]
    draw = np.random.default_rng(3)
    pairs = [
        (" ".join(words[start : start + 9]), " ".join(draw.permutation(words[start : start + 9])))
        for start in range(4)
        for _ in range(6)
    ]
    again = np.random.default_rng(1)
    drawn = [[pairs[place] for place in again.integers(24, size=24)] for _ in range(20)]
    expected = statistics.stdev(
        sacrebleu.corpus_bleu([p for _, p in some], [[t for t, _ in some]]).score / 100 for some in drawn
    )
    assert evaluate.bleu_stderr(pairs, seed=1, rounds=20) == pytest.approx(expected)


def test_a_group_or_tag_of_the_harness_reads_local_files_too(small):
    from lm_eval.tasks._index import Entry, Kind

    index = {
        "mine": Entry("mine", Kind.GROUP, None, {"group": "mine", "task": ["piqa", {"task": "arc"}, "gone"]}),
        "arc": Entry("arc", Kind.TAG, None, None, {"arc_easy", "arc_challenge"}),
        "piqa": Entry("piqa", Kind.TASK, None),
    }
    assert list(evaluate._leaves("mine", index)) == ["piqa", "arc_challenge", "arc_easy"]


def test_scores_are_those_of_the_harness_run_by_its_own_command_line(tmp_path):
    """Two tasks of the laboratory, and one that reads a local file: here as we read it, there as JSON in hub's form."""
    (tmp_path / "arc_easy_test.jsonl").write_text(
        "".join(f'{{"question": "{n}?", "choices": ["one", "no", "yes {n}"], "answer": {n % 3}}}\n' for n in range(9))
    )
    options = ScoreOptions(tasks="toy_choice,toy_short,arc_easy", data_dir=tmp_path, limit=6)
    tasks = evaluate.load_tasks(options)
    ours = evaluate.run(pretrained.load("toy"), pretrained.load_tokenizer("toy"), tasks, options, seed=1)
    theirs = command_line(TOY_FOLDER, ["toy_choice", "toy_short", "arc_easy"], tmp_path, tmp_path, 6)
    assert {(score.task, score.metric): score.score for score in ours.scores} == pytest.approx(theirs)


def test_an_unknown_task_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match="there is no task 'toy_shrt'; the nearest are toy_short"):
        evaluate.load_tasks(ScoreOptions(tasks="toy,toy_shrt"))


def test_a_task_that_needs_another_package_is_told_in_one_line(monkeypatch):
    def needs(*_):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", needs)
    with pytest.raises(
        ValueError, match="the tasks toy need a package that is not installed: No module named 'langdetect"
    ):
        evaluate.load_tasks(ScoreOptions(tasks="toy"))


def test_what_does_not_fit_the_models_window_is_counted_and_told(tmp_path):
    """toy has 512 positions."""
    rows = [
        {"question": "What is it?", "choices": ["zq" * 400, "no"], "answer": 1},
        {"question": "What? " * 200, "choices": ["yes", "no"], "answer": 1},
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ScoreOptions(tasks="arc_easy", data_dir=tmp_path)
    tasks = evaluate.load_tasks(options)
    with pytest.warns(UserWarning, match="requests with") as told:
        evaluation = evaluate.run(pretrained.load("toy"), pretrained.load_tokenizer("toy"), tasks, options, seed=1)
    messages = [str(warning.message) for warning in told]
    assert "requests with a context cut from the left to fit the model's window: 2 of arc_easy" in messages
    assert "requests with an answer longer than the model's window, scored window by window: 1 of arc_easy" in messages
    assert {(score.metric, score.truncated, score.windowed) for score in evaluation.scores} == {
        ("acc", 2, 1),
        ("acc_norm", 2, 1),
    }
    assert [(row["truncated"], row["windowed"]) for row in evaluate.table(evaluation, {})] == [(2, 1)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two different adapters of toy."""
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(pretrained.load("toy"), settings).save_pretrained(str(folder))
    return folders


def test_adapters_are_scored_over_one_base(adapters):
    options = ScoreOptions(tasks="toy_choice", limit=8)
    tasks = evaluate.load_tasks(options)
    base, tokenizer = pretrained.load("toy"), pretrained.load_tokenizer("toy")
    before = {name: weights.clone() for name, weights in base.state_dict().items()}
    expected = [
        evaluate.run(*pretrained.load_for_scoring(str(folder)), tasks, options, seed=1).scores for folder in adapters
    ]
    scored = list(evaluate.run_adapters(base, tokenizer, adapters, tasks, options, seed=1))
    assert [folder for folder, _ in scored] == adapters
    assert [evaluation.scores for _, evaluation in scored] == expected
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapters_folder_stands_for_its_base_with_it_merged(adapters):
    tokens = torch.arange(8).unsqueeze(0)
    attached = saved_adapters.attach(pretrained.load("toy"), adapters[0])
    merged, tokenizer = pretrained.load_for_scoring(str(adapters[0]))
    torch.testing.assert_close(merged(tokens).logits, attached(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(tokens).logits, pretrained.load("toy")(tokens).logits, atol=0.1)
    assert tokenizer("Who?").input_ids == pretrained.load_tokenizer("toy")("Who?").input_ids


def test_adapters_that_cannot_be_used_are_told(tmp_path, adapters):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model: KeyError"):
        pretrained.load_for_scoring(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match=r"names no base model: base_model_name_or_path is empty"):
        pretrained.load_for_scoring(str(tmp_path))
    with pytest.raises(ValueError, match=r"the adapter of .* cannot be loaded"):
        saved_adapters.attach(pretrained.load("toy"), tmp_path)


@pytest.fixture
def own(tmp_path):
    """A folder of a base, and one of an adapter on it that says what it was trained on."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(pretrained.load(str(base)), settings).save_pretrained(str(folder))
    saved_adapters.note_base(folder, str(base), location.digest(str(base)))
    return base, folder


def _set(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_on_another_base_than_it_was_trained_on_is_refused(own):
    base, folder = own
    tokens = torch.arange(8).unsqueeze(0)
    expected = pretrained.load_for_scoring(str(folder))[0](tokens).logits
    changed = tiny_llama()
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(base)
    with pytest.raises(
        ValueError, match=r"was trained on [0-9a-f]{64}, but its base .* is [0-9a-f]{64}; name the right"
    ):
        pretrained.load_for_scoring(str(folder))
    with pytest.warns(UserWarning, match="so the scores may be of a model that nobody has trained"):
        given = pretrained.load_for_scoring(str(folder), str(base))[0](tokens).logits
    assert not torch.equal(given, expected)
    (folder / saved_adapters.BASE_FILE).unlink()  # as adapters from elsewhere have none
    assert torch.equal(pretrained.load_for_scoring(str(folder))[0](tokens).logits, given)


def test_a_base_that_has_another_place_now_is_found_by_its_name_or_given(own, monkeypatch):
    base, folder = own
    tokens = torch.arange(8).unsqueeze(0)
    expected = pretrained.load_for_scoring(str(folder))[0](tokens).logits
    _set(folder, base_model_name_or_path="/where/they/trained/base")  # the note has the right one
    assert torch.equal(pretrained.load_for_scoring(str(folder))[0](tokens).logits, expected)
    moved = base.rename(base.parent / "moved")
    with pytest.raises(ValueError, match=r"is not a folder on this machine; say by --base where that is now"):
        pretrained.load_for_scoring(str(folder))
    assert torch.equal(pretrained.load_for_scoring(str(folder), str(moved))[0](tokens).logits, expected)
    with pytest.raises(ValueError, match=r"base is of adapters, but there is no adapter_config.json in"):
        pretrained.load_for_scoring(str(moved), str(moved))


@pytest.mark.parametrize("base", [None, "", " ", [], 0, ".", "./base", "../base", "..", ["base"], 3, {"a": "b"}])
def test_an_adapter_does_not_take_whatever_is_here_as_its_base(base, own, monkeypatch):
    here, folder = own
    monkeypatch.chdir(here)
    _set(folder, base_model_name_or_path=base)
    with pytest.raises(ValueError, match=r"adapter_config.json names (no base model|its base by a path of another)"):
        pretrained.load_for_scoring(str(folder))


class _Marker:
    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return type(self._file).touch, (self._file,)


def _pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head": _Marker(folder / "was run")}, folder / "adapter_model.bin")


def _changed(**changes):
    """Damage to the weights of an adapter; None takes one away."""

    def damage(folder):
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        for name, weight in changes.items():
            name = f"base_model.model.model.layers.{name}.weight"
            weights.pop(name, None) if weight is None else weights.update({name: weight})
        save_file(weights, file)

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_pickled, "cannot be loaded: a file of its weights is damaged, or holds more than weights"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
        (partial(_set, peft_type="IA3"), "is of type IA3, which is not loaded here; plain LoRA is"),
        (partial(_set, peft_type=None), "is of type None"),
        (partial(_set, megatron_config={}, megatron_core="os"), ""),
        (partial(_set, megatron_config={"a": 1}, megatron_core="megatron.x"), "asks for megatron_config"),
        (partial(_set, layer_replication=[[0, 2]] * 9), "asks for layer_replication"),
        (partial(_set, alora_invocation_tokens=[1]), "asks for alora_invocation_tokens"),
        (partial(_set, r=10**9), "has rank 1000000000, but its weights have no such shape"),
        (partial(_set, rank_pattern={"q_proj": 10**9}), "has rank 1000000000, but its weights have no such shape"),
        (partial(_set, r="two"), "cannot be loaded: TypeError"),
        (partial(_set, target_modules=["q_proj"]), "it also has the weights .*lora_A"),
        (_changed(**{"1.mlp.up_proj.lora_A": None}), "lacks the weights .*up_proj.lora_A"),
        (_changed(**{"7.mlp.up_proj.lora_A": torch.ones(2, 24)}), "it also has the weights .*layers.7.mlp.up_proj"),
    ],
)
def test_a_strangers_adapter_is_refused_in_one_line(damage, expected, own):
    _, folder = own
    damage(folder)
    if not expected:  # a setting that is empty asks for nothing
        pretrained.load_for_scoring(str(folder))
        return
    with pytest.raises(ValueError, match=expected) as raised:
        pretrained.load_for_scoring(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (folder / "was run").exists()
