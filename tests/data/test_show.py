"""Does what is shown agree with what is trained on, token by token?"""

import io
import re

import pytest
from hypothesis import given
from transformers import AutoTokenizer

from plw_mlflow.data import show, templates
from plw_mlflow.data.batches import collate
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.records import Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.data.weights import Weights
from plw_mlflow.toy import TOY_FOLDER
from tests.conftest import byte_tokenizer
from tests.data.test_tokens import odd

HALF = Weights(plw=0.5, template_weight=0.25, completion_weight=1)


@pytest.fixture(scope="module")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY_FOLDER)


def shown(record, tokenizer, weights=HALF, template="none", colour=False):
    (example,) = Encoder(tokenizer, templates.load(template, tokenizer)).encode([record])
    return example, show.show(example, tokenizer, weights, name=record.id, colour=colour)


def rows(text):
    """What stands in each line: segment and weight (carried on where a line goes on), and the tokens."""
    segment = weight = ""
    for line in text.split("\n")[1:]:
        label, *tokens = line.split("│")
        segment, weight = label.split() or (segment, weight)
        yield segment, weight, tokens


def test_an_example_by_hand():
    _, text = shown(Record("file:7", "ab", "c", "d\n"), byte_tokenizer(bos=True))
    assert text.split("\n") == [
        "file:7: 9 tokens, 40.0% of their weight on the prompt",  # 0.5 * 3 + 0.25 * 2 of 3 more
        "template    masked   │<s>",
        "instruction 0.5      │a│b",
        "template    0.25     │⏎",
        "input       0.5      │c",
        "template    0.25     │⏎",
        "completion  1        │d│⏎│</s>",
    ]


def test_masked_tokens_are_called_so():
    _, text = shown(Record("1", "ab", "", "d"), byte_tokenizer(), Weights(plw=0))
    assert [(segment, weight) for segment, weight, _ in rows(text)] == [
        ("instruction", "masked"),
        ("template", "masked"),
        ("completion", "1"),
    ]
    assert "0.0% of their weight" in text


@given(instruction=odd, context=odd, output=odd)
def test_every_token_is_shown_once_with_its_segment_and_the_weight_it_is_trained_with(instruction, context, output):
    record = Record("1", instruction, context, output.replace("│", ""))
    example, text = shown(record, byte_tokenizer(bos=True), template="alpaca")
    found = [
        (segment, 0.0 if weight == "masked" else float(weight))
        for segment, weight, tokens in rows(text)
        for _ in tokens
    ]
    names = [Segment(segment).name.lower() for segment in example.segment]
    if "│" not in instruction + context:
        assert found == list(zip(names, collate([example], HALF).weights[0].tolist(), strict=True))


@given(output=odd)
def test_nothing_reaches_the_terminal_that_would_not_print(output):
    _, text = shown(Record("1", "a", "", output + "\x1b[31m\r\x07\u202e"), byte_tokenizer())
    assert text.replace("\n", "").isprintable()


def test_characters_of_several_tokens_are_shown_by_the_last(toy_tokenizer):
    _, text = shown(Record("1", "a", "", "é😀😀\ufffd."), toy_tokenizer)
    tokens = list(rows(text))[-1][2]
    # A replacement character of the text itself cannot be told from an unfinished one, and waits for what follows.
    assert tokens == ["…", "é", *["…", "…", "…", "😀"] * 2, "…", "…", "…", "\ufffd.", "</s>"]


def test_spaces_are_those_of_the_text(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")
    example, text = shown(Record("1", "Say  hello 😀😀 to", "", " you"), tokenizer)
    assert len(example.tokens) == sum(len(tokens) for *_, tokens in rows(text))
    tokens = [token for _, _, tokens in rows(text) for token in tokens if token != "…"]
    assert "".join(tokens) == "<s> Say  hello 😀😀 to⏎ you</s>"  # LLaMA's tokenizer begins texts with a space


def test_long_lines_are_broken_between_tokens(toy_tokenizer):
    _, text = shown(Record("1", "a", "", "Who is it? " * 50), toy_tokenizer)
    assert max(map(len, text.split("\n"))) <= show.WIDTH
    _, text = shown(Record("1", "a", "", "x"), toy_tokenizer, template="alpaca")
    assert len(text.split("\n")) > 5


def test_a_cut_example_shows_what_is_left(toy_tokenizer):
    (example,) = Encoder(toy_tokenizer, templates.load("none", toy_tokenizer)).encode([Record("1", "abc", "", "d")])
    cut = type(example)(example.tokens[:2], example.segment[:2])
    text = show.show(cut, toy_tokenizer, Weights(plw=0), name="1", colour=False)
    assert text.startswith("1: 2 tokens, all masked\n")


def test_colours_add_nothing_but_colour(toy_tokenizer):
    record = Record("1", "What is it?", "This.", "That.")
    _, plain = shown(record, toy_tokenizer, template="alpaca")
    _, coloured = shown(record, toy_tokenizer, template="alpaca", colour=True)
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    assert len(set(re.findall(r"\033\[(\d+)m", coloured))) == 1 + 4  # off, and one a segment


@pytest.mark.parametrize(
    ("terminal", "variables", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: set and not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, variables, expected):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert show.has_colour(stream) == expected
