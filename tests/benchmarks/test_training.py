"""benchmarks.training: that all train the same steps and the same loss, and what becomes of its figures."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peers, training
from benchmarks.training import Case, Contestant, Figures
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example

FIGURES = Figures(speed=600.0, clock_speed=500.0, peak_mib=1000.0, first_loss=4.0)


def pool(count, vocabulary=50):
    """Examples of 6 to 12 tokens, half of them prompt."""
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(3, 7, count):
        segment = np.repeat(np.array([Segment.INSTRUCTION, Segment.COMPLETION], dtype=np.int8), length)
        examples.append(Example(rng.integers(3, vocabulary, 2 * length, dtype=np.int32), segment))
    return examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_peers_train_the_loss_that_we_train(folder, method):
    examples = pool(64)
    taken = {
        who: training.take_steps(Case("tiny", method, "alpaca"), Contestant(who, "float32", 0.1), folder, examples, 1)
        for who in ("ours", "Trainer", "Trainer, grouped", "PLWTrainer")
    }
    assert taken["PLWTrainer"].first_loss == pytest.approx(taken["ours"].first_loss, rel=1e-5)
    assert taken["Trainer"].first_loss == pytest.approx(taken["ours"].first_loss, rel=1e-5)
    assert taken["Trainer, grouped"].first_loss == pytest.approx(taken["ours"].first_loss, rel=1e-5)
    assert taken["Trainer"].tokens == taken["ours"].tokens == sum(len(example.tokens) for example in examples[32:])


def test_grouped_steps_have_examples_of_like_lengths():
    examples = training.draw("alpaca", 1000)
    first, *rest = peers.grouped(examples[:32], examples, 4)
    assert sorted(map(id, first)) == sorted(map(id, examples[:32]))
    spreads = [np.std([len(example.tokens) for example in step]) for step in rest]
    assert max(spreads) < np.std([len(example.tokens) for example in examples]) / 2
    means = [np.mean([len(example.tokens) for example in step]) for step in rest]
    assert means == sorted(means)
    assert np.mean(means) == pytest.approx(np.mean([len(example.tokens) for example in examples]), rel=0.1)


@pytest.mark.parametrize("data", ["alpaca", "inverted"])
def test_drawn_lengths_are_those_of_the_table(data):
    examples = training.draw(data, 1000)
    for side, expected in zip((Segment.INSTRUCTION, Segment.COMPLETION), training.LENGTHS[data], strict=True):
        lengths = [int((example.segment == side).sum()) for example in examples]
        median, upper = np.quantile(lengths, [0.5, 0.9])
        assert median == pytest.approx(expected[5], rel=0.1)
        assert upper == pytest.approx(expected[9], rel=0.1)


def test_a_ratio_above_1_means_that_ours_is_better():
    figures = {
        Contestant("ours", "float32", 0.1): FIGURES,
        Contestant("ours", "float32", 1.0): replace(FIGURES, speed=550.0),
        Contestant("ours", "bfloat16", 0.1): replace(FIGURES, speed=1200.0),
        Contestant("TRL, packed", "float32", 1.0): replace(FIGURES, speed=200.0, peak_mib=500.0, first_loss=4.1),
    }
    case = Case("15M", "lora", "alpaca")
    rows = {(row["case"], row["metric"], row["peer"]): row["ratio"] for row in training.compare(case, figures, 0.1)}
    same, best = f"{case}, float32, plw 0.1", f"{case}, each in its best precision, plw 0.1"
    assert rows[same, "tokens per processor second", "TRL, packed, plw 1"] == pytest.approx(3)
    assert rows[same, "MiB at the peak", "TRL, packed, plw 1"] == pytest.approx(0.5)
    assert rows[best, "tokens per processor second", "TRL, packed, float32, plw 1"] == pytest.approx(6)
    assert rows[f"{case}, float32, plw 1", "loss of step 1", "TRL, packed"] == pytest.approx(4.1 / 4)


def test_another_loss_is_a_fault_in_float32_alone():
    row = {"case": "15M full, alpaca, float32, plw 1", "metric": "loss of step 1", "ratio": 1.001}
    assert training.is_wrong(row)
    assert not training.is_wrong(row | {"ratio": 1.00001})
    assert not training.is_wrong(row | {"case": "15M full, alpaca, bfloat16, plw 1"})


def test_the_contestants_of_a_case():
    chosen = training.contestants(["float32"], [0.0, 0.1, 1.0], ["ours", "Trainer", "TRL, packed"])
    assert [(each.who, each.plw) for each in chosen] == [
        ("ours", 0.0),
        ("ours", 0.1),
        ("ours", 1.0),
        ("Trainer", 0.1),
        ("TRL, packed", 1.0),
    ]
