"""Templates: the text in which a model reads a record, in pieces that belong to one segment each.

A template never searches a text for a border: it puts the record's contents in itself. So a content that spells
"### Response:", a chat's markers or a special token moves nothing, and stays text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple, Protocol

from jinja2 import TemplateError, TemplateSyntaxError

from plw_mlflow import study
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.environment import bounded
from plw_mlflow.errors import UserError, did_you_mean, first_line

# Some chat templates write today's date, with which no run could be repeated. Theirs is the day that Llama 3.1's own
# template falls back on. The macro takes the place of the function that transformers gives to templates.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') -}}{%- endmacro -%}"
)

MOST_CHARACTERS = 1_000_000  # of a template, and of what it writes around the contents of a record

Turns = Literal["last", "every"]


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


class Template(Protocol):
    """How a record is rendered."""

    digest: str  # what tells its renderings from another template's
    is_whole: bool  # whether a rendering has its own beginning and end; otherwise those are the tokenizer's
    completion_turns: Turns  # which turns of the assistant are completion

    def render(self, record: Record) -> list[Piece]:
        """The record's text in pieces. Raises Misfit for a record that the template cannot hold."""


class Misfit(UserError):
    """A template cannot hold a record."""

    def __init__(self, record: Record, fault: str) -> None:
        super().__init__(f"record {record.id} {fault}")
        self.fault = Fault(fault)


def load(name: str, tokenizer: Any, *, completion_turns: Turns = "last") -> Template:
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
            raise UserError(_TOO_LONG)
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


