"""Audit: what silently masks, cuts or shifts the tokens that a model is trained on, counted before a run.

Of each record, what can be seen in its text and tokens is found when it is tokenised, and stored with its example as
the bits of one number (`flags`). It is found from the outside: what stands before an answer is tokenised alone, as
whoever serves the model will, and a chat is rendered as a server renders it. This is done for every answer that is
trained on, so a conversation with n of them is rendered n times more. What follows from the options is counted from the
stored columns (`profile.count_faults`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.config.limits import IN_TOKENS
from plw_mlflow.data.chat_template import ChatTemplate
from plw_mlflow.data.pieces import Piece, Segment, prompt_pieces
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.tokens import Encoder, Example

BITS = {name: 1 << number for number, name in enumerate(IN_TOKENS)}
BATCH_CHARACTERS = 250_000  # of prompts, beyond which no more are tokenised together; a token takes some 200 bytes


def flags(
    records: Sequence[Record],
    rendered: Sequence[list[Piece] | Fault],
    examples: Sequence[Example],
    encoder: Encoder,
) -> NDArray[np.int32]:
    """What is wrong with each record or its example: int32 [N], the sum of its BITS.

    rendered, examples: as the encoder has made them of the records.
    """
    specials = re.compile("|".join(map(re.escape, encoder.specials)) or r"\b\B")
    parts = zip(records, examples, strict=True)
    faults = [set(_faults(encoder, specials, record, example)) for record, example in parts]
    for batch in _batches(_prompts(records, rendered, encoder)):
        served = encoder.prompts([prompt.pieces for prompt in batch])
        for prompt, tokens in zip(batch, served, strict=True):
            faults[prompt.record].update(_drifts(encoder, examples[prompt.record], prompt, tokens))
    return np.array([sum(BITS[name] for name in names) for names in faults], np.int32)


class _Prompt(NamedTuple):
    """What a server gives the model of a record, for it to write one of the answers that it is trained on.

    A special token parts a text: the tokens before it are the same whatever follows it. So a prompt is tokenised from
    its last special token on: with whole prompts, a conversation of 240 long answers took 39 s instead of 2.
    """

    record: int  # its number
    pieces: list[Piece]  # from the last special token on
    specials: int = 0  # tokens up to there that are like that one, itself included; 0: the pieces are the whole prompt
    is_other_text: bool = False  # than stands before the answer in training, by more than blanks
    is_without_blanks: bool = False  # that the template writes before the answer in training


def _prompts(records: Sequence[Record], rendered: Sequence[list[Piece] | Fault], encoder: Encoder) -> Iterator[_Prompt]:
    """The prompts of all completions of some records."""
    template = encoder.template
    for number, (record, pieces) in enumerate(zip(records, rendered, strict=True)):
        assert not isinstance(pieces, Fault), "a record that has an example has a rendering"
        if isinstance(template, ChatTemplate):
            for before, served in template.prompts(record):
                yield _served(number, before, served)
        else:
            yield _Prompt(number, prompt_pieces(pieces))


def _served(record: int, before: list[Piece], served: str | None) -> _Prompt:
    """The prompt that a server makes of the conversation before an answer. before: its pieces in training."""
    text = "".join(piece.text for piece in before)
    start = next((number for number in reversed(range(len(before))) if before[number].is_special), 0)
    pieces = before[start:]
    specials = sum(piece.is_special and piece.text == before[start].text for piece in before)
    prompt = _Prompt(record, pieces, specials)
    if served is None or not text.startswith(served):
        return prompt._replace(is_other_text=True)
    blanks = text[len(served) :]
    if not blanks.strip() and pieces and pieces[-1].text.endswith(blanks):
        last = pieces[-1]._replace(text=pieces[-1].text.removesuffix(blanks))
        return prompt._replace(pieces=[*pieces[:-1], last], is_without_blanks=bool(blanks))
    return prompt._replace(is_other_text=bool(blanks))


def _batches(prompts: Iterable[_Prompt]) -> Iterator[list[_Prompt]]:
    """The prompts, as many at a time as are tokenised together: those of one long conversation may be too many."""
    batch: list[_Prompt] = []
    characters = 0
    for prompt in prompts:
        batch.append(prompt)
        characters += sum(len(piece.text) for piece in prompt.pieces)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _drifts(encoder: Encoder, example: Example, prompt: _Prompt, served: NDArray[np.int32]) -> Iterator[str]:
    """The names of what is wrong before one answer. served: the tokens of the prompt's pieces."""
    start = 0
    if prompt.specials:
        special = encoder.specials[prompt.pieces[0].text]
        start = int(np.flatnonzero(example.tokens == special)[prompt.specials - 1])
    border = start + len(served)
    is_completion = np.concatenate([[False], example.segment == Segment.COMPLETION])
    # Before an answer stands the prompt, or another answer where the template writes nothing between two.
    follows_answer = bool(prompt.pieces) and prompt.pieces[-1].segment == Segment.COMPLETION
    is_border = is_completion[border : border + 2].tolist() == [follows_answer, True]
    # Where a server leaves off the blanks before an answer, the model has to write them. It does so where they are a
    # part of the answer's first token; where they are tokens of their own, they are the prompt's, and not trained on.
    is_shifted = not is_border or not np.array_equal(example.tokens[start:border], served)
    if is_shifted and not prompt.is_without_blanks:
        yield "border_drift"
    if prompt.is_other_text or (is_shifted and prompt.is_without_blanks):
        yield "template_drift"


def _faults(encoder: Encoder, specials: re.Pattern[str], record: Record, example: Example) -> Iterator[str]:
    """The names of what is wrong with one record, other than before its answers."""
    contents = encoder.contents(record)
    if not all(text.strip() for text, segment in contents if segment == Segment.COMPLETION):
        yield "empty_completion"
    is_completion = example.segment == Segment.COMPLETION
    ends = np.flatnonzero(is_completion & ~np.append(is_completion[1:], False))
    if not len(ends) or not set(example.tokens[ends].tolist()) <= set(encoder.specials.values()):
        yield "without_end_token"
    if encoder.bos is not None:
        is_bos = example.tokens == encoder.bos
        if (is_bos[1:] & is_bos[:-1]).any():
            yield "doubled_bos"
    if not _is_in_order([message.role for message in record.messages]):
        yield "roles_out_of_order"
    if any(specials.search(text) for text, _ in contents):
        yield "special_token_in_text"


def _is_in_order(roles: Sequence[str]) -> bool:
    """Whether user and assistant take turns, the user first, after the system if it says something."""
    turns = roles[1:] if roles and roles[0] == "system" else roles
    return all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
