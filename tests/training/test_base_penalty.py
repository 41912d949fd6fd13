"""Is the distance to the base penalised as autograd would?"""

import copy
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters
from plw_mlflow.training.base_penalty import BasePenalty
from tests.conftest import tiny_llama
from tests.families import tiny

STRENGTH = 0.3


def away(model, seed=5):
    """The same model, its trained weights moved a little."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return model


@pytest.mark.parametrize("order", [1, 1.5, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_distance_to_the_base_is_penalised_as_autograd_would(tied, order):
    model = tiny_llama(tied=tied).double()
    base = copy.deepcopy(model)
    penalty = BasePenalty(model, STRENGTH, order)
    away(model)
    expected = STRENGTH * sum(
        ((parameter - start).abs() ** order).sum()
        for parameter, start in zip(model.parameters(), base.parameters(), strict=True)
    )
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for parameter in model.parameters():  # as micro-batches have left them; one has none
        parameter.grad = torch.ones_like(parameter)
    model.lm_head.weight.grad = None

    assert float(penalty.add_gradients()) == pytest.approx(expected.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        there = 0 if parameter is model.lm_head.weight else 1
        torch.testing.assert_close(parameter.grad, gradient + there)


def test_at_the_base_nothing_is_penalised():
    model = tiny_llama()
    for order in (1, 1.5, 2):
        assert BasePenalty(model, STRENGTH, order).add_gradients() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("order", [1.5, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_distance_of_adapters_is_that_of_the_merged_model(method, family, order, tmp_path):
    """Its value beside peft's merging, its gradient beside differences of values."""
    base = tiny(family).double()
    model = adapters.adapt(copy.deepcopy(base), method, RecipeOptions(lora_rank=3), 1).double()
    penalty = BasePenalty(away(model), STRENGTH, order)
    value = float(penalty.add_gradients())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [parameter.grad.clone() for parameter in trained]

    random = torch.Generator().manual_seed(9)
    for _ in range(3):
        step = [1e-6 * torch.randn(parameter.shape, generator=random, dtype=torch.float64) for parameter in trained]
        values = []
        for sign in (1, -1):
            for parameter, part in zip(trained, step, strict=True):
                parameter.data += sign * part
            values.append(float(penalty.add_gradients()))
            for parameter, part in zip(trained, step, strict=True):
                parameter.data -= sign * part
        expected = (values[0] - values[1]) / 2
        along = sum((gradient * part).sum() for gradient, part in zip(found, step, strict=True))
        assert float(along) == pytest.approx(expected, rel=1e-5)

    merged = adapters.merge(model, tmp_path)
    differences = [
        (after - before).detach().abs().pow(order).sum()
        for after, before in zip(merged.parameters(), base.parameters(), strict=True)
    ]
    assert value == pytest.approx(STRENGTH * float(sum(differences)), rel=1e-9)


def penalised(method, *, shard):
    """Value and whole gradients of the penalty; `shard`: over all processes, by FSDP2."""
    model = adapters.adapt(tiny_llama(), method, RecipeOptions(lora_rank=3), 1)
    moves = dict(away(copy.deepcopy(model)).named_parameters())
    if shard:
        for layer in (model.base_model.model.model if method != "full" else model.model).layers:
            fully_shard(layer)
        fully_shard(model)
    penalty = BasePenalty(model, STRENGTH, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = moves[name].detach()
            if isinstance(parameter, DTensor):
                moved = distribute_tensor(moved, parameter.device_mesh, parameter.placements)
            parameter.copy_(moved)
    value = float(penalty.add_gradients())
    return value, {
        name: parameter.grad.full_tensor() if shard else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def share(port: str) -> None:
    """Compare shards over two processes with the whole, method by method; exits with status 1 where they differ.

    Runs in a process of its own, where torch has done nothing yet that would not survive a fork.
    """
    for rank in range(2):
        if os.fork() == 0:
            try:
                dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
                for method in ("full", "lora", "dora"):
                    (value, gradients), (expected, whole) = (penalised(method, shard=shard) for shard in (True, False))
                    assert value == pytest.approx(expected, rel=1e-5), method
                    assert gradients.keys() == whole.keys()
                    for name, gradient in whole.items():
                        torch.testing.assert_close(gradients[name], gradient)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    sys.exit(any([os.wait()[1] for _ in range(2)]))


def test_shards_are_penalised_as_the_whole():
    """FSDP2 over two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = "import sys; from tests.training.test_base_penalty import share; share(sys.argv[1])"
    command = [sys.executable, "-c", script, port]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
