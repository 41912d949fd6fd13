"""Is a data set measured, cut and split as told, with everything left out counted?"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow import prepare, tokens
from plw_mlflow.config import DataOptions, PrepareConfig
from plw_mlflow.records import Record
from plw_mlflow.tokens import Example, Segment, encode
from tests.conftest import byte_tokenizer

HEAD = len(tokens.ALPACA_WITHOUT_INPUT) - len("{instruction}")  # bytes of the template around an instruction


@pytest.fixture
def write(tmp_path):
    """A function that writes (instruction, output) pairs as a data file and returns its path."""

    def written(pairs, name="data.jsonl"):
        rows = [json.dumps({"instruction": instruction, "output": output}) for instruction, output in pairs]
        (tmp_path / name).write_text("\n".join(rows))
        return str(tmp_path / name)

    return written


def texts(examples, tokenizer):
    """The instruction of each example, read back from its tokens."""
    return [
        tokenizer.decode([t for t, s in zip(e.tokens, e.segment, strict=True) if s == Segment.INSTRUCTION])
        for e in examples
    ]


def everything(found):
    """All examples, in the order of their length."""
    return sorted(found.training + found.validation, key=lambda example: len(example.tokens))


LONG = [("a" * 10, "b" * 5), ("a" * 20, "b" * 5), ("a" * 10, "b" * 40)]  # HEAD + 16, HEAD + 26, HEAD + 51 tokens


def test_examples_that_are_too_long_are_dropped_and_counted(write, tokenizer):
    found = prepare.run(write(LONG), tokenizer, DataOptions(max_tokens=HEAD + 26, validation_share=1e-9))
    assert [len(example.tokens) for example in everything(found)] == [HEAD + 16, HEAD + 26]
    assert found.profile["dropped_as_too_long"] == ["data.jsonl:3"]
    assert found.profile["truncated"] == found.profile["lost_whole_completion"] == 0


def test_or_cut_off_and_counted(write, tokenizer):
    options = DataOptions(max_tokens=HEAD + 20, on_long="truncate", validation_share=1e-9)
    found = prepare.run(write(LONG), tokenizer, options)
    assert [len(example.tokens) for example in everything(found)] == [HEAD + 16, HEAD + 20, HEAD + 20]
    completions = [example.segment.count(Segment.COMPLETION) for example in everything(found)]
    assert sorted(completions) == [0, 5 + 1, 10]  # only the one of 6 has kept its end of text
    assert found.profile["dropped_as_too_long"] == []
    assert found.profile["truncated"] == 2
    assert found.profile["lost_whole_completion"] == 1


@pytest.mark.parametrize(
    ("on_long", "expected"),
    [("drop", "of 3 records 3 were dropped"), ("truncate", "0 were dropped and 3 lost their whole completion")],
)
def test_nothing_left_is_an_error_that_counts(write, tokenizer, on_long, expected):
    with pytest.raises(ValueError, match=expected):
        prepare.run(write(LONG), tokenizer, DataOptions(max_tokens=50, on_long=on_long))


def test_completions_lost_in_validation_do_not_stop_the_training(write, tokenizer, monkeypatch):
    """As many completions are lost as there are training examples, yet these have theirs."""
    monkeypatch.setattr(prepare, "_place", lambda record: 0.0 if len(record.instruction) > 20 else 0.9)
    options = DataOptions(max_tokens=HEAD + 20, on_long="truncate")
    found = prepare.run(write([("a", "b"), ("a" * 30, "b")]), tokenizer, options)
    assert found.profile["lost_whole_completion"] == len(found.training) == len(found.validation) == 1


def test_all_examples_kept_for_validation_is_an_error_that_says_so(write, tokenizer):
    with pytest.raises(ValueError, match="2 are kept for validation"):
        prepare.run(write([("a", "b"), ("c", "d")]), tokenizer, DataOptions(validation_share=1 - 1e-12))


def test_the_split_holds_every_example_once_in_its_share(write, tokenizer):
    pairs = [(f"Question {number}", "Answer") for number in range(400)]
    found = prepare.run(write(pairs), tokenizer, DataOptions(validation_share=0.25))
    together = texts(found.training, tokenizer) + texts(found.validation, tokenizer)
    assert sorted(together) == sorted(instruction for instruction, _ in pairs)
    assert 70 < len(found.validation) < 130  # 100 +- 3.5 standard deviations of a fair draw


def test_adding_rows_moves_none_across_the_split(write, tokenizer):
    pairs = [(f"Question {number}", "Answer") for number in range(200)]
    options = DataOptions(validation_share=0.25)
    before = prepare.run(write(pairs[:100]), tokenizer, options)
    after = prepare.run(write(pairs[::-1], "more.jsonl"), tokenizer, options)
    assert set(texts(before.validation, tokenizer)) <= set(texts(after.validation, tokenizer))
    assert set(texts(before.training, tokenizer)) <= set(texts(after.training, tokenizer))


def test_a_few_records_leave_one_for_validation_that_is_not_trained_on(write, tokenizer):
    found = prepare.run(write([("a", "b"), ("c", "d"), ("e", "f")]), tokenizer, DataOptions(validation_share=1e-9))
    assert len(found.validation) == 1
    assert sorted(texts(everything(found), tokenizer)) == ["a", "c", "e"]


def test_a_single_record_is_trained_on(write, tokenizer):
    found = prepare.run(write([("a", "b")]), tokenizer, DataOptions(validation_share=1e-9))
    assert (len(found.training), len(found.validation)) == (1, 0)


def test_inversion_is_counted(write, tokenizer):
    found = prepare.run(
        write([("Short.", "A longer one."), ("A longer one.", "Short.")]),
        tokenizer,
        DataOptions(invert=True, validation_share=1e-9),
    )
    assert found.profile["inverted"] == 1
    expected = Record("", "Predict the prompt that generated the following AI output.", "A longer one.", "Short.")
    assert encode(expected, tokenizer) in everything(found)


def test_a_profile_by_hand():
    """Segments 0 template, 1 instruction, 2 input, 3 completion; the last completion token is the end of text."""
    examples = [
        Example([9] * 10, [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]),
        Example([9] * 12, [0, 0, 0, 0, 1, 3, 3, 3, 3, 3, 3, 3]),
    ]
    found = prepare.profile(examples)
    assert found["tokens"] == 22
    assert found["mean_tokens"] == {"template": 4, "instruction": 1.5, "input": 0.5, "completion": 5}
    assert found["generation_ratio"] == 4 / 2  # 2 and 6 completion tokens over 3 and 1 prompt tokens
    assert found["generation_ratio_with_template"] == 5 / 6
    shares = found["effective_prompt_share"]
    assert len(shares) == 10
    assert shares["0"] == 0
    assert shares["0.5"] == pytest.approx(6 / 16)
    assert shares["1"] == pytest.approx(12 / 22)


def test_the_profile_reads_well_and_names_what_was_left_out(write, tokenizer):
    path = write([*LONG, ("empty", "")])
    options = PrepareConfig(max_tokens=HEAD + 26, on_bad_record="skip")
    found = prepare.run(path, tokenizer, options).profile
    text = prepare.profile_text(found)
    assert found["skipped"] == ["record 4 has an empty completion (output)"]
    assert "1 unusable, 1 too long; 0 truncated" in text
    assert found["sha256"][:12] in text


def test_a_profile_is_written_where_there_is_a_folder_for_it(write, tokenizer, tmp_path):
    found = prepare.run(write(LONG), tokenizer, DataOptions())
    prepare.write(found, tmp_path / "new" / "folder")
    assert json.loads((tmp_path / "new" / "folder" / "profile.json").read_text()) == found.profile
    prepare.write(found, None)


@given(st.text(max_size=20))
def test_bare_counts_leave_out_special_tokens(text):
    assert prepare.count_tokens(text, byte_tokenizer(bos=True)) == len(text.encode())
