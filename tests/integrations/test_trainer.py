"""Does transformers' Trainer with our loss take our steps, and leave the model as it is otherwise?"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    MambaConfig,
    MambaForCausalLM,
    TrainingArguments,
)

from benchmarks import exactness
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.errors import UserError
from plw_mlflow.integrations import PLWCollator, PLWTrainer
from plw_mlflow.integrations import trainer as trainers
from plw_mlflow.training import train
from tests.conftest import VOCABULARY, byte_tokenizer
from tests.integrations import steps


@pytest.mark.parametrize(("plw", "divisor", "accumulation", "packing"), steps.CASES)
def test_its_gradients_are_our_loops_and_the_oracles(plw, divisor, accumulation, packing):
    one = steps.case(accumulation, packing, divisor)
    found = steps.by_trainer(one, plw, steps.model(), steps.prepared().training)
    assert steps.difference(found, steps.oracle(plw, divisor)) < 1e-6
    assert steps.difference(found, steps.ours(plw, divisor, packing)) < 1e-6


def test_adapters_of_peft_get_the_oracles_gradients():
    examples, one = steps.prepared().training, steps.case(4, True, "weights")
    found = steps.by_trainer(one, 0.242, steps.lora(steps.model()), examples)
    exact = exactness.oracle(one, 0.242, steps.lora(steps.model()).double(), examples)
    assert steps.difference(found, exact) < 1e-6


def test_twenty_steps_give_our_loops_weights(tmp_path):
    config = TrainConfig(
        plw=0.242,
        learning_rate=1e-2,
        batch_examples=4,
        micro_batch_examples=2,
        epochs=1,
        max_grad_norm=1.0,
        packing=False,
        precision="float32",
        warmup_ratio=0.1,
    )
    prepared = steps.prepared(80)
    ours = train.run(config, prepared, steps.model(), tmp_path).model
    assert steps.difference(steps.parameters(ours), steps.parameters(steps.model())) > 0.1
    order = batches.steps(80, 4, seed=config.seed, first=0, total=20)
    ordered = [prepared.training[index] for index in itertools.chain.from_iterable(order)]
    arguments = TrainingArguments(
        tmp_path,
        **steps.QUIET,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_ratio * 20),
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    model = steps.model()
    trainer = PLWTrainer(model, arguments, train_dataset=steps.rows(ordered), plw=0.242)
    trainer.train()
    assert steps.difference(steps.parameters(model), steps.parameters(ours)) < 1e-5


def test_a_trained_model_generates_and_is_saved_as_any_other(tmp_path):
    model = steps.lora(steps.model())
    trainer = PLWTrainer(
        model, steps.arguments(tmp_path, bf16=True), train_dataset=steps.rows(steps.prepared().training), plw=0.1
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert "forward" not in vars(model.get_base_model())
    loaded = PeftModel.from_pretrained(steps.model(), tmp_path / "saved")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.autocast("cpu", enabled=False):
        expected = loaded.generate(tokens, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits.shape[1] == 3


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_evaluation_is_the_weighted_one(tmp_path, packing):
    examples = steps.prepared(4).training
    arguments = steps.arguments(tmp_path, per_device_eval_batch_size=4)
    rows = steps.rows(examples)
    trainer = PLWTrainer(
        steps.model(), arguments, train_dataset=rows, eval_dataset=rows, plw=0.1, loss_divisor="tokens", packing=packing
    )
    batch = PLWCollator(0.1)(rows)
    logits = steps.model()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    weights = batch["weights"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    expected = (nll * weights).sum() / weights.count_nonzero()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_evaluation_does_not_depend_on_how_it_is_cut(tmp_path):
    rows = steps.rows(steps.prepared(7).training)
    losses = []
    for size in (1, 3, 7):
        arguments = steps.arguments(tmp_path, per_device_eval_batch_size=size)
        trainer = PLWTrainer(steps.model(), arguments, train_dataset=rows, eval_dataset=rows, plw=0.1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("plw", [0.5, np.float32(0.5)])
def test_a_saved_model_tells_its_plw(tmp_path, plw):
    rows = steps.rows(steps.prepared(4).training)
    trainer = PLWTrainer(steps.model(), steps.arguments(tmp_path), train_dataset=rows, plw=plw, loss_divisor="tokens")
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/plw.json").read_text()) == {"plw": 0.5, "loss_divisor": "tokens"}


def test_logits_are_given_to_metrics(tmp_path):
    rows = steps.rows(steps.prepared(4).training)
    shapes = []

    def look(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"fine": 1.0}

    arguments = steps.arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = PLWTrainer(steps.model(), arguments, train_dataset=rows, eval_dataset=rows, plw=0.1, compute_metrics=look)
    assert trainer.evaluate()["eval_fine"] == 1
    ((logits, labels),) = shapes
    assert logits[:2] == labels


def test_a_step_without_a_weight_changes_nothing(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "weights": [0.0, 0.0, weight]} for weight in (0.0, 1.0)]
    model = steps.model()
    arguments = steps.arguments(tmp_path, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    PLWTrainer(model, arguments, train_dataset=rows, plw=0.0).train()
    assert torch.equal(steps.parameters(model), steps.parameters(steps.model()))


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"labels": [5, 6, 7]}, "values of labels mark every token as completion.* let them be -100 on prompts"),
        ({"completion_mask": [1, 1, 1]}, "values of completion_mask mark every token.* let them be 0 on prompts"),
        ({"assistant_masks": [0, 0, 0]}, "by assistant_masks; .*{% generation %}"),
        ({"weights": [0.0, 0.0, 0.0]}, "no token has a weight above 0"),
        ({"weights": [1.0, 0.0, 0.0]}, "no token has a weight above 0"),  # nothing predicts the first
    ],
)
def test_rows_in_which_a_plw_has_no_effect_are_refused(tmp_path, marks, message):
    with pytest.raises(UserError, match=message):
        PLWTrainer(steps.model(), steps.arguments(tmp_path), train_dataset=[{"input_ids": [5, 6, 7], **marks}], plw=0.1)


def adapters_of(**settings):
    return get_peft_model(steps.model(), LoraConfig(**{"target_modules": ["q_proj"]} | settings))


@pytest.mark.parametrize(
    "make_model",
    [
        steps.model,
        lambda: adapters_of(),
        lambda: adapters_of(target_modules=["embed_tokens"]),
        lambda: adapters_of(modules_to_save=["embed_tokens"]),
        lambda: adapters_of(trainable_token_indices=[5]),
    ],
)
def test_tokens_of_another_vocabulary_are_refused(tmp_path, make_model):
    rows = [{"input_ids": [5, 6, VOCABULARY], "completion_mask": [0, 0, 1]}]
    with pytest.raises(UserError, match=f"the token {VOCABULARY}, but the model knows 0 to {VOCABULARY - 1}"):
        PLWTrainer(make_model(), steps.arguments(tmp_path), train_dataset=rows, plw=0.1)


def test_labels_of_another_collator_that_are_not_the_tokens_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, -100]}]
    with pytest.raises(UserError, match="labels are shifted or of other tokens"):
        PLWTrainer(steps.model(), steps.arguments(tmp_path), DataCollatorForSeq2Seq(tokenizer), rows, plw=0.1)


def test_a_divisor_that_is_none_is_not_hidden():
    assert [float(trainers._reciprocal(torch.tensor(whole), torch.ones(1))) for whole in (0.0, 4.0)] == [0, 0.25]
    assert trainers._reciprocal(torch.tensor(math.nan), torch.ones(1)).isnan()


def test_a_collator_that_passes_over_masks_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = steps.rows(steps.prepared(4).training)
    with pytest.raises(UserError, match="tokens as completion that their row does not"):
        PLWTrainer(steps.model(), steps.arguments(tmp_path), collate, train_dataset=rows, plw=0.1)
    # Where texts are padded with what ends them, this collator leaves the ends out, and they are no prompts.
    rows = [{"input_ids": [5, 6, 7, tokenizer.eos_token_id]}]
    with pytest.raises(UserError, match="labels mark every token as completion"):
        PLWTrainer(steps.model(), steps.arguments(tmp_path), collate, train_dataset=rows, plw=0.1)


def test_columns_that_trainer_leaves_out_are_left_out_of_the_checks(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    rows = Dataset.from_list([{"text": "a", "input_ids": [5, 6, 7], "labels": [-100, -100, 7]}] * 2)
    arguments = steps.arguments(tmp_path, per_device_train_batch_size=2)
    PLWTrainer(steps.model(), arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows, plw=0.1).train()


def test_a_stream_that_can_be_read_once_loses_no_row(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, rows):
            self.rows = iter(rows)

        def __iter__(self):
            return self.rows

    rows = steps.rows(steps.prepared(3).training)
    trainer = PLWTrainer(steps.model(), steps.arguments(tmp_path), train_dataset=Stream(rows), plw=0.1)
    assert len(list(trainer.train_dataset)) == 3


def test_adapters_on_the_head_are_refused(tmp_path):
    model = get_peft_model(steps.model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="adapters on the head"):
        PLWTrainer(model, steps.arguments(tmp_path), train_dataset=[], plw=0.1)


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(tmp_path):
    model = steps.model()
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits / 2) or output)
    with pytest.raises(UserError, match="logits in a way that is not known"):
        PLWTrainer(model, steps.arguments(tmp_path), train_dataset=[], plw=0.1)
    PLWTrainer(steps.model(), steps.arguments(tmp_path, bf16=True), train_dataset=[], plw=0.1)


def test_packing_that_would_mix_examples_is_refused(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5))
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]
    with pytest.raises(UserError, match="packed"):
        PLWTrainer(model, steps.arguments(tmp_path), train_dataset=rows, plw=0.1, packing=True)
    PLWTrainer(model, steps.arguments(tmp_path), train_dataset=rows, plw=0.1)


def test_labels_of_another_collator_become_weights(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    arguments = steps.arguments(tmp_path, per_device_train_batch_size=2, train_sampling_strategy="sequential")
    trainer = PLWTrainer(steps.model(), arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows, plw=0.5)
    (batch,) = trainer.get_train_dataloader()
    assert batch["weights"].tolist() == [[0, 0.5, 1, 1], [0, 1, 0, 0]]
    trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {"plw": -1.0},
        {"plw": math.nan},
        {"plw": "0.1"},
        {"plw": None},
        {"plw": 0.1, "max_tokens": "5"},
        {"plw": 0.1, "loss_divisor": "rows"},
        {"plw": 0.1, "compute_loss_func": lambda *_: 0},
        {"plw": 0.1, "data_collator": PLWCollator(0.1), "packing": True},
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options):
    with pytest.raises(UserError):
        PLWTrainer(steps.model(), steps.arguments(tmp_path), train_dataset=[], **options)


def test_another_signature_is_refused_in_one_line():
    class Later(trainers.Trainer):
        def compute_loss(self, model, inputs, loss_context):
            return 0

    with pytest.raises(UserError, match=r"Later\.compute_loss takes \(self, model, inputs, loss_context\)") as caught:
        trainers.check_signatures(Later, "transformers", "9.0")
    assert "transformers 5.23.0 and TRL 1.16.0" in str(caught.value)
    assert "\n" not in str(caught.value)
