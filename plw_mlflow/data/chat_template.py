"""Chat templates: Jinja texts, rendered as transformers renders them, with every content where the template puts it."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from plw_mlflow.data.pieces import (
    CompletionTurns,
    Misfit,
    Piece,
    Segment,
    Turn,
    digest,
    special_tokens,
    template_pieces,
    turns_of,
)
from plw_mlflow.data.records import Record
from plw_mlflow.environment import bounded
from plw_mlflow.errors import UserError, first_line

# Some chat templates write today's date, so that no run could be repeated. Here, today is the day that Llama 3.1's own
# template falls back on. The macro takes the place of the function that transformers gives to templates.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') -}}{%- endmacro -%}"
)

MOST_CHARACTERS = 1_000_000  # of a template, and of what it writes around the contents of a record
TOO_LONG = f"has more than {MOST_CHARACTERS:,} characters"

# What a template may leave of the padding before and after a content, and what it has then stripped: nothing, newlines
# or (None) any white space. All pairs of a left and a right one differ in length, so a text fits one pair only.
_LEFT = {"\n ": "", " ": "\n", "": None}
_RIGHT = {"\t\t\t\n\n\n\n\n\n": "", "\t\t\t": "\n", "": None}


class ChatTemplate:
    """A chat template, rendered as transformers renders it, in a process with bounded memory and computing time.

    Where the contents lie is learnt from a rendering with placeholders, once for every order of roles; the rendering of
    every record must then have its contents in just these places. The special token after a completion, with which the
    model is to end its turn, belongs to the completion.
    """

    is_whole = True

    def __init__(self, source: str, tokenizer: Any, completion_turns: CompletionTurns = "last") -> None:
        """source: the Jinja text. tokenizer: has the special tokens. Raises UserError for a text that is too long."""
        self.digest = digest(source, json.dumps(tokenizer.special_tokens_map, sort_keys=True), completion_turns)
        self.completion_turns: CompletionTurns = completion_turns
        self._source = FIXED_DATE + source if "strftime_now" in source else source
        if len(source) > MOST_CHARACTERS:
            raise UserError(f"the chat template {TOO_LONG}")
        self._tokenizer = tokenizer
        self._specials = special_tokens(tokenizer)
        self._outlines: dict[tuple[tuple[str, bool, bool], ...], _Outline] = {}

    def render(self, record: Record) -> list[Piece]:
        """The record's text in pieces.

        Raises Misfit where the template refuses the record, or changes a content beyond stripping it; UserError where
        it is no template, or needs too much memory or time.
        """
        turns = turns_of(record, self.completion_turns)
        try:
            outline = self._outline(turns)
            rendered = self._rendered(turns, [turn.text for turn in turns])
        except bounded.Exhausted as error:
            raise _exhausted(error, record) from None
        except _Unfit as error:
            raise Misfit(record, f"does not fit the chat template: {error}") from None
        pieces = list(itertools.chain.from_iterable(outline.parts(turns)))
        if "".join(piece.text for piece in pieces) != rendered:
            raise Misfit(
                record,
                "does not fit the chat template, which changes its contents, so that no token's segment is certain; "
                "use another --template",
            )
        return pieces + outline.end

    def prompts(self, record: Record) -> Iterator[tuple[list[Piece], str | None]]:
        """What stands before each completion of a record, in training and when it is served.

        In training, these are the pieces of `render` before the completion. A server gives the model the conversation
        before the completion, with the generation prompt; None where the template refuses that conversation. Raises
        UserError where the template needs too much memory or time.
        """
        turns = turns_of(record, self.completion_turns)
        parts = self._outline(turns).parts(turns)
        before = [*next(parts)]
        for number, turn in enumerate(turns):
            if turn.is_completion:
                yield before.copy(), self._served(turns[:number], record)
            if turn.is_placed:
                before += next(parts)

    def _served(self, turns: Sequence[Turn], record: Record) -> str | None:
        try:
            return self._rendered(turns, [turn.text for turn in turns], add_generation_prompt=True)
        except bounded.Exhausted as error:
            raise _exhausted(error, record) from None
        except _Unfit:
            return None

    def _rendered(self, turns: Sequence[Turn], texts: Sequence[str], **how: bool) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
        ((is_fit, text),) = _RENDERER.results(self._source, messages, self._tokenizer.special_tokens_map | how)
        if not is_fit:
            raise _Unfit(text)
        return str(text)

    def _outline(self, turns: Sequence[Turn]) -> _Outline:
        """The outline of a conversation with this order of roles, which is learnt once."""
        shape = tuple((turn.role, turn.is_placed, turn.is_completion) for turn in turns)
        if shape not in self._outlines:
            self._outlines[shape] = self._learnt_outline(turns)
        return self._outlines[shape]

    def _learnt_outline(self, turns: Sequence[Turn]) -> _Outline:
        """What the template writes around the contents, and how it strips each of them."""
        bare = self._texts_around(turns, "", "")
        padded = self._texts_around(turns, *(max(paddings, key=len) for paddings in (_LEFT, _RIGHT)))
        strips = _strips(bare, padded)
        opening, *after = (template_pieces(text, self._specials) for text in bare)
        end: list[Piece] = []
        for number, turn in enumerate(turn for turn in turns if turn.is_placed):
            if turn.is_completion:
                last = next((n for n, piece in enumerate(after[number]) if piece.is_special), None)
                if last is None and turn is turns[-1]:  # nothing would teach the model to stop
                    last = len(after[number])
                    end = [Piece(self._tokenizer.eos_token, Segment.COMPLETION, is_special=True)]
                elif last is None:
                    warnings.warn(
                        "the chat template ends answers with no special token: where to stop is learnt from the last "
                        "answer of a conversation alone",
                        stacklevel=3,
                    )
                after[number] = [
                    piece._replace(segment=Segment.COMPLETION) if last is not None and n <= last else piece
                    for n, piece in enumerate(after[number])
                ]
        lefts, rights = [left for left, _ in strips], [right for _, right in strips[1:]]
        return _Outline(opening, list(zip(lefts, rights, after, strict=False)), end)

    def _texts_around(self, turns: Sequence[Turn], left: str, right: str) -> list[str]:
        """The template's own texts before, between and after the contents, each padded left and right."""
        names = [f"CONTENT{number}X" for number in range(sum(turn.is_placed for turn in turns))]
        texts = iter(left + name + right for name in names)
        rendered = self._rendered(turns, [next(texts) if turn.is_placed else "" for turn in turns])
        if re.findall("|".join(names), rendered) != names:
            raise _Unfit("it leaves out, repeats or reorders messages")
        return re.split("|".join(names), rendered)


