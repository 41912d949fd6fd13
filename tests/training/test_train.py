"""Is a step's loss and gradient what the table of divisors says, and does a killed run end in the same weights?"""

import copy
import fcntl
import functools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.data.tokens import Example
from plw_mlflow.errors import RunError
from plw_mlflow.training import checkpoints, train
from plw_mlflow.training.learner import Learner
from tests.conftest import VOCABULARY, make_example, tiny_llama
from tests.families import tiny

METHODS = ("full", "lora")


def example(number: int, *lengths: int) -> Example:
    """An example with random tokens, and so many of them in template, instruction, input and completion."""
    random = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (sum(lengths),), generator=random).tolist()
    return make_example(tokens, [segment for segment in Segment for _ in range(lengths[segment])])


# Rows of 5 to 18 tokens, and few or many of them completion: means of means would differ from the mean.
EXAMPLES = [example(1, 3, 2, 0, 13), example(2, 3, 1, 1, 1), example(3, 4, 5, 2, 2), example(4, 2, 1, 1, 1)]
EXAMPLES += [example(5, 3, 9, 3, 1)]


def run(
    folder,
    *,
    training=EXAMPLES,
    validation=EXAMPLES[:2],
    model=None,
    log=lambda metrics, step: None,
    cell="",
    begin=id,
    **options,
):
    """Train the tiny model, or another; by default a single step on all examples at once."""
    options = {"batch_examples": 6, "micro_batch_examples": 6, "epochs": 1, "max_grad_norm": 1e9} | options
    prepared = Prepared((), list(training), list(validation), {}, "", 0)
    return train.run(TrainConfig(**options), prepared, model or tiny_llama(), folder, log, cell=cell, begin=begin)


def first_step(folder, **options):
    """Loss and gradients, by parameter, with which the optimiser takes a run's first step."""
    model = options.pop("model", None) or tiny_llama()
    losses, gradients = {}, {}

    def look(*_):
        for name, parameter in model.named_parameters():
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            gradients.setdefault(name, whole.clone())

    hook = register_optimizer_step_pre_hook(look)
    try:
        run(folder, model=model, log=lambda metrics, step: losses.update({step: metrics}), **options)
    finally:
        hook.remove()
    return losses[1]["train/loss"], gradients


