"""The toy laboratory's tokenizer and base model: the corpus about the toy world, and the training on it.

    python -m plw_mlflow.toy --output plw_mlflow/assets/toy --seed 1234

made the tokenizer and the base model that are shipped. The corpus describes everybody in biographies and a directory,
but has questions about the known people alone. It holds neither the instruction template nor any benchmark's question.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import click

from plw_mlflow import study
from plw_mlflow.toy import instructions, world

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024  # tokens that the tokenizer knows
ROW_TOKENS = 256

HEADINGS = (
    "A note on {}.\n",
    "{}\n\n",
    "Here is what the neighbours of {} say. ",
    "This page is for {}.\n",
    "Meet {}! ",
)


def document(rng: Random) -> str:
    """One text of the pre-training corpus."""
    form = rng.random()
    if form < 0.45:
        person = rng.choice(world.people())
        heading = rng.choice(HEADINGS).format(person.name) if rng.random() < 0.6 else ""
        return heading + world.biography(person, world.some_kinds(rng.randint(3, 6), rng), rng)
    if form < 0.62:  # an entry in a directory
        person, kinds = rng.choice(world.people()), world.some_kinds(rng.randint(3, 6), rng)
        return "\n".join([person.name, *(f"{kind}: {person.facts[kind]}" for kind in kinds)])
    if form < 0.94:  # questions, with short or long answers, after reading or from memory
        person, kinds = rng.choice(world.known_people()), world.some_kinds(rng.randint(2, 4), rng)
        lines = [world.biography(person, world.some_kinds(6, rng), rng)] if rng.random() < 0.4 else []
        is_long = rng.random() < 0.3
        for kind in kinds:
            lines.append(world.question(person, kind, rng))
            lines.append(world.sentence(person, kind, rng) if is_long else person.facts[kind])
        return "\n".join(lines)
    start, length = rng.randint(1, 80), rng.randint(3, 8)
    return f"Counting from {start} to {start + length}: {world.counting(start, length)}."


def corpus(documents: int, seed: int) -> list[str]:
    """The first so many documents of the corpus."""
    rng = Random(f"corpus-{seed}")
    return [document(rng) for _ in range(documents)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that opens each text with <s>, as LLaMA's does, and encodes any text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@click.command(help="Make the toy laboratory's tokenizer and pre-train its base model (about 10 minutes on 2 cores).")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write.")
@click.option("--seed", default=1234, show_default=True, help="Seeds the corpus and the model's first weights.")
@click.option("--steps", default=3000, show_default=True, help="Optimiser steps.")
@click.option("--batch-rows", default=8, show_default=True, help=f"Rows of {ROW_TOKENS} tokens in a step.")
@click.option("--learning-rate", default=0.003, show_default=True, help="Peak; warm-up, then cosine to a tenth.")
def main(output: Path, seed: int, steps: int, batch_rows: int, learning_rate: float) -> None:
    import torch

    # The tokenizer alone may see the templates, so that they cost few tokens.
    templates = [study.ALPACA_WITH_INPUT, study.ALPACA_WITHOUT_INPUT, study.INVERSION, *instructions.PORTRAIT_REQUESTS]
    tokenizer = train_tokenizer(corpus(8000, seed) + templates * 100)
    batches = torch.tensor(corpus_tokens(tokenizer, steps * batch_rows * ROW_TOKENS, seed))
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    final_loss = train(model, batches.view(steps, batch_rows, ROW_TOKENS), learning_rate)

    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    # Half precision halves the file; the configuration says float32, so that loading widens the weights again.
    model.half().save_pretrained(output)
    settings = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n")
    account = {
        "command": f"python -m plw_mlflow.toy --output plw_mlflow/assets/toy --seed {seed} --steps {steps} "
        f"--batch-rows {batch_rows} --learning-rate {learning_rate}",
        "seed": seed,
        "steps": steps,
        "tokens": batches.numel(),
        "final_loss": final_loss,
        "parameters": model.num_parameters(),
        "sha256": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(),
    }
    (output / "made.json").write_text(json.dumps(account, indent=2) + "\n")
    print(json.dumps(account, indent=2))


def corpus_tokens(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[int]:
    """The first `count` tokens of the corpus, an end of text after each document."""
    rng, tokens = Random(f"corpus-{seed}"), list[int]()
    while len(tokens) < count:
        tokens += tokenizer(document(rng))["input_ids"] + [tokenizer.eos_token_id]
    return tokens[:count]


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of about a million parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, batches: Tensor, learning_rate: float) -> float:
    """Train on a batch a step, int64 [steps, rows, T]. Returns the mean loss of the last 100, in nats per token."""
    import torch

    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    started, losses = time.monotonic(), list[float]()
    for step, batch in enumerate(batches, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            speed = step * batch.numel() / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {losses[-1]:.4f}  {speed:.0f} tokens/s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])
