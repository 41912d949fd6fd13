"""Prompting: the fine-tuning template around the harness's prompt.

The study gave its models the harness's prompts as they are. A model tuned on a template may show what it has learnt
only within it: then the whole prompt, few-shot examples and all, is the instruction, and the answer follows as a
completion did in training, with no blank before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plw_mlflow import templates
from plw_mlflow.records import Record
from plw_mlflow.templates import Template

HARNESS = "harness"  # the kind of prompt that is the harness's own


class Wrapping:
    """What takes the place of `apply_chat_template` of the harness's language models."""

    def __init__(self, template: Template, name: str) -> None:
        self._template = template
        self.kind = f"template {name}"

    def __call__(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that some messages become; without `add_generation_prompt`, the last one begins the answer.

        messages: the harness's, "role" and "content": a task's description may come before the question.
        """
        texts = [message["content"] for message in messages]
        begun = "" if add_generation_prompt else texts.pop()
        # The completion is cut off again; a template may write nothing at all for an empty one.
        record = Record("prompt", instruction="".join(texts), input="", output="?")
        return templates.prompt(record, self._template) + begun


def wrapping(name: str, tokenizer: Any) -> Wrapping:
    """The wrapping in the template that `name` means (templates.load). Raises ValueError where there is none."""
    return Wrapping(templates.load(name, tokenizer), Path(name).name)


def own_wrapping(model: str, tokenizer: Any) -> Wrapping:
    """The wrapping in a tokenizer's chat template, for a model that no cell has trained.

    Raises ValueError where it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"apply-template: {model} has no template, as no cell of this project trained it and its tokenizer has no "
            "chat template; leave apply-template out"
        )
    return wrapping("chat", tokenizer)
