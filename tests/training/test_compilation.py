"""Are compiled layers made once for rows of all lengths, and is what they give the same but for rounding?

Compiling by a C++ compiler takes a minute, so most tests let torch trace the layers and run the traced operations.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import UserError
from plw_mlflow.models import adapters, causal
from plw_mlflow.training import attention, compilation, train
from plw_mlflow.training.learner import Learner
from tests.conftest import make_example, tiny_llama

ROWS = ((9, 5, 7, 8), (6, 20, 4), (5, 5), (13,), (3, 3, 3, 8, 9, 40))  # tokens of the examples in each


def make_batches(collate):
    random = torch.Generator().manual_seed(1)
    texts = [[torch.randint(2, 200, (length,), generator=random).tolist() for length in row] for row in ROWS]
    return [
        collate([make_example(text, [0, 1] + [3] * (len(text) - 2)) for text in row], Weights(0.2)) for row in texts
    ]


def gradients(model, batch):
    model.zero_grad()
    total, _ = Learner(model)(batch.tokens, batch.weights, batch.rows, **batch.context)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("method", "backend"), [("full", "eager"), pytest.param("lora", "aot_eager", marks=pytest.mark.slow)]
)
def test_packed_rows_of_all_lengths_share_the_programs_of_the_first(method, backend):
    model = adapters.adapt(tiny_llama(), method, TrainConfig(), 0)
    exact = copy.deepcopy(model).double()
    counter = CompileCounterWithBackend(backend)
    rows, counts = make_batches(batches.pack), []
    with attention.over_examples(causal.unwrap(model)):
        with compilation.of_layers(model, torch.float32, backend=counter):
            found = []
            for row in rows:
                found.append(gradients(model, row))
                counts.append(counter.frame_count)
        assert causal.unwrap(model).config._attn_implementation == attention.NAME
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
    with attention.over_examples(causal.unwrap(exact)):
        for row, ours in zip(rows, found, strict=True):
            for name, expected in gradients(exact, row).items():
                assert (ours[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.slow
def test_padded_rows_may_be_compiled_too():
    model = tiny_llama()
    rows = make_batches(batches.collate)[:2]
    with compilation.of_layers(model, torch.float32, backend="aot_eager"):
        found = [gradients(model, row) for row in rows]
    for row, ours in zip(rows, found, strict=True):
        for name, expected in gradients(model, row).items():
            torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_compiler_that_fails_is_told_of_in_one_line():
    def fail(graph, inputs):
        raise OSError("Python.h: No such file or directory\nand much more")

    model, (row, *_) = tiny_llama(), make_batches(batches.pack)
    with (
        attention.over_examples(model),
        pytest.raises(UserError, match=r"leave --compile out. .*: Python.h: No such file or directory$") as told,
        compilation.of_layers(model, torch.float32, backend=fail),
    ):
        gradients(model, row)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_resumed_training_of_compiled_layers_ends_in_the_bits_of_an_undisturbed_one(tmp_path):
    """By torch's own compiler; the two begin with rows of other lengths. And what is trained is the plain model."""
    lengths = [14, 5, 11, 8, 30, 6, 21, 9]
    random = torch.Generator().manual_seed(2)
    examples = [
        make_example(torch.randint(2, 200, (n,), generator=random).tolist(), [0, 1] + [3] * (n - 2)) for n in lengths
    ]
    prepared = Prepared((), examples, examples[:2], {}, "", 0)

    def training(folder, stop=None, **options):
        def log(metrics, step):
            if step == stop:
                raise KeyboardInterrupt

        config = TrainConfig(
            batch_examples=2, micro_batch_examples=1, max_tokens=32, epochs=2, save_every=2, eval_every=99, **options
        )
        return train.run(config, prepared, tiny_llama(), folder, log).model

    undisturbed = training(tmp_path / "undisturbed", compile=True)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "stopped", stop=5, compile=True)
    resumed = training(tmp_path / "stopped", compile=True)
    plain = training(tmp_path / "plain")
    for name, parameter in undisturbed.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name
        torch.testing.assert_close(plain.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    assert all(layer._compiled_call_impl is None for layer in undisturbed.modules())
    assert undisturbed.config._attn_implementation == "sdpa"


def test_layers_that_are_computed_again_are_not_to_be_compiled():
    with pytest.raises(UserError, match="compile does nothing for layers that activation-checkpointing"):
        TrainConfig(compile=True, activation_checkpointing=True)
