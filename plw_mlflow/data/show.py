"""Show an example token by token, with the weight that training gives each: what is masked, before a run.

The weights come from `batches.collate`, which training uses too. Where they depend on the other examples of a step,
they are those of a step that has no others. Thin lines separate the tokens, and every character
that a terminal would not print as it stands is spelled out, so that a record can neither hide a character nor control
the terminal.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from plw_mlflow.data import weights as weighting
from plw_mlflow.data.batches import collate
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.tokens import Example
from plw_mlflow.data.weights import Weights

COLOURS = {Segment.TEMPLATE: 90, Segment.INSTRUCTION: 36, Segment.INPUT: 34, Segment.COMPLETION: 32}  # ANSI
WIDTH = 120
PART = "│"
UNFINISHED = "…"  # a token that holds the first bytes of a character


def show(example: Example, tokenizer: Any, weights: Weights, *, name: str, colour: bool) -> str:
    """An example as lines of one segment and weight each.

    name: of the record. colour: whether the segments have ANSI colours as well.
    """
    factors = None
    if weights.have_factors:  # which depend on a step's other examples; here there are none
        factors = weighting.factors(weighting.count([example]), weights, np.zeros(1, np.int64))
    by_token = collate([example], weights, factors).weights[0].tolist()
    is_completion = example.segment == Segment.COMPLETION
    total = sum(by_token)
    of_prompt = sum(itertools.compress(by_token, ~is_completion))
    share = f"{of_prompt / total:.1%} of their weight on the prompt" if total else "all masked"
    lines = [f"{name}: {len(by_token)} tokens, {share}"]
    spelled = zip(example.segment.tolist(), by_token, _texts(example, tokenizer), strict=True)
    for (segment, weight), run in itertools.groupby(spelled, key=lambda token: token[:2]):
        label = f"{Segment(segment).name.lower():<12}{f'{weight:.4g}' if weight else 'masked':<9}"
        for text in _wrapped([text for *_, text in run], WIDTH - len(label)):
            lines.append(label + (f"\033[{COLOURS[Segment(segment)]}m{text}\033[0m" if colour else text))
            label = " " * len(label)
    return "\n".join(lines)


def has_colour(stream: TextIO) -> bool:
    """Whether colours are seen and wanted there (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _texts(example: Example, tokenizer: Any) -> Iterator[str]:
    """What each token adds to the text. Of the tokens that make up one character, the last one has it."""
    before: list[int] = []
    parts: list[int] = []
    for token in example.tokens.tolist():
        parts.append(token)
        # Read after another token, since a token alone may lose the space it starts with.
        text_before, text_with_parts = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, before + parts)
        )
        if text_with_parts.endswith("\ufffd") and len(parts) < 4:  # UTF-8 has no character of more than four bytes
            yield UNFINISHED
            continue
        text = text_with_parts.removeprefix(text_before) or tokenizer.convert_ids_to_tokens(token)
        yield "".join(map(_visible, text))
        before, parts = parts, []


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _wrapped(texts: list[str], width: int) -> Iterator[str]:
    """Tokens separated by lines, in rows of at most so many characters, unless one token is longer than that."""
    row = ""
    for text in texts:
        if row and len(row) + len(PART) + len(text) > width:
            yield row
            row = ""
        row += PART + text
    yield row
