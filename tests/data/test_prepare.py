"""Is a data set read, cut, split and mixed as told, measured, and stored once, with everything left out counted?"""

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from plw_mlflow import study
from plw_mlflow.config import DataOptions, PrepareConfig
from plw_mlflow.data import building, files, formats, prepare, profile, selection, templates
from plw_mlflow.data.batches import collate
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.records import Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.data.weights import Weights
from tests.conftest import byte_tokenizer

HEAD = len(study.ALPACA_WITHOUT_INPUT) - len("{instruction}")  # bytes of the template around an instruction


@pytest.fixture
def write(tmp_path):
    """A function that writes rows, or (instruction, output) pairs, as a data file and returns its path."""

    def written(rows, name="data.jsonl"):
        rows = [row if isinstance(row, dict) else {"instruction": row[0], "output": row[1]} for row in rows]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    return written


def texts(examples, tokenizer, segment=Segment.INSTRUCTION):
    """One segment of each example, read back from its tokens."""
    return [tokenizer.decode(example.tokens[example.segment == segment].tolist()) for example in examples]


def lengths(found):
    return sorted(len(example.tokens) for example in [*found.training, *found.validation])


def places(records):
    """Where the split places records."""
    keys = np.array([list(record.key()) for record in records], np.uint8)
    return selection._fraction(keys[:, :6])


# Cutting.

LONG = [("a" * 10, "b" * 5), ("a" * 20, "b" * 5), ("a" * 10, "b" * 40)]  # HEAD + 16, HEAD + 26, HEAD + 51 tokens


def test_examples_that_are_too_long_are_dropped_and_counted(write, tokenizer):
    found = prepare.run(write(LONG), tokenizer, DataOptions(max_tokens=HEAD + 26, validation_share=1e-9))
    assert lengths(found) == [HEAD + 16, HEAD + 26]
    assert found.profile.dropped_as_too_long == 1
    assert found.profile.first_dropped_as_too_long == ["data.jsonl:3"]
    assert found.profile.truncated == found.profile.lost_whole_completion == 0


def test_or_cut_off_and_counted(write, tokenizer):
    options = DataOptions(max_tokens=HEAD + 20, on_long="truncate", validation_share=1e-9)
    found = prepare.run(write(LONG), tokenizer, options)
    assert lengths(found) == [HEAD + 16, HEAD + 20, HEAD + 20]
    kept = [np.count_nonzero(one.segment == Segment.COMPLETION) for one in [*found.training, *found.validation]]
    assert sorted(kept) == [0, 5 + 1, 10]  # only the one of 6 has kept its end of text
    assert found.profile.dropped_as_too_long == 0
    assert found.profile.truncated == 2
    assert found.profile.lost_whole_completion == 1


def test_only_the_first_of_many_that_are_too_long_are_named(write, tokenizer):
    found = prepare.run(write([LONG[2]] * 150 + LONG[:2]), tokenizer, DataOptions(max_tokens=HEAD + 26)).profile
    assert found.dropped_as_too_long == 150
    assert found.first_dropped_as_too_long == [f"data.jsonl:{number}" for number in range(1, 101)]
    assert "150 dropped" in profile.text(found)


@pytest.mark.parametrize(("template", "opening"), [("alpaca", 1), ("none", 0)])
@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_the_prompts_share_is_that_of_the_weights_a_batch_has(write, tokenizer, template, opening, on_long):
    """Of `none`, an example starts with the instruction; its first token is then not the template's."""
    options = DataOptions(template=template, max_tokens=HEAD * opening + 24, on_long=on_long, validation_share=1e-9)
    found = prepare.run(write(LONG), tokenizer, options, Weights(1.0, 0.3, 2.0))
    for plw, share in found.profile.effective_prompt_share.items():
        loss = Weights(float(plw), 0.3, 2.0)
        batch = collate(list(found.training), loss)
        expected = batch.weights[~batch.is_completion].sum() / batch.weights.sum()
        assert share == found.prompt_share(loss) == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("on_long", "expected"),
    [("drop", "of 3 records 3 were dropped"), ("truncate", "0 were dropped and 3 lost their whole completion")],
)
def test_nothing_left_is_an_error_that_counts(write, tokenizer, on_long, expected):
    with pytest.raises(ValueError, match=expected):
        prepare.run(write(LONG), tokenizer, DataOptions(max_tokens=50, on_long=on_long))


