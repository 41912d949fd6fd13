"""Templates: the text in which a model reads a record.

A template never searches a text for a border: it puts the record's contents in itself. So a content that spells
"### Response:", a chat's markers or a special token moves nothing, and stays text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from plw_mlflow import study
from plw_mlflow.data.chat_template import MOST_CHARACTERS, TOO_LONG, ChatTemplate
from plw_mlflow.data.pieces import CompletionTurns, Misfit, Piece, Segment, digest, special_tokens, template_pieces
from plw_mlflow.data.records import Record
from plw_mlflow.errors import UserError, did_you_mean, first_line


class Template(Protocol):
    """How a record is rendered."""

    digest: str  # templates that render any record differently have different ones
    is_whole: bool  # whether a rendering has its own beginning and end; otherwise those are the tokenizer's
    completion_turns: CompletionTurns  # which turns of the assistant are completion

    def render(self, record: Record) -> list[Piece]:
        """The record's text in pieces. Raises Misfit for a record that the template cannot hold."""


def load(name: str, tokenizer: Any, *, completion_turns: CompletionTurns = "last") -> Template:
    """The template that `name` means: alpaca, chat (the tokenizer's own), none, or a file.

    `none` is instruction and input (if any), each followed by a newline, and then the completion. A .json file holds
    `prompt_input` and `prompt_no_input`, texts with {instruction} and {input} in them, as Alpaca-LoRA's templates do;
    a .jinja file holds a chat template. Raises UserError where there is no such template.
    """
    specials = special_tokens(tokenizer)
    if name == "alpaca":
        return TextTemplate(study.ALPACA_WITH_INPUT, study.ALPACA_WITHOUT_INPUT, specials)
    if name == "none":
        return TextTemplate("{instruction}\n{input}\n", "{instruction}\n", specials)
    if name == "chat":
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path} has no chat template; give one: --template FILE.jinja")
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer, completion_turns)
    path = file(name)
    if path is None:
        if Path(name).is_dir():
            raise UserError(f"template {name} is a folder; give a .json or .jinja file")
        raise UserError(
            f"there is no template {name!r}; it must be alpaca, chat, none, or the path of a .json file (with "
            "prompt_input and prompt_no_input) or of a .jinja file (a chat template)"
            + did_you_mean(name, ("alpaca", "chat", "none"), folders=[])
        )
    try:
        with path.open(encoding="utf-8", newline=None) as stream:
            text = stream.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise UserError(TOO_LONG)
        if path.suffix == ".jinja":
            return ChatTemplate(text, tokenizer, completion_turns)
        forms = json.loads(text)
        if not isinstance(forms, dict):
            raise UserError("it must be one JSON object, with the fields prompt_input and prompt_no_input")
        return TextTemplate(forms["prompt_input"], forms["prompt_no_input"], specials)
    except KeyError as error:
        raise UserError(f"template {path} lacks the field {error}") from None
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"template {path} cannot be used: {first_line(error)}") from None


def file(name: str) -> Path | None:
    """The file that a template's name means, if it means one."""
    path = Path(name)
    return path if path.suffix in (".json", ".jinja") and path.is_file() else None


class TextTemplate:
    """A text with places for instruction and input, in a form with and a form without input; then the completion."""

    is_whole = False
    completion_turns: CompletionTurns = "last"

    def __init__(self, with_input: str, without_input: str, specials: Sequence[str] = ()) -> None:
        """Raises UserError for a form that does not hold {instruction} and {input}, or {instruction}, once each."""
        self.digest = digest(with_input, without_input)
        self._with_input = _parsed(with_input, ["input", "instruction"], specials)
        self._without_input = _parsed(without_input, ["instruction"], specials)

    def render(self, record: Record) -> list[Piece]:
        """The record's text in pieces. Raises Misfit for a conversation of several turns."""
        if record.messages and [message.role for message in record.messages] != ["user", "assistant"]:
            raise Misfit(
                record,
                f"is a conversation ({', '.join(message.role for message in record.messages)}), but the template holds "
                "one instruction and its completion; use --template chat, or --template FILE.jinja",
            )
        fields = {
            "instruction": Piece(record.instruction, Segment.INSTRUCTION),
            "input": Piece(record.input, Segment.INPUT),
        }
        form = self._with_input if record.input else self._without_input
        pieces = [fields[part] if isinstance(part, str) else part for part in form]
        return [*pieces, Piece(record.output, Segment.COMPLETION)]


def _parsed(form: str, expected: list[str], specials: Sequence[str]) -> list[Piece | str]:
    """A form as its own pieces, with the names of fields between them."""
    parsed: list[Piece | str] = []
    for literal, name, _, _ in Formatter().parse(form):
        parsed += template_pieces(literal, specials)
        if name is not None:
            parsed.append(name)
    fields = sorted(part for part in parsed if isinstance(part, str))
    if fields != expected:
        raise UserError(f"a form must hold the fields {', '.join(expected)}, but has {', '.join(fields) or 'none'}")
    return parsed
