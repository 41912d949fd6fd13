"""Does the oracle find the weights that tokens had in a step, and see it where they had none or something else?"""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from benchmarks import conformance, exactness
from benchmarks.trainers import cases, commands, material, oracle
from benchmarks.trainers.names import as_transformers
from plw_mlflow.data.pieces import Segment
from tests.integrations import steps
from tests.stores import ROOT


@functools.cache
def the_oracle():
    return oracle.Oracle(steps.model().double())


def examples():
    return steps.prepared().training


def texts():
    return [tuple(example.tokens.tolist()) for example in examples()]


def by_name(gradient):
    """A flat gradient by the names of parameters."""
    parameters = dict(steps.model().named_parameters())
    parts = gradient.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(parameters[name].shape) for name, part in zip(parameters, parts, strict=True)}


def gradient_of(loss_of):
    """That of a loss of a model in float32."""
    model = steps.model()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def losses(model, text):
    tokens = torch.tensor([text])
    return functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize(("accumulation", "packing"), [(1, True), (2, False)])
def test_the_weights_of_our_own_loop_are_found(accumulation, packing):
    one = steps.case(accumulation, packing, "weights")
    found = the_oracle().weights(by_name(exactness.ours(one, 0.242, steps.model, steps.prepared())), texts())
    given = [torch.where(torch.tensor(e.segment[1:] == Segment.COMPLETION), 1.0, 0.242) for e in examples()]
    whole = sum(float(weights.sum()) for weights in given)
    for text, weights in zip(texts(), given, strict=True):
        assert found.by_position(text) == pytest.approx((weights / whole).tolist(), rel=1e-3)
    assert found.residual < 1e-6
    assert found.condition < 1e4


def test_a_mean_of_the_means_of_micro_batches_is_seen():
    """Which is what a trainer does that divides each micro-batch by its own tokens."""
    first, second = texts()[:3], texts()[3:6]

    def mean_of_means(model):
        means = [torch.cat([losses(model, text) for text in part]).mean() for part in (first, second)]
        return sum(means) / 2

    found = the_oracle().weights(gradient_of(mean_of_means), [*first, *second])
    for part in (first, second):
        expected = 0.5 / sum(len(text) - 1 for text in part)
        assert found.by_position(part[0]) == pytest.approx([expected] * (len(part[0]) - 1), rel=1e-3)


def test_examples_that_attend_to_each_other_are_seen():
    row = texts()[0] + texts()[1]
    gradient = gradient_of(lambda model: losses(model, row).mean())
    assert the_oracle().weights(gradient, oracle.cut(row, texts())).residual > 0.1
    assert the_oracle().residual_as_one(gradient, [oracle.Row(row, None)]) < 1e-6


def test_a_loss_with_something_else_in_it_is_seen():
    def with_decay(model):
        return losses(model, texts()[0]).mean() + 0.01 * model.lm_head.weight.square().sum()

    assert the_oracle().weights(gradient_of(with_decay), texts()[:1]).residual > 1e-3


def test_rows_are_cut_into_known_texts():
    known = [(1, 5, 6), (1, 7), (1, 5, 6, 8)]
    assert oracle.cut((1, 5, 6, 8, 1, 7, 1, 5), known) == [(1, 5, 6, 8), (1, 7), (1, 5)]
    assert oracle.cut((6, 8, 1, 7), known) == [(6, 8), (1, 7)]
    assert oracle.cut((3, 4), ()) == [(3, 4)]
    with pytest.raises(ValueError, match="no known text"):
        oracle.cut((1, 5, 6, 9), known)