def test_completions_lost_in_validation_do_not_stop_the_training(write, tokenizer):
    """As many completions are lost as there are training examples, yet these have theirs."""
    pairs = sorted((f"{number}" + "a" * 30, "b") for number in range(20))
    first, *_ = np.argsort(places([Record("", *pair[:1], "", pair[1]) for pair in pairs]))
    kept = next(pair for pair in (("c" * n, "b") for n in range(1, 9)) if places([Record("", pair[0], "", "b")]) > 0.5)
    options = DataOptions(max_tokens=HEAD + 20, on_long="truncate", validation_share=0.5)
    found = prepare.run(write([pairs[first], kept]), tokenizer, options)
    assert found.profile.lost_whole_completion == len(found.training) == len(found.validation) == 1


# Splitting.


def test_all_examples_kept_for_validation_is_an_error_that_says_so(write, tokenizer):
    with pytest.raises(ValueError, match="3 are kept for validation"):
        prepare.run(write(LONG), tokenizer, DataOptions(validation_share=1 - 1e-9))


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
    assert sorted(texts([*found.training, *found.validation], tokenizer)) == ["a", "c", "e"]


def test_a_single_record_is_trained_on(write, tokenizer):
    found = prepare.run(write([("a", "b")]), tokenizer, DataOptions(validation_share=1e-9))
    assert (len(found.training), len(found.validation)) == (1, 0)


def test_an_inverted_record_stays_on_its_side_of_the_split(write, tokenizer):
    """Or a mixture of a data set with its own inversion would be validated on what it has been trained on."""
    path = write([(f"Question {number}?", "A longer answer than that, to be sure.") for number in range(100)])
    options = DataOptions(validation_share=0.3)
    plain, inverted = prepare.run(path, tokenizer, options), prepare.run(path, tokenizer, replace(options, invert=True))
    assert inverted.profile.inverted == 100
    inverted_instructions = texts(inverted.validation, tokenizer, Segment.COMPLETION)
    assert [f"{text}</s>" for text in texts(plain.validation, tokenizer)] == inverted_instructions


# Inverting, mixing, duplicates.


def test_inversion_is_counted(write, tokenizer):
    found = prepare.run(
        write([("Short.", "A longer one."), ("A longer one.", "Short.")]),
        tokenizer,
        DataOptions(invert=True, validation_share=1e-9),
    )
    assert found.profile.inverted == 1
    expected = Record("", "Predict the prompt that generated the following AI output.", "A longer one.", "Short.")
    (example,) = Encoder(tokenizer, templates.load("alpaca", tokenizer)).encode([expected])
    assert example.tokens.tolist() in [one.tokens.tolist() for one in [*found.training, *found.validation]]
    # Bare, of both records: the new instruction or the old, the input or none, the completion.
    bare = {name: found.profile.lengths[name].mean * 2 for name in ("instruction", "input", "completion")}
    assert bare == {"instruction": len(expected.instruction) + 13, "input": 13, "completion": 6 + 6}


def test_a_set_is_mixed_with_its_own_inversion(write, tokenizer):
    """`invert` concerns the first set alone, `mix_invert` the second; records then occur in both forms."""
    path = write([(f"Question {number}?", "A longer answer than that, to be sure.") for number in range(20)])
    options = DataOptions(mix=path, mix_invert=True, validation_share=0.3)
    for told in (options, replace(options, invert=True, mix_invert=False)):
        found = prepare.run(path, tokenizer, told)
        assert (found.profile.records, found.profile.inverted, found.profile.duplicates) == (40, 20, 0)
        completions = texts([*found.training, *found.validation], tokenizer, Segment.COMPLETION)
        assert sum(text.startswith("Question") for text in completions) == 20
    assert found.profile.name == "data inverted + 0.5 data"


