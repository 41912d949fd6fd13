"""Tokens: a record as an example, each of whose tokens belongs to one segment of the record.

The whole text is tokenised once, as the model will see it, and the tokenizer's character offsets say which segment
a token belongs to. Tokenising prompt and completion apart would be simpler, but inserts a space before the
completion with SentencePiece tokenizers and so trains on text nobody will generate.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from plw_mlflow.data.pieces import Misfit, Piece, Segment, contents
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.templates import Template
from plw_mlflow.errors import UserError

# How the encoder's own copy of a tokenizer spells special tokens: as a number between what Unicode reserves as
# noncharacters, which no text should hold.
SPECIAL = "\ufdd0{}\ufdd1"
SPELLS_SPECIALS = "holds the noncharacters U+FDD0 and U+FDD1 around a number"


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised record of T tokens."""

    tokens: NDArray[np.int32]  # [T] beginning of text (if the tokenizer adds one), prompt, completion, its end
    segment: NDArray[np.int8]  # [T] a Segment each
    straddling: int = 0  # tokens counted as completion that begin in the prompt
    straddling_end: int = 0  # tokens counted as completion that end in what the template writes after an answer


class Encoder:
    """Tokenises records in a template."""

    def __init__(
        self, tokenizer: Any, template: Template, *, prompt_border: Literal["offsets", "separate"] = "offsets"
    ) -> None:
        """Takes a fast Hugging Face tokenizer; others cannot say where in the text a token lies.

        prompt_border: where a prompt ends among the tokens of the whole text. By `offsets`, a token belongs to the
            segment its last character lies in, so one that straddles the border counts as completion: it is text that
            only the completion explains. So does one that straddles a completion's end, or the answer would lose its
            last token. By `separate`, the prompt has as many tokens as it has when tokenised alone,
            as in the training code of Stanford Alpaca and of the study.

        Raises UserError for a tokenizer that is not fast or has no end-of-text token.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which gives no offsets; use its fast form"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path} has no end-of-text token, so no completion could end")
        self.template = template
        self._prompt_border = prompt_border
        self._specials = {
            token.content: SPECIAL.format(number)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        #: The special tokens by their spelling, and the one that begins a text, if there is one.
        self.specials = {token.content: n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.bos: int | None = tokenizer.bos_token_id
        self._opening, self._closing = ([], []) if template.is_whole else _around(tokenizer)
        # Padding and truncation are what the last call through transformers left behind; each call sets them again.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        self._serialised: str = tokenizer.backend_tokenizer.to_str()
        identity = [template.digest, prompt_border, self._opening, self._closing]
        #: What decides the output: two encoders of one digest make the same of a record.
        self.digest = hashlib.sha256((self._serialised + json.dumps(identity)).encode()).hexdigest()

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizer with special tokens spelled as no text spells them, and without what it adds around a text.

        A record may spell a special token, as HTML's <s>struck out</s> does LLaMA's: that is text like any other.
        """
        settings = json.loads(self._serialised)
        model, specials = settings["model"], self._specials
        for token in settings["added_tokens"]:
            if token["content"] in specials:
                # Found before the text is normalised: after it, some would be missed (LLaMA puts a space before each).
                token |= {"content": specials[token["content"]], "normalized": False}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {specials.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:  # Unigram: pairs of piece and log-probability
            model["vocab"] = [[specials.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = specials.get(model["unk_token"], model["unk_token"])
        settings["post_processor"] = None  # GPT-2's would also take spaces out of the offsets
        return Tokenizer.from_str(json.dumps(settings))

    def contents(self, record: Record) -> list[tuple[str, Segment]]:
        """A record's own texts, without any template's."""
        return contents(record, self.template.completion_turns)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Bare tokens of each text: no special tokens; the empty text has none."""
        encodings = iter(self._backend.encode_batch_fast([text for text in texts if text], add_special_tokens=False))
        return [len(next(encodings)) if text else 0 for text in texts]

    def encode(self, records: Sequence[Record]) -> list[Example | Fault]:
        """Tokenise records in the template, a thousand or so at a time: all are in memory at once.

        A Fault stands in place of a record that the template cannot hold. Raises UserError where there is no template.
        """
        return self.encode_rendered([self.render(record) for record in records])

    def encode_rendered(self, rendered: Sequence[list[Piece] | Fault]) -> list[Example | Fault]:
        """Tokenise what `render` gives of records; a Fault stays one."""
        examples = iter(self._encoded([pieces for pieces in rendered if not isinstance(pieces, Fault)]))
        return [pieces if isinstance(pieces, Fault) else next(examples) for pieces in rendered]

    def prompts(self, prompts: Sequence[Sequence[Piece]]) -> list[NDArray[np.int32]]:
        """The tokens of prompts that a model is to go on from, int32 [T] each; a prompt is the pieces before an answer.

        They are the tokens that stand before the completion of the same record in training, unless one of those
        straddles the border: the prompt alone has only a part of its text.
        """
        texts = ["".join(self._spelled(pieces)) for pieces in prompts]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [np.array([*self._opening, *encoding.ids], dtype=np.int32) for encoding in encodings]

    def continuations(
        self, prompts: Sequence[Sequence[Piece]], texts: Sequence[str]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The tokens of each prompt, and of the text that follows it, as training has a record's prompt and completion.

        The end-of-text token is not among them. Raises UserError for a text that holds `SPECIAL`, which stands for
        special tokens.
        """
        rendered = [[*pieces, Piece(text, Segment.COMPLETION)] for pieces, text in zip(prompts, texts, strict=True)]
        if any(self._spells_specials(pieces[-1]) for pieces in rendered):
            raise UserError(f"the text to be scored {SPELLS_SPECIALS}")
        pairs = []
        for example in self._encoded(rendered):
            tokens = example.tokens[: len(example.tokens) - len(self._closing)]
            is_completion = example.segment[: len(tokens)] == Segment.COMPLETION
            border = int(is_completion.argmax()) if is_completion.any() else len(tokens)
            pairs.append((tokens[:border], tokens[border:]))
        return pairs

    def render(self, record: Record) -> list[Piece] | Fault:
        """A record's text in the template, in pieces; a Fault where the template cannot hold it."""
        try:
            pieces = self.template.render(record)
        except Misfit as misfit:
            return misfit.fault
        return Fault(SPELLS_SPECIALS) if any(map(self._spells_specials, pieces)) else pieces

    def _spells_specials(self, piece: Piece) -> bool:
        return SPECIAL[0] in piece.text and any(special in piece.text for special in self._specials.values())

    def _spelled(self, pieces: Sequence[Piece]) -> list[str]:
        """The texts of pieces, special tokens as the encoder's own copy of the tokenizer spells them."""
        return [self._specials[piece.text] if piece.is_special else piece.text for piece in pieces]

    def _encoded(self, rendered: Sequence[Sequence[Piece]]) -> list[Example]:
        parts = [self._spelled(pieces) for pieces in rendered]
        encodings = self._backend.encode_batch(["".join(texts) for texts in parts], add_special_tokens=False)
        borders = [_completion_starts(pieces) for pieces in rendered]
        prompt_tokens: Iterator[int] | None = None
        if self._prompt_border == "separate":
            prompts = ["".join(texts[:n]) for texts, starts in zip(parts, borders, strict=True) for n in starts]
            prompt_tokens = iter(self.count(prompts))
        return [
            self._example(encoding, pieces, [len(text) for text in texts], starts, prompt_tokens)
            for encoding, pieces, texts, starts in zip(encodings, rendered, parts, borders, strict=True)
        ]

    def _example(
        self,
        encoding: Encoding,
        pieces: Sequence[Piece],
        characters: Sequence[int],
        completion_starts: Sequence[int],
        prompt_tokens: Iterator[int] | None,
    ) -> Example:
        """The example of one encoding.

        characters: of each piece. completion_starts: numbers of pieces. prompt_tokens: the tokens before each of these
            starts if tokenised alone, where that is to be the border.
        """
        ends = list(itertools.accumulate(characters))
        stops: list[int] = []  # in tokens
        straddling = straddling_end = 0
        for number, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
            before = stops[-1] if stops else 0
            if piece.is_special:  # one token, though it may take the white space after it along
                stop = before + 1
            elif end == ends[-1]:
                stop = len(encoding)
            else:
                stop = max(before, _first_beyond(encoding, end))
                after = pieces[number + 1]
                if piece.segment == Segment.COMPLETION != after.segment and not after.is_special:
                    last_token = encoding.token_to_chars(stop)
                    if last_token and last_token[0] < end:
                        stop += 1
                        straddling_end += 1
            stops.append(stop)
        for number in completion_starts:
            if prompt_tokens is not None:
                border = min(next(prompt_tokens), len(encoding))
                earlier, later = stops[: number - 1], stops[number:]
                stops = [*(min(stop, border) for stop in earlier), border, *(max(stop, border) for stop in later)]
            elif first_token := encoding.token_to_chars(stops[number - 1]):
                straddling += first_token[0] < ends[number - 1]
        segments = [Segment.TEMPLATE, *(piece.segment for piece in pieces), Segment.COMPLETION]
        lengths = [len(self._opening), *(b - a for a, b in itertools.pairwise([0, *stops])), len(self._closing)]
        return Example(
            np.array([*self._opening, *encoding.ids, *self._closing], dtype=np.int32),
            np.repeat(np.array(segments, dtype=np.int8), lengths),
            straddling,
            straddling_end,
        )


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer adds before and after a text of one sequence."""
    encoded = tokenizer(tokenizer.eos_token or "a", return_special_tokens_mask=True)
    is_added = encoded["special_tokens_mask"]
    start, end = is_added.index(0), len(is_added) - is_added[::-1].index(0)
    return encoded["input_ids"][:start], encoded["input_ids"][end:]


def answer_ends(examples: Iterable[Example | Fault], tokenizer: Any, max_tokens: int | None = None) -> list[int]:
    """The special tokens by which training on examples ends an answer, in ascending order.

    max_tokens: an example as long as this may have been truncated, and then shows no end.
    """
    specials = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials.add(tokenizer.eos_token_id)
    ends = set()
    for example in examples:
        if isinstance(example, Fault):
            continue
        (places,) = np.nonzero(example.segment == Segment.COMPLETION)
        if len(places) and (max_tokens is None or len(example.tokens) < max_tokens):
            ends.add(int(example.tokens[places[-1]]))
    return sorted(ends & specials)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens with which training opens and closes a text: those that the tokenizer adds, and EOS in any case."""
    opening, closing = added_around(tokenizer)
    return opening, closing if tokenizer.eos_token_id in closing else [*closing, tokenizer.eos_token_id]


def _completion_starts(pieces: Sequence[Piece]) -> list[int]:
    """The numbers of the pieces with which a completion starts after a prompt."""
    is_completion = [piece.segment == Segment.COMPLETION for piece in pieces]
    return [number for number in range(1, len(pieces)) if is_completion[number] and not is_completion[number - 1]]


def _first_beyond(encoding: Encoding, character: int) -> int:
    """The first token that ends beyond a character border inside the text."""
    token: int | None = encoding.char_to_token(character)  # fast, and None only where a tokenizer leaves characters out
    if token is None:
        return next((n for n, (_, end) in enumerate(encoding.offsets) if end > character), len(encoding))
    return token
