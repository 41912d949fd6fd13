"""Presets: named recipes, each with values for options that the caller leaves unset; and models by name.

A value that the caller gives wins over the preset's. Model, data set and PLW are what a recipe is applied to, so no
preset sets them.

"The study" is Huerta-Enochian and Ko, arXiv:2401.13586, which took over the training code of Stanford Alpaca
(tatsu-lab/stanford_alpaca@761dc5b, train.py); neither has released the models. What both leave open is marked CHOICE.
"""

from __future__ import annotations

from typing import Any

# The laboratory's: everything at a scale that two CPU cores train in seconds.
TOY: dict[str, Any] = {
    "method": "full",
    "seed": 1234,
    "learning_rate": 0.001,
    "batch_examples": 16,
    "micro_batch_examples": 16,
    "divisor_scope": "step",
    "packing": True,
    "precision": "auto",
    "add_pad_token": False,
    "on_long": "drop",
    "empty_completion": "bad",
    "prompt_border": "offsets",
    "validation_share": 0.02,
}

# On one node of four GPUs: torchrun --nproc-per-node 4. AdamW's betas (0.9, 0.999) and epsilon (1e-8), weights in
# float32 and the cosine without a floor are train.py's own, and the study's.
HUERTA2024: dict[str, Any] = {
    "method": "full",
    # The study's only one. CHOICE: the order of examples that follows from it is ours, not that of its libraries.
    "seed": 42,
    "learning_rate": 2e-5,
    "warmup_ratio": 0.03,
    "epochs": 3.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "precision": "bfloat16",  # CHOICE: without TF32 in what autocast leaves in float32, which no large product is
    "batch_examples": 128,  # 4 GPUs x 4 examples x 8 micro-batches
    "micro_batch_examples": 4,
    # transformers' loss is a mean over each micro-batch, and Trainer of 2023 averaged these means.
    "divisor_scope": "micro-batch",
    # CHOICE: the study gives no divisor. Both of ours give what it says of PLW 0 and 1; this one is continuous at 0.
    "loss_divisor": "weights",
    "template_weight": None,  # as the prompt: the code masks everything before the completion alike
    "completion_weight": 1.0,
    "packing": False,
    "add_pad_token": True,  # [PAD], its embedding the mean of all others: one more class in the softmax
    "template": "alpaca",
    "prompt_border": "separate",
    "max_tokens": 512,
    "on_long": "truncate",  # an example cut before its completion trains the prompt alone
    "empty_completion": "keep",
    "drop_duplicates": False,
    # CHOICE: the study trained on all records and validated on none. The curves need some: 50 of AlpacaData's 52,002.
    "validation_share": 0.001,
}

# The study's data and schedule on one GPU. How the adapters are trained is NOT the study's, which had none.
HUERTA2024_LORA: dict[str, Any] = HUERTA2024 | {
    "method": "lora",
    # CHOICE: ten times that of full fine-tuning, as is usual for adapters on all linear layers, with the rank 16 and
    # alpha 32 that are the options' defaults.
    "learning_rate": 2e-4,
    # CHOICE: nothing here needs a padding token, and with it the adapters would fit only a base that has one too.
    "add_pad_token": False,
}

PRESETS: dict[str, dict[str, Any]] = {"toy": TOY, "huerta2024": HUERTA2024, "huerta2024-lora": HUERTA2024_LORA}

# CHOICE: the study says LLaMA 1 and 2, 7B, not where from. Revisions: the hub's newest when it was written (those of
# many public caches and scripts of December 2023 and later).
MODELS = {
    "llama-7b": "huggyllama/llama-7b@4782ad278652c7c71b72204d462d6d01eaaf7549",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf@01c7f73d771dfac7d292323805ebc428287df4f9",
}
