"""Pieces: a record's text in a template, in parts that belong to one segment each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from plw_mlflow.data.records import Fault, Record
from plw_mlflow.errors import UserError

CompletionTurns = Literal["last", "every"]  # which of a conversation's assistant turns are completion


class Segment(IntEnum):
    """What a token belongs to."""

    TEMPLATE = 0
    INSTRUCTION = 1  # in a conversation, what the user says
    INPUT = 2  # in a conversation, what else a completion follows from: the system message, earlier answers
    COMPLETION = 3


class Piece(NamedTuple):
    """A part of a rendered record."""

    text: str
    segment: Segment
    is_special: bool = False  # a special token, as the template writes it; a content that spells one is text


class Misfit(UserError):
    """A template cannot hold a record."""

    def __init__(self, record: Record, fault: str) -> None:
        super().__init__(f"record {record.id} {fault}")
        self.fault = Fault(fault)


@dataclass(frozen=True)
class Turn:
    """One message, as pieces."""

    role: str
    pieces: list[Piece]
    is_completion: bool = False

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def is_placed(self) -> bool:
        """Whether the message needs a place; of an empty one, templates may write nothing at all."""
        return self.is_completion or any(piece.text for piece in self.pieces)


def turns_of(record: Record, completion_turns: CompletionTurns) -> list[Turn]:
    """The record as a conversation; an instruction has its input in the next line."""
    if not record.messages:
        user = [Piece(record.instruction, Segment.INSTRUCTION)]
        if record.input:
            user += [Piece("\n", Segment.TEMPLATE), Piece(record.input, Segment.INPUT)]
        assistant = [Piece(record.output, Segment.COMPLETION)]
        return [Turn("user", user), Turn("assistant", assistant, is_completion=True)]
    turns = []
    for number, message in enumerate(record.messages, start=1):
        is_chosen = completion_turns == "every" or number == len(record.messages)
        is_completion = message.role == "assistant" and message.is_trained and is_chosen
        segment = Segment.INSTRUCTION if message.role == "user" else Segment.INPUT
        piece = Piece(message.content, Segment.COMPLETION if is_completion else segment)
        turns.append(Turn(message.role, [piece], is_completion))
    return turns


def contents(record: Record, completion_turns: CompletionTurns) -> list[tuple[str, Segment]]:
    """A record's own texts, without any template's."""
    return [
        (piece.text, piece.segment)
        for turn in turns_of(record, completion_turns)
        for piece in turn.pieces
        if piece.segment != Segment.TEMPLATE
    ]


def prompt_pieces(rendered: Sequence[Piece]) -> list[Piece]:
    """The pieces of a rendered record that a model is given to complete: all before the first completion."""
    return list(itertools.takewhile(lambda piece: piece.segment != Segment.COMPLETION, rendered))


def template_pieces(text: str, specials: Sequence[str]) -> list[Piece]:
    """A template's own text, with its special tokens apart."""
    spelled = "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True))
    parts = re.split(f"({spelled})", text) if spelled else [text]
    return [Piece(part, Segment.TEMPLATE, is_special=bool(number % 2)) for number, part in enumerate(parts) if part]


def special_tokens(tokenizer: Any) -> list[str]:
    """The spellings of a tokenizer's special tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def digest(*parts: str) -> str:
    """What identifies a template that is made of these texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