def special_tokens(tokenizer: Any) -> list[str]:
    """The spellings of a tokenizer's special tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def contents(record: Record, completion_turns: Turns) -> list[tuple[str, Segment]]:
    """A record's own texts, without any template's."""
    return [
        (piece.text, piece.segment)
        for turn in _turns(record, completion_turns)
        for piece in turn.pieces
        if piece.segment != Segment.TEMPLATE
    ]


def prompt(record: Record, template: Template) -> str:
    """The text that a model is given to complete."""
    return "".join(piece.text for piece in prompt_pieces(template.render(record)))


def prompt_pieces(rendered: Sequence[Piece]) -> list[Piece]:
    """The pieces of a rendered record that a model is given to complete: all before the first completion."""
    return list(itertools.takewhile(lambda piece: piece.segment != Segment.COMPLETION, rendered))


class TextTemplate:
    """A text with places for instruction and input, in a form with and a form without input; then the completion."""

    is_whole = False
    completion_turns: Turns = "last"

    def __init__(self, with_input: str, without_input: str, specials: Sequence[str] = ()) -> None:
        """Raises UserError for a form that does not hold {instruction} and {input}, or {instruction}, once each."""
        self.digest = _digest(with_input, without_input)
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


class ChatTemplate:
    """A chat template, rendered as transformers renders it, in a process with bounded memory and computing time.

    Where the contents lie is learnt from a rendering with placeholders, once for every order of roles; every record's
    own rendering must then be what that promises. The special token after a completion, by which the model is to
    end its turn, belongs to the completion.
    """

    is_whole = True

    def __init__(self, source: str, tokenizer: Any, completion_turns: Turns = "last") -> None:
        """source: the Jinja text. tokenizer: has the special tokens. Raises UserError for a text that is too long."""
        self.digest = _digest(source, json.dumps(tokenizer.special_tokens_map, sort_keys=True), completion_turns)
        self.completion_turns: Turns = completion_turns
        self._source = FIXED_DATE + source if "strftime_now" in source else source
        if len(source) > MOST_CHARACTERS:
            raise UserError(f"the chat template {_TOO_LONG}")
        self._tokenizer = tokenizer
        self._specials = special_tokens(tokenizer)
        self._outlines: dict[tuple[tuple[str, bool, bool], ...], _Outline] = {}

    def render(self, record: Record) -> list[Piece]:
        """The record's text in pieces.

        Raises Misfit where the template refuses the record, or changes a content beyond stripping it; UserError where
        it is no template, or needs too much memory or time.
        """
        turns = _turns(record, self.completion_turns)
        shape = tuple((turn.role, turn.is_placed, turn.is_completion) for turn in turns)
        try:
            if shape not in self._outlines:
                self._outlines[shape] = self._outline(turns)
            rendered = self._rendered(turns, [turn.text for turn in turns])
        except bounded.Exhausted as error:
            raise UserError(f"the chat template {error}, at record {record.id}; use another --template") from None
        except _Unfit as error:
            raise Misfit(record, f"does not fit the chat template: {error}") from None
        outline = self._outlines[shape]
        pieces = outline.around(turns)
        if "".join(piece.text for piece in pieces) != rendered:
            raise Misfit(
                record,
                "does not fit the chat template, which changes its contents, so that no token's segment is certain; "
                "use another --template",
            )
        return pieces + outline.end

    def _rendered(self, turns: Sequence[_Turn], texts: Sequence[str]) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
        ((is_fit, text),) = _RENDERER.results(self._source, messages, self._tokenizer.special_tokens_map)
        if not is_fit:
            raise _Unfit(text)
        return str(text)

    def _outline(self, turns: Sequence[_Turn]) -> _Outline:
        """What the template writes around the contents, and how it strips each of them."""
        placed = [turn for turn in turns if turn.is_placed]
        names = [f"CONTENT{number}X" for number in range(len(placed))]

        def around(left: str, right: str) -> list[str]:
            """The template's own texts before, between and after the contents."""
            texts = iter(left + name + right for name in names)
            rendered = self._rendered(turns, [next(texts) if turn.is_placed else "" for turn in turns])
            if re.findall("|".join(names), rendered) != names:
                raise _Unfit("it leaves out, repeats or reorders messages")
            return re.split("|".join(names), rendered)

        bare, padded = around("", ""), around(*(max(pads, key=len) for pads in (_LEFT, _RIGHT)))
        # Of the padding around a content, what the template has left tells what it strips.
        strips = [
            (_LEFT[left], _RIGHT[right])
            for text, with_padding in zip(bare, padded, strict=True)
            for left in _LEFT
            for right in _RIGHT
            if right + text + left == with_padding
        ]
        if len(strips) != len(bare):
            raise _Unfit("it changes the space around messages")
        opening, *after = ([*_own(text, self._specials)] for text in bare)
        end: list[Piece] = []
        for number, turn in enumerate(placed):
            if turn.is_completion:
                last = next((n for n, piece in enumerate(after[number]) if piece.is_special), None)
                if last is None and turn is turns[-1]:  # nothing would teach the model to stop
                    last = len(after[number])
                    end = [Piece(self._tokenizer.eos_token, Segment.COMPLETION, is_special=True)]
                elif last is None:
                    warnings.warn(
                        "the chat template ends answers with no special token: where to stop is learnt from the last "
                        "answer of a conversation alone",
                        stacklevel=2,
                    )
                after[number] = [
                    piece._replace(segment=Segment.COMPLETION) if last is not None and n <= last else piece
                    for n, piece in enumerate(after[number])
                ]
        lefts, rights = [left for left, _ in strips], [right for _, right in strips[1:]]
        return _Outline(opening, list(zip(lefts, rights, after, strict=False)), end)


class _Unfit(Exception):
    """Why a record does not fit a chat template."""


