"""Measures of a trained model, beside its scores, that may explain why prompt loss weight matters.

The study's fourth version has four: how far the weights move, how much of the training data is memorised, how unsteady
the training loss is, and how long answers become. The divergence from the base is from Instruction Modelling
(arXiv:2405.14394). Their exact definitions are not known to us; the definitions here are our own.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from plw_mlflow.config import DataOptions
from plw_mlflow.data import prepare
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example, answer_ends
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import bleu
from plw_mlflow.models import causal, pretrained

BATCH_EXAMPLES = 16  # generated together


def run(
    wanted: Sequence[str],
    model: Any,
    tokenizer: Any,
    base: str,
    dataset: str,
    options: DataOptions,
    prompts: int,
    curve: Sequence[float],
) -> dict[str, float]:
    """The measures that `wanted` names (of config.MEASURES), by the names under which they are logged.

    model: the trained model, its adapters merged. base: the name of the model it was trained from. prompts: how many
    of the data set's prompts are used. curve: the training loss of every step.
    """
    check(wanted, len(_data(dataset, tokenizer, options).validation))
    values: dict[str, float] = {}
    if "stability" in wanted:
        values["stability"] = relative_deviation(curve)
    if {"weight_distance", "kl"} & set(wanted):
        original = pretrained.load(base).to(model.device)
        if "weight_distance" in wanted:
            values |= weight_distance(model, original)
        if "kl" in wanted:
            held_out = _data(dataset, tokenizer, options).validation
            examples = _spread(held_out, prompts)
            values["kl"] = divergence(model, original, [prompt(example) for example in examples])
        del original
    if "memorisation" in wanted:
        trained_on = _spread(_data(dataset, tokenizer, options).training, prompts)
        values["memorisation"] = memorisation(model, tokenizer, trained_on, options.max_tokens)
    if "length" in wanted:
        held_out = _data(dataset, tokenizer, options).validation
        answers = generate(model, tokenizer, _spread(held_out, prompts), options.max_tokens)
        values["length"] = statistics.fmean(len(tokens) for tokens, _ in answers)
        values["length_cut"] = statistics.fmean(not has_ended for _, has_ended in answers)
    return values


def check(wanted: Sequence[str], validation_examples: int) -> None:
    """Raise UserError where measures need validation examples and there are none."""
    lacking = [name for name in wanted if name in ("kl", "length")]
    if lacking and not validation_examples:
        raise UserError(
            f"measures: {' and '.join(lacking)} would be of validation examples, of which there are none, as all "
            "records are the same; leave such measures out, or give more records"
        )


def _data(dataset: str, tokenizer: Any, options: DataOptions) -> prepare.Prepared:
    return prepare.run(dataset, tokenizer, options)  # it was stored when the model was trained, so that this is quick


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples with a completion, evenly spread, so that every PLW and seed has the same ones."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    chosen = [examples[int(place)] for place in places]
    return [example for example in chosen if (example.segment == Segment.COMPLETION).any() and len(prompt(example))]


def prompt(example: Example) -> np.ndarray[Any, Any]:
    """The tokens before the first completion token; all of them where there is none."""
    is_completion = example.segment == Segment.COMPLETION
    return example.tokens[: int(is_completion.argmax()) if is_completion.any() else None]


def completion(example: Example) -> np.ndarray[Any, Any]:
    """The tokens of the first completion, its end of text included."""
    rest = example.segment[len(prompt(example)) :] == Segment.COMPLETION
    length = len(rest) if rest.all() else int(rest.argmin())
    return example.tokens[len(prompt(example)) :][:length]


def relative_deviation(curve: Sequence[float]) -> float:
    """Standard deviation over mean of the training loss of all steps. Raises UserError for fewer than two steps."""
    if len(curve) < 2:
        raise UserError(f"stability needs the training loss of two steps at least, and the run has {len(curve)}")
    return statistics.stdev(curve) / statistics.fmean(curve)


@torch.no_grad()
def weight_distance(model: Any, base: Any) -> dict[str, float]:
    """The L2 distance between all weights and the base's, also of each layer and of each module outside the layers.

    Tied weights count once. Where one embedding has more rows than the other (that of a padding token, for example),
    the common rows count. Raises UserError where the two models have different weights.
    """
    own, others = dict(model.named_parameters()), dict(base.named_parameters())
    if own.keys() != others.keys():
        raise UserError(
            f"the model and its base differ in weights: {', '.join(sorted(own.keys() ^ others.keys())[:3])}"
        )
    squares: dict[str, float] = {}
    for name, parameter in own.items():
        other = others[name].to(parameter.device)
        rows = min(len(parameter), len(other))
        distance = torch.linalg.vector_norm(parameter[:rows].float() - other[:rows].float(), dtype=torch.float64)
        part = _part(name)
        squares[part] = squares.get(part, 0.0) + distance.item() ** 2
    by_part = {f"weight_distance_by_layer/{part}": math.sqrt(square) for part, square in squares.items()}
    return {"weight_distance": math.sqrt(sum(squares.values()))} | by_part


def _part(name: str) -> str:
    """The layer that a weight belongs to, or the module outside the layers."""
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer_{int(layer[1]):02d}" if layer else name.split(".")[-2]


@torch.no_grad()
def divergence(model: Any, base: Any, prompts: Sequence[np.ndarray[Any, Any]]) -> float:
    """The mean over all prompt tokens of the Kullback-Leibler divergence KL(model || base), in nats.

    It compares the two predictions of the token after each prompt token, the last of which is the first completion
    token. Where one model has a larger vocabulary, both predictions are restricted to the common tokens.
    """
    total, count = 0.0, 0
    for tokens in prompts:
        # Cast, and so copied, as stored examples are read-only.
        batch = torch.tensor(tokens.astype(np.int64), device=model.device).unsqueeze(0)
        both: list[Tensor] = [each(batch).logits[0].float() for each in (model, base)]
        common = min(logits.shape[1] for logits in both)
        ours, theirs = (logits[:, :common].log_softmax(1) for logits in both)
        total += float((ours.exp() * (ours - theirs)).sum(dtype=torch.float64))
        count += len(tokens)
    return total / count


def memorisation(model: Any, tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> float:
    """Corpus BLEU, as a fraction, of a model's completions of training prompts against the completions in the data."""
    written = [tokenizer.decode(tokens) for tokens, _ in generate(model, tokenizer, examples, max_tokens)]
    true = [tokenizer.decode(completion(example), skip_special_tokens=True) for example in examples]
    return bleu.of_corpus(list(zip(true, written, strict=True)))


