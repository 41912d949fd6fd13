"""Records: one instruction as text.

A record's `id` is where it stood in its source, so that every later message can name it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    is_trained: bool = True  # false for an answer that is never a completion, only what later ones follow from


@dataclass(frozen=True)
class Record:
    """One instruction as text, or a conversation that ends with the assistant."""

    id: str  # "FILE:NUMBER" counted from 1, "toy-short:NUMBER" or "HUB-ID:NUMBER"
    instruction: str  # of a conversation: the last user turn
    input: str  # may be empty
    output: str  # the completion; of a conversation: the last assistant turn
    messages: tuple[Message, ...] = ()  # the whole conversation, where the record came as one

    def key(self) -> bytes:
        """16 bytes that stand for the text: records have the same key if and only if all their text is the same.

        An answer that is marked as not to be trained on is not the same as one that is not marked.
        """
        texts = [self.instruction, self.input, self.output]
        for message in self.messages:
            texts += [message.role if message.is_trained else f"{message.role}, not trained on", message.content]
        # NUL between the texts; a NUL inside a text has a \x01 before it.
        escaped = (text.replace("\x01", "\x01\x01").replace("\x00", "\x01\x00") for text in texts)
        return hashlib.sha256("\x00".join(escaped).encode("utf-8", "surrogatepass")).digest()[:16]


@dataclass(frozen=True)
class Fault:
    """What makes a row or a record unusable, as the rest of a sentence that starts with "record N"."""

    text: str
