"""Is the chunked loss, with gradients made by hand in its forward pass, the plain weighted cross-entropy?"""

from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plw_mlflow import loss

N, H, V = 37, 16, 50
PROMPT, COMPLETION = slice(0, 20), slice(20, 30)  # the rest is padding
INPUTS = ("hidden", "head", "bias")
CLOSE = {"rtol": 1e-5, "atol": 1e-7}  # tighter than the defaults, which would not see a gradient times 0.0005


def case(plw: float) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    weights = torch.zeros(N)
    weights[PROMPT], weights[COMPLETION] = plw, 1
    return {
        "hidden": torch.randn(N, H, generator=random),
        "head": torch.randn(V, H, generator=random),
        "bias": torch.randn(V, generator=random),
        "targets": torch.randint(V, (N,), generator=random),
        "weights": weights,
    }


def oracle(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Undivided loss, losses per row and gradients: all logits at once, in float64, by autograd."""
    leaves = {name: inputs[name].double().requires_grad_() for name in INPUTS}
    logits = leaves["hidden"] @ leaves["head"].T + leaves["bias"]
    nll = F.cross_entropy(logits, inputs["targets"], reduction="none")
    total = (nll * inputs["weights"].double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return total.detach(), nll.detach(), dict(zip(INPUTS, gradients, strict=True))


def divided_by(kind: str, plw: float) -> float:
    """The table of divisors, counted by hand."""
    return {"weights": 20 * plw + 10, "tokens": 10 if plw == 0 else 30}[kind]


@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["weights", "tokens"])
@pytest.mark.parametrize("plw", [0, 0.0005, 0.242, 1, 1.5])
def test_loss_and_gradients_are_those_of_full_logits(plw, kind, rows_at_once, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * V * rows_at_once)
    inputs = case(plw)
    for name in INPUTS:
        inputs[name].requires_grad_()

    total, nll = loss.weighted_nll(**inputs)
    divided = total / loss.divisor(inputs["weights"], kind)
    divided.backward()

    total_expected, nll_expected, gradients = oracle(case(plw))
    expected = divided_by(kind, plw)
    torch.testing.assert_close(divided.detach(), total_expected / expected, check_dtype=False, **CLOSE)
    torch.testing.assert_close(nll, nll_expected.where(inputs["weights"] != 0, 0.0), check_dtype=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(inputs[name].grad, gradient / expected, check_dtype=False, **CLOSE)


def test_a_head_without_bias():
    inputs = case(0.242)
    expected, _, _ = oracle(inputs | {"bias": torch.zeros(V)})
    total, _ = loss.weighted_nll(**inputs | {"bias": None})
    torch.testing.assert_close(total, expected, check_dtype=False)


def test_where_nothing_weighs_anything_the_loss_is_0_and_so_are_the_gradients():
    inputs = case(0) | {"weights": torch.zeros(N)}
    for name in INPUTS:
        inputs[name].requires_grad_()
    total, nll = loss.weighted_nll(**inputs)
    total.backward()
    assert total == 0
    assert not nll.any()
    assert not any(inputs[name].grad.any() for name in INPUTS)
    assert [loss.divisor(inputs["weights"], kind).item() for kind in ("weights", "tokens")] == [0, 0]


def test_a_frozen_head_gets_no_gradient_and_changes_no_other():
    inputs = case(0.242)
    inputs["hidden"].requires_grad_()
    loss.weighted_nll(**inputs)[0].backward()
    assert inputs["head"].grad is None
    torch.testing.assert_close(inputs["hidden"].grad, oracle(case(0.242))[2]["hidden"], check_dtype=False)


def test_bfloat16_products_stay_near_float32():
    inputs = case(0.242)
    for name in INPUTS:
        inputs[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = loss.weighted_nll(**inputs | {"hidden": inputs["hidden"].bfloat16().float()})
    total.backward()
    expected, _, gradients = oracle(case(0.242))
    # bfloat16 keeps 8 bits, so each product is off by up to 1 part in 256.
    torch.testing.assert_close(total.detach(), expected, check_dtype=False, rtol=0.01, atol=0)
    for name, gradient in gradients.items():
        assert inputs[name].grad.dtype == torch.float32
        assert (inputs[name].grad - gradient).norm() < 0.01 * gradient.norm()


def test_a_bfloat16_divisor_is_not_rounded():
    """1 / 777 in bfloat16 is off by 0.17 %, which would scale the gradients of all layers but the head."""
    gradients = []
    for scale in (1.0, 1 / 777):
        inputs = case(1)
        hidden = inputs.pop("hidden").bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = loss.weighted_nll(hidden=hidden, **inputs)
        (total * scale).backward()
        gradients.append(hidden.grad.double() / scale)
    whole, divided = gradients
    along = (whole * divided).sum() / whole.square().sum()  # 1 where the second is the first but for random rounding
    assert along.item() == pytest.approx(1, abs=5e-4)


def test_without_gradients_none_is_made():
    """A parameter asks for its gradient even under no_grad; the head's is as large as the head."""

    class Products(TorchDispatchMode):
        shapes: ClassVar[list[tuple[int, ...]]] = []

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            if function is torch.ops.aten.mm.default:
                self.shapes.append(tuple(made.shape))
            return made

    inputs = case(1)
    inputs["head"].requires_grad_()
    with torch.no_grad(), Products() as products:
        loss.weighted_nll(**inputs)
    assert products.shapes == [(30, V)]  # logits alone


def test_the_logits_of_all_rows_never_exist_at_once(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            for tensor in made if isinstance(made, tuple | list) else [made]:
                self.elements = max(self.elements, getattr(tensor, "nelement", lambda: 0)())
            return made

    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * V * 4)
    inputs = case(1)
    inputs["hidden"].requires_grad_()
    inputs["head"].requires_grad_()
    with Largest() as largest:
        loss.weighted_nll(**inputs)[0].backward()
    assert largest.elements == V * H  # the head and its gradient; 4 rows of logits are fewer, all rows more
