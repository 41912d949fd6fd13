"""Audit: what silently masks, cuts or shifts the tokens that a model is trained on, counted before a run.

Of each record, what can be seen in its text and tokens is found when it is tokenised, and stored with its example as
the bits of one number (`flags`). It is found from the outside: the prompt is tokenised alone, as whoever serves the
model will, and a chat is rendered as a server renders it. What follows from the options is counted from the stored
columns (`profile.count_faults`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.config.limits import IN_TOKENS
from plw_mlflow.data.chat_template import ChatTemplate
from plw_mlflow.data.pieces import Piece, Segment, prompt_pieces
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.tokens import Encoder, Example

BITS = {name: 1 << number for number, name in enumerate(IN_TOKENS)}


def flags(
    records: Sequence[Record],
    rendered: Sequence[list[Piece] | Fault],
    examples: Sequence[Example],
    encoder: Encoder,
) -> NDArray[np.int32]:
    """What is wrong with each record or its example: int32 [N], the sum of its BITS.

    rendered, examples: as the encoder has made them of the records.
    """
    prompts = [_served(encoder, record, pieces) for record, pieces in zip(records, rendered, strict=True)]
    tokens = encoder.prompts([prompt.pieces for prompt in prompts])
    specials = re.compile("|".join(map(re.escape, encoder.specials)) or r"\b\B")
    parts = zip(records, examples, prompts, tokens, strict=True)
    return np.array([sum(BITS[name] for name in _faults(encoder, specials, *part)) for part in parts], np.int32)


class _Served(NamedTuple):
    """What a server gives the model of a record, for it to write the first answer."""

    pieces: list[Piece]
    is_other_text: bool  # than stands before the answer in training, by more than blanks
    is_without_blanks: bool  # that the template writes before the answer in training


def _served(encoder: Encoder, record: Record, rendered: list[Piece] | Fault) -> _Served:
    """What is served of a record. What a chat template does before the last answer, it is taken to do before all."""
    assert not isinstance(rendered, Fault), "a record that has an example has a rendering"
    pieces, template = prompt_pieces(rendered), encoder.template
    if not isinstance(template, ChatTemplate):
        return _Served(pieces, is_other_text=False, is_without_blanks=False)
    before, served = _text_before_last_answer(rendered), template.served(record)
    if served is None or not before.startswith(served):
        return _Served(pieces, is_other_text=True, is_without_blanks=False)
    blanks = before[len(served) :]
    if not blanks.strip() and pieces and pieces[-1].text.endswith(blanks):
        last = pieces[-1]._replace(text=pieces[-1].text.removesuffix(blanks))
        return _Served([*pieces[:-1], last], is_other_text=False, is_without_blanks=bool(blanks))
    return _Served(pieces, is_other_text=bool(blanks), is_without_blanks=False)


def _faults(
    encoder: Encoder,
    specials: re.Pattern[str],
    record: Record,
    example: Example,
    served: _Served,
    served_tokens: NDArray[np.int32],
) -> Iterator[str]:
    """The names of what is wrong with one record."""
    contents = encoder.contents(record)
    is_completion = example.segment == Segment.COMPLETION
    places = np.flatnonzero(is_completion)
    if not any(text.strip() for text, segment in contents if segment == Segment.COMPLETION):
        yield "empty_completion"
    if not len(places) or int(example.tokens[places[-1]]) not in encoder.specials.values():
        yield "without_end_token"
    border = int(places[0]) if len(places) else len(example.tokens)
    # Where a server leaves off the blanks before an answer, the model has to write them. It does so where they are a
    # part of the answer's first token; where they are tokens of their own, they are the prompt's, and not trained on.
    is_shifted = not np.array_equal(example.tokens[:border], served_tokens)
    if is_shifted and not served.is_without_blanks:
        yield "border_drift"
    if served.is_other_text or (is_shifted and served.is_without_blanks):
        yield "template_drift"
    if encoder.bos is not None:
        is_bos = example.tokens == encoder.bos
        if (is_bos[1:] & is_bos[:-1]).any():
            yield "doubled_bos"
    if not _is_in_order([message.role for message in record.messages]):
        yield "roles_out_of_order"
    if any(specials.search(text) for text, _ in contents):
        yield "special_token_in_text"


def _text_before_last_answer(pieces: Sequence[Piece]) -> str:
    is_completion = [piece.segment == Segment.COMPLETION for piece in pieces]
    last = max(n for n, (before, here) in enumerate(itertools.pairwise([False, *is_completion])) if here and not before)
    return "".join(piece.text for piece in pieces[:last])


def _is_in_order(roles: Sequence[str]) -> bool:
    """Whether user and assistant take turns, the user first, after the system if it says something."""
    turns = roles[1:] if roles and roles[0] == "system" else roles
    return all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