@pytest.mark.parametrize(("share", "expected"), [(0.25, (60, 20)), (0.5, (40, 40)), (0.8, (10, 40)), (0.3, (60, 26))])
def test_a_mixture_has_its_share_and_is_as_large_as_can_be(write, tokenizer, share, expected):
    first = write([(f"First {number}", "a") for number in range(60)], "first.jsonl")
    second = write([(f"Second {number}", "b") for number in range(40)], "second.jsonl")
    found = prepare.run(first, tokenizer, DataOptions(mix=second, mix_share=share))
    mixed = texts([*found.training, *found.validation], tokenizer)
    assert len(set(mixed)) == len(mixed)
    assert tuple(sum(text.startswith(which) for text in mixed) for which in ("First", "Second")) == expected
    assert [source.records for source in found.profile.sources] == list(expected)
    assert [source.name for source in found.sources] == [first, second]


def test_a_mixture_takes_the_same_records_wherever_they_stand(write, tokenizer):
    pairs = [(f"First {number}", "a") for number in range(60)]
    second = write([(f"Second {number}", "b") for number in range(20)], "second.jsonl")
    options = DataOptions(mix=second, mix_share=0.5)
    one = prepare.run(write(pairs), tokenizer, options)
    other = prepare.run(write(pairs[::-1], "reversed.jsonl"), tokenizer, options)
    assert set(texts(one.training, tokenizer)) == set(texts(other.training, tokenizer))
    more = prepare.run(write([*pairs, ("First 60", "a")], "more.jsonl"), tokenizer, options)
    assert len(set(texts(one.training, tokenizer)) - set(texts(more.training, tokenizer))) <= 1


def test_what_is_taken_into_a_mixture_does_not_decide_its_split(write, tokenizer):
    first = write([(f"First {number}", "a") for number in range(2000)], "first.jsonl")
    second = write([(f"Second {number}", "b") for number in range(200)], "second.jsonl")
    found = prepare.run(first, tokenizer, DataOptions(mix=second, mix_share=0.5, validation_share=0.5))
    assert 150 < len(found.validation) < 250  # of 400; the first sixth of the split would be all validation


@given(
    keys=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.booleans(), st.booleans()), min_size=1),
    share=st.floats(0.01, 0.99),
)
def test_a_blend_is_of_usable_records_and_cannot_be_larger(keys, share):
    is_second, usable = (np.array([one[which] for one in keys]) for which in (1, 2))
    taken = selection.blend(np.array([list(key) for key, *_ in keys], np.uint8), is_second, usable, share)
    assert not (taken & ~usable).any()
    counts = np.array([(taken & ~is_second).sum(), (taken & is_second).sum()])
    whole = np.array([(usable & ~is_second).sum(), (usable & is_second).sum()])
    parts = np.array([1 - share, share])
    total = (whole / parts).min()
    assert np.abs(counts - total * parts).max() <= 0.5 + 1e-9


def test_a_mixture_of_nothing_is_an_error(write, tokenizer):
    first = write([("First", "a"), ("Other", "a")], "first.jsonl")
    second = write([("Second", "b")], "second.jsonl")
    with pytest.raises(ValueError, match=r"mix-share=0.01 .* leaves no record of .*second.jsonl"):
        prepare.run(first, tokenizer, DataOptions(mix=second, mix_share=0.01))


def test_a_set_mixed_with_itself_has_nothing_left_without_its_duplicates(write, tokenizer):
    path = write([("First", "a"), ("Other", "a")])
    with pytest.raises(ValueError, match=r"^drop-duplicates leaves no record of .* has them all"):
        prepare.run(path, tokenizer, DataOptions(mix=path, drop_duplicates=True))


