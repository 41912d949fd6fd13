"""Do benchmark scores mean what they say?"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from plw_mlflow import evaluate, models, toy
from plw_mlflow.config import ScoreOptions


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
    model, tokenizer = models.load("toy"), models.load_tokenizer("toy")
    options = ScoreOptions(tasks="toy_choice", limit=24)
    (score,) = evaluate.run(model, tokenizer, evaluate.load_tasks(options), options, seed=1).scores
    right = []
    for document in toy.benchmark("toy_choice")[:24]:
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


def test_real_arc_files_are_read_whole(shared):
    options = ScoreOptions(tasks="arc_easy,arc_challenge", data_dir=shared / "data/eval")
    counts = {task.config.task: len(list(task.test_docs())) for task in evaluate.load_tasks(options).loaded}
    assert counts == {"arc_easy": 2376, "arc_challenge": 1172}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which does not exist"),
        ('{"question": "?"}', "is not what task arc_easy reads: KeyError 'choices'"),
        ("no json", "is not what task arc_easy reads: JSONDecodeError"),
    ],
)
def test_missing_or_damaged_documents_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "arc_easy_test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl") as error:
        evaluate.load_tasks(ScoreOptions(tasks="arc_easy", data_dir=tmp_path))
    assert message in str(error.value)


def test_an_unknown_task_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match="there is no task 'toy_shrt'; the nearest are toy_short"):
        evaluate.load_tasks(ScoreOptions(tasks="toy,toy_shrt"))


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
        evaluation = evaluate.run(models.load("toy"), models.load_tokenizer("toy"), tasks, options, seed=1)
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
        get_peft_model(models.load("toy"), settings).save_pretrained(str(folder))
    return folders


def test_adapters_are_scored_over_one_base(adapters):
    options = ScoreOptions(tasks="toy_choice", limit=8)
    tasks = evaluate.load_tasks(options)
    base, tokenizer = models.load("toy"), models.load_tokenizer("toy")
    before = {name: weights.clone() for name, weights in base.state_dict().items()}
    expected = [
        evaluate.run(*models.load_for_scoring(str(folder)), tasks, options, seed=1).scores for folder in adapters
    ]
    scored = list(evaluate.run_adapters(base, tokenizer, adapters, tasks, options, seed=1))
    assert [folder for folder, _ in scored] == adapters
    assert [evaluation.scores for _, evaluation in scored] == expected
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapters_folder_stands_for_its_base_with_it_merged(adapters):
    tokens = torch.arange(8).unsqueeze(0)
    attached = models.load_adapter(models.load("toy"), adapters[0])
    merged, tokenizer = models.load_for_scoring(str(adapters[0]))
    torch.testing.assert_close(merged(tokens).logits, attached(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(tokens).logits, models.load("toy")(tokens).logits, atol=0.1)
    assert tokenizer("Who?").input_ids == models.load_tokenizer("toy")("Who?").input_ids


def test_adapters_that_cannot_be_used_are_told(tmp_path, adapters):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model: KeyError"):
        models.load_for_scoring(str(tmp_path))
    with pytest.raises(ValueError, match=r"the adapter of .* cannot be loaded"):
        models.load_adapter(models.load("toy"), tmp_path)
