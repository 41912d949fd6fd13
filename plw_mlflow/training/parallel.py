"""Several processes, one a device: how the learner is spread over them, and how its state is put together again.

`ddp` keeps the whole model on every device. `fsdp2` cuts every parameter, its gradient and its optimiser state up
among the devices (torch's `fully_shard`), for models that one device cannot hold. Both average gradients over
processes; the trainer, which needs their sum, multiplies by the number of processes.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from plw_mlflow.environment.processes import is_first_process
from plw_mlflow.errors import UserError
from plw_mlflow.models import adapters, causal
from plw_mlflow.training.checkpoints import Writers

T = TypeVar("T")

# The cache would keep a bfloat16 copy of each weight until the forward pass ends, for a second use that
# no weight of a layer has: 2 bytes a weight, even where layers are computed again or gathered shards are let go of.
AUTOCAST = {"cache_enabled": False}
PATIENCE = timedelta(hours=1)  # so long processes wait for another one, which may be fetching a checkpoint


def accelerator(precision: Literal["float32", "bfloat16"]) -> Accelerator:
    """Join the processes that torchrun or accelerate launch has started, if any. The first call sets the precision.

    precision: of the arithmetic; weights and sums stay float32.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        cpu=several and not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), AutocastKwargs(**AUTOCAST)],
    )


def wrap(learner: nn.Module, kind: Literal["ddp", "fsdp2"], joined: Accelerator) -> Any:
    """Spread a learner over the processes. With fsdp2 its parameters are replaced by their shards, in place.

    The numbers are those of the first process; in the others, parameters may lie on the device "meta" until then. With
    fsdp2 no process but the first ever holds more than its shards and one layer.
    """
    if joined.num_processes == 1:
        return joined.prepare_model(learner)
    types = tell({name: parameter.dtype for name, parameter in learner.named_parameters()})
    for name, parameter in learner.named_parameters():
        if parameter.is_meta:
            parameter.data = parameter.data.to(types[name])
    for buffer in learner.buffers():
        send(buffer)
    if kind == "ddp":
        _receive(learner, joined.device)
        wrapped = joined.prepare_model(learner)
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped
    mesh = init_device_mesh(joined.device.type, (joined.num_processes,))
    # Lower precision is left to autocast, as with ddp. A sharding policy would use it for norms and the sums between
    # layers, too. Only weights that autocast would round anyway are rounded before they are gathered.
    policy, multiplied = MixedPrecisionPolicy(cast_forward_inputs=False), set()
    if joined.mixed_precision == "bf16":
        learner.forward = torch.autocast(joined.device.type, torch.bfloat16, **AUTOCAST)(learner.forward)
        if not hasattr(learner.model, "get_base_model"):  # the base of adapters is held in bfloat16 (`models/held.py`)
            multiplied = set(adapters.targets(learner.model, "all-linear").values())
    rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in causal.decoder_layers(learner):
        _receive(layer, joined.device)
        if linear := [module for module in layer.modules() if module in multiplied]:
            fully_shard(linear, mesh=mesh, mp_policy=rounded)
            multiplied.difference_update(linear)  # a layer may lie within another
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    _receive(learner, joined.device)
    fully_shard(learner, mesh=mesh, mp_policy=policy)
    assert isinstance(learner, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in learner.parameters())
    return learner


def let_go(learner: nn.Module) -> None:
    """Have a learner of fsdp2 hold nothing but shards again after a forward pass that no backward pass has followed.

    The outermost module would keep its parameters gathered (embedding, last norm and head), which the optimiser and
    checkpoints would take for other parameters.
    """
    if isinstance(learner, FSDPModule):
        learner.reshard()


@torch.no_grad()
def _receive(part: nn.Module, device: torch.device) -> None:
    """Put the first process's parameters of a part on each process's device, but for those that are shards already."""
    received: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in received:
                own = parameter
                if parameter.is_meta:
                    own = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                own.data = own.data.to(device)
                dist.broadcast(own.data, 0)
                received[parameter] = own
            setattr(module, name, received[parameter])


def hollow_copy(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters hold no numbers until `fill_in` gives them theirs."""
    hollow = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, hollow)  # which takes these for copies that it has already made


def fill_in(hollow: Any, weights: dict[str, Tensor]) -> Any:
    """Give what `hollow_copy` has made its parameters, by name; tied ones stay tied."""
    filled = {id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in hollow.named_parameters()}
    for part in hollow.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            setattr(part, name, filled[id(parameter)])
    return hollow


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, put together from their shards; empty in processes other than the first.

    Every process has to call this.
    """
    copies = {name: _whole(tensor) for name, tensor in tensors.items()}
    return {name: copy for name, copy in copies.items() if copy is not None}


def _whole(tensor: Tensor) -> Tensor | None:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not is_first_process():
        return None
    return full.detach().to("cpu", copy=True).contiguous()


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether the processes share these parameters, so that each holds shards of them."""
    kinds = {isinstance(parameter, DTensor) for parameter in parameters.values()}
    assert len(kinds) <= 1, "some parameters are shards and others are gathered"
    return True in kinds


def own_part(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copies on the CPU of this process's shards, and where in the whole tensors they begin.

    Of tensors that every process holds, the first process has the whole, and the others nothing.
    """
    parts, starts = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            (shard,) = tensor.__create_chunk_list__()
            local, start = tensor.to_local(), list(shard.offsets)
        else:
            local, start = tensor, [0] * tensor.ndim
        if local.numel() if isinstance(tensor, DTensor) else is_first_process():
            parts[name] = local.detach().to("cpu", copy=True).contiguous()
            starts[name] = start
    return parts, starts


def tell(value: T) -> T:
    """The value that the first process has, in every process; every process has to call this."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def send(tensor: Tensor) -> None:
    """Copy the first process's numbers into a tensor in every process; every process has to call this."""
    if not dist.is_initialized():
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    moved = tensor.to(device)  # AdamW keeps its count of steps on the CPU
    dist.broadcast(moved, 0)
    tensor.copy_(moved)


@contextmanager
def writers(folder: Path) -> Iterator[Writers]:
    """The processes of a sharded training as writers of its checkpoints into `folder`; every process has to call this.

    Their threads agree by a group of their own, as training goes on meanwhile. A process that has ended agrees to
    nothing.

    Raises UserError in every process where one of them does not see the first one's folder.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def agree(is_well: bool) -> bool:
        flag = torch.tensor(int(is_well))
        try:
            dist.all_reduce(flag, dist.ReduceOp.MIN, group)
        except RuntimeError:
            return False
        return bool(flag)

    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="seen-") if is_first_process() else nullcontext("") as made:
        seen = tell(Path(made).absolute())
        if not agree(seen.is_dir()):
            raise UserError(
                f"not every process sees the folder {seen.parent} of the first one, in which --parallel fsdp2 has each "
                f"save its part; set --checkpoint-dir to a disk that all machines share, or use --parallel ddp"
            )
    yield Writers(dist.get_rank(), dist.get_world_size(), agree)
    dist.destroy_process_group(group)
