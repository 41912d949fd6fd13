"""Does a step read nothing from the device before AdamW is queued, and does AdamW leave all as it was where it must?

And is what is said where memory runs out of use?
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import optimizer
from transformers import AttentionInterface

from plw_mlflow.config import TrainConfig
from plw_mlflow.data.batches import Batch
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.errors import RunError
from plw_mlflow.models import adapters, causal
from plw_mlflow.training import attention, checkpoints, trainer
from plw_mlflow.training.learner import Learner
from plw_mlflow.training.trainer import Trainer
from tests.conftest import make_example, tiny_llama

EXAMPLES = [make_example([2 + i for i in range(n)], [0, 1, 2] + [3] * (n - 3)) for n in (9, 5, 7, 8)]


class Alone:
    """What the trainer asks of an Accelerator, by one process on a device of any kind."""

    num_processes, process_index = 1, 0

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def prepare_model(self, learner):
        return learner

    def no_sync(self, learner):
        return nullcontext()

    def reduce(self, tensor, how):
        return tensor

    def clip_grad_norm_(self, parameters, norm):
        return nn.utils.clip_grad_norm_(parameters, norm)


def _by_kernel(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, scaling, **_):
    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return attention._varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, None).unsqueeze(0), None


@pytest.mark.parametrize("plw", [0, 0.242])
@pytest.mark.parametrize("changes", [{}, {"divisor_scope": "micro-batch"}, {"base_penalty": 0.1}, {"method": "lora"}])
def test_a_step_reads_no_number_before_its_end(changes, plw, monkeypatch):
    """On torch's meta device, whose tensors hold no numbers that could be read, as a GPU's without waiting for it."""
    monkeypatch.setattr(trainer, "ASYNCHRONOUS", {"meta"})
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    AttentionInterface.register("by_kernel", _by_kernel)
    config = TrainConfig(plw=plw, batch_examples=4, micro_batch_examples=2, max_tokens=9, **changes)
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    model = adapters.adapt(model, config.method, config, 0).to("meta").bfloat16()
    with attention.over_examples(causal.unwrap(model), "by_kernel"):
        training = Trainer(config, Prepared((), EXAMPLES, [], {}, "", 0), model, True, 10, Alone("meta"))
        step = training.prepare(EXAMPLES)
        assert step.count == 2
        numbers = training.begin_step(step)
    assert training._optimizer.found_inf.is_meta
    assert all(state["step"].is_meta for state in training._optimizer.state.values())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # as anything would that had read a number
        training.end_step(numbers)


def test_a_step_that_is_not_finite_changes_nothing_where_adamw_is_queued_before_that_is_known(monkeypatch):
    """As on a GPU, by the same kernel for a CPU; and the steps before and after it are those of plain AdamW."""
    weights = {}
    for kinds in (set(), {"cpu"}):
        monkeypatch.setattr(trainer, "ASYNCHRONOUS", kinds)
        monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
        model = tiny_llama()
        config = TrainConfig(batch_examples=4, micro_batch_examples=4, max_tokens=9, packing=False, warmup_ratio=0)
        training = Trainer(config, Prepared((), EXAMPLES, [], {}, "", 0), model, False, 10, Alone("cpu"))
        step = training.prepare(EXAMPLES)
        training.end_step(training.begin_step(step))

        states = [state for state in training._optimizer.state.values()]
        before = [t.clone() for t in [*model.parameters(), *(t for state in states for t in state.values())]]
        spoilt = model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(RunError, match="train/grad_norm is nan at step 2; "):
            training.end_step(training.begin_step(step))
        after = [*model.parameters(), *(t for state in states for t in state.values())]
        assert all(map(torch.equal, after, before))

        spoilt.remove()
        training._optimizer.zero_grad()
        training.end_step(training.begin_step(step))
        assert training.step == 2
        weights[bool(kinds)] = [p.detach() for p in model.parameters()]
    torch.testing.assert_close(weights[True], weights[False])


def test_a_fused_optimizers_state_is_restored_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "ASYNCHRONOUS", {"cpu"})
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    config = TrainConfig(batch_examples=4, micro_batch_examples=4, max_tokens=9, packing=False)

    def make():
        return Trainer(config, Prepared((), EXAMPLES, [], {}, "", 0), tiny_llama(), False, 10, Alone("cpu"))

    def take(training, steps):
        for _ in range(steps):
            training.end_step(training.begin_step(training.prepare(EXAMPLES)))
        return training

    undisturbed, begun, resumed = take(make(), 5), take(make(), 3), make()
    writer = checkpoints.Writer(tmp_path, "", 1, lambda saved: None)
    writer.save(begun.checkpoint())
    writer.wait()
    assert resumed.load(checkpoints.load(tmp_path, "", resumed.check_fit)) == 3
    take(resumed, 2)
    assert all(map(torch.equal, resumed._trained.values(), undisturbed._trained.values()))


def make_trainer(**options):
    config = TrainConfig(batch_examples=4, micro_batch_examples=4, max_tokens=9, **options)
    model = adapters.adapt(tiny_llama(), config.method, config, 0)
    return Trainer(config, Prepared((), EXAMPLES, [], {}, "", 0), model, False, 10, Alone("cpu"))


def test_memory_that_runs_out_while_layers_are_compiled_is_told_of_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "forward", fail)
    with pytest.raises(
        RunError, match=r"^out of memory after step 0; lower --max-tokens \(now 9\), or leave --compile"
    ):
        make_trainer(compile=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "--optimizer adamw8bit or --method lora or --parallel fsdp2 with more --processes needs less for"),
        ({"parallel": "fsdp2"}, "--method lora or --parallel fsdp2 with more --processes needs less for"),
        ({"method": "lora"}, "--optimizer adamw8bit or --parallel fsdp2 with more --processes needs less for"),
        ({"optimizer": "adamw8bit"}, "--method lora needs less for AdamW's averages"),
        ({"optimizer": "adamw8bit", "method": "lora"}, "give --activation-checkpointing"),
    ],
)
def test_memory_that_runs_out_in_the_optimizer_recommends_what_can_be_given(options, told, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    training = make_trainer(packing=False, **options)
    monkeypatch.setattr(training._optimizer, "step", fail)
    with pytest.raises(RunError, match=f"^out of memory after step 0; {told}"):
        training.begin_step(training.prepare(EXAMPLES))
