"""Corpus BLEU's standard error, by a bootstrap that tokenises each sentence once.

The harness's own bootstrap tokenises the whole corpus again for every draw, which takes two minutes for a WMT test set.
Corpus BLEU is a function of sums over sentences, so that a draw here only adds up rows of counts.
"""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

ROUNDS = 100  # draws of a bootstrap


def without_standard_error(tasks: list[Any]) -> None:
    """Have the harness compute corpus BLEU for these tasks, but not its standard error.

    The harness bootstraps the metrics whose functions it knows. It does not know the one that is put in their place.
    """
    from lm_eval.api.metrics import bleu

    def corpus_bleu(pairs: Any) -> Any:
        return bleu(pairs)

    for task in tasks:
        if task.aggregation().get("bleu") is bleu:
            task.aggregation()["bleu"] = corpus_bleu


def pairs_by_filter(samples: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The targets and predictions of a task whose metric is corpus BLEU, by the harness's filter.

    Filters with fewer than two pairs are left out, as there is no standard error for them.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for sample in samples:
        if isinstance(sample.get("bleu"), list | tuple):
            target, prediction = map(str, sample["bleu"])
            pairs.setdefault(sample["filter"], []).append((target, prediction))
    return {name: of_filter for name, of_filter in pairs.items() if len(of_filter) > 1}


@cache
def _sentence_bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # orders of which a short sentence has no n-gram do not make it 0


def of_sentence(target: str, prediction: str) -> float:
    """The BLEU of one sentence, as a fraction."""
    return float(_sentence_bleu().sentence_score(prediction, [target]).score / 100)


def standard_error(pairs: list[tuple[str, str]], seed: int, rounds: int = ROUNDS) -> float:
    """The bootstrapped standard error of corpus BLEU, as a fraction; pairs: target and prediction of each sentence."""
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU

    rows = [_sentence_bleu().sentence_score(prediction, [target]) for target, prediction in pairs]
    counts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])
    draw = np.random.default_rng(seed)
    scores = []
    for _ in range(rounds):
        sums = counts[draw.integers(len(counts), size=len(counts))].sum(0).tolist()
        scores.append(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score / 100)
    return statistics.stdev(scores)


def of_corpus(pairs: list[tuple[str, str]]) -> float:
    """Corpus BLEU, as a fraction, by sacreBLEU's defaults; pairs: target and prediction of each sentence."""
    import sacrebleu

    targets, predictions = [target for target, _ in pairs], [prediction for _, prediction in pairs]
    return float(sacrebleu.corpus_bleu(predictions, [targets]).score / 100)