def _strips(bare: Sequence[str], padded: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """What the template strips from the left of the content after each of its texts, and the right of the one before.

    bare, padded: its texts around contents without and with padding; the padding that it has left is in the latter.
    """
    strips = [
        (_LEFT[left], _RIGHT[right])
        for text, with_padding in zip(bare, padded, strict=True)
        for left in _LEFT
        for right in _RIGHT
        if right + text + left == with_padding
    ]
    if len(strips) != len(bare):
        raise _Unfit("it changes the space around messages")
    return strips


class _Unfit(Exception):
    """Why a record does not fit a chat template."""


def _exhausted(error: bounded.Exhausted, record: Record) -> UserError:
    return UserError(f"the chat template {error}, at record {record.id}; use another --template")


def renderings(source: str, messages: list[dict[str, str]], variables: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """One chat as its template writes it, with True; or what is wrong with it, with False.

    It is for a process with bounded memory and time. Raises UserError for a source that is no template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: str = render_jinja_template([messages], chat_template=source, **variables)[0][0]
    except TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} of the chat template is no Jinja: {error.message}") from None
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


@dataclass(frozen=True)
class _Outline:
    """What a chat template makes of one order of roles."""

    opening: list[Piece]
    places: list[tuple[str | None, str | None, list[Piece]]]  # what is stripped left and right; what follows
    end: list[Piece]  # the end of text, where the template writes none

    def parts(self, turns: Sequence[Turn]) -> Iterator[list[Piece]]:
        """The opening, and then every turn that needs a place, with what follows it."""
        yield self.opening
        placed = (turn for turn in turns if turn.is_placed)
        for turn, (left, right, after) in zip(placed, self.places, strict=True):
            text = turn.text.lstrip(left)
            start = len(turn.text) - len(text)
            yield [*_cut(turn.pieces, start, start + len(text.rstrip(right))), *after]


def _cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The part of some pieces from one character of their text to another."""
    ends = itertools.accumulate(len(piece.text) for piece in pieces)
    return [
        piece._replace(
            text=piece.text[max(0, len(piece.text) - (end - start)) : max(0, len(piece.text) - (end - stop))]
        )
        for piece, end in zip(pieces, ends, strict=True)
    ]
