"""Held-out instructions: how well a cell's model completes records that it was not trained on, in the cell's template.

Benchmarks ask a fine-tuned model for something else than it was trained for. A held-out data set asks for the same:
its records become examples as the cell's own do, and the model is measured on their completions. These numbers are not
part of a run's `score`, whose tasks have prompts of the harness.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plw_mlflow.config import HELD_OUT, DataOptions, recorded_data_options, short_name
from plw_mlflow.data import prepare
from plw_mlflow.data.sources import Source
from plw_mlflow.data.tokens import Example, answer_ends
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import bleu, questions
from plw_mlflow.evaluation.measures import completion, prompt
from plw_mlflow.evaluation.scores import Score

if TYPE_CHECKING:
    from plw_mlflow.evaluation.caching_lm import CachingLM  # slow to import

COMPLETION_LOSS = "completion_loss"  # in nats a token; of all tokens of the set
EXACT_MATCH = "exact_match"
BLEU = "bleu"  # of the whole set, on 0..1


@dataclass(frozen=True)
class HeldOut:
    """The examples of one data set that a model is measured on."""

    task: str  # held_out_NAME
    numbers: list[int]  # of the records in their file
    examples: list[Example]
    source: Source
    prompt: str  # "template NAME"


def read(names: Sequence[str], tokenizer: Any, options: DataOptions, limit: int | None = None) -> list[HeldOut]:
    """The examples of data sets, made as `options` make those of the cell.

    All records are taken, or the first `limit`; they are neither mixed nor inverted, and those that the options drop as
    too long are left out. Of a conversation, the last answer is measured. Raises UserError where two data sets have one
    name, or one has no completion to measure.
    """
    choosing = ("mix", "mix_invert", "mix_share", "invert", "max_records")
    kept = {name: value for name, value in vars(options).items() if name not in choosing}
    alone = recorded_data_options(kept | {"completion_turns": "last"}, None)
    sets = [_read(name, tokenizer, alone, limit) for name in names]
    if len({each.task for each in sets}) < len(sets):
        raise UserError(f"held-out data sets need different names, got {', '.join(names)}")
    return sets


def _read(name: str, tokenizer: Any, options: DataOptions, limit: int | None) -> HeldOut:
    prepared = prepare.run(name, tokenizer, options)
    places = {
        int(part.id(index).rpartition(":")[2]): (part, index)
        for part in (prepared.training, prepared.validation)
        for index in range(len(part))
    }
    in_order = ((number, part[index]) for number, (part, index) in sorted(places.items(), key=lambda place: place[0]))
    numbers: list[int] = []
    examples: list[Example] = []
    unusable: list[int] = []
    for number, example in in_order:
        if not len(prompt(example)) or not len(completion(example)):
            unusable.append(number)
        elif len(examples) == limit:
            break
        else:
            numbers.append(number)
            examples.append(example)
    if not examples:
        raise UserError(f"held-out data set {name} has no record with a prompt and a completion")
    if unusable:
        warnings.warn(
            f"held-out data set {name}: {len(unusable)} records without a prompt or a completion are left out, the "
            f"first of them record {unusable[0]}",
            stacklevel=2,
        )
    template = f"template {options.template}"
    return HeldOut(HELD_OUT + short_name(name), numbers, examples, prepared.sources[0], template)


def warn_of_overlap(sets: Sequence[HeldOut], training: Sequence[Example]) -> None:
    """Warn where a held-out example is among those that the model is trained on."""
    if not sets:
        return  # all training examples would be read for nothing
    trained_on = {example.tokens.tobytes() for example in training}
    for each in sets:
        if known := sum(example.tokens.tobytes() in trained_on for example in each.examples):
            warnings.warn(
                f"{known} of the {len(each.examples)} examples of {each.task} are in the training data, so that they "
                "are not held out",
                stacklevel=2,
            )


def run(model: CachingLM, sets: Sequence[HeldOut], seed: int) -> tuple[list[Score], list[dict[str, Any]]]:
    """The scores of a model on held-out sets, none of them primary, and `questions.row`s of every example.

    The loss is the mean over all completion tokens, the end of text included, of their negative log-likelihood in nats.
    Texts are generated greedily, and are as long as the longest completion of the set at most. seed: of the bootstrap
    that gives BLEU's standard error.
    """
    scores: list[Score] = []
    rows: list[dict[str, Any]] = []
    for each in sets:
        losses = _losses(model, each.examples)
        texts = _texts(model, each.examples)
        tokens = [len(completion(example)) for example in each.examples]
        targets = [_decode(model, completion(example)) for example in each.examples]
        matches = [text == target for text, target in zip(texts, targets, strict=True)]
        scores += _scores(each, losses, tokens, targets, texts, seed)
        for number, example, target, text, loss, count, match in zip(
            each.numbers, each.examples, targets, texts, losses, tokens, matches, strict=True
        ):
            values = {COMPLETION_LOSS: loss / count, EXACT_MATCH: float(match), BLEU: bleu.of_sentence(target, text)}
            rows += [
                questions.row(
                    *(each.task, metric, number, example.tokens.tolist(), value),
                    prompt=each.prompt,
                    prediction=text,
                    log_likelihoods=[-loss],
                )
                for metric, value in values.items()
            ]
    return scores, rows


def _losses(model: CachingLM, examples: Sequence[Example]) -> list[float]:
    """The negative log-likelihood in nats of each example's completion after its prompt."""
    pairs = [(prompt(example), completion(example)) for example in examples]
    return [-each for each in model.log_likelihoods(pairs, "held-out completions")]


def _texts(model: CachingLM, examples: Sequence[Example]) -> list[str]:
    """What the model writes after each example's prompt."""
    longest = max(len(completion(example)) for example in examples)
    room = model.window - longest
    if over := [len(prompt(example)) for example in examples if len(prompt(example)) > room]:
        raise UserError(
            f"held-out prompts of up to {max(over)} tokens leave no room for answers of {longest} in the model's "
            f"window of {model.window}; lower --max-tokens"
        )
    prompts = [prompt(example) for example in examples]
    ends = answer_ends(examples, model.tokenizer)
    return [text.strip() for text in model.greedy_texts(prompts, longest, ends, "held-out answers")]


def _decode(model: CachingLM, tokens: np.ndarray[Any, Any]) -> str:
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _scores(
    held_out: HeldOut,
    losses: Sequence[float],
    tokens: Sequence[int],
    targets: Sequence[str],
    texts: Sequence[str],
    seed: int,
) -> list[Score]:
    count = len(losses)
    loss = math.fsum(losses) / sum(tokens)
    matches = [float(text == target) for text, target in zip(texts, targets, strict=True)]
    pairs = list(zip(targets, texts, strict=True))
    # Of a ratio of two sums over examples, by the residuals of the one on the other.
    residuals = [of_example - loss * length for of_example, length in zip(losses, tokens, strict=True)]
    values: dict[str, tuple[float, float | None]] = {
        COMPLETION_LOSS: (loss, None if count < 2 else statistics.stdev(residuals) * math.sqrt(count) / sum(tokens)),
        EXACT_MATCH: (statistics.fmean(matches), None if count < 2 else statistics.stdev(matches) / math.sqrt(count)),
        BLEU: (bleu.of_corpus(pairs), None if count < 2 else bleu.standard_error(pairs, seed)),
    }
    return [
        Score(held_out.task, metric, value, stderr, count, 0, "1", is_primary=False, prompt=held_out.prompt)
        for metric, (value, stderr) in values.items()
    ]