def test_exact_duplicates_are_counted_and_dropped_if_told_so(write, tokenizer):
    pairs = [("a", "b"), ("c", "d"), ("a", "b"), ("a", "b "), ("a", "b"), ("A", "b")]
    found = prepare.run(write(pairs), tokenizer, DataOptions())
    assert (found.profile.duplicates, found.profile.records) == (2, 6)
    assert "2, kept" in profile.text(found.profile)
    found = prepare.run(write(pairs), tokenizer, DataOptions(drop_duplicates=True))
    assert (found.profile.duplicates, found.profile.records) == (2, 4)
    assert "2, left out" in profile.text(found.profile)
    assert [found.training.id(index) for index in range(len(found.training))] == sorted(
        f"data.jsonl:{number}"
        for number, pair in enumerate(pairs, 1)
        if pair not in pairs[: number - 1]
        and f"data.jsonl:{number}" not in [found.validation.id(index) for index in range(len(found.validation))]
    )


def test_a_record_is_no_duplicate_of_its_inversion(write, tokenizer):
    path = write([("Short.", "A longer one."), ("Brief.", "A longer one yet.")])
    found = prepare.run(path, tokenizer, DataOptions(mix=path, mix_share=0.5))
    assert found.profile.duplicates == 2


# Bad records.

GOOD = {"instruction": "Add.", "input": "2 2", "output": "4"}


@pytest.mark.parametrize(
    ("row", "fault", "way_out"),
    [
        ({"instruction": "Add."}, "lacks the field 'output'", "--on-bad-record skip"),
        (GOOD | {"output": ""}, "has an empty completion (output)", "--empty-completion keep"),
        ({}, "lacks the field 'instruction'", "--on-bad-record skip"),
    ],
)
def test_a_bad_record_is_named_by_file_and_number_or_skipped_and_listed(write, tokenizer, row, fault, way_out):
    path = write([GOOD, row, GOOD, GOOD | {"output": 5}])
    with pytest.raises(ValueError, match="record 2") as raised:
        prepare.run(path, tokenizer, DataOptions())
    assert str(raised.value).startswith(f"{path}: record 2 {fault}")
    assert way_out in str(raised.value)

    found = prepare.run(path, tokenizer, DataOptions(on_bad_record="skip"))
    (source,) = found.profile.sources
    assert source.records == found.profile.records == 2
    assert source.skipped[0].startswith(f"record 2 {fault}")
    assert source.skipped[1] == "record 4 has something other than text as its output"
    assert f"left out            {source.skipped[0]}" in profile.text(found.profile)


def test_an_empty_completion_may_be_kept_to_train_on_its_end(write, tokenizer):
    found = prepare.run(write([("a", ""), ("c", "d")]), tokenizer, DataOptions(empty_completion="keep"))
    assert found.profile.lengths["completion"].mean == 0.5
    assert sorted(
        one.tokens[one.segment == Segment.COMPLETION].tolist() for one in [*found.training, *found.validation]
    ) == [[tokenizer.eos_token_id], [*tokenizer("d")["input_ids"], tokenizer.eos_token_id]]


def test_max_records_counts_usable_ones_and_reads_no_further(write, tokenizer):
    path = write([{}, GOOD, {}, GOOD, {}, GOOD])
    found = prepare.run(path, tokenizer, DataOptions(max_records=2, on_bad_record="skip"))
    (source,) = found.profile.sources
    assert (source.records, len(source.skipped)) == (2, 2)


def test_a_file_without_a_good_record_is_refused_even_when_skipping(write, tokenizer):
    path = write([{"instruction": "Add.", "output": ""}] * 2)
    with pytest.raises(ValueError, match=r"holds no usable record .*2 were read; record 1 has an empty completion"):
        prepare.run(path, tokenizer, DataOptions(on_bad_record="skip"))


MULTI_TURN = {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]}
PAIR = {"messages": MULTI_TURN["messages"][:2]}
MARKED = {"messages": [PAIR["messages"][0], {"role": "assistant", "content": "\ufdd01\ufdd1"}]}


