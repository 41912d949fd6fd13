"""Put the fine-tuning template around the harness's prompts.

The study gave its models the harness's prompts as they are. But a model that was tuned on a template may show what it
has learnt only within it. Then the whole prompt, few-shot examples included, is the instruction, and the answer follows
as a completion did in training, with no blank before it.

The harness passes prompts on as strings. A string alone does not tell a template's special token from a text that
spells one, or the template's last newline from the answer's first. So a prompt in a template is a string that knows the
pieces it is made of, and it is tokenised by the encoder that tokenised the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from plw_mlflow.data import templates, tokens
from plw_mlflow.data.pieces import Piece, Segment, prompt_pieces
from plw_mlflow.data.records import Fault, Record
from plw_mlflow.data.templates import Template
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.errors import UserError

HARNESS = "harness"  # how score tables name the harness's own prompts


class TemplatedPrompt(str):
    """The text of a prompt in a template, with the pieces that its tokens are made from."""

    pieces: tuple[Piece, ...]  # of the template, up to where the answer starts
    encoder: Encoder
    ends: tuple[int, ...]  # the tokens by which training in the template ends an answer

    def __new__(cls, pieces: Sequence[Piece], encoder: Encoder, ends: Sequence[int]) -> TemplatedPrompt:
        """The prompt that is made of these pieces."""
        prompt = super().__new__(cls, "".join(piece.text for piece in pieces))
        prompt.pieces, prompt.encoder, prompt.ends = tuple(pieces), encoder, tuple(ends)
        return prompt

    def __getnewargs__(self) -> tuple[Any, ...]:
        """The arguments that `copy` makes a copy from."""
        return self.pieces, self.encoder, self.ends

    def begun(self, text: str) -> TemplatedPrompt:
        """The prompt with the beginning of an answer, which the model is given and not asked for."""
        return TemplatedPrompt([*self.pieces, Piece(text, Segment.TEMPLATE)], self.encoder, self.ends)


class Wrapping:
    """Puts prompts into a template; it replaces `apply_chat_template` of the harness's language models."""

    def __init__(self, template: Template, name: str, tokenizer: Any, prompt_border: Literal["offsets", "separate"]):
        self._encoder = Encoder(tokenizer, template, prompt_border=prompt_border)
        self._tokenizer = tokenizer
        self._ends: list[int] | None = None
        self.kind = f"template {name}"

    def __call__(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> TemplatedPrompt:
        """The prompt for some messages; without `add_generation_prompt`, the last message begins the answer.

        messages: the harness's, with "role" and "content". A task's description may come before the question. Raises
        UserError where the template cannot hold them.
        """
        texts = [message["content"] for message in messages]
        begun = "" if add_generation_prompt else texts.pop()
        # The completion is cut off again. It is not empty, as a template may write nothing at all for an empty one.
        record = Record("prompt", instruction="".join(texts), input="", output="?")
        rendered = self._encoder.render(record)
        if isinstance(rendered, Fault):
            raise UserError(f"a prompt of the harness {rendered.text}; leave apply-template out")
        if self._ends is None:
            self._ends = tokens.answer_ends(self._encoder.encode([record]), self._tokenizer)
        prompt = TemplatedPrompt(prompt_pieces(rendered), self._encoder, self._ends)
        return prompt.begun(begun) if begun else prompt


def wrapping(name: str, tokenizer: Any, prompt_border: Literal["offsets", "separate"] = "offsets") -> Wrapping:
    """The wrapping in the template of this name (see `templates.load`), with tokens as in training.

    prompt_border: as `Encoder` takes it. Raises UserError where there is no such template.
    """
    return Wrapping(templates.load(name, tokenizer), Path(name).name, tokenizer, prompt_border)


def own_wrapping(model: str, tokenizer: Any) -> Wrapping:
    """The wrapping in a tokenizer's chat template, for a model that no cell has trained.

    Raises UserError where it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"apply-template: {model} has no template, as no cell of this project trained it and its tokenizer has no "
            "chat template; leave apply-template out"
        )
    return wrapping("chat", tokenizer)
