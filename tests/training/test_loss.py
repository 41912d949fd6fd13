"""Is the chunked loss, with gradients made by hand in its forward pass, the plain weighted cross-entropy?"""

import doctest
import math
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plw_mlflow.training import loss

N, H, V = 37, 16, 50
PROMPT, COMPLETION = slice(0, 20), slice(20, 30)  # the rest is padding
ROW_BYTES = 4 * (V + 2 * H)  # of a chunk: logits, hidden states and their gradient; chunks get 3/4 of the budget
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


def oracle(
    inputs: dict[str, torch.Tensor], scale: float = 1, softcap: float | None = None, label_smoothing: float = 0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Undivided loss, losses per row and gradients: all logits at once, in float64, by autograd."""
    leaves = {name: inputs[name].double().requires_grad_() for name in INPUTS}
    logits = scale * (leaves["hidden"] @ leaves["head"].T + leaves["bias"])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, inputs["targets"], reduction="none")
    smoothed = F.cross_entropy(logits, inputs["targets"], reduction="none", label_smoothing=label_smoothing)
    total = (smoothed * inputs["weights"].double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return total.detach(), nll.detach(), dict(zip(INPUTS, gradients, strict=True))


@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
@pytest.mark.parametrize("plw", [0, 0.0005, 0.242, 1, 1.5])
def test_loss_and_gradients_are_those_of_full_logits(plw, rows_at_once, monkeypatch):
    monkeypatch.setattr(loss, "BUDGET_BYTES", math.ceil(4 / 3 * ROW_BYTES * rows_at_once))
    inputs = case(plw)
    for name in INPUTS:
        inputs[name].requires_grad_()

    total, nll = loss.weighted_nll(**inputs)
    divisor = 20 * plw + 10  # the sum of weights
    divided = total / divisor
    divided.backward()

    total_expected, nll_expected, gradients = oracle(case(plw))
    torch.testing.assert_close(divided.detach(), total_expected / divisor, check_dtype=False, **CLOSE)
    torch.testing.assert_close(nll, nll_expected.where(inputs["weights"] != 0, 0.0), check_dtype=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(inputs[name].grad, gradient / divisor, check_dtype=False, **CLOSE)


@pytest.mark.parametrize("rows_at_once", [4, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("scale", [0.0625, 1, 3])
def test_scaled_and_soft_capped_logits(scale, softcap, rows_at_once, monkeypatch):
    monkeypatch.setattr(loss, "BUDGET_BYTES", math.ceil(4 / 3 * ROW_BYTES * rows_at_once))
    inputs = case(0.242)
    for name in INPUTS:
        inputs[name].requires_grad_()
    total, nll = loss.weighted_nll(**inputs, scale=scale, softcap=softcap)
    total.backward()

    total_expected, nll_expected, gradients = oracle(case(0.242), scale, softcap)
    torch.testing.assert_close(total.detach(), total_expected, check_dtype=False, **CLOSE)
    torch.testing.assert_close(nll, nll_expected.where(inputs["weights"] != 0, 0.0), check_dtype=False)
    for name, gradient in gradients.items():
        # Of a sum, not of each number: where the cap is all but reached, float32 keeps few digits of tanh's slope.
        assert (inputs[name].grad - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("rows_at_once", [4, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1, None), (0.5, 2.0)])
@pytest.mark.parametrize("label_smoothing", [0.1, 0.9])
def test_smoothed_labels_change_the_loss_and_not_the_losses_told(
    label_smoothing, scale, softcap, rows_at_once, monkeypatch
):
    monkeypatch.setattr(loss, "BUDGET_BYTES", math.ceil(4 / 3 * ROW_BYTES * rows_at_once))
    inputs = case(0.242)
    for name in INPUTS:
        inputs[name].requires_grad_()
    total, nll = loss.weighted_nll(**inputs, scale=scale, softcap=softcap, label_smoothing=label_smoothing)
    total.backward()

    total_expected, nll_expected, gradients = oracle(case(0.242), scale, softcap, label_smoothing)
    torch.testing.assert_close(total.detach(), total_expected, check_dtype=False, **CLOSE)
    torch.testing.assert_close(nll, nll_expected.where(inputs["weights"] != 0, 0.0), check_dtype=False)
    plain = oracle(case(0.242), scale, softcap)[2]
    for name, gradient in gradients.items():
        assert (plain[name] - gradient).norm() > 0.05 * gradient.norm()
        assert (inputs[name].grad - gradient).norm() < 1e-6 * gradient.norm()


def test_logits_far_apart_stay_finite_and_exact():
    inputs = case(1)
    inputs["hidden"] *= 1e4
    expected = oracle(inputs)[0]
    inputs["hidden"].requires_grad_()
    total, _ = loss.weighted_nll(**inputs)
    total.backward()
    torch.testing.assert_close(total.detach(), expected, check_dtype=False)
    assert inputs["hidden"].grad.isfinite().all()


@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (None, 0.1), (2.0, 0.0), (30.0, 0.1)])
@pytest.mark.parametrize("scale", [0.0625, 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_compiled_for_a_gpu_gives_what_a_cpu_computes_in_place(has_bias, scale, softcap, smoothing):
    inputs = case(0.242)
    weights, targets = inputs["weights"][:30], inputs["targets"][:30]
    products = inputs["hidden"][:30] @ inputs["head"].T
    form = loss._Form(scale, softcap, smoothing, is_fused=True)
    found, expected = products.clone(), products.clone()
    bias = inputs["bias"] if has_bias else None
    ours = loss._differentiate_whole(found, bias, targets, weights, form)
    theirs = loss._differentiate(expected, bias, targets, weights, form)
    torch.testing.assert_close((found, *ours), (expected, *theirs), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, products)


@pytest.mark.slow
def test_it_can_be_compiled_for_any_number_of_rows():
    inputs, form = case(0.242), loss._Form(0.5, 30.0, 0.1, is_fused=True)
    for rows in (30, 7, 16):
        products = inputs["hidden"][:rows] @ inputs["head"].T
        rest = inputs["bias"], inputs["targets"][:rows], inputs["weights"][:rows], form
        found, expected = products.clone(), products.clone()
        ours, theirs = loss._compiled()(found, *rest), loss._differentiate(expected, *rest)
        torch.testing.assert_close((found, *ours), (expected, *theirs), rtol=1e-5, atol=1e-6)


def test_the_example_of_the_docstring():
    found = doctest.testmod(loss)
    assert found.attempted > 0
    assert found.failed == 0


def test_gradients_can_be_had_once():
    """They are scaled in place, so a second time they would be scaled twice."""
    inputs = case(1)
    inputs["head"].requires_grad_()
    total, _ = loss.weighted_nll(**inputs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


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
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                self.shapes.append(tuple(made.shape))
            return made

    inputs = case(1)
    inputs["head"].requires_grad_()
    with torch.no_grad(), Products() as products:
        loss.weighted_nll(**inputs)
    assert products.shapes == [(30, V)]  # logits alone


def peak_bytes(run) -> int:
    """The most memory that torch held at a time while `run` ran, of what was allocated since, inside kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_is_counted_inside_kernels_too():
    logits = torch.ones(100, 1000)
    assert peak_bytes(lambda: logits.logsumexp(1)) > logits.nbytes  # it takes the exponentials of all
    assert peak_bytes(lambda: logits.exp_()) < 1000


@pytest.mark.parametrize(("softcap", "label_smoothing"), [(None, 0.0), (30.0, 0.1)])
@pytest.mark.parametrize("trains", [{"hidden"}, {"hidden", "head", "bias"}, set()])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plw", [0, 0.242])
def test_memory_stays_within_the_budget(plw, kind, trains, softcap, label_smoothing, monkeypatch):
    """Of all that is allocated beyond the gradients and losses returned: here a ninth of what the logits take."""
    rows, width, vocabulary = 1500, 64, 4000
    monkeypatch.setattr(loss, "BUDGET_BYTES", 4 * rows * vocabulary // 9)
    inputs = {
        "hidden": torch.randn(rows, width),
        "head": torch.randn(vocabulary, width),
        "bias": torch.randn(vocabulary),
        "targets": torch.randint(vocabulary, (rows,)),
        "weights": torch.where(torch.arange(rows) % 10 < 7, plw, 1.0),
    }
    for name in trains:
        inputs[name].requires_grad_()

    def run():
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16),
            torch.set_grad_enabled(bool(trains)),
        ):
            total, nll = loss.weighted_nll(**inputs, softcap=softcap, label_smoothing=label_smoothing)
        if trains:
            (total / 777).backward()
        return nll

    returned = sum(inputs[name].nbytes for name in trains) + 4 * rows
    if kind is torch.bfloat16:
        returned += inputs["head"].nbytes // 2  # the head in the products' type
    peak = peak_bytes(run)
    assert 0.5 * loss.BUDGET_BYTES < peak - returned <= loss.BUDGET_BYTES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and PLW_TEST_GPU=1")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(kind):
    rows, width, vocabulary = 300, 64, 1000
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, width), torch.randn(vocabulary, width) / width**0.5
    targets, weights = torch.randint(vocabulary, (rows,)), torch.rand(rows).round(decimals=1)

    def gradients(device, kind):
        inputs = [part.to(device).requires_grad_() for part in (hidden, head)]
        with torch.autocast(device, torch.bfloat16, enabled=kind is torch.bfloat16):
            total, _ = loss.weighted_nll(*inputs, None, targets.to(device), weights.to(device))
        (total / 7).backward()
        return [part.grad.cpu() for part in inputs]

    for found, expected in zip(gradients("cuda", kind), gradients("cpu", torch.float32), strict=True):
        assert (found - expected).norm() < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[kind] * expected.norm()