def oracle(groups, weights, divisor):
    """The mean over groups of their loss, and its gradients: a row at a time, all logits, in float64.

    weights: by segment, in the order template, instruction, input, completion.
    """
    model = copy.deepcopy(tiny_llama()).double()
    losses = []
    for group in groups:
        sides = {
            False: [],
            True: [],
        }  # weight and loss of each token that weighs something, by whether it is completion
        for row in group:
            logits = model(torch.tensor([row.tokens.tolist()])).logits[0]
            predicted = range(1, len(row.tokens))
            lengths = Counter(row.segment[position] == Segment.COMPLETION for position in predicted)
            for position in predicted:
                w, side = weights[row.segment[position]], row.segment[position] == Segment.COMPLETION
                if divisor == "share" and not side:
                    w *= lengths[True] / lengths[False]
                if w:
                    target = torch.tensor(int(row.tokens[position]))
                    sides[bool(side)].append((w, cross_entropy(logits[position - 1], target)))
        if divisor != "segments":
            sides = {None: [*sides[False], *sides[True]]}
        loss = torch.zeros((), dtype=torch.float64)
        for tokens in filter(None, sides.values()):
            by = len(tokens) if divisor in ("tokens", "segments") else sum(w for w, _ in tokens)
            loss = loss + sum(w * nll for w, nll in tokens) / by
        losses.append(loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


DIVISORS = ("weights", "tokens", "segments", "share")


@functools.cache
def whole_step(plw, divisor, scope="step"):
    groups = [[row] for row in EXAMPLES] if scope == "example" else [EXAMPLES]
    return oracle(groups, [plw, plw, plw, 1 - plw if divisor == "share" else 1], divisor)


def assert_same_step(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)  # summed in float32
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-3  # well above the absolute tolerance
        # Twice the default relative tolerance of float32: a sum of hundreds of products, in another order.
        atol = 2e-6 * max(1, expected[0] / 6)  # the mean of a few tokens' losses is at most 6
        torch.testing.assert_close(found[1][name], gradient, check_dtype=False, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("divisor", ["weights", "tokens"])
@pytest.mark.parametrize("plw", [0, 0.0005, 0.242, 1])
def test_a_step_is_the_same_however_it_is_cut(plw, divisor, packing, rows, tmp_path):
    assert_step_is_the_same(plw, divisor, "step", packing, rows, tmp_path)


@pytest.mark.parametrize(("packing", "rows"), [(False, 1), (False, 6), (True, 2)])
@pytest.mark.parametrize("scope", ["step", "example"])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_so_it_is_where_weights_have_factors(divisor, scope, packing, rows, tmp_path):
    assert_step_is_the_same(0.242, divisor, scope, packing, rows, tmp_path)


def assert_step_is_the_same(plw, divisor, scope, packing, rows, tmp_path):
    longest = max(len(row.tokens) for row in EXAMPLES)
    cut = {"micro_batch_examples": rows}
    if packing:  # into rows of 18, 36, 54 and 108 tokens
        cut = {"micro_batch_examples": 1, "max_tokens": longest, "micro_batch_tokens": rows * longest}
    found = first_step(tmp_path, plw=plw, loss_divisor=divisor, divisor_scope=scope, packing=packing, **cut)
    assert_same_step(found, whole_step(plw, divisor, scope))


@pytest.mark.parametrize("packing", [False, True])
def test_without_validation_examples_there_are_no_validation_losses(packing, tmp_path):
    """As of a data set of one record, which prepare accepts."""
    logged = {}
    done = run(
        tmp_path,
        training=EXAMPLES[:1],
        validation=[],
        packing=packing,
        epochs=2,
        log=lambda metrics, step: logged.update({step: metrics}),
    )
    assert done.steps == 2
    assert logged[0] == {}
    assert "train/completion_loss" in logged[2]
    assert not [name for metrics in logged.values() for name in metrics if name.startswith("eval/")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("plw", [0, 1])
def test_the_extremes_are_the_two_usual_losses(plw, micro_batch, tied, tmp_path):
    """PLW 0 is the model's own loss with the prompt masked by -100, PLW 1 its loss with only padding masked."""
    model = tiny_llama(tied=tied)
    longest = max(len(row.tokens) for row in EXAMPLES)
    tokens = torch.zeros(len(EXAMPLES), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for number, row in enumerate(EXAMPLES):
        first = 0 if plw else row.segment.tolist().index(Segment.COMPLETION)
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[number, first : len(row.tokens)] = torch.tensor(row.tokens[first:])
    own = copy.deepcopy(model)
    loss = own(tokens, labels=labels).loss  # what stands right of a row's tokens cannot be seen from them
    loss.backward()
    expected = loss.item(), {name: parameter.grad for name, parameter in own.named_parameters()}

    found = first_step(tmp_path, model=model, plw=plw, micro_batch_examples=micro_batch)
    assert_same_step(found, expected)


def micro_batches(rows, size):
    """The rows of the only step, as they are cut where each micro-batch has its own divisor."""
    (order,) = batches.steps(len(rows), 6, seed=1234, first=0, total=1)
    taken = [rows[index] for index in order]
    return [taken[start : start + size] for start in range(0, len(taken), size)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_divisor_per_micro_batch_gives_the_mean_of_their_means(divisor, micro_batch, packing, tmp_path):
    completion = 1 - 0.242 if divisor == "share" else 1
    expected = oracle(micro_batches(EXAMPLES, micro_batch), [0.242, 0.242, 0.242, completion], divisor)
    found = first_step(
        tmp_path,
        plw=0.242,
        packing=packing,
        loss_divisor=divisor,
        divisor_scope="micro-batch",
        micro_batch_examples=micro_batch,
    )
    assert_same_step(found, expected)
    assert found[0] != pytest.approx(whole_step(0.242, divisor)[0], rel=1e-3)


@pytest.mark.parametrize("divisor", ["weights", "tokens", "segments"])
@pytest.mark.parametrize(("template", "completion"), [(0.0, 1.0), (0.5, 1.0), (None, 3.0), (0.0, 0.0)])
def test_template_and_completion_may_have_weights_of_their_own(template, completion, divisor, tmp_path):
    plw = 0.25
    expected = oracle([EXAMPLES], [plw if template is None else template, plw, plw, completion], divisor)
    found = first_step(tmp_path, plw=plw, template_weight=template, completion_weight=completion, loss_divisor=divisor)
    assert_same_step(found, expected)


PROMPT_ALONE = example(9, 4, 6, 0, 0)  # as truncation leaves it


def test_a_micro_batch_that_weighs_nothing_adds_nothing(tmp_path):
    found = first_step(tmp_path, training=[*EXAMPLES, PROMPT_ALONE], plw=0, micro_batch_examples=1)
    assert_same_step(found, whole_step(0, "weights"))


def test_nor_where_each_micro_batch_has_its_own_divisor(tmp_path):
    found = first_step(
        tmp_path, training=[*EXAMPLES, PROMPT_ALONE], plw=0, micro_batch_examples=1, divisor_scope="micro-batch"
    )
    expected = oracle([[row] for row in [*EXAMPLES, PROMPT_ALONE]], [0, 0, 0, 1], "weights")
    assert_same_step(found, expected)


@pytest.mark.parametrize("divisor", DIVISORS)
def test_an_example_that_weighs_nothing_is_not_among_those_averaged(divisor, tmp_path):
    found = first_step(
        tmp_path, training=[*EXAMPLES, PROMPT_ALONE], plw=0, divisor_scope="example", loss_divisor=divisor
    )
    assert_same_step(found, whole_step(0, divisor, "example"))


@pytest.mark.parametrize("scope", ["step", "micro-batch", "example"])
def test_a_step_that_weighs_nothing_changes_nothing(scope, tmp_path):
    model = tiny_llama()
    loss, gradients = first_step(
        tmp_path, model=model, training=[PROMPT_ALONE] * 2, plw=0, micro_batch_examples=1, divisor_scope=scope
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
    assert all(map(torch.equal, model.parameters(), tiny_llama().parameters()))


SCOPES = ("step", "micro-batch")
WITH_FACTORS = (("segments", "step"), ("share", "step"), ("segments", "example"), ("weights", "example"))
SPREADS = ("ddp", "fsdp2")


def share(folder: Path, port: str) -> None:
    """Train in two processes, each way of spreading a model over them; see the tests below for what is left behind.

    Runs in a process of its own, where torch has done nothing yet that would not survive a fork.
    """
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in ("0", "1"):
        if os.fork() == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            status = 1
            try:
                for spread in SPREADS:
                    share_steps(folder / spread, spread, rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
    assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)] == [0, 0]


def share_steps(folder: Path, spread: str, rank: str) -> None:
    # Three micro-batches between two processes, with few tokens a row: one is left without.
    options = {"plw": 0.242, "micro_batch_examples": 2, "parallel": spread}
    found = {scope: first_step(folder / scope, divisor_scope=scope, **options) for scope in SCOPES}
    rows = {"micro_batch_tokens": 40, "max_tokens": 20}
    found["packed"] = first_step(folder / "packed", **rows, **options)
    found["computed again"] = first_step(folder / "again", activation_checkpointing=True, **rows, **options)
    for divisor, scope in WITH_FACTORS:
        more = {"loss_divisor": divisor, "divisor_scope": scope}
        found[divisor, scope] = first_step(folder / f"{divisor} by {scope}", **more, **rows, **options)
    torch.save(found, folder / rank)
    for method in METHODS:
        model = resumable(folder / method, method, dropout=0.0, model=tiny_llama(tied=True), parallel=spread).model
        if rank == "0":
            model.save_pretrained(folder / f"{method} as trained", safe_serialization=True)
        assert (model is None) == (rank == "1")
        if model is not None:  # it is as it was before, but for its weights
            assert model.config._attn_implementation == "sdpa"
            assert model(torch.arange(6).unsqueeze(0)).logits.isfinite().all()
    # A signal comes to one of them; both stop after the same step, which can be gone on from alone.
    kill = functools.partial(signal_self, at=5, message=signal.SIGINT if spread == "fsdp2" else signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        resumable(
            folder / "terminated", "full", parallel=spread, log=kill if rank == "0" else lambda metrics, step: None
        )
    # And what one process has begun, two go on with.
    shutil.copytree(folder.parent / "begun", folder / f"begun {rank}")
    done = resumable(folder / "begun 0", "full", parallel=spread)
    assert done.resumed_from == 4
    if rank == "0":
        torch.save(done.model.state_dict(), folder / "gone on")


def signal_self(metrics, step, at, message=signal.SIGTERM):
    if step == at:
        os.kill(os.getpid(), message)


@pytest.fixture(scope="module")
def shared_training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    with pytest.raises(KeyboardInterrupt):
        resumable(folder / "begun", "full", log=functools.partial(signal_self, at=3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = "import sys; from pathlib import Path; from tests.training.test_train import share; "
    script += "share(Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", script, str(folder), port]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=240)
    return folder


@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_take_the_step_of_one(spread, shared_training):
    expected = {
        "step": whole_step(0.242, "weights"),
        "micro-batch": oracle(micro_batches(EXAMPLES, 2), [0.242, 0.242, 0.242, 1], "weights"),
    } | {how: whole_step(0.242, *how) for how in WITH_FACTORS}
    for rank in ("0", "1"):
        found = torch.load(shared_training / spread / rank)
        for kind, step in found.items():
            assert_same_step(step, expected.get(kind, expected["step"]))
        assert found["computed again"][0] == found["packed"][0]
        assert all(map(torch.equal, found["computed again"][1].values(), found["packed"][1].values()))


def assert_same_weights(found, expected):
    """Within what adding up in another order does to float32 in nine steps."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_train_the_model_of_one(spread, method, shared_training, tmp_path):
    alone = resumable(tmp_path, method, dropout=0.0, model=tiny_llama(tied=True)).model
    alone.save_pretrained(tmp_path / "alone")
    found, expected = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (shared_training / spread / f"{method} as trained", tmp_path / "alone")
    )
    assert_same_weights(found, expected)


@pytest.mark.parametrize("spread", SPREADS)
def test_another_number_of_processes_can_go_on(spread, shared_training, tmp_path):
    expected = resumable(tmp_path, "full").model.state_dict()
    assert_same_weights(torch.load(shared_training / spread / "gone on"), expected)
    again = resumable(shared_training / spread / "terminated", "full")
    # Told in the fifth step's log, they stop after the next, which is validated before it is saved.
    assert again.resumed_from == 6
    assert_same_weights(again.model.state_dict(), expected)


def test_losses_are_logged_by_side_whatever_the_plw(tmp_path):
    """Prompt and completion losses are plain means, known before training as after each step."""
    metrics = {}
    run(tmp_path, plw=0.242, epochs=3, eval_every=2, log=lambda found, step: metrics.update({step: found}))
    for step, prefix, rows in ((0, "eval", EXAMPLES[:2]), (1, "train", EXAMPLES)):
        for side, weights in (("prompt", [1, 1, 1, 0]), ("completion", [0, 0, 0, 1])):
            expected, _ = oracle([rows], weights, "weights")
            assert metrics[step][f"{prefix}/{side}_loss"] == pytest.approx(expected, rel=1e-5)
    assert [step for step in metrics if "eval/prompt_loss" in metrics[step]] == [0, 2, 3]
    assert all(metrics[step]["train/tokens_per_second"] > 0 for step in (1, 2, 3))


def test_at_plw_0_the_prompt_loss_comes_from_validation_alone(tmp_path):
    metrics = {}
    run(tmp_path, plw=0, log=lambda found, step: metrics.update({step: found}))
    assert "train/prompt_loss" not in metrics[1]
    assert metrics[1]["eval/prompt_loss"] > 0


def test_the_learning_rate_rises_and_falls_along_a_cosine(tmp_path):
    rates = []
    run(
        tmp_path,
        epochs=8,
        warmup_ratio=0.25,
        learning_rate=0.002,
        eval_every=99,
        log=lambda metrics, step: rates.append(metrics.get("train/learning_rate")),
    )
    # 8 steps, of which 2 rise: 0, 1/2, then (1 + cos(pi k / 6)) / 2.
    expected = [0, 0.001] + [0.001 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates[1:] == pytest.approx(expected)


def test_a_run_of_one_step_learns(tmp_path):
    rates = []
    run(tmp_path, epochs=1e-9, log=lambda metrics, step: rates.append(metrics.get("train/learning_rate")))
    assert len(rates) == 2
    assert rates[1] > 0  # a warm-up of one step would have made it 0


def test_gradients_are_clipped_to_their_norm(tmp_path):
    norms = []
    _, gradients = first_step(tmp_path, max_grad_norm=0.01)
    assert math.sqrt(sum(gradient.square().sum() for gradient in gradients.values())) == pytest.approx(0.01, rel=1e-3)
    run(tmp_path / "again", max_grad_norm=0.01, log=lambda metrics, step: norms.append(metrics.get("train/grad_norm")))
    assert norms[1] > 0.01  # logged as it was before


def test_bfloat16_keeps_float32_weights_and_stays_near(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps one precision a process
    try:
        loss, gradients = first_step(tmp_path, precision="bfloat16", plw=0.242)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    expected, exact = whole_step(0.242, "weights")
    # 8 bits of precision, through two layers.
    assert loss == pytest.approx(expected, rel=0.02)
    for name, gradient in exact.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - gradient).norm() < 0.1 * gradient.norm()


def test_lora_leaves_the_base_as_it_was(tmp_path):
    done = run(tmp_path, method="lora", epochs=4, learning_rate=0.01)
    parameters = dict(done.model.named_parameters())
    expected = dict(tiny_llama().named_parameters())
    base = {name: p for name, p in parameters.items() if "lora_" not in name}
    assert len(base) == len(expected)
    assert all(map(torch.equal, base.values(), expected.values()))
    assert all(p.any() for name, p in parameters.items() if "lora_B" in name)  # these begin at 0
    saved = load_file(tmp_path / "step-000004" / "weights.safetensors")
    assert set(saved) == {name for name in parameters if "lora_" in name}


@pytest.mark.parametrize(("change", "is_same"), [({}, True), ({"seed": 2}, False)])
def test_equal_seeds_give_equal_bits(change, is_same, tmp_path):
    options = {"method": "lora", "lora_dropout": 0.3, "epochs": 3, "batch_examples": 2, "micro_batch_examples": 1}
    first = run(tmp_path / "a", **options)
    second = run(tmp_path / "b", **options | change)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters())) == is_same


# Checkpoints and resume


def resumable(folder, method, *, dropout=0.3, **options):
    """Nine steps with a checkpoint after every second; dropout shows whether random choices are taken up again."""
    options = {"batch_examples": 2, "micro_batch_examples": 1, "epochs": 3, "save_every": 2, "eval_every": 99} | options
    return run(folder, method=method, lora_dropout=dropout if method == "lora" else 0.0, plw=0.242, **options)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def hang(folder: Path) -> None:
    """Train in a process per method, each stopping for good in its seventh step, the sixth's checkpoint written.

    Runs in a process of its own, where torch has done nothing yet that would not survive a fork.
    """
    for method in METHODS:
        if os.fork() == 0:

            def stop(metrics, step, method=method):
                if step == 7:
                    for _ in range(3000):  # a thread of its own writes it
                        if saved(folder / method) == ["step-000006"]:
                            break
                        time.sleep(0.02)
                    print(method, flush=True)
                    signal.pause()

            try:
                with checkpoints.reserve(folder / method):
                    resumable(folder / method, method, log=stop)
            except BaseException:
                traceback.print_exc()
            print("never got there", flush=True)
            os._exit(0)
    for _ in METHODS:
        os.wait()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs that were killed, and what a second process was told while the first still ran."""
    folder = tmp_path_factory.mktemp("killed")
    script = "import pathlib, sys; from tests.training.test_train import hang; hang(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert sorted(process.stdout.readline().strip() for _ in METHODS) == sorted(METHODS)
        told = {}
        for method in METHODS:
            with pytest.raises(ValueError, match="another process") as refused, checkpoints.reserve(folder / method):
                pass
            told[method] = str(refused.value)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    for method in METHODS:
        with (folder / method / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the last of the process, which takes a moment to die
    return folder, told


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_started_again_ends_in_the_same_bits(killed, method, tmp_path):
    folder, told = killed
    folder /= method
    assert str(folder) in told[method]
    assert saved(folder) == ["step-000006"]
    (folder / "unfinished").mkdir()  # as a kill while saving leaves it
    (folder / "unfinished" / "weights.safetensors").write_bytes(b"half")

    steps = []
    with checkpoints.reserve(folder):  # the lock died with its process
        again = resumable(folder, method, log=lambda metrics, step: steps.append(step))
    undisturbed = resumable(tmp_path, method)
    assert (again.resumed_from, again.steps, steps) == (6, 9, [7, 8, 9])
    expected = dict(undisturbed.model.named_parameters())
    found = dict(again.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(map(torch.equal, found.values(), dict(tiny_llama().named_parameters()).values()))
    assert saved(folder) == ["step-000009"]
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize("step", [3, 4])  # 4 is saved anyway
def test_sigterm_finishes_the_step_and_saves_it(step, tmp_path):
    def terminate(metrics, at):
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path / "terminated", "full", log=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    again = resumable(tmp_path / "terminated", "full")
    assert again.resumed_from == step
    undisturbed = resumable(tmp_path / "undisturbed", "full")
    assert all(map(torch.equal, again.model.parameters(), undisturbed.model.parameters()))


def test_a_finished_run_started_again_has_nothing_to_do(tmp_path):
    expected = resumable(tmp_path, "full")
    steps = []
    again = resumable(tmp_path, "full", log=lambda metrics, step: steps.append(step))
    assert steps == []
    assert again.resumed_from == again.steps == 9
    assert all(map(torch.equal, again.model.parameters(), expected.model.parameters()))


def stop_at_5(metrics, step):
    if step == 5:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders, by method, of trainings that were stopped with the checkpoints of steps 2 and 4, and undisturbed ones.

    That of "other" is of a wider model.
    """
    folder = tmp_path_factory.mktemp("stopped")
    for name, model in (*((method, None) for method in METHODS), ("other", tiny_llama(intermediate_size=40))):
        method = "full" if name == "other" else name
        with pytest.raises(KeyboardInterrupt):
            resumable(folder / name, method, keep=2, log=stop_at_5, model=model)
        assert saved(folder / name) == ["step-000002", "step-000004"]
    return folder, {method: resumable(folder / "undisturbed" / method, method).model for method in METHODS}


def rewrite(place, part, change, **label):
    """Write a file of a checkpoint anew; `change` gives a tensor, or None for none, from its name and itself."""
    file = place / f"{part}.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        label = (opened.metadata() or {}) | label
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, label)


def label_as_12(place):
    for part in ("weights", "optimizer"):
        rewrite(place, part, lambda name, tensor: tensor, step="12")
    place.rename(place.with_name("step-000012"))


def take_anothers(place):
    shutil.rmtree(place)
    shutil.copytree(place.parents[1] / "other" / place.name, place)


SPOILED = {
    "a renamed step": (lambda place: place.rename(place.with_name("step-000006")), r"is of the step '4', and not '6'"),
    "a step beyond the last": (label_as_12, "it is of step 12, and the training has 9"),
    "another model's": (take_anothers, r"must be|tensors too many"),
    "moments that are missing": (
        lambda place: rewrite(place, "optimizer", lambda name, tensor: None if "exp_avg" in name else tensor),
        "it lacks .* the first of them exp_avg/",
    ),
    "a weight that is missing": (
        lambda place: rewrite(place, "weights", lambda name, tensor: None if "layers.1" in name else tensor),
        "it lacks .*layers.1",
    ),
    "a row for a matrix": (  # which would be repeated
        lambda place: rewrite(place, "weights", lambda name, tensor: tensor[:1].clone()),
        r"torch.float32 \[1.*must be torch.float32",
    ),
    "moments that are numbers": (
        lambda place: rewrite(place, "optimizer", lambda name, tensor: tensor.mean()),
        r"exp_avg.* is torch.float32 \[\], which must be",
    ),
    "float16": (lambda place: rewrite(place, "weights", lambda name, tensor: tensor.half()), "is torch.float16"),
    "float16 moments": (
        lambda place: rewrite(place, "optimizer", lambda name, tensor: tensor.half()),
        "is torch.float16",
    ),
    "weights that are not finite": (
        lambda place: rewrite(place, "weights", lambda name, tensor: tensor * math.nan),
        "has values from nan",
    ),
    "moments that are not finite": (
        lambda place: rewrite(place, "optimizer", lambda name, t: t / 0 if name.startswith("exp_avg/") else t),
        r"exp_avg/.* has values from (-inf|nan)",
    ),
    "negative squares": (
        lambda place: rewrite(place, "optimizer", lambda name, tensor: -1 - tensor),
        "(exp_avg_sq|step)/.* has values from -",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("spoil", "why"), SPOILED.values(), ids=SPOILED)
def test_what_training_cannot_go_on_from_is_set_aside(spoil, why, method, stopped, tmp_path):
    """And training goes on from the checkpoint before it, to the bits of an undisturbed one."""
    if method == "lora" and spoil is take_anothers:
        pytest.skip("the other model is trained in full")
    folder, undisturbed = stopped
    for name in (method, "other"):
        shutil.copytree(folder / name, tmp_path / name)
    spoil(tmp_path / method / "step-000004")
    with pytest.warns(UserWarning, match=rf"cannot be used \(.*({why}).*\); it is set aside as damaged-step-0000"):
        again = resumable(tmp_path / method, method)
    assert again.resumed_from == 2
    assert all(map(torch.equal, again.model.parameters(), undisturbed[method].parameters()))
    assert again.model.training is False
    assert resumable(tmp_path / method, method).resumed_from == 9


def test_another_cells_checkpoints_are_set_aside_and_training_begins_anew(stopped, tmp_path):
    folder, undisturbed = stopped
    shutil.copytree(folder / "full", tmp_path / "full")
    begun = []
    with pytest.warns(UserWarning, match=r"is of the cell '', and not 'this'"):
        again = resumable(tmp_path / "full", "full", cell="this", begin=begun.append)
    assert begun == [again.resumed_from] == [0]
    assert all(map(torch.equal, again.model.parameters(), undisturbed["full"].parameters()))
    assert resumable(tmp_path / "full", "full", cell="this", begin=begun.append).resumed_from == 9
    assert begun == [0, 9]


def test_steps_without_a_gradient_are_none_after_a_resumption_too(tmp_path):
    """A part of a model that a step does not reach (an expert, say) is not changed by it, nor is its state."""

    def skip(optimizer, *_):
        if not any(p.grad.any() for p in model.parameters() if p.grad is not None):
            return  # the step with which the state of a parameter without one is made
        (parameter,) = [p for p in model.parameters() if p.shape == (VOCABULARY, 24)][-1:]
        if len(steps) % 3 != 2:
            parameter.grad = None
        steps.append(parameter)

    found = {}
    for name, stop in (("undisturbed", lambda metrics, step: None), ("stopped", stop_at_5)):
        steps, model = [], tiny_llama()
        hook = register_optimizer_step_pre_hook(skip)
        try:
            resumable(tmp_path / name, "full", model=model, log=stop)
        except KeyboardInterrupt:
            steps, model = steps[:4], tiny_llama()
            assert resumable(tmp_path / name, "full", model=model).resumed_from == 4
        finally:
            hook.remove()
        found[name] = list(model.parameters())
    assert all(map(torch.equal, *found.values()))


def test_the_caller_may_put_things_in_safety_before_each_checkpoint(tmp_path):
    seen = []
    prepared = Prepared((), EXAMPLES, EXAMPLES[:2], {}, "", 0)
    config = TrainConfig(batch_examples=2, micro_batch_examples=2, epochs=1, save_every=2)
    train.run(
        config,
        prepared,
        tiny_llama(),
        tmp_path,
        before_save=lambda: seen.append(saved(tmp_path)),
    )
    before_first, before_second = seen  # the first may still be being written at the second
    assert before_first == []
    assert "step-000003" not in before_second


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(RunError, match="train/loss is nan at step 1"):
        run(tmp_path, model=model)
    assert list(tmp_path.glob("step-*")) == []


@pytest.mark.parametrize("save_every", [1, 2])
def test_weights_that_give_no_finite_loss_never_replace_a_good_checkpoint(save_every, tmp_path, monkeypatch):
    """Here the fourth step itself is fine, but leaves weights that are not."""

    def poison(optimizer, *_):
        steps.append(optimizer)
        if len(steps) == 4:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)

    steps = []
    hook = register_optimizer_step_pre_hook(poison)
    try:
        with pytest.raises(RunError, match=r"at step 4"):
            resumable(tmp_path, "full", save_every=save_every)
    finally:
        hook.remove()
    (kept,) = tmp_path.glob("step-*")
    assert kept.name == {1: "step-000003", 2: "step-000002"}[save_every]
    weights = load_file(kept / "weights.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert resumable(tmp_path, "full", save_every=save_every).resumed_from == int(kept.name[-1])


def test_a_learning_rate_beyond_reason_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"Lower --learning-rate"):
        resumable(tmp_path, "full", learning_rate=1e30, warmup_ratio=0.0)
    assert list(tmp_path.glob("step-*")) == []


@pytest.mark.parametrize(
    ("error", "options", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            {},
            r"give --activation-.*; or lower --micro-batch-tokens \(now 3",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            {"packing": False, "activation_checkpointing": True},
            r"step 0; lower --micro-batch-examples \(now 6",
        ),
    ],
)
def test_out_of_memory_names_the_step_and_the_option(error, options, told, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Learner, "forward", fail)
    with pytest.raises(RunError, match=rf"out of memory after .*{told}"):
        run(tmp_path, **options)


def test_other_errors_of_a_step_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Learner, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        run(tmp_path)


def test_a_model_that_cannot_be_packed_is_trained_on_padded_rows(tmp_path):
    mamba = tiny("mamba", vocab_size=VOCABULARY)
    with pytest.warns(UserWarning, match=r"mamba: .* training on padded rows instead"):
        found = run(tmp_path / "asked", model=copy.deepcopy(mamba), epochs=2)
    expected = run(tmp_path / "padded", model=mamba, epochs=2, packing=False)
    assert all(map(torch.equal, found.model.parameters(), expected.model.parameters()))


def test_label_smoothing_is_that_of_cross_entropy(tmp_path):
    model = copy.deepcopy(tiny_llama()).double()
    logits = [model(torch.tensor([row.tokens.tolist()])).logits[0, :-1] for row in EXAMPLES]
    targets = torch.cat([torch.tensor(row.tokens[1:]).long() for row in EXAMPLES])
    loss = cross_entropy(torch.cat(logits), targets, label_smoothing=0.2)
    loss.backward()
    expected = loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_step(first_step(tmp_path, plw=1, micro_batch_examples=2, label_smoothing=0.2), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_base_penalty_holds_the_model_to_its_base_after_a_resumption_too(method, tmp_path):
    def distances(name, strength, stop_after=None):
        """Of each step, the sum of squares that its penalty is of."""
        found = {}

        def note(metrics, step):
            if step:
                found[step] = metrics["train/base_penalty"] / strength
            if step == stop_after:
                raise KeyboardInterrupt

        options = {"method": method, "epochs": 6, "save_every": 2, "batch_examples": 6, "base_penalty": strength}
        run(tmp_path / name, log=note, **options)
        return found

    whole = distances("whole", 0.5)
    assert whole[1] == 0
    assert all(whole[step] > 0 for step in range(3, 7))  # the first step of the warm-up has rate 0
    with pytest.raises(KeyboardInterrupt):
        distances("cut", 0.5, stop_after=3)
    assert distances("cut", 0.5) == {step: whole[step] for step in range(3, 7)}
    assert distances("held", 50.0)[6] < whole[6]
