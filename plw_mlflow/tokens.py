"""Examples: a record as tokens, each knowing which segment of the record it belongs to.

The whole text is tokenised once, as the model will see it, and the tokenizer's character offsets say
which segment a token belongs to. Tokenising prompt and completion apart would be simpler, but inserts a
space before the completion with SentencePiece tokenizers and so trains on text nobody will generate.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from string import Formatter
from typing import Any

from plw_mlflow.records import Record

# The templates of Stanford Alpaca, PROMPT_DICT in its train.py at 761dc5b, which the study used unchanged.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Segment(IntEnum):
    """What a token belongs to."""

    TEMPLATE = 0
    INSTRUCTION = 1
    INPUT = 2
    COMPLETION = 3


@dataclass(frozen=True)
class Example:
    """One tokenised record; both lists have one entry per token."""

    tokens: list[int]  # beginning of text (if the tokenizer has the habit), prompt, completion, end of text
    segment: list[int]  # a Segment each


def render(record: Record) -> Iterator[tuple[str, Segment]]:
    """The text of a record in the template, in pieces that belong to one segment each."""
    fields = {
        "instruction": (record.instruction, Segment.INSTRUCTION),
        "input": (record.input, Segment.INPUT),
    }
    for literal, field, _, _ in Formatter().parse(ALPACA_WITH_INPUT if record.input else ALPACA_WITHOUT_INPUT):
        yield literal, Segment.TEMPLATE
        if field is not None:
            yield fields[field]
    yield record.output, Segment.COMPLETION


def prompt(record: Record) -> str:
    """The text a model is given to complete."""
    return "".join(text for text, segment in render(record) if segment is not Segment.COMPLETION)


def encode(record: Record, tokenizer: Any) -> Example:
    """Tokenise a record in the template, beginning as the tokenizer itself begins a text and ending with its EOS.

    tokenizer: a fast Hugging Face tokenizer; others cannot say where in the text a token lies.

    A token belongs to the segment its last character lies in, so a token that straddles the end of the prompt
    counts as completion: it is text that only the completion explains.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer, which gives no offsets; use its fast form")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path} has no end-of-text token, so no completion could end")
    pieces = list(render(record))
    ends = list(itertools.accumulate(len(text) for text, _ in pieces))
    segments = [segment for _, segment in pieces]
    # A record may spell a special token, as HTML's <s>struck out</s> does LLaMA's: that is text like any other.
    encoded = tokenizer(
        "".join(text for text, _ in pieces), return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    tokens: list[int] = list(encoded["input_ids"])
    segment = [int(segments[bisect.bisect_left(ends, end)]) for _, end in encoded["offset_mapping"]]
    if tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
        segment.append(int(Segment.COMPLETION))
    else:
        segment[-1] = int(Segment.COMPLETION)
    return Example(tokens, segment)