@pytest.mark.parametrize(
    ("bad", "template", "invert", "fault"),
    [
        (MULTI_TURN, "alpaca", False, "is a conversation (user, assistant, user, assistant), but the template holds"),
        (MULTI_TURN, "chat", False, "does not fit the chat template: one question at a time"),
        (MARKED, "alpaca", False, "holds the noncharacters U+FDD0 and U+FDD1"),
        (MARKED, "chat", True, "holds the noncharacters U+FDD0 and U+FDD1"),
    ],
)
def test_a_record_that_the_template_refuses_is_bad_like_any(write, bad, template, invert, fault):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}"
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"
    )
    path = write([PAIR, bad, {"messages": 5}, PAIR, PAIR], "chats.jsonl")
    options = DataOptions(template=template, invert=invert, validation_share=1e-9, max_records=2)
    with pytest.raises(ValueError, match="record 2") as raised:
        prepare.run(write([PAIR, bad, PAIR]), tokenizer, options)
    assert str(raised.value).startswith(f"{write([PAIR, bad, PAIR])}: record 2 {fault}")
    assert str(raised.value).endswith("--on-bad-record skip")

    found = prepare.run(path, tokenizer, replace(options, on_bad_record="skip"))
    (source,) = found.profile.sources
    assert found.profile.records == 2
    assert [found.training.id(n) for n in range(len(found.training))] == ["chats.jsonl:1", "chats.jsonl:4"]
    assert source.skipped[0].startswith(f"record 2 {fault}")
    assert source.skipped[1].startswith("record 3 has something other than a list of turns")
    with pytest.raises(ValueError, match=r"holds no usable record \(2 were read; record 1"):
        prepare.run(write([bad, bad]), tokenizer, replace(options, on_bad_record="skip"))


def test_a_template_that_is_none_is_no_fault_of_the_records(write, tokenizer, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for %}")
    options = DataOptions(template=str(tmp_path / "broken.jinja"), on_bad_record="skip")
    with pytest.raises(ValueError, match="line 1 of the chat template is no Jinja"):
        prepare.run(write([PAIR]), tokenizer, options)


def test_the_text_names_a_few_of_many_skipped_records_and_says_where_the_others_are(write, tokenizer):
    found = prepare.run(write([*[("a", "")] * 9, ("b", "c")]), tokenizer, DataOptions(on_bad_record="skip"))
    text = profile.text(found.profile)
    assert text.count("has an empty completion") == 5
    assert "9 in all, listed in profile.json" in text


def test_fields_that_are_not_read_are_counted_and_told(write, tokenizer):
    path = write([GOOD | {"topic": "sums", "\x1b[1m": 1}, GOOD | {"topic": "sums", "source": None}])
    found = prepare.run(path, tokenizer, DataOptions()).profile
    assert found.sources[0].fields_not_read == {"topic": 2, "\x1b[1m": 1}
    assert "fields not read     'topic' (2), '\\x1b[1m' (1)" in profile.text(found)
    assert "fields not read" not in profile.text(prepare.run(write([GOOD]), tokenizer, DataOptions()).profile)


def test_fields_of_turns_that_are_not_read_are_counted_and_told(write):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURN_BY_TURN
    turns = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello", "weight": 1}]
    path = write([{"messages": turns}, {"messages": [*turns, *turns]}])
    for which, weights in (("every", {}), ("last", {"messages[].weight": 1})):
        found = prepare.run(path, tokenizer, DataOptions(template="chat", completion_turns=which)).profile
        assert found.sources[0].fields_not_read == {"messages[].name": 2} | weights
        assert "fields not read     'messages[].name' (2)" in profile.text(found)


def test_text_of_another_format_stops_the_reading_and_names_the_way_out(write, tokenizer):
    path = write([GOOD | {"context": "3 3"}])
    with pytest.raises(ValueError, match=r"record 1 has text in the field 'context'.*--format alpaca leaves it out"):
        prepare.run(path, tokenizer, DataOptions())
    found = prepare.run(path, tokenizer, DataOptions(format="alpaca"))
    assert texts(found.training, tokenizer, Segment.INPUT) == ["2 2"]
    assert found.profile.sources[0].fields_not_read == {"context": 1}


@pytest.mark.parametrize("names", [("input", "response"), ("context", "output")])
def test_an_input_under_another_formats_name_is_trained_on(write, tokenizer, names):
    found = prepare.run(
        write([dict(zip(("instruction", *names), GOOD.values(), strict=True))]), tokenizer, DataOptions()
    )
    (example,) = found.training
    assert [texts([example], tokenizer, segment)[0] for segment in (1, 2, 3)] == ["Add.", "2 2", "4</s>"]
    assert found.profile.sources[0].fields_not_read == {}


