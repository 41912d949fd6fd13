"""Prompt inversion, by hand on a record of each kind, and on real data against the figures of the paper's notes."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from plw_mlflow.data import templates
from plw_mlflow.data.inversion import invert
from plw_mlflow.data.records import Message, Record
from plw_mlflow.data.tokens import Encoder


def inverted(*texts):
    """The texts of a record inverted, a word being a token."""
    instruction, context, output = (len(text.split()) for text in texts)
    found = invert(Record("file:7", *texts), instruction + context, output)
    assert found.id == "file:7"
    return found.instruction, found.input, found.output


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # Three words answer two: the answer becomes the input, and the instruction what is to be told.
        (
            ("Say hello.", "", "Hello, dear reader."),
            ("Predict the prompt that generated the following AI output.", "Hello, dear reader.", "Say hello."),
        ),
        # With a context, the context moves into the instruction, and only the old instruction is to be told.
        (
            ("Translate:", "guten Tag", "good day to you"),
            (
                "Predict the prompt that generated the below AI output given the following context. Context: guten Tag",
                "good day to you",
                "Translate:",
            ),
        ),
        # Two words for two are not more than the prompt.
        (("Say hello.", "", "Hello, reader."), ("Say hello.", "", "Hello, reader.")),
        # The context is part of the prompt: two words for one and one are not more either.
        (("Translate:", "Tag", "good day"), ("Translate:", "Tag", "good day")),
        # One word for eight.
        (
            ("Is the following sentence true? Say yes or no.", "Two is even.", "Yes."),
            ("Is the following sentence true? Say yes or no.", "Two is even.", "Yes."),
        ),
    ],
)
def test_a_longer_completion_changes_places_with_its_instruction(record, expected):
    assert inverted(*record) == expected


def test_an_unchanged_record_is_the_same_object():  # prepare counts inverted records by this
    record = Record("file:1", "Say something long.", "", "No.")
    assert invert(record, 3, 1) is record


def test_a_single_turn_is_inverted_and_no_chat_any_more():
    messages = (Message("user", "Say hello."), Message("assistant", "Hello, dear reader."))
    found = invert(Record("file:1", "Say hello.", "", "Hello, dear reader.", messages), 2, 3)
    assert (found.input, found.output, found.messages) == ("Hello, dear reader.", "Say hello.", ())


@pytest.mark.parametrize("roles", [("system", "user", "assistant"), ("user", "assistant", "user", "assistant")])
def test_a_longer_conversation_is_not(roles):
    record = Record("file:1", "Hi.", "", "Hello, dear reader.", tuple(Message(role, "x") for role in roles))
    assert invert(record, 1, 3) is record


def test_the_sample_of_cleaned_data_becomes_what_the_paper_describes(shared):
    """paper.md, section 3: 78 % of 999 rows swapped; instruction 17.9, completion 13.9, input as the old output."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")
    encoder = Encoder(tokenizer, templates.load("none", tokenizer))
    with gzip.open(shared / "data/instruct/alpaca_gpt4_sample.json.gz", "rt", encoding="utf-8") as file:
        records = [Record(str(number), **row) for number, row in enumerate(json.load(file))]

    def counts(name, of):
        return encoder.count([getattr(record, name) for record in of])

    before = {name: counts(name, records) for name in ("instruction", "input", "output")}
    prompts = [a + b for a, b in zip(before["instruction"], before["input"], strict=True)]
    found = [invert(*given) for given in zip(records, prompts, before["output"], strict=True)]
    assert len(found) == len(records) == 999
    swapped = sum(new is not old for new, old in zip(found, records, strict=True))
    assert swapped / 999 == pytest.approx(0.78, abs=0.005)
    mean = {name: sum(counts(name, found)) / 999 for name in ("instruction", "input", "output")}
    assert mean["instruction"] == pytest.approx(17.9, abs=0.05)
    assert mean["output"] == pytest.approx(13.9, abs=0.05)
    assert mean["input"] == pytest.approx(sum(before["output"]) / 999 * (1 - 0.003), rel=0.0005)
