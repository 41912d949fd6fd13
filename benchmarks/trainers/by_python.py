"""Start a trainer that is used from Python:  python by_python.py NAME CASE.json

NAME is of `TRAINERS`. Run by the Python of the trainer's environment, so nothing of ours is imported but for ours.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "bf16": False,
}
STEP: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-3}


def transformers_trainer(case: dict[str, Any]) -> None:
    """transformers' Trainer on rows with labels, which are -100 on prompts."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    collator: Any = DataCollatorWithFlattening() if case["packing"] else DataCollatorForSeq2Seq(tokenizer)
    if case["options"].get("collator") == "language modeling":
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = AutoModelForCausalLM.from_pretrained(case["model"])
    arguments = TrainingArguments(case["folder"], **QUIET, **STEP, **cut(case))
    rows = labelled_rows(case, tokenizer)
    if case["options"]:
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    Trainer(model, arguments, data_collator=collator, train_dataset=rows).train()


def plw_trainer(case: dict[str, Any]) -> None:
    """Our PLWTrainer on the same rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from plw_mlflow.integrations import PLWTrainer

    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    model = AutoModelForCausalLM.from_pretrained(case["model"])
    arguments = TrainingArguments(case["folder"], **QUIET, **STEP, **cut(case))
    rows = labelled_rows(case, tokenizer)
    plw = case["plw"] or 0.0
    PLWTrainer(model, arguments, train_dataset=rows, plw=plw, packing=case["packing"]).train()


def trl_sft_trainer(case: dict[str, Any]) -> None:
    """TRL's SFTTrainer on columns of prompt and completion, or on messages with assistant_only_loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if case["records"] == "conversations":
        rows = read(case["messages"])
    else:
        rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in read(case["prompts"])]
    arguments = SFTConfig(
        case["folder"],
        **QUIET,
        **STEP,
        **cut(case),
        max_length=case["max_tokens"],
        packing=case["packing"],
        gradient_checkpointing=False,
        **{"assistant_only_loss": case["records"] == "conversations"} | case["options"],
    )
    SFTTrainer(case["model"], arguments, train_dataset=Dataset.from_list(rows)).train()


def litgpt_finetune(case: dict[str, Any]) -> None:
    """litgpt's own command, on a checkpoint that is made by what its convert_to_litgpt calls."""
    import runpy

    import torch
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config
    from safetensors.torch import load_file

    # Each process converts it for itself, so that none has to wait for another.
    folder = Path(case["folder"]) / f"process{os.environ.get('RANK', '0')}"
    checkpoint = Path(shutil.copytree(case["model"], folder / "checkpoint"))
    given = json.loads((checkpoint / "config.json").read_text())
    config = Config(
        name="tiny",
        block_size=given["max_position_embeddings"],
        vocab_size=given["vocab_size"],
        padded_vocab_size=given["vocab_size"],
        n_layer=given["num_hidden_layers"],
        n_head=given["num_attention_heads"],
        n_query_groups=given["num_key_value_heads"],
        n_embd=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        norm_eps=given["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(checkpoint / "model.safetensors"))
    torch.save(weights, checkpoint / "lit_model.pth")
    save_config(config, checkpoint)
    for name in ("train", "val"):
        shutil.copy(f"{case['folder']}/alpaca.json", folder / f"{name}.json")
    options = {
        "data": "JSON",
        "data.json_path": folder,
        "data.prompt_style": "alpaca",
        "data.num_workers": 0,
        "precision": "32-true",
        "devices": case["processes"],
        "train.global_batch_size": case["micro_batch"] * case["accumulation"] * case["processes"],
        "train.micro_batch_size": case["micro_batch"],
        "train.max_seq_length": case["max_tokens"],
        "train.lr_warmup_steps": 1,
        "train.epochs": 1,
        "out_dir": folder / "out",
        "data.mask_prompt": "true",
    } | case["options"]
    given_options = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    sys.argv = ["litgpt", "finetune_full", str(checkpoint), *given_options]
    runpy.run_module("litgpt", run_name="__main__", alter_sys=True)


TRAINERS = {
    "litgpt": litgpt_finetune,
    "transformers": transformers_trainer,
    "PLWTrainer": plw_trainer,
    "trl": trl_sft_trainer,
}


def cut(case: dict[str, Any]) -> dict[str, Any]:
    """The options of transformers that cut a step into micro-batches."""
    return {
        "per_device_train_batch_size": case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
    }


def labelled_rows(case: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens, and labels that are -100 on what is not an answer."""
    rows = []
    if case["records"] == "conversations":
        for record in read(case["messages"]):
            made = tokenizer.apply_chat_template(
                record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            rows.append((made["input_ids"], made["assistant_masks"]))
    else:
        for record in read(case["prompts"]):
            whole = tokenizer(record["prompt"] + record["completion"] + tokenizer.eos_token)["input_ids"]
            prompt = len(tokenizer(record["prompt"])["input_ids"])
            rows.append((whole, [int(at >= prompt) for at in range(len(whole))]))
    cut_at = case["max_tokens"]
    return [
        {
            "input_ids": tokens[:cut_at],
            "labels": [t if trained else -100 for t, trained in zip(tokens, mask, strict=True)][:cut_at],
        }
        for tokens, mask in rows
    ]


def read(file: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    TRAINERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
