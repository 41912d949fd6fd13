"""Start a trainer that is used from Python:  python by_python.py NAME CASE.json

NAME is of `TRAINERS`. Run by the Python of the trainer's environment, so nothing of ours is imported but for ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QUIET = {"report_to": [], "save_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False, "bf16": False}
STEP = {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-3}


def transformers_trainer(case: dict[str, Any]) -> None:
    """transformers' Trainer on rows with labels, which are -100 on prompts."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer
    from transformers import AutoTokenizer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    collator = DataCollatorWithFlattening() if case["packing"] else DataCollatorForSeq2Seq(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(case["model"])
    arguments = TrainingArguments(case["folder"], **QUIET, **STEP, **cut(case))
    rows = labelled_rows(case, tokenizer)
    Trainer(model, arguments, data_collator=collator, train_dataset=rows).train()


def plw_trainer(case: dict[str, Any]) -> None:
    """Our PLWTrainer on the same rows."""
    from plw_mlflow.integrations import PLWTrainer
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

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
        assistant_only_loss=case["records"] == "conversations",
        gradient_checkpointing=False,
        **case["options"],
    )
    SFTTrainer(case["model"], arguments, train_dataset=Dataset.from_list(rows)).train()


TRAINERS = {"transformers": transformers_trainer, "PLWTrainer": plw_trainer, "trl": trl_sft_trainer}


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
