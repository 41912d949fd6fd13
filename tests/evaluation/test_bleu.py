"""Is the bootstrapped standard error of corpus BLEU that of whole corpora?"""

import statistics

import numpy as np
import pytest
import sacrebleu

from plw_mlflow.evaluation import bleu


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
    assert bleu.standard_error(pairs, seed=1, rounds=20) == pytest.approx(expected)