def renderings(source: str, messages: list[dict[str, str]], variables: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """One chat as its template writes it, with True; or what is wrong with it, with False.

    It is for a process with bounded memory and time. Raises bounded.Refusal for a source that is no template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: str = render_jinja_template([messages], chat_template=source, **variables)[0][0]
    except TemplateSyntaxError as error:
        raise bounded.Refusal(f"line {error.lineno} of the chat template is no Jinja: {error.message}") from None
    except (TemplateError, ValueError, TypeError) as error:
        yield False, first_line(error)
    except MemoryError:
        raise
    except Exception as error:  # of whatever the template calls
        yield False, f"{type(error).__name__}: {first_line(error)}"
    else:
        own = len(rendered) - sum(len(message["content"]) for message in messages)
        if own > MOST_CHARACTERS:
            yield False, f"it writes more than {MOST_CHARACTERS:,} characters of its own"
        else:
            yield True, rendered


_RENDERER = bounded.Worker(renderings)  # one for all chat templates, as it takes a second to start
_TOO_LONG = f"has more than {MOST_CHARACTERS:,} characters"

# Padding before and after a content, by what is left of it; the value is what the template has stripped: nothing,
# newlines or (None) any white space. No two pairs of paddings have one length, so one text fits one pair.
_LEFT = {"\n ": "", " ": "\n", "": None}
_RIGHT = {"\t\t\t\n\n\n\n\n\n": "", "\t\t\t": "\n", "": None}


@dataclass(frozen=True)
class _Outline:
    """What a chat template makes of one order of roles."""

    opening: list[Piece]
    places: list[tuple[str | None, str | None, list[Piece]]]  # what is stripped left and right; what follows
    end: list[Piece]  # the end of text, where the template writes none

    def around(self, turns: Sequence[_Turn]) -> list[Piece]:
        """The opening, and every turn with what follows it."""
        pieces = [*self.opening]
        placed = (turn for turn in turns if turn.is_placed)
        for turn, (left, right, after) in zip(placed, self.places, strict=True):
            text = turn.text.lstrip(left)
            start = len(turn.text) - len(text)
            pieces += _cut(turn.pieces, start, start + len(text.rstrip(right)))
            pieces += after
        return pieces


@dataclass(frozen=True)
class _Turn:
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


def _turns(record: Record, completion_turns: Turns) -> list[_Turn]:
    """The record as a conversation; an instruction has its input in the next line."""
    if not record.messages:
        asked = [Piece(record.instruction, Segment.INSTRUCTION)]
        if record.input:
            asked += [Piece("\n", Segment.TEMPLATE), Piece(record.input, Segment.INPUT)]
        answered = [Piece(record.output, Segment.COMPLETION)]
        return [_Turn("user", asked), _Turn("assistant", answered, is_completion=True)]
    turns = []
    for number, message in enumerate(record.messages, start=1):
        is_chosen = completion_turns == "every" or number == len(record.messages)
        is_completion = message.role == "assistant" and message.is_trained and is_chosen
        segment = Segment.INSTRUCTION if message.role == "user" else Segment.INPUT
        piece = Piece(message.content, Segment.COMPLETION if is_completion else segment)
        turns.append(_Turn(message.role, [piece], is_completion))
    return turns


def _cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces from one character to another."""
    ends = itertools.accumulate(len(piece.text) for piece in pieces)
    return [
        piece._replace(
            text=piece.text[max(0, len(piece.text) - (end - start)) : max(0, len(piece.text) - (end - stop))]
        )
        for piece, end in zip(pieces, ends, strict=True)
    ]


def _parsed(form: str, expected: list[str], specials: Sequence[str]) -> list[Piece | str]:
    """A form as its own pieces, with the names of fields between them."""
    parsed: list[Piece | str] = []
    for literal, name, _, _ in Formatter().parse(form):
        parsed += _own(literal, specials)
        if name is not None:
            parsed.append(name)
    found = sorted(part for part in parsed if isinstance(part, str))
    if found != expected:
        raise UserError(f"a form must hold the fields {', '.join(expected)}, but has {', '.join(found) or 'none'}")
    return parsed


def _own(text: str, specials: Sequence[str]) -> list[Piece]:
    """A template's own text, with its special tokens apart."""
    spelled = "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True))
    parts = re.split(f"({spelled})", text) if spelled else [text]
    return [Piece(part, Segment.TEMPLATE, is_special=bool(number % 2)) for number, part in enumerate(parts) if part]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
