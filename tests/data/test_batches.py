"""Does every example enter every epoch once, in an order that no interruption and no cut of the step changes?"""

import math
from fractions import Fraction
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow.data import batches
from plw_mlflow.data.weights import Weights
from tests.conftest import make_example

counts = st.integers(1, 40)


@given(examples=counts, batch=counts, epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_epoch_holds_every_example_once(examples, batch, epochs, seed):
    per_epoch = -(-examples // batch)
    total = batches.count_steps(examples, batch, epochs)
    steps = list(batches.steps(examples, batch, seed=seed, first=0, total=total))
    assert total == len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        taken = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(chain.from_iterable(taken)) == list(range(examples))
        assert all(len(step) == batch for step in taken[:-1])


@given(examples=counts, batch=counts, total=st.integers(1, 60), data=st.data())
def test_going_on_from_a_step_gives_the_steps_that_were_left(examples, batch, total, data):
    first = data.draw(st.integers(0, total))
    whole = list(batches.steps(examples, batch, seed=1, first=0, total=total))
    assert list(batches.steps(examples, batch, seed=1, first=first, total=total)) == whole[first:]


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = batches.steps(99, 99, seed=1, first=0, total=2)
    (other,) = batches.steps(99, 99, seed=2, first=0, total=1)
    assert first != second
    assert first != other


@given(examples=counts, batch=counts, tenths=st.integers(1, 50))
def test_a_fraction_of_an_epoch_is_rounded_up_to_a_step(examples, batch, tenths):
    # Exact in tenths; in binary 10 * 1.1 is above 11.
    expected = math.ceil(math.ceil(Fraction(examples, batch)) * Fraction(tenths, 10))
    assert batches.count_steps(examples, batch, tenths / 10) == max(1, expected)


def test_a_batch_by_hand():
    examples = [make_example([5, 6, 7, 8, 9], [0, 1, 2, 3, 3]), make_example([0, 4], [0, 3])]
    batch = batches.collate(examples, Weights(plw=0.25, template_weight=0.5, completion_weight=2.0))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [0, 4, 0, 0, 0]]
    assert batch.attention.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]  # a token 0 is no padding
    assert batch.weights.tolist() == [[0, 0.25, 0.25, 2, 2], [0, 2, 0, 0, 0]]
    assert batch.is_completion.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert batch.rows.tolist() == [0, 1, 2, 3, 5]
    assert batch.prompt_rows.tolist() == [0, 1]
    assert batch.completion_rows.tolist() == [2, 3, 5]
    assert batch.context == {"attention_mask": batch.attention}


def test_a_packed_row_by_hand():
    examples = [make_example([5, 6, 7, 8, 9], [0, 1, 2, 3, 3]), make_example([0, 4], [3, 3])]
    batch = batches.pack(examples, Weights(plw=0.25, template_weight=0.5, completion_weight=2.0))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.borders.tolist() == [0, 5, 7]
    assert batch.longest == 5
    assert batch.weights.tolist() == [
        [0, 0.25, 0.25, 2, 2, 0, 2]
    ]  # no example's first token follows from another's last
    assert batch.is_completion.tolist() == [[False, False, False, True, True, True, True]]
    assert batch.rows.tolist() == [0, 1, 2, 3, 5]  # none before the second example
    assert batch.prompt_rows.tolist() == [0, 1]
    assert batch.completion_rows.tolist() == [2, 3, 5]


lengths = st.lists(st.integers(1, 32), min_size=1, max_size=40)


@given(lengths=lengths, room=st.integers(32, 200), multiple=st.integers(1, 4))
def test_rows_are_few_not_too_long_and_hold_every_example_once(lengths, room, multiple):
    examples = [make_example([number] * length, [3] * length) for number, length in enumerate(lengths)]
    rows = batches.fill(examples, room, multiple=multiple)
    taken = [int(example.tokens[0]) for row in rows for example in row]
    assert sorted(taken) == list(range(len(lengths)))
    assert all(sorted(numbers) == numbers for numbers in ([int(e.tokens[0]) for e in row] for row in rows))
    filled = [sum(len(example.tokens) for example in row) for row in rows]
    assert max(filled) <= room
    if len(rows) >= multiple:
        assert len(rows) % multiple == 0 or len(rows) == len(lengths)
    assert max(filled) - min(filled) <= 32  # about equally long, so that no process waits for another
    assert len(rows) <= math.ceil(sum(lengths) / (room - 31) / multiple) * multiple


def test_examples_that_fill_their_rows_exactly_leave_no_room():
    examples = [make_example([0] * length, [3] * length) for length in (8, 2, 4, 6, 4, 8)]
    assert [[len(e.tokens) for e in row] for row in batches.fill(examples, 8)] == [[8], [8], [2, 6], [4, 4]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example has 9 tokens, but a packed row only 8"):
        batches.fill([make_example([0] * 9, [3] * 9)], 8)


def test_an_example_that_was_cut_to_its_prompt_weighs_as_a_prompt():
    batch = batches.collate([make_example([3, 4, 5], [0, 0, 1])], Weights(plw=0.0))
    assert not batch.weights.any()
    assert not batch.is_completion.any()
    assert len(batch.rows) == len(batch.prompt_rows) == len(batch.completion_rows) == 0


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 9), by_length=st.booleans())
def test_cutting_a_step_keeps_every_example_once(lengths, size, by_length):
    step = [make_example([number] * length, [3] * length) for number, length in enumerate(lengths)]
    cuts = batches.split(step, size, by_length=by_length)
    together = list(chain.from_iterable(cuts))
    assert all(len(cut) == size for cut in cuts[:-1])
    assert 0 < len(cuts[-1]) <= size
    if by_length:
        assert [len(example.tokens) for example in together] == sorted(lengths)
        together.sort(key=lambda example: example.tokens[0])
    assert together == step


def test_moving_a_batch_keeps_all_of_it():
    batch = batches.collate([make_example([5, 6], [0, 3])], Weights(1.0, 1.0, 1.0))
    moved = batch.to(torch.device("meta"))
    parts = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(parts) == 7
    assert all(part.is_meta for part in parts)


@pytest.mark.parametrize("epochs", [0.001, 1e-9])
def test_there_is_always_a_step(epochs):
    assert batches.count_steps(3, 32, epochs) == 1
