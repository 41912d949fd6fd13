"""Does AdamW in 8 bits go on to the bit, take the memory it should, and is it refused where it cannot run?"""

import pytest
import torch
from safetensors.torch import load_file

from plw_mlflow.config import TrainConfig
from plw_mlflow.errors import UserError
from plw_mlflow.training import optimizers
from tests.conftest import tiny_llama
from tests.training.test_train import resumable


class Killed(Exception):
    pass


def kill(metrics, step):
    if step == 7:
        raise Killed


def wide():
    """A model with tensors of more than 4,096 numbers, and others."""
    return tiny_llama(hidden_size=64, intermediate_size=96, tied=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_that_was_killed_ends_in_the_same_bits(method, tmp_path):
    options = {"optimizer": "adamw8bit", "lora_rank": 64}
    with pytest.raises(Killed):
        resumable(tmp_path / "killed", method, model=wide(), log=kill, **options)
    again = resumable(tmp_path / "killed", method, model=wide(), **options)
    undisturbed = resumable(tmp_path / "undisturbed", method, model=wide(), **options)
    assert again.resumed_from == 6
    expected = dict(undisturbed.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    kept = {name: tensor.dtype for name, tensor in load_file(next((tmp_path / "killed").glob("step-*/opt*"))).items()}
    large = [name for name, p in expected.items() if p.requires_grad and p.numel() >= 4096]
    assert large
    assert all(kept[f"state{i}/{name}"] == torch.uint8 for name in large for i in (1, 2))


def test_its_steps_are_those_of_adamw_but_for_rounding():
    weights = {}
    for kind in ("adamw", "adamw8bit"):
        generator = torch.Generator().manual_seed(0)
        weight, vector = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((128, 64), (64,)))
        start = weight.detach().clone()
        optimizer = optimizers.make(kind, [weight, vector], learning_rate=0.01, weight_decay=0.1)
        for _ in range(5):
            weight.grad, vector.grad = (torch.randn(part.shape, generator=generator) for part in (weight, vector))
            optimizer.step()
        weights[kind] = weight.detach() - start
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    exact, rounded = weights.values()
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1  # 8 bits are 2 to 3 digits
    held = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    tables = 2 * 256 * 4  # of the numbers that the 8 bits stand for
    assert held == 128 * 64 * (2 + 8 / 256) + tables


@pytest.mark.parametrize(
    "step",
    [
        lambda optimizer: (_ for _ in ()).throw(NotImplementedError("no kernel for cpu\nat length")),
        lambda optimizer: optimizer.param_groups[0]["params"][0].data.fill_(float("nan")),
        lambda optimizer: None,
    ],
)
def test_it_is_refused_where_a_step_of_it_fails(step, monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    optimizers.check("adamw8bit")
    monkeypatch.setattr(AdamW8bit, "step", step)
    with pytest.raises(UserError, match=r"^optimizer adamw8bit cannot run on this machine's cpu \([^\n]*\)") as refused:
        optimizers.check("adamw8bit")
    assert "--optimizer adamw" in str(refused.value)


def test_it_is_not_for_shards_and_makes_another_cell():
    with pytest.raises(UserError, match="adamw8bit cannot be sharded"):
        TrainConfig(optimizer="adamw8bit", parallel="fsdp2")
    assert "optimizer" not in TrainConfig().identity()
    assert TrainConfig(optimizer="adamw8bit").identity()["optimizer"] == "adamw8bit"