@torch.no_grad()
def generate(model: Any, tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> list[tuple[list[int], bool]]:
    """The tokens that a model writes greedily after each example's prompt, and whether the answer ended by itself.

    The token that ends it, an end of text or the special token that ends the examples' answers, is left out. As in
    training, prompt and answer together have at most `max_tokens`.
    """
    ends = {tokenizer.eos_token_id, *causal.text_ends(model), *answer_ends(examples, tokenizer, max_tokens)} - {None}
    answers: dict[int, tuple[list[int], bool]] = {}
    # In some models a long text changes what is computed for the others of its batch. There each is generated alone.
    together = BATCH_EXAMPLES if causal.length_limit(model.config) is None else 1
    for numbers in _batches([len(prompt(example)) for example in examples], together):
        prompts = [prompt(examples[number]) for number in numbers]
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), tokenizer.eos_token_id, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        for row, of_prompt in enumerate(prompts):  # padded on the left, so that all prompts end in the last column
            tokens[row, longest - len(of_prompt) :] = torch.tensor(of_prompt.astype(np.int64))
            attention[row, longest - len(of_prompt) :] = 1
        rooms = [max(1, max_tokens - len(of_prompt)) for of_prompt in prompts]
        written = model.generate(
            tokens.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(rooms),
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.eos_token_id,
            ),
        )[:, longest:].tolist()
        for number, row, room in zip(numbers, written, rooms, strict=True):
            stop = next((place for place, token in enumerate(row[:room]) if token in ends), None)
            answers[number] = (row[: room if stop is None else stop], stop is not None)
    return [answers[number] for number in range(len(examples))]


def _batches(lengths: Sequence[int], together: int) -> Iterator[list[int]]:
    """The numbers of texts in batches of so many, with texts of similar length together."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for start in range(0, len(order), together):
        yield order[start : start + together]