# Formats.


def test_a_format_can_be_forced(write, tokenizer):
    path = write([GOOD | {"response": "four"}])
    with pytest.raises(ValueError, match="say which with --format"):
        prepare.run(path, tokenizer, DataOptions())
    for format, expected in (("alpaca", "4"), ("dolly", "four")):
        found = prepare.run(path, tokenizer, DataOptions(format=format))
        assert found.profile.sources[0].format == format
        assert f"{format} format" in profile.text(found.profile)
        (completion,) = texts(found.training, tokenizer, Segment.COMPLETION)
        assert completion == expected + "</s>"


TURN_BY_TURN = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"


def test_an_answer_that_is_marked_is_not_trained_on_and_makes_another_record(write):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURN_BY_TURN
    asked, last = MULTI_TURN["messages"][::2], MULTI_TURN["messages"][3]
    rows = [
        {"messages": [asked[0], {"role": "assistant", "content": "No."} | mark, asked[1], last]}
        for mark in ({"weight": 0}, {"weight": 1}, {"train": True})
    ]
    options = DataOptions(template="chat", completion_turns="every", validation_share=1e-9, drop_duplicates=True)
    found = prepare.run(write(rows), tokenizer, options)
    assert (found.profile.records, found.profile.duplicates) == (2, 1)
    together = [*found.training, *found.validation]
    assert sorted(texts(together, tokenizer, Segment.COMPLETION)) == ["No.</s>assistant</s>", "assistant</s>"]
    assert sorted(texts(together, tokenizer, Segment.INPUT)) == ["", "No."]


