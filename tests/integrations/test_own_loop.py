"""Are the examples in the docstrings what the functions give?"""

import doctest

import pytest
import torch

from plw_mlflow.errors import UserError
from plw_mlflow.integrations import collator, own_loop
from plw_mlflow.integrations.own_loop import token_weights, weighted_nll
from tests.integrations import steps


@pytest.mark.parametrize(("module", "examples"), [(own_loop, 3), (collator, 1)])
def test_the_examples_run(module, examples):
    found = doctest.testmod(module)
    assert (found.failed, sum(bool(test.examples) for test in doctest.DocTestFinder().find(module))) == (0, examples)


def test_padding_on_the_left_weighs_nothing():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1]])
    weights = token_weights(torch.tensor([[0, 0, 0, 0, 1]]), 0.5, attention_mask=attention_mask)
    assert weights.tolist() == [[0, 0, 0, 0.5, 1]]


def test_a_router_whose_loss_would_be_left_out_is_refused():
    model = steps.model()
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="router"):
        weighted_nll(model, torch.tensor([[5, 6]]), torch.tensor([[0.0, 1.0]]))


def test_the_forward_pass_is_as_it_was_even_after_an_error():
    model = steps.model()
    with pytest.raises(IndexError):
        weighted_nll(model, torch.tensor([[5, 10**6]]), torch.tensor([[0.0, 1.0]]))
    assert "forward" not in vars(model)
