"""Do scores mean what the harness's results mean?"""

import pytest

from plw_mlflow.evaluation import scores
from plw_mlflow.evaluation.scores import Evaluation


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
    found = scores.of_results(
        results(
            choice=({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2}, 4),
            translation=({"bleu,none": 20.0, "bleu_stderr,none": 3.0}, 8),
            unknown_error=({"exact_match,none": 0.1, "exact_match_stderr,none": "N/A"}, 8),
            group=({"acc,none": 0.9}, None),
        ),
        {},
    )
    evaluation = Evaluation(found, {})
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
    assert [(s.metric, s.is_primary) for s in scores.of_results(found, {})] == [("perplexity", False), ("acc", True)]
    found["higher_is_better"]["lambada"] = {"perplexity": False, "acc": False}
    with pytest.raises(ValueError, match="task lambada has no metric on 0 to 1"):
        scores.of_results(found, {})


def test_filters_of_one_metric_have_names_of_their_own():
    found = results(gsm8k=({"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.3}, 9))
    assert [(s.metric, s.score, s.is_primary) for s in scores.of_results(found, {})] == [
        ("exact_match-strict-match", 0.1, True),
        ("exact_match-flexible-extract", 0.3, False),
    ]
