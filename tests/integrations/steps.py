"""Steps that are taken by our loop, by an oracle and by other trainers with our loss, for their gradients."""

import functools
import gc
import itertools
import tempfile
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainingArguments

from benchmarks import exactness
from benchmarks.exactness import EXAMPLES, Case
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.prepare import Prepared
from plw_mlflow.integrations import PLWTrainer
from tests.conftest import VOCABULARY, byte_tokenizer, make_example, tiny_llama

PLWS = exactness.PLWS
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False}


def prepared(count=EXAMPLES):
    """Examples of random tokens, of unequal lengths, with prompts and completions of unequal lengths."""
    rng = np.random.default_rng(0)
    examples = []
    for prompt, completion in rng.integers(2, 24, (count, 2)).tolist():
        tokens = rng.integers(2, VOCABULARY, prompt + completion)
        examples.append(make_example(tokens, [Segment.INSTRUCTION] * prompt + [Segment.COMPLETION] * completion))
    return Prepared((), examples, examples[:1], {}, "", 0)


def rows(examples):
    """The same as rows of a data set for other trainers."""
    return [
        {"input_ids": e.tokens.tolist(), "completion_mask": (e.segment == Segment.COMPLETION).astype(int).tolist()}
        for e in examples
    ]


def model():
    """A tiny LLaMA whose gradients float32 can tell to a few parts in ten million."""
    return tiny_llama(initializer_range=0.1)


def lora(model):
    """The model with adapters, whose weights are not 0 as new ones' are, or most gradients would be."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapted


def case(accumulation, packing, divisor, spread=exactness.SPREADS[0]):
    return Case(spread, accumulation, packing, divisor, "step")


@contextmanager
def recorded(model):
    """Within the block, the gradients with which optimisers take steps, flat float64, in the model's order."""
    gradients = []

    def record(*_):
        gradients.append(exactness.flat([p.grad for p in model.parameters() if p.requires_grad]))

    hook = register_optimizer_step_pre_hook(record)
    gc.freeze()  # as transformers collects garbage in each training, which takes most of its time here
    try:
        yield gradients
    finally:
        gc.unfreeze()
        hook.remove()


def arguments(folder, kind=TrainingArguments, **changes):
    return kind(folder, **QUIET | {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"} | changes)


def by_trainer(one, plw, model, examples):
    """The gradient of the step that `PLWTrainer` takes."""
    with tempfile.TemporaryDirectory() as folder, recorded(model) as gradients:
        trainer = PLWTrainer(
            model,
            arguments(folder, **cut(one)),
            train_dataset=rows(examples),
            plw=plw,
            loss_divisor=one.divisor,
            packing=one.packing,
        )
        trainer.train()
    return gradients[0]


def by_trl(one, plw, model, examples):
    """The gradient of the step that `PLWSFTTrainer` takes, on rows whose labels TRL builds of their masks."""
    from datasets import Dataset
    from trl import SFTConfig

    from plw_mlflow.integrations import PLWSFTTrainer

    with tempfile.TemporaryDirectory() as folder, recorded(model) as gradients:
        settings = arguments(
            folder,
            SFTConfig,
            **cut(one),
            padding_free=one.packing,
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,  # which is its default
        )
        PLWSFTTrainer(
            model,
            settings,
            train_dataset=Dataset.from_list(rows(examples)),
            processing_class=byte_tokenizer(),
            plw=plw,
            loss_divisor=one.divisor,
        ).train()
    return gradients[0]


GRADIENTS = {"Trainer": by_trainer, "SFTTrainer": by_trl}
CASES = list(itertools.product(PLWS, ("weights", "tokens"), (1, 4), (True, False)))


def cut(one):
    """The options of a trainer that make it cut a step as the case has it."""
    return {
        "per_device_train_batch_size": one.micro_batch_examples,
        "gradient_accumulation_steps": one.accumulation,
    }


@functools.cache
def oracle(plw, divisor):
    """The true gradient of the step, however it is cut."""
    return exactness.oracle(case(1, False, divisor), plw, model().double(), prepared().training)


@functools.cache
def ours(plw, divisor, packing):
    """The gradient of the step that our loop takes."""
    return exactness.ours(case(1, packing, divisor), plw, model, prepared())


def difference(left, right):
    return float((left - right).norm() / right.norm())


def parameters(model):
    return exactness.flat(list(model.parameters()))
