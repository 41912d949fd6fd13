"""Peak memory of an optimiser step by kind of tensor, computed and measured:  python -m benchmarks.memory --json FILE

The first table is computed: the trainer takes steps on fake tensors, which have shapes and no numbers, and every
storage is counted from its first use to its last. The kinds are those at the moment of the peak. Several devices are
the first of so many processes (FSDP2), whose collective calls do nothing.

The second table measures: the same steps are taken on this machine's CPU with numbers, in a process of their own. Its
peak in bytes of tensors is the allocator's, as torch's profiler has it, and beside it is the growth of the process.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaForCausalLM

from benchmarks.loss_head import MIB, Row
from benchmarks.shapes import llama
from plw_mlflow.config import TrainConfig
from plw_mlflow.data.batches import Batch
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.models import adapters, causal, held
from plw_mlflow.training import arithmetic, attention, loss, parallel, recomputation, state, trainer
from plw_mlflow.training.trainer import Trainer

KINDS = ("base", "adapters", "gradients", "moments", "gathered", "loss", "activations")
# Hidden size, inner size, layers, heads, key heads, vocabulary; tied embeddings where the model has them.
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2's
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2's
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2's
}
EXAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """A training whose steps are counted."""

    shape: str
    method: str
    precision: str
    row_tokens: int
    is_computed_again: bool = False
    optimizer: str = "adamw"
    devices: int = 1

    def __str__(self) -> str:
        again = ", checkpointing" if self.is_computed_again else ""
        eight_bits = ", adamw8bit" if self.optimizer == "adamw8bit" else ""
        devices = "" if self.devices == 1 else f", {self.devices} devices"
        return f"{self.shape} {self.method}, {self.precision}, {self.row_tokens} tokens{again}{eight_bits}{devices}"

    def config(self) -> TrainConfig:
        return TrainConfig(
            plw=0.242,
            method=self.method,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            optimizer=self.optimizer,  # type: ignore[arg-type]
            activation_checkpointing=self.is_computed_again,
            parallel="fsdp2" if self.devices > 1 else "ddp",
            micro_batch_tokens=self.row_tokens,
            max_tokens=EXAMPLE_TOKENS,
            batch_examples=self.devices * self.row_tokens // EXAMPLE_TOKENS,
            micro_batch_examples=1,
        )


# The promise: 7B by LoRA on one common GPU.
COMPUTED = [
    Case("7B", "lora", "bfloat16", 4096),
    Case("7B", "lora", "bfloat16", 4096, is_computed_again=True),
    *(Case("7B", "full", "bfloat16", 4096, is_computed_again=True, devices=devices) for devices in (1, 4, 8)),
    Case("7B", "full", "bfloat16", 4096, is_computed_again=True, optimizer="adamw8bit"),
]
MEASURED = [
    Case("135M", "full", "float32", 1024),
    Case("135M", "lora", "bfloat16", 1024),
    Case("135M", "full", "bfloat16", 1024, is_computed_again=True),
    Case("135M", "full", "float32", 1024, optimizer="adamw8bit"),
    Case("1B", "lora", "bfloat16", 512),
    Case("1B", "lora", "bfloat16", 512, is_computed_again=True),
    Case("1B", "full", "bfloat16", 512, is_computed_again=True, optimizer="adamw8bit"),
]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that exist at a time, within the block, and their kinds at the peak."""

    def __init__(self, kinds: Callable[[], dict[Any, str]]) -> None:
        """kinds: gives the kind of each storage whose kind is known; asked whenever the peak has grown."""
        super().__init__()
        self._kinds = kinds
        self._bytes: dict[int, int] = {}  # by the storage's address in C++
        self._born_in: dict[int, str] = {}  # the kinds of those that were made for a purpose
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.purpose: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **kwargs or {})
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return outputs

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is gone, if it is not counted already."""
        if tensor.device.type not in ("cpu", "meta") or isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        if self.purpose is not None:
            self._born_in[key] = self.purpose
        weakref.finalize(storage, self._forget, key)
        self.total += storage.nbytes()
        self._look()

    def _look(self) -> None:
        """Whether this is the peak. As kinds take time to find, it may be missed by a thousandth."""
        if self.total > self.peak * 1.001:
            self.peak = self.total
            self.at_peak = self._by_kind()

    @contextmanager
    def following_sizes(self) -> Iterator[None]:
        """Within the block, notice too that a storage is emptied or filled again, as FSDP2's are; those are gathered.

        No operator does this, so the mode alone would not see it.
        """
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            key = storage._cdata
            if key in self._bytes:
                self.total += storage.nbytes() - self._bytes[key]
                self._bytes[key] = storage.nbytes()
                self._born_in[key] = "gathered"
                self._look()
            return resized

        with patch.object(torch.UntypedStorage, "resize_", noted):
            yield

    def within(self, purpose: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose storages are of a kind, unless a better one is known."""

        def watched(*inputs: Any, **others: Any) -> Any:
            before, self.purpose = self.purpose, purpose
            try:
                return function(*inputs, **others)
            finally:
                self.purpose = before

        return watched

    def _forget(self, key: int) -> None:
        self.total -= self._bytes.pop(key, 0)
        self._born_in.pop(key, None)

    def _by_kind(self) -> Counter[str]:
        known, found = self._kinds(), Counter[str]()
        for key, size in self._bytes.items():
            found[known.get(key) or self._born_in.get(key, "activations")] += size
        return found


