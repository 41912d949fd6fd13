"""benchmarks.shared_base: adapters that share a base are trained as alone."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import shared_base
from benchmarks.shared_base import Way

PLWS = (0.0, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_adapters_trained_in_turns_have_the_bits_of_those_trained_alone(folder):
    in_turns = shared_base.measure(Way("in turns", folder, PLWS, examples=3, steps=2)).weights
    for plw in PLWS:
        alone = shared_base.measure(Way("alone", folder, [plw], examples=3, steps=2)).weights
        assert all((weight == in_turns[plw][name]).all() for name, weight in alone[plw].items())
    assert shared_base.difference(in_turns, {plw: in_turns[PLWS[0]] for plw in PLWS}) > 1e-4  # what PLW does


def test_the_gradients_of_a_joint_pass_are_those_of_separate_ones(folder):
    way = Way("together", folder, PLWS, examples=3, steps=1)
    assert shared_base.difference(shared_base.measure(way).weights, shared_base.first_gradients(way)) < 1e-5