def test_every_turn_of_a_conversation_keeps_its_segment(write):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURN_BY_TURN
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long")]
    path = write([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    for which, input_text, completion in (
        ("last", "Be brief.Hello", "So long"),
        ("every", "Be brief.", "HelloSo long"),
    ):
        options = DataOptions(template="chat", completion_turns=which)
        found = prepare.run(path, tokenizer, options)
        assert texts(found.training, tokenizer) == ["HiBye"]
        assert texts(found.training, tokenizer, Segment.INPUT) == [input_text]
        (trained,) = texts(found.training, tokenizer, Segment.COMPLETION)
        assert trained.replace("</s>", "") == completion
        bare = {name: length.mean for name, length in found.profile.lengths.items()}
        assert (bare["instruction"], bare["input"], bare["completion"]) == (5, len(input_text), len(completion))


odd = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00\x01 \n\u202eא🦔")) | st.just(
    "### Response:"
)


@given(st.lists(st.tuples(odd, odd, odd), min_size=1, max_size=5))
def test_odd_text_goes_through_unchanged_or_is_left_out(tmp_path_factory, rows):
    """From the file to the tokens of each segment, whatever the text; blank instructions and completions are bad."""
    folder, tokenizer = tmp_path_factory.mktemp("odd"), byte_tokenizer()
    records = [{"instruction": a, "input": b, "output": c} for a, b, c in rows]
    (folder / "data.json").write_text(json.dumps([GOOD, *records]))
    options = DataOptions(on_bad_record="skip", cache_dir=folder, max_tokens=10_000)
    found = prepare.run(str(folder / "data.json"), tokenizer, options)
    together = [*found.training, *found.validation]
    expected = [(a, b, c + "</s>") for a, b, c in rows if a.strip() and c.strip()] + [("Add.", "2 2", "4</s>")]
    parts = (texts(together, tokenizer, segment) for segment in (1, 2, 3))
    assert sorted(zip(*parts, strict=True)) == sorted(expected)


def test_a_record_of_a_megabyte_is_prepared_like_any(write, tokenizer):
    path = write([("Repeat.", "ab " * 330_000), ("Add.", "4"), ("Add 5.", "9")])
    found = prepare.run(path, tokenizer, DataOptions(max_tokens=2_000_000))
    assert lengths(found)[-1] == HEAD + len("Repeat.") + 990_000 + 1


def test_a_record_of_too_many_characters_is_bad_like_any(write, tokenizer):
    path = write([("Repeat.", "ab " * 100), ("Add.", "4"), ("Add 5.", "9")])
    with pytest.raises(
        ValueError, match=r"record 1 has more than 200 characters \(--max-characters\); mend it, or leave"
    ):
        prepare.run(path, tokenizer, DataOptions(max_characters=200))
    found = prepare.run(path, tokenizer, DataOptions(max_characters=200, on_bad_record="skip"))
    assert found.profile.sources[0].skipped == ["record 1 has more than 200 characters (--max-characters)"]
    assert found.profile.records == 2


def test_no_format_is_found_out_by_more_than_one_row_at_once(write, tokenizer, monkeypatch):
    """A hundred of the longest rows would take a hundred times the memory of one."""
    living = [0, 0]  # rows that are held now, and the most there were

    class Row(dict):
        def __init__(self, **fields):
            super().__init__(fields)
            living[0] += 1
            living[1] = max(living)

        def __del__(self):
            living[0] -= 1

    monkeypatch.setattr(files, "rows", lambda *_: (Row(instruction=str(n), output="b") for n in range(50)))
    path = write([("a file that no other test has", "b")])
    assert prepare.run(path, tokenizer, DataOptions()).profile.records == 50
    assert living[1] <= 3


def test_what_is_said_of_a_record_and_counted_of_its_fields_has_an_end(write, tokenizer, monkeypatch):
    monkeypatch.setattr(building, "COUNTED_FIELDS", 2)
    good = {"instruction": "Add.", "output": "4"}
    rows = [good | {"weight": "x" * 5000}, good | {"a": 1}, good | {"b": 1}, good | {"c": 1, "b": 1}]
    path = write([])
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    (source,) = prepare.run(path, tokenizer, DataOptions(on_bad_record="skip")).profile.sources
    assert source.fields_not_read == {"a": 1, "b": 2}
    (fault,) = source.skipped
    assert fault.startswith("record 1 has the weight 'xxx")
    assert fault.endswith("rename the field if it means something else")
    assert len(fault) < 600


# Storing.


def test_what_was_prepared_is_not_read_again(write, tokenizer, monkeypatch):
    path = write(LONG)
    first = prepare.run(path, tokenizer, DataOptions(validation_share=1e-9))
    monkeypatch.setattr(formats, "record", None)
    again = prepare.run(path, tokenizer, DataOptions(validation_share=1e-9))
    assert again.profile == first.profile
    assert again.digest == first.digest
    # Nor for what only chooses among the examples, nor under another name.
    for change in ({"max_tokens": HEAD + 26}, {"on_long": "truncate"}, {"validation_share": 0.5}, {"mix": path}):
        assert prepare.run(path, tokenizer, DataOptions(**change)).digest
    other = write(LONG, "other.jsonl")
    assert prepare.run(other, tokenizer, DataOptions(validation_share=1e-9)).digest == first.digest


@pytest.mark.parametrize(
    "change",
    [
        {"invert": True},
        {"template": "none"},
        {"prompt_border": "separate"},
        {"max_records": 2},
        {"max_characters": 100_000},
        {"format": "alpaca"},
        {"on_bad_record": "skip"},
        {"empty_completion": "keep"},
        {"completion_turns": "every"},
    ],
)
def test_what_could_change_a_token_is_prepared_anew(write, tokenizer, tmp_path, change):
    path, options = write(LONG), DataOptions(cache_dir=tmp_path / "cache")
    prepare.run(path, tokenizer, options)
    prepare.run(path, tokenizer, replace(options, **change))
    assert len(list((tmp_path / "cache" / "examples").glob("*.lock"))) == 2


def test_a_file_that_is_written_to_while_it_is_read_is_not_stored(write, tokenizer, tmp_path, monkeypatch):
    """Or what was read then would be taken for the first content ever after."""
    path, options = write(LONG), DataOptions(cache_dir=tmp_path / "cache", max_records=1)
    read = files.rows

    def rows_changed(path, most):
        write([("Other", "content")])
        return read(path, most)

    monkeypatch.setattr(files, "rows", rows_changed)
    with pytest.raises(ValueError, match=f"{path} has changed while it was read"):
        prepare.run(path, tokenizer, options)
    monkeypatch.setattr(files, "rows", read)
    assert not [one for one in (tmp_path / "cache" / "examples").iterdir() if one.is_dir()]
    assert texts(prepare.run(write(LONG), tokenizer, options).training, tokenizer) == ["a" * 10]


def test_so_is_another_content_and_another_tokenizer(write, tokenizer, tmp_path):
    options = DataOptions(cache_dir=tmp_path / "cache")
    first = prepare.run(write(LONG), tokenizer, options)
    other = prepare.run(write(LONG[:2]), tokenizer, options)
    merged = prepare.run(write(LONG), byte_tokenizer(("a", "a")), options)
    assert len({first.digest, other.digest, merged.digest}) == 3


def imported(module):
    """Where a module imports from, named as in `building.CODE`; a folder, for what its own __init__ holds."""
    package = Path(prepare.__file__).parents[1]
    for node in ast.walk(ast.parse((package / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "plw_mlflow":
            source = package.parent / node.module.replace(".", "/")
            for path in [source / alias.name for alias in node.names] if source.is_dir() else [source]:
                yield str((path if path.with_suffix(".py").exists() else source).relative_to(package))


def test_the_code_that_matters_is_all_there_is_between_a_file_and_its_tokens():
    """Every module that these modules import is one of them, or is known not to decide a token."""
    # A toy data set is known by the hash of its rows, whatever made them.
    harmless = {
        "config",
        "data/profile",
        "data/profile_figure",
        "environment/disk",
        "environment/outputs",
        "errors",
        "toy",
    }
    sources = {source for module in building.CODE for source in imported(module)}
    decisive = {source for source in sources if not harmless & {source, source.partition("/")[0]}}
    assert "study" in decisive
    assert decisive <= set(building.CODE)


@pytest.mark.parametrize("given", ["cache", None])
def test_the_cache_is_where_it_was_told_to_be(write, tokenizer, tmp_path, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare.run(write(LONG), tokenizer, DataOptions(cache_dir=given and tmp_path / given))
    expected = tmp_path / "cache" if given else tmp_path / "xdg" / "plw_mlflow"
    assert [path.suffix for path in (expected / "examples").iterdir() if path.suffix] == [".lock"]


def test_a_cache_that_cannot_be_made_is_told_with_the_way_out(write, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file/plw_mlflow cannot be made .*--cache-dir"):
        prepare.run(write(LONG), tokenizer, DataOptions())


# Telling.


def test_the_profile_says_what_was_read(write, tokenizer):
    path = write(LONG)
    found = prepare.run(path, tokenizer, PrepareConfig(max_tokens=HEAD + 26)).profile
    (source,) = found.sources
    assert (source.name, source.location, source.licence) == (path, path, "")
    text = profile.text(found)
    assert source.sha256[:12] in text
    assert "licence             not known" in text
    assert "1 dropped; 0 truncated" in text


def test_a_profile_is_written_where_there_is_a_folder_for_it(write, tokenizer, tmp_path):
    found = prepare.run(write(LONG), tokenizer, DataOptions())
    prepare.write(found, tmp_path / "new" / "folder")
    assert json.loads((tmp_path / "new" / "folder" / "profile.json").read_text()) == asdict(found.profile)
    assert (tmp_path / "new" / "folder" / "profile.png").read_bytes().startswith(b"\x89PNG")
    prepare.write(found, None)


# The study's own data.


@pytest.fixture(scope="module")
def llama(shared):
    return AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")


def test_inversion_of_the_kind_of_data_the_study_inverted(shared, llama):
    found = prepare.run(
        str(shared / "data/instruct/alpaca_gpt4_sample.json.gz"), llama, DataOptions(invert=True)
    ).profile
    assert (found.records, f"{found.inverted / found.records:.0%}") == (999, "78%")
    assert found.lengths["completion"].mean == pytest.approx(13.9, abs=0.05)
    assert found.lengths["instruction"].mean == pytest.approx(17.9, abs=0.05)
