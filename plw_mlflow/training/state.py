"""The state of a training as its checkpoints hold it: the trained parameters, and what AdamW keeps of each.

Every process has to call `gather` and `restore`, since each may hold a shard of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from plw_mlflow.errors import UserError
from plw_mlflow.training import parallel
from plw_mlflow.training.checkpoints import Checkpoint


def gather(step: int, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> Checkpoint:
    """A copy of everything that training changes; its tensors are there in the first process alone."""
    state = {
        f"{kind}/{name}": value
        for name, parameter in parameters.items()
        for kind, value in (optimizer.state[parameter] or _initial_state(parameter)).items()
    }
    return Checkpoint(step, parallel.whole(parameters), parallel.whole(state))


def restore(checkpoint: Checkpoint | None, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> int:
    """Put the checkpoint that the first process has, if it has one, into every process; returns its step, or 0."""
    device = next(iter(parameters.values())).device
    first_process_step = torch.tensor(0 if checkpoint is None else checkpoint.step, device=device)
    parallel.spread(first_process_step, first_process_step)
    step = int(first_process_step)
    for name, parameter in parameters.items() if step else ():
        parallel.spread(checkpoint.weights[name] if checkpoint else None, parameter)
        for kind, initial in _initial_state(parameter).items():
            value = initial.to(device)
            parallel.spread(checkpoint.optimizer[f"{kind}/{name}"] if checkpoint else None, value)
            # AdamW keeps its count of steps on the CPU, unless it is one kernel for all.
            is_fused = bool(optimizer.defaults.get("fused"))
            optimizer.state[parameter][kind] = value if is_fused else value.to(initial.device)
    return step


def check_fit(checkpoint: Checkpoint, parameters: Mapping[str, Tensor], total_steps: int) -> None:
    """Raise UserError for a checkpoint that a training of these parameters and steps cannot have saved."""
    if checkpoint.step > total_steps:
        raise UserError(f"it is of step {checkpoint.step}, and the training has {total_steps}")
    state = {
        f"{kind}/{name}": initial
        for name, parameter in parameters.items()
        for kind, initial in _initial_state(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")).items()
    }
    _check_tensors(checkpoint.weights, parameters)
    _check_tensors(checkpoint.optimizer, state)


def _initial_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter before its first gradient: a count of steps, and two moving averages."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError where names, shapes or types are not the expected ones, or a value is one that none can have."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"it lacks {len(missing)} tensors, the first of them {missing[0]}")
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"it has {len(surplus)} tensors too many, the first of them {surplus[0][:80]!r}")
    for name, tensor in tensors.items():
        like = expected[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise UserError(
                f"its {name} is {tensor.dtype} {list(tensor.shape)}, which must be {like.dtype} {list(like.shape)}"
            )
        if tensor.numel():
            lowest, highest = map(float, tensor.aminmax())  # both are NaN where any number is
            is_square_or_count = name.startswith(("exp_avg_sq/", "step/"))  # squares may have overflowed to infinity
            if not (lowest >= 0 if is_square_or_count else math.isfinite(lowest) and math.isfinite(highest)):
                raise UserError(f"its {name} has values from {lowest} to {highest}")
