"""Prompt inversion: make short-completion records of long-completion ones, as the study made AlpacaDataShort.

arXiv:2401.13586v1, section 3.3: where the completion is longer than the prompt, the completion becomes the input
and the instruction becomes the completion. The other records stay as they are; none is dropped.
"""

from __future__ import annotations

from dataclasses import replace

from plw_mlflow import study
from plw_mlflow.data.records import Record


def invert(record: Record, prompt_tokens: int, completion_tokens: int) -> Record:
    """The record inverted if its completion has more tokens than its instruction and input, else unchanged.

    A conversation with a system message or several turns stays unchanged too: the study has no rule for it.
    """
    if completion_tokens <= prompt_tokens or len(record.messages) > 2:
        return record
    instruction = study.INVERSION_WITH_CONTEXT + record.input if record.input else study.INVERSION
    return replace(record, instruction=instruction, input=record.output, output=record.instruction, messages=())
