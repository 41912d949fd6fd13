"""Prompt inversion, by hand: a word is a token here."""

import pytest

from plw_mlflow.inversion import invert
from plw_mlflow.records import Record


@pytest.mark.parametrize(
    ("instruction", "context", "output", "expected"),
    [
        # Three words answer two: the answer becomes the input, and the instruction what is to be told.
        (
            "Say hello.",
            "",
            "Hello, dear reader.",
            (
                "Predict the prompt that generated the following AI output.",
                "Hello, dear reader.",
                "Say hello.",
            ),
        ),
        # With a context, the context moves into the instruction.
        (
            "Translate:",
            "guten Tag",
            "good day to you",
            (
                "Predict the prompt that generated the below AI output given the following context. Context: guten Tag",
                "good day to you",
                "Translate:",
            ),
        ),
        # Two words for two, or for one and one, are not more than the prompt: unchanged.
        ("Say hello.", "", "Hello, reader.", ("Say hello.", "", "Hello, reader.")),
        ("Translate:", "Tag", "good day", ("Translate:", "Tag", "good day")),
    ],
)
def test_a_longer_completion_changes_places_with_its_instruction(instruction, context, output, expected):
    inverted = invert(Record("file:7", instruction, context, output), lambda text: len(text.split()))
    assert inverted == Record("file:7", *expected)


def test_an_unchanged_record_is_the_same_object():  # prepare counts inverted records by this
    record = Record("file:1", "Say something long.", "", "No.")
    assert invert(record, len) is record
