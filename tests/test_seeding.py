"""Do equal seeds give equal choices, and does each choice have a generator of its own?"""

import hashlib

import pytest
import torch

from plw_mlflow import seeding


def draw(*names):
    return torch.randint(2**31, (8,), generator=seeding.generator(*names)).tolist()


def test_a_seed_is_the_start_of_a_hash_of_its_name():
    # By hand: sha256("1234/order/0"), the first 8 bytes, the lowest bit cut off to fit a signed number.
    expected = int(hashlib.sha256(b"1234/order/0").hexdigest()[:16], 16) // 2
    assert seeding.derive(1234, "order", 0) == expected


@pytest.mark.parametrize("other", [(1, "order", 0), (1234, "order", 1), (1234, "dropout", 0), (1234, "order")])
def test_choices_differ_by_seed_and_by_name(other):
    assert draw(1234, "order", 0) == draw(1234, "order", 0)
    assert draw(1234, "order", 0) != draw(*other)


def test_drawing_for_one_choice_moves_no_other():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw(1234, "order", 0)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 1234])
def test_any_whole_number_is_a_seed(seed):
    seeding.seed_global(seed, "dropout", 0, 0)
    first = torch.rand(3)
    seeding.seed_global(seed, "dropout", 0, 0)
    assert torch.equal(torch.rand(3), first)
