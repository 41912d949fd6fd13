"""Does TRL's SFTTrainer with our loss take our steps, and does it keep weights by templates, cutting and packing?"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

trl = pytest.importorskip("trl", reason="needs TRL, which make test-slow installs to output/trl")

from datasets import Dataset  # noqa: E402
from trl import SFTConfig  # noqa: E402

from benchmarks import exactness  # noqa: E402
from plw_mlflow.errors import UserError  # noqa: E402
from plw_mlflow.integrations import PLWSFTTrainer, PLWTrainer  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402
from tests.integrations import steps  # noqa: E402

pytestmark = pytest.mark.slow
PLAIN = {"bf16": False, "gradient_checkpointing": False}  # both of which are True by default
MASKED = PLAIN | {"max_length": None, "completion_only_loss": True}


@pytest.mark.parametrize(("plw", "divisor", "accumulation", "packing"), steps.CASES)
def test_its_gradients_are_our_loops_and_the_oracles(plw, divisor, accumulation, packing):
    one = steps.case(accumulation, packing, divisor)
    found = steps.by_trl(one, plw, steps.model(), steps.prepared().training)
    assert steps.difference(found, steps.oracle(plw, divisor)) < 1e-6
    assert steps.difference(found, steps.ours(plw, divisor, packing)) < 1e-6


def test_twenty_steps_give_the_weights_of_transformers_trainer(tmp_path):
    """Which are those of our own loop (`test_trainer.py`)."""
    examples = steps.prepared(80).training
    options = {"max_steps": 20, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 4}
    models = [steps.model(), steps.model()]
    rows = steps.rows(examples)
    PLWTrainer(models[0], steps.arguments(tmp_path, **options), train_dataset=rows, plw=0.242).train()
    arguments = steps.arguments(tmp_path, SFTConfig, **options, **MASKED)
    data = Dataset.from_list(rows)
    PLWSFTTrainer(models[1], arguments, train_dataset=data, processing_class=byte_tokenizer(), plw=0.242).train()
    trained = [steps.parameters(model) for model in models]
    assert steps.difference(trained[1], trained[0]) < 1e-5
    assert steps.difference(trained[0], steps.parameters(steps.model())) > 0.1


CHAT = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TURNS = [("user", "aaaa"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "dddd")]


def batches_of(folder, dataset, template=None, **options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    arguments = steps.arguments(folder, SFTConfig, per_device_train_batch_size=2, **PLAIN | options)
    trainer = PLWSFTTrainer(steps.model(), arguments, train_dataset=dataset, processing_class=tokenizer, plw=0.5)
    return [
        [
            "".join(tokenizer.convert_ids_to_tokens(row)[at] for at, weight in enumerate(weights) if weight == wanted)
            for row, weights in zip(batch["input_ids"].tolist(), batch["weights"].tolist(), strict=True)
        ]
        for batch in trainer.get_train_dataloader()
        for wanted in (0, 0.5, 1)
    ]


def test_each_of_the_assistants_turns_is_a_completion(tmp_path):
    messages = [{"role": role, "content": text} for role, text in TURNS]
    data = Dataset.from_list([{"messages": messages}] * 2)
    first, prompt, completion = batches_of(tmp_path, data, CHAT, assistant_only_loss=True)
    assert first == ["<s>"] * 2
    assert prompt == ["u:aaaa<s>a:<s>u:ccc<s>a:"] * 2
    assert completion == ["bb</s>dddd</s>"] * 2


def test_weights_stay_with_their_tokens_where_rows_are_cut(tmp_path):
    data = Dataset.from_list([{"prompt": "aaaa", "completion": "bbbbbb"}, {"prompt": "cc", "completion": "dd"}])
    batch = batches_of(tmp_path, data, max_length=7, train_sampling_strategy="sequential")
    assert batch == [["a", "c</s></s>"], ["aaa", "c"], ["bbb", "dd</s>"]]  # the shorter is padded with two </s>


def test_weights_stay_with_their_tokens_where_rows_are_packed(tmp_path):
    data = Dataset.from_list([{"prompt": "aaaa", "completion": "bbbbbb"}, {"prompt": "cc", "completion": "dd"}])
    assert batches_of(tmp_path, data, packing=True, max_length=12) == [["ac"], ["aaac"], ["bbbbbb</s>dd</s>"]]


def test_messages_that_would_be_trained_on_alike_are_refused(tmp_path):
    data = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in TURNS]}])
    with pytest.raises(UserError, match="assistant_only_loss=True"):
        batches_of(tmp_path, data, CHAT)


def test_masks_that_trl_would_pass_over_are_refused(tmp_path):
    data = Dataset.from_list(steps.rows(steps.prepared(4).training))
    with pytest.raises(UserError, match="completion_only_loss=True"):
        batches_of(tmp_path, data)


def test_weights_that_trl_would_lose_are_refused(tmp_path):
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weights": [0, 0.5, 2]}])
    with pytest.raises(UserError, match="use PLWTrainer"):
        batches_of(tmp_path, data)


def test_adapters_that_trl_makes_get_the_oracles_gradients(tmp_path):
    examples = steps.prepared().training
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, r=4)
    one = steps.case(1, False, "weights")
    arguments = steps.arguments(tmp_path, SFTConfig, **steps.cut(one), **MASKED)
    trainer = PLWSFTTrainer(
        steps.model(),
        arguments,
        train_dataset=Dataset.from_list(steps.rows(examples)),
        processing_class=byte_tokenizer(),
        peft_config=settings,
        plw=0.242,
    )
    like = get_peft_model(steps.model(), settings)
    like.load_state_dict(trainer.model.state_dict())
    exact = exactness.oracle(one, 0.242, like.double(), examples)
    with steps.recorded(trainer.model) as gradients:
        trainer.train()
    assert steps.difference(gradients[0], exact) < 1e-6
    assert trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_evaluation_gives_the_weighted_loss(tmp_path):
    rows = steps.rows(steps.prepared(4).training)
    arguments = steps.arguments(tmp_path, SFTConfig, per_device_eval_batch_size=4, **MASKED)
    data = Dataset.from_list(rows)
    trainer = PLWSFTTrainer(
        steps.model(), arguments, train_dataset=data, eval_dataset=data, processing_class=byte_tokenizer(), plw=0.1
    )
    ours = PLWTrainer(
        steps.model(),
        steps.arguments(tmp_path, per_device_eval_batch_size=4),
        train_dataset=rows,
        eval_dataset=rows,
        plw=0.1,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-6)


def test_another_loss_of_trl_is_refused(tmp_path):
    arguments = steps.arguments(tmp_path, SFTConfig, loss_type="dft", bf16=False)
    with pytest.raises(UserError, match="'dft' is another loss"):
        PLWSFTTrainer(steps.model(), arguments, train_dataset=None, plw=0.1)
