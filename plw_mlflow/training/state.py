"""The state of a training as its checkpoints hold it: the trained parameters, and what the optimiser keeps of each.

Which tensors that are is up to the optimiser; they are asked of the optimiser itself. Where processes share the
parameters (fsdp2), each saves and reads its own shards, and none ever holds the whole of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.errors import UserError
from plw_mlflow.training import parallel
from plw_mlflow.training.checkpoints import Checkpoint, Saved


def gather(step: int, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> Checkpoint:
    """A copy of what this process has to save of all that training changes.

    That is its shards, if it has shards; of tensors that every process holds, the first one saves all.
    """
    make_state(optimizer)
    kept = [parallel.own_part(tensors) for tensors in (parameters, _state(parameters, optimizer))]
    (weights, starts), (state, state_starts) = kept
    return Checkpoint(step, weights, state, starts | state_starts if parallel.is_sharded(parameters) else None)


def restore(saved: Saved | None, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """Put the checkpoint that the first process has found, if it has one, into every process; returns its step, or 0.

    Every process has to call this.
    """
    saved = parallel.tell(saved)
    if saved is None:
        return 0
    make_state(optimizer)
    tensors = {**parameters, **_state(parameters, optimizer)}
    is_sharded = parallel.is_sharded(parameters)
    if is_sharded or is_first_process():
        saved.read_into({name: tensor.detach() for name, tensor in tensors.items()})
    if not is_sharded:
        for tensor in tensors.values():
            parallel.send(tensor.detach())
    for name, parameter in parameters.items():  # counts that are no tensors
        for kind, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][kind] = tensors[f"{kind}/{name}"].item()
    return saved.step


def check_fit(saved: Saved, parameters: Mapping[str, Tensor], optimizer: Optimizer, total_steps: int) -> None:
    """Raise UserError for a checkpoint that a training of these parameters and steps cannot have saved."""
    if saved.step > total_steps:
        raise UserError(f"it is of step {saved.step}, and the training has {total_steps}")
    make_state(optimizer)
    expected = {**parameters, **_state(parameters, optimizer)}
    if missing := sorted(expected.keys() - saved.shapes.keys()):
        raise UserError(f"it lacks {len(missing)} tensors, the first of them {missing[0]}")
    if surplus := sorted(saved.shapes.keys() - expected.keys()):
        raise UserError(f"it has {len(surplus)} tensors too many, the first of them {surplus[0][:80]!r}")
    for name, (shape, kind) in saved.shapes.items():
        like = expected[name]
        if (shape, kind) != (list(like.shape), like.dtype):
            raise UserError(f"its {name} is {kind} {shape}, which must be {like.dtype} {list(like.shape)}")
    for name, piece in saved.pieces():
        if piece.numel():
            lowest, highest = map(float, piece.aminmax())  # both are NaN where any number is
            is_square_or_count = name.startswith(("exp_avg_sq/", "step/"))  # squares may have overflowed to infinity
            if not (lowest >= 0 if is_square_or_count else math.isfinite(lowest) and math.isfinite(highest)):
                raise UserError(f"its {name} has values from {lowest} to {highest}")


@torch.no_grad()
def make_state(optimizer: Optimizer) -> None:
    """Have an optimiser make what it keeps of the parameters that have had no gradient yet, as it is before the first.

    A step of rate 0 with gradients of 0 does so whatever the optimiser; it changes no parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lacking = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    if not lacking:
        return
    assert all(parameter.grad is None for parameter in parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in lacking:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in lacking:
        parameter.grad = None
        optimizer.state[parameter]["step"] *= 0  # a tensor or a plain number


def _state(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps, as KIND/NAME of the parameter; copies of what is no tensor."""
    state = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            state[f"{kind}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
            # A part of a shard that does not say where it belongs could not be put together again.
            assert not isinstance(parameter, DTensor) or isinstance(value, DTensor) or not state[f"{kind}/{name}"].ndim
    return state