def test_padding_is_no_part_of_rows():
    batch = {
        "input_ids": torch.tensor([[1, 5, 2, 2], [1, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2),
    }
    assert oracle.rows_of(batch, padding=0) == [oracle.Row((1, 5, 2), None)]


def test_the_names_of_litgpt_are_translated():
    values = torch.arange(64.0).view(64, 1)
    found = as_transformers({"_forward_module.transformer.h.1.attn.qkv.weight": values})
    assert {name: len(part) for name, part in found.items()} == {
        "model.layers.1.self_attn.q_proj.weight": 32,
        "model.layers.1.self_attn.k_proj.weight": 16,
        "model.layers.1.self_attn.v_proj.weight": 16,
    }
    assert torch.equal(torch.cat([*found.values()]), values)


PROGRAM = """
import torch

model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
with torch.no_grad():
    model(torch.tensor([[7, 7]]))
model(torch.tensor([[1, 2, 3]])).sum().backward()
optimizer.step()
print("after the step")
"""


def test_the_probe_sees_the_first_step_and_ends_the_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    step = {"folder": str(tmp_path), "program": [str(tmp_path / "program.py")]}
    (tmp_path / "steps.json").write_text(json.dumps({"imports": [], "steps": [step]}))
    probe = [sys.executable, str(ROOT / "benchmarks/trainers/probe.py"), str(tmp_path / "steps.json")]
    subprocess.run(probe, check=True)
    seen = torch.load(tmp_path / "rank0.pt")
    assert [batch["input_ids"].tolist() for batch in seen["micro_batches"]] == [[[1, 2, 3]]]
    assert torch.equal(seen["gradient"]["1.bias"], torch.full((8,), 3.0))
    assert "after the step" not in (tmp_path / "output.txt").read_text()


def taken(folder, micro_batches, loss_of):
    """Save what the probe would have, of a step of the tiny model; and its tokenizer."""
    material.write_model(folder / "model")
    model = material.model()
    loss_of(model).backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    batches = [{"input_ids": torch.tensor(tokens)} for tokens in micro_batches]
    torch.save({"micro_batches": batches, "gradient": gradient, "versions": {}}, folder / "rank0.pt")
    return folder


def test_a_step_is_described_by_the_weights_of_its_tokens(tmp_path):
    first, second = (1, 20, 30, 40), (1, 50, 60)

    def loss_of(model):  # of the last token of each, the second of half the weight
        return (2 * losses(model, first)[-1] + losses(model, second)[-1]) / 3

    found = conformance.judge(taken(tmp_path, [[first], [second]], loss_of), [])
    assert (found["texts"], found["tokens"], found["trained"]) == (2, 5, 2)
    assert found["sum"] == pytest.approx(1)
    assert (found["smallest"], found["largest"]) == pytest.approx((2 / 3, 4 / 3), rel=1e-4)
    assert [text.count("⟦") for text in found["shown"]] == [1, 1]


def test_what_no_weights_explain_is_not_told_as_weights(tmp_path):
    first, second = (1, 20, 30, 40), (1, 50, 60)
    row = first + second
    found = conformance.judge(taken(tmp_path, [[row]], lambda model: losses(model, row).mean()), [first, second])
    assert found["residual"] > 0.01
    assert found["residual_as_one"] < 1e-6
    assert "sum" not in found
    assert conformance.line(found).startswith("no weights explain it")


def test_tokens_of_a_shared_beginning_do_not_count_as_smallest_or_largest(tmp_path):
    """Of which only the sum can be known: the one text's are trained on, the other's are not."""
    first, second = (1, 20, 30, 40), (1, 20, 30, 50)
    found = conformance.judge(taken(tmp_path, [[first, second]], lambda model: losses(model, first).mean()), [])
    assert found["smallest"] == found["largest"]


def test_processes_with_gradients_of_their_own_have_failed(tmp_path):
    taken(tmp_path, [[(1, 20, 30)]], lambda model: losses(model, (1, 20, 30)).mean())
    step = torch.load(tmp_path / "rank0.pt")
    step["gradient"]["lm_head.weight"] = step["gradient"]["lm_head.weight"] + 1
    torch.save(step, tmp_path / "rank1.pt")
    assert conformance.judge(tmp_path, []) == {"failed": "each process has a gradient of its own"}


def test_without_its_environment_no_step_of_a_trainer_is_taken(tmp_path):
    (trl,) = [trainer for trainer in commands.TRAINERS if trainer.name == "TRL"]
    ((_, found),) = conformance.take_steps(trl, [cases.WHOLE], tmp_path / "none", tmp_path)
    assert "make it by --install trl" in found["not_run"]


def test_an_error_is_told_and_not_what_torchrun_says_of_it(tmp_path):
    (tmp_path / "output.txt").write_text(
        "ValueError: no accelerator\ntorch.distributed.elastic.ChildFailedError: 1\nbye\n"
    )
    assert conformance.last_error(tmp_path) == "ValueError: no accelerator"
    (tmp_path / "output.txt").write_text("at work\n\n")
    assert conformance.last_error(tmp_path) == "at work"


@pytest.mark.slow
def test_steps_of_trainers_are_read(tmp_path):
    """Of PLWTrainer's, in one process and in two."""
    chosen = [
        replace(cases.WHOLE, plw=0.242),
        cases.Case("packed", packing=True, plw=0.242),
        cases.Case("2 processes", micro_batch=3, accumulation=2, processes=2, plw=0.242),
    ]
    (ours,) = [trainer for trainer in commands.TRAINERS if trainer.name == "PLWTrainer"]
    for case, found in conformance.take_steps(ours, chosen, tmp_path, tmp_path):
        assert found["sum"] == pytest.approx(1), case
        assert found["smallest"] / found["largest"] == pytest.approx(0.242, rel=1e-4)
        assert found["texts"] == 12
        assert found["residual"] < 1e-6
