"""Are the operations of a step those that a count by hand gives, and is what is measured on every run?"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.weights import Weights
from plw_mlflow.models import adapters
from plw_mlflow.training import measured
from plw_mlflow.training.measured import Meter, Peak, Work
from tests.conftest import VOCABULARY, tiny_llama
from tests.training.test_train import EXAMPLES, example, run

HIDDEN, INNER, LAYERS, RANK = 24, 32, 2, 8
PROJECTIONS = HIDDEN * (24 + 12 + 12) + 24 * HIDDEN  # queries, keys and values of two groups, output
MATRICES = LAYERS * (PROJECTIONS + 3 * HIDDEN * INNER)
HEAD = VOCABULARY * HIDDEN


def pairs(*lengths):
    return sum(length * (length + 1) // 2 for length in lengths)


def test_a_whole_model_is_six_operations_a_weight_and_attention_three_times_its_forward_pass():
    work = Work.of(tiny_llama())
    assert (work.per_token, work.per_loss_token) == (6 * MATRICES, 6 * HEAD)
    assert work.per_pair == 3 * LAYERS * 2 * 2 * HIDDEN  # query times key, and weight times value
    assert Work.of(tiny_llama(tied=True)) == work


def test_frozen_weights_are_four_operations_and_those_of_adapters_six():
    work = Work.of(adapters.adapt(tiny_llama(), "lora", TrainConfig(method="lora", lora_rank=RANK), 1))
    shapes = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 32), (24, 32), (32, 24)]
    assert work.per_token == 4 * MATRICES + 6 * LAYERS * sum(RANK * (a + b) for a, b in shapes)
    assert work.per_loss_token == 4 * HEAD


def test_a_step_counts_its_tokens_those_that_bear_loss_and_those_that_see_each_other():
    short, long = example(1, 1, 2, 0, 3), example(2, 1, 6, 0, 2)
    work = Work(per_token=1_000_000, per_loss_token=1000, per_pair=1)
    for make in (batches.pack, batches.collate):
        # At PLW 0 the completions alone bear loss: 3 and 2 tokens.
        assert work.of_step([make([short, long], Weights(0.0))]) == 15 * 1_000_000 + 5 * 1000 + pairs(6, 9)


def test_the_forward_pass_of_the_matrices_is_what_torch_counts():
    model, tokens = tiny_llama(), torch.zeros(3, 7, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    products = counter.get_flop_counts()["Global"]
    work = Work.of(model)
    assert products[torch.ops.aten.mm] == 21 * (work.per_token + work.per_loss_token) / 3


def test_the_numbers_of_llama_3_8b_are_those_of_the_convention():
    """33.2 GFLOP a token for LoRA, without its adapters, and 48.2 when all is trained, at 4,096 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    found = {}
    for method in ("full", "lora"):
        model.requires_grad_(method == "full")
        work = Work.of(model)
        found[method] = work.per_token + work.per_loss_token + work.per_pair * pairs(4096) / 4096
    assert found["full"] == pytest.approx(48.2e9, rel=2e-3)
    assert found["lora"] == pytest.approx(33.2e9, rel=2e-3)


@pytest.mark.parametrize(("packing", "padding"), [(True, 0.0), (False, 1 - 58 / (5 * 18))])
def test_every_step_says_how_fast_it_was_and_what_it_took(tmp_path, packing, padding):
    logged = {}
    assert sum(len(each.tokens) for each in EXAMPLES) == 58
    run(tmp_path, log=lambda metrics, step: logged.update({step: metrics}), packing=packing)
    assert logged[1]["train/padding_share"] == pytest.approx(padding)
    assert logged[1]["train/tokens_per_second"] > 0
    assert logged[1]["train/peak_memory_mib"] > 100  # of Python and torch
    assert "train/mfu" not in logged[1]  # no peak was given


def test_mfu_is_operations_by_seconds_by_peak():
    batch = batches.pack(EXAMPLES, Weights(0.5))
    meter = Meter(tiny_llama(), torch.device("cpu"), Peak(1e9, "known"))
    found = meter.metrics([batch], tokens=58, seconds=0.5)
    assert found["train/mfu"] == Work.of(tiny_llama()).of_step([batch]) / 0.5 / 1e9
    assert found["train/tokens_per_second"] == 116


def test_the_peak_of_a_cpu_is_measured_and_named():
    peak = measured.find_peak(tiny_llama(), "float32", max_tokens=512)
    assert 1e8 < peak.flops < 1e15
    assert peak.named.startswith(f"{peak.flops / 1e9:.0f} GFLOP/s, bare float32 products on this CPU")


@pytest.mark.parametrize(
    ("name", "arithmetic", "expected"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H200 NVL", "bfloat16", None),
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_from_the_table(monkeypatch, name, arithmetic, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    peak = measured.find_peak(tiny_llama(), arithmetic, max_tokens=512)
    assert peak.flops == (None if expected is None else pytest.approx(expected * 1e12))
    assert name in peak.named


def test_what_cannot_be_counted_has_no_mfu_and_says_why():
    model = tiny_llama()
    model.config.sliding_window = 128
    assert "window of 128 tokens" in measured.find_peak(model, "float32", max_tokens=512).named
    assert measured.find_peak(model, "float32", max_tokens=128).flops > 0
    model.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    peak = measured.find_peak(model, "float32", max_tokens=128)
    assert peak.flops is None
    assert "experts" in peak.named


def test_a_weight_in_four_bits_counts_by_the_shape_it_stands_for():
    packed = torch.nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(3, 4))
    assert measured._per_token(packed) == 4 * 12
    assert math.prod(packed.shape) != 12