def key_of(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata


def make_model(case: Case) -> Any:
    """A model of random weights with its adapters, as `train.run` has it."""
    *shape, is_tied = SHAPES[case.shape]
    settings = llama(shape, tie_word_embeddings=is_tied)
    config = case.config()
    model = adapters.adapt(LlamaForCausalLM(settings), config.method, config, 0).eval()
    if config.method == "lora" and case.precision == "bfloat16":
        held.hold(model, torch.bfloat16)
    return model


def make_fake(model: Any, fake: FakeTensorMode) -> None:
    """Give a model on the device "meta" fake tensors, as if they were on a CPU."""
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: like(tensor) for name, tensor in tensors.items() if tensor is not None})


@contextmanager
def made_trainer(case: Case, model: Any, accelerator: Any) -> Iterator[Trainer]:
    """The trainer of a case, as `train.run` makes it of a model whose layers `arithmetic` has replaced."""
    with ExitStack() as stack:
        stack.enter_context(attention.over_examples(causal.unwrap(model)))
        if case.is_computed_again:
            stack.enter_context(recomputation.of_layers(model))
        yield Trainer(case.config(), Prepared((), [], [], {}, "", 0), model, True, 100, accelerator)  # type: ignore[arg-type]


def examples(case: Case) -> list[Example]:
    """Those of a step; half of each is prompt. All tokens weigh something, so the loss is computed for all."""
    segment = np.full(EXAMPLE_TOKENS, Segment.COMPLETION, np.int8)
    segment[: EXAMPLE_TOKENS // 2] = Segment.INSTRUCTION
    tokens = np.arange(EXAMPLE_TOKENS, dtype=np.int32)
    return [Example(tokens, segment)] * case.config().batch_examples


def attend_in_one_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """A stand-in for the kernel that attends to a packed row on a GPU, with its inputs, its output and what it keeps.

    It knows no examples, which makes no difference to memory.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (part.to(kind) for part in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2), None


def update_on_cpu(optimizer: str, gradient: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    """A stand-in for bitsandbytes' kernel on a CPU, which has both averages, the gradient and a quotient in float32."""
    averages = [torch.empty_like(weight, dtype=torch.float32) for _ in range(2)]
    scaled = gradient.float() * 1.0
    quotient = averages[1].sqrt() / 1.0
    assert quotient.shape == scaled.shape


class Borders:
    """The borders of a row's examples, whose numbers a fake tensor would not have."""

    def __init__(self, borders: Tensor) -> None:
        self.lengths = borders.diff().tolist()

    def diff(self) -> Borders:
        return self

    def tolist(self) -> list[int]:
        return self.lengths


class FakeProcess:
    """What the trainer asks of an Accelerator; of several processes this is the first, and the others do nothing."""

    process_index = 0
    device = torch.device("cpu")

    def __init__(self, count: int, precision: str) -> None:
        self.num_processes, self.mixed_precision = count, "bf16" if precision == "bfloat16" else "no"

    def prepare_model(self, learner: nn.Module) -> nn.Module:
        if self.mixed_precision == "bf16":
            learner.forward = torch.autocast("cpu", torch.bfloat16, **parallel.AUTOCAST)(learner.forward)
        return learner

    def no_sync(self, learner: Any) -> Any:
        return nullcontext()

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        return tensor

    def clip_grad_norm_(self, parameters: list[Tensor], norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, norm)


def computed(case: Case, *, as_on_gpu: bool = True) -> Counter[str]:
    """Bytes at the peak of a step, by kind, by fake tensors.

    as_on_gpu: with attention and AdamW as one kernel, and the loss's budget as it is on a GPU; else as on a CPU.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tables = [functional.create_dynamic_map(signed=signed) for signed in (False, True)]  # made of numbers
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(functional, "create_dynamic_map", lambda signed: fake.from_tensor(tables[signed]))
        )
        if case.devices > 1:
            torch.distributed.init_process_group("fake", rank=0, world_size=case.devices, store=FakeStore())
            stack.callback(torch.distributed.destroy_process_group)
            mesh = init_device_mesh("cpu", (case.devices,))  # which needs numbers
            stack.enter_context(patch.object(parallel, "init_device_mesh", lambda *_: mesh))
        accelerator = FakeProcess(case.devices, case.precision)
        if as_on_gpu:
            AttentionInterface.register(attention.NAME, attend_in_one_kernel)
            stack.callback(AttentionInterface.register, attention.NAME, attention._attend)
            stack.enter_context(patch.object(trainer, "ASYNCHRONOUS", {"cpu"}))
            stack.enter_context(patch.object(Batch, "pinned", lambda batch: batch))
            stack.enter_context(patch.object(loss, "BUDGET_BYTES", loss.BUDGET_BYTES_CUDA))
        else:
            stack.enter_context(patch.object(functional, "optimizer_update_8bit_blockwise", update_on_cpu))
        stack.enter_context(patch.object(Trainer, "_metrics", lambda self, numbers: {}))  # numbers there are none
        with torch.device("meta"):
            model = make_model(case)
        stack.enter_context(arithmetic.fewer_passes(model))  # which tries norms with numbers
        make_fake(model, fake)
        stack.enter_context(fake)
        training = stack.enter_context(made_trainer(case, model, accelerator))
        return taken(case, training, fake)


def taken(case: Case, training: Trainer, fake: FakeTensorMode) -> Counter[str]:
    """Bytes at the peak of a step, by kind."""

    def kinds() -> dict[Any, str]:
        known: dict[Any, str] = {}
        for parameter in training._model.parameters():  # whole ones, where FSDP2 has gathered them
            for tensor in (parameter, parameter.grad):
                if case.devices > 1 and tensor is not None:
                    known[key_of(tensor)] = "gathered"
        for parameter in own:
            is_adapter = case.method != "full" and parameter.requires_grad
            known[key_of(parameter)] = "adapters" if is_adapter else "base"
            if parameter.grad is not None:
                known[key_of(parameter.grad)] = "gradients"
        for averages in training._optimizer.state.values():
            known |= {key_of(value): "moments" for value in averages.values() if isinstance(value, Tensor)}
        return known

    own = list(training._model.parameters())
    begin(training)
    live = Live(kinds)
    for tensor in kept(training):
        live.note(tensor)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        step = training.prepare(examples(case))
        rows = [fake_batch(batch, fake) for batch in step.own]
    with ExitStack() as stack:
        forward = loss._ChunkedNLL.forward
        stack.enter_context(patch.object(loss._ChunkedNLL, "forward", staticmethod(live.within("loss", forward))))
        for name in ("foreach_all_gather", "foreach_reduce"):
            function = getattr(_fsdp_param_group, name)
            stack.enter_context(patch.object(_fsdp_param_group, name, live.within("gathered", function)))
        stack.enter_context(live.following_sizes())
        stack.enter_context(live)
        training.begin_step(trainer.Step(rows, step.count, step.tokens))
    return live.at_peak


def kept(training: Trainer) -> list[Tensor]:
    """What is there before a row: weights, gradients and AdamW's averages, or their shards."""
    weights = list(training._model.parameters())
    gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
    averages = [value for each in training._optimizer.state.values() for value in each.values()]
    tensors = [tensor for tensor in (*weights, *gradients, *averages) if isinstance(tensor, Tensor)]
    return [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def begin(training: Trainer) -> None:
    """Put a training into the state in which a row needs most: gradients and AdamW's averages are there.

    That is so for all rows but the first of a step, and for all steps but the first.
    """
    state.make_state(training._optimizer)
    for parameter in training._trained.values():
        parameter.grad = torch.zeros_like(parameter)


def fake_batch(batch: Batch, fake: FakeTensorMode) -> Batch:
    parts = {name: fake.from_tensor(part) if isinstance(part, Tensor) else part for name, part in vars(batch).items()}
    return Batch(**parts | {"borders": Borders(batch.borders)})  # type: ignore[arg-type]


def measured(case: Case) -> tuple[int, int]:
    """Bytes at the peak of a step on this machine's CPU: of tensors, and of all memory that the process has gained."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    before = resident("VmRSS")
    model, accelerator = make_model(case), parallel.accelerator(case.precision)  # type: ignore[arg-type]
    with arithmetic.fewer_passes(model), made_trainer(case, model, accelerator) as training:
        begin(training)
        gc.collect()
        beforehand = sum({key_of(tensor): tensor.untyped_storage().nbytes() for tensor in kept(training)}.values())
        step = training.prepare(examples(case))
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts again from here
        with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            training.end_step(training.begin_step(step))
        peak = resident("VmHWM")
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return beforehand + max(itertools.accumulate(changes)), peak - before


@contextmanager
def silent() -> Iterator[None]:
    """Within the block, nothing reaches stderr: the profiler writes lines there that no setting turns off."""
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def resident(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at its peak (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--shapes", default="135M,1B,7B", show_default=True, help="Models of which to show something.")
def main(file: Path, shapes: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows: list[Row] = []
    cases = [case for case in COMPUTED if case.shape in shapes.split(",")]
    if cases:
        print(f"{'computed: MiB at the peak of a step':<56}" + "".join(f"{kind:>12}" for kind in (*KINDS, "all")))
    for case in cases:
        by_kind = computed(case)
        sizes = [by_kind[kind] / MIB for kind in KINDS]
        print(f"{case!s:<56}" + "".join(f"{size:>12,.0f}" for size in (*sizes, sum(sizes))), flush=True)
        rows += [Row(str(case), f"MiB, {kind}", size, "", 0.0) for kind, size in zip(KINDS, sizes, strict=True)]
        rows.append(Row(str(case), "MiB", sum(sizes), "", 0.0))
    cases = [case for case in MEASURED if case.shape in shapes.split(",")]
    if cases:
        print(f"\n{'on this CPU: MiB at the peak of a step':<56}{'computed':>12}{'measured':>12}{'process':>12}")
    for case in cases:
        # A process of its own for each, so that none finds the memory of another, or its precision.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            tensors, process = (size / MIB for size in processes.submit(measured, case).result())
        expected = sum(computed(case, as_on_gpu=False).values()) / MIB
        print(f"{case!s:<56}{expected:>12,.0f}{tensors:>12,.0f}{process:>12,.0f}", flush=True)
        rows.append(Row(str(case), "MiB, computed", expected, "measured", tensors))
        rows.append(Row(str(case), "MiB of the process, measured", process, "tensors alone", tensors))
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
