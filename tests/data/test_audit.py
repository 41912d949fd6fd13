"""Is each fault that masks, cuts or shifts trained tokens counted, and are clean data found clean?"""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from plw_mlflow.config import PrepareConfig
from plw_mlflow.config.limits import COUNTED, parse
from plw_mlflow.data import audit, prepare, templates
from plw_mlflow.data.profile import check_limits
from plw_mlflow.data.records import Record
from plw_mlflow.data.tokens import Encoder
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import RunError
from tests.conftest import byte_tokenizer

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
JSON = {"prompt_input": "{instruction}\n{input}\n", "prompt_no_input": "{instruction}\n"}
CLEAN = [{"instruction": f"Question {number:02}", "output": f"Answer {number:02}"} for number in range(40)]


def chat(number, *roles):
    return {"messages": [{"role": role, "content": f"text {number} {place}"} for place, role in enumerate(roles)]}


CHATS = [chat(number, "system", "user", "assistant", "user", "assistant") for number in range(20)]


@pytest.fixture
def counted(tmp_path):
    """Prepare rows and give what the audit has counted, without zeros. template: a text, as its file has it."""

    def count(rows, tokenizer=None, template=None, plw=0.0, **options):
        (tmp_path / "data.json").write_text(json.dumps(rows))
        file = tmp_path / f"template.{'json' if isinstance(template, dict) else 'jinja'}"
        if template is not None:
            file.write_text(json.dumps(template) if isinstance(template, dict) else template)
        options |= {"validation_share": 0.1, "cache_dir": tmp_path / "cache"}
        config = PrepareConfig(template="none" if template is None else str(file), **options)
        found = prepare.run(str(tmp_path / "data.json"), tokenizer or byte_tokenizer(), config, Weights(plw))
        assert list(found.profile.audit) == list(COUNTED)
        return {name: number for name, number in found.profile.audit.items() if number}

    return count


def test_clean_data_are_found_clean(counted):
    assert counted(CLEAN) == counted(CLEAN, byte_tokenizer(bos=True)) == {}
    assert counted(CHATS, template=CHAT) == counted(CHATS, template=CHAT, completion_turns="every") == {}


# The seven faults by which people lose weeks.


def test_all_masked(counted):
    """Prompts that fill an example leave nothing to train on at PLW 0."""
    rows = [*CLEAN[:37], *({"instruction": f"{n}" * 60, "output": "a"} for n in range(3))]
    cut = {"max_tokens": 30, "on_long": "truncate"}
    assert counted(rows, **cut) == {"no_completion": 3, "all_masked": 3, "no_end": 3, "prompt_cut": 3}
    assert "all_masked" not in counted(rows, plw=0.1, **cut)


def test_end_cut(counted):
    rows = [*CLEAN[:38], *({"instruction": "b", "output": f"{n}" * 60} for n in range(2))]
    assert counted(rows, max_tokens=30, on_long="truncate") == {"no_end": 2}
    assert counted(rows, max_tokens=30) == {"too_long": 2}


@pytest.mark.parametrize("prompt", ["[assistant]<think></think>", "[assistant] ", "[Assistant]", ""])
def test_template_drift(prompt, counted):
    """A server would give the model another text to answer than training had before the answers."""
    assert counted(CHATS, template=CHAT.replace("[assistant]{% endif %}", prompt + "{% endif %}")) == {
        "template_drift": 20
    }


@pytest.mark.parametrize("turns", ["last", "every"])
def test_a_blank_before_answers_is_drift_where_it_is_a_token_of_its_own(turns, counted):
    """Llama 2's template writes one that its generation prompt lacks, and SentencePiece makes it part of the answer."""
    blank = byte_tokenizer().tokenize(" ")[0]
    template = CHAT.replace(
        "]{{ message['content'] }}", "]{{ ' ' if message['role'] == 'assistant' }}{{ message['content'] }}"
    )
    assert "' '" in template
    options = {"template": template, "completion_turns": turns}
    assert counted(CHATS, byte_tokenizer((blank, "t")), **options) == {}
    assert counted(CHATS, byte_tokenizer(), **options) == {"template_drift": 20}


def test_doubled_bos(counted):
    """A template writes the token that the tokenizer adds anyway."""
    doubled = {name: "<s>" + form for name, form in JSON.items()}
    assert counted(CLEAN, byte_tokenizer(bos=True), doubled) == {"doubled_bos": 40}
    assert counted(CLEAN, byte_tokenizer(bos=False), doubled) == {}
    assert counted(CHATS, template="{{ bos_token }}" + CHAT) == {}
    assert counted(CHATS, template="{{ bos_token }}{{ bos_token }}" + CHAT) == {"doubled_bos": 20}


def test_swapped_roles(counted):
    swapped = [chat(number, "assistant", "user", "assistant") for number in range(3)]
    twice = [chat(9, "user", "user", "assistant"), chat(8, "user", "system", "assistant")]
    assert counted([*CHATS, *swapped, *twice], template=CHAT) == {"roles_out_of_order": 5}
    ends_with_user = [chat(number, "assistant", "user") for number in range(2)]
    assert counted([*CHATS, *ends_with_user], template=CHAT, on_bad_record="skip") == {"left_out": 2}


def test_empty_completions(counted):
    rows = [*CLEAN, *({"instruction": f"{n}", "output": " " * n} for n in range(3))]
    assert counted(rows, empty_completion="keep") == {"empty_completion": 3}
    assert counted(rows, on_bad_record="skip") == {"left_out": 3}


@pytest.mark.parametrize("step", [-1, 1])
def test_border_off_by_one(step):
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, templates.load("none", tokenizer))
    record = Record("1", "ab", "", "cd")
    (example,) = encoder.encode([record])
    assert audit.flags([record], [encoder.render(record)], [example], encoder).tolist() == [0]
    shifted = replace(example, segment=np.roll(example.segment, step))
    shifted.segment[0], shifted.segment[-1] = example.segment[0], example.segment[-1]
    assert audit.flags([record], [encoder.render(record)], [shifted], encoder).tolist() == [audit.BITS["border_drift"]]


# Each answer of a conversation, where each is trained on.

EACH = {"template": CHAT, "completion_turns": "every"}


@pytest.mark.parametrize("starts", [("x", "t"), ("t", "x"), ("t", "t")])
def test_border_drift_of_one_answer(starts, counted):
    """The bracket that ends the prompt and the t of an answer are one token."""
    rows = [chat(number, "user", "assistant", "user", "assistant") for number in range(20)]
    for row in rows:
        for place, start in zip((1, 3), starts, strict=True):
            row["messages"][place]["content"] = start
    assert counted(rows, byte_tokenizer(("]", "t")), **EACH) == {"border_drift": 20}
    of_last = {"border_drift": 20} if starts[-1] == "t" else {}
    assert counted(rows, byte_tokenizer(("]", "t")), template=CHAT) == of_last


@pytest.mark.parametrize("ended", ["loop.index == 2", "loop.last", "loop.index == 4", "false"])
def test_no_end_of_one_answer(ended, counted):
    """A template ends some answers alone. After the last one, there is always an end of text."""
    template = CHAT.replace("message['role'] == 'assistant' %}", f"message['role'] == 'assistant' and ({ended}) %}}")
    rows = [chat(number, *("user", "assistant") * 3) for number in range(20)]
    with pytest.warns(UserWarning, match="ends answers with no special token"):
        found = counted(rows, template=template, completion_turns="every")
    assert found == {"no_end": 20, "without_end_token": 20}
    assert counted(rows, template=template) == {}


@pytest.mark.parametrize("place", [2, 4])
def test_template_drift_of_one_answer(place, counted):
    """In training, thinking stands before one of the answers alone; a server gives no model such a prompt."""
    template = CHAT.replace(
        "]{{ message['content'] }}",
        f"]{{% if loop.index0 == {place} %}}<think></think>{{% endif %}}{{{{ message['content'] }}}}",
    )
    assert "<think>" in template
    assert counted(CHATS, template=template, completion_turns="every") == {"template_drift": 20}
    assert counted(CHATS, template=template) == ({"template_drift": 20} if place == 4 else {})


def test_empty_completion_of_one_answer(counted):
    rows = [chat(number, "user", "assistant", "user", "assistant") for number in range(20)]
    rows[5]["messages"][1]["content"] = " "
    assert counted(rows, empty_completion="keep", **EACH) == {"empty_completion": 1}


def test_an_answer_that_follows_another_at_once_has_no_border(counted):
    """The template writes nothing between two answers, so their tokens are one run."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[user]{{ message['content'] }}[assistant]"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    rows = [chat(number, "user", "assistant", "assistant") for number in range(20)]
    assert counted(rows, template=template, completion_turns="every") == {"roles_out_of_order": 20}


def test_an_answer_that_is_not_trained_on_is_not_looked_at(counted):
    rows = [chat(number, "user", "assistant", "user", "assistant") for number in range(20)]
    for row in rows:
        row["messages"][1] |= {"content": "t", "weight": 0}
        row["messages"][3]["content"] = "x"
    assert counted(rows, byte_tokenizer(("]", "t")), **EACH) == {}


# And others.


@pytest.mark.parametrize("border", ["offsets", "separate"])
def test_a_token_across_the_border_is_drift_wherever_it_is_counted(border, counted):
    """The newline that ends the prompt and the A of the answers are one token in training, and two when served."""
    newline = byte_tokenizer().tokenize("\n")[0]
    assert counted(CLEAN, byte_tokenizer((newline, "A")), prompt_border=border) == {"border_drift": 40}


def test_special_tokens_spelled_in_text(counted):
    rows = [*CLEAN[:38], {"instruction": "what is </s>?", "output": "a"}, {"instruction": "b", "output": "<s>"}]
    assert counted(rows) == {"special_token_in_text": 2}


def test_duplicates_are_among_the_counts(counted):
    assert counted([*CLEAN, CLEAN[0]]) == {"duplicates": 1}


def test_an_example_without_an_end_token_is_found():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, templates.load("none", tokenizer))
    record = Record("1", "ab", "", "cd")
    (example,) = encoder.encode([record])
    endless = replace(example, tokens=example.tokens[:-1], segment=example.segment[:-1])
    assert audit.flags([record], [encoder.render(record)], [endless], encoder).tolist() == [
        audit.BITS["without_end_token"]
    ]


# Limits.


def test_limits_are_read_as_they_are_written():
    limits = parse("no_end > 0, prompt_cut>=1.5%,left_out != 2 ,")
    assert [str(limit) for limit in limits] == ["no_end > 0", "prompt_cut >= 1.5%", "left_out != 2"]
    assert parse("") == []
    assert len(parse("no_end >= 100%, no_end <= 0%, no_end == 0, no_end > 1000000, no_end != 3.0")) == 5
    for limit, broken, kept in zip(limits, (1, 3, 1), (0, 2, 2), strict=True):
        assert limit.is_broken(broken, 200)
        assert not limit.is_broken(kept, 200)


@pytest.mark.parametrize(("limit", "is_broken"), [("left_out > 74%", True), ("left_out > 75%", False)])
def test_a_share_of_what_was_left_out_is_of_all_records(limit, is_broken, tmp_path):
    rows = [*CLEAN[:10], *({"instruction": f"{n}", "output": ""} for n in range(30))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = PrepareConfig(template="none", on_bad_record="skip", cache_dir=tmp_path / "cache")
    found = prepare.run(str(tmp_path / "data.json"), byte_tokenizer(), options).profile
    expectation = pytest.raises(RunError, match="left_out is 30 of 40 records") if is_broken else nullcontext()
    with expectation:
        check_limits(found, parse(limit))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no_ends > 0", r"fail-if names 'no_ends', which is not counted \(did you mean 'no_end'\?\)"),
        ("anything > 0", "which is not counted; it may be empty_completion, without_end_token"),
        ("no_end", "fail-if must be like 'no_end > 0, prompt_cut > 1%', got 'no_end'"),
        ("no_end > -1", "must be like"),
        ("no_end > 0 or 1", "must be like"),
        (",", "fail-if holds no condition, got ','"),
        (" ", "fail-if holds no condition"),
        ("no_end > 500%", "fail-if 'no_end > 500%' can never hold"),
        ("no_end > 100%", "can never hold"),
        ("no_end == 101%", "can never hold"),
        ("no_end < 0", "can never hold"),
        ("no_end > 0.5", "fail-if counts whole records, got 'no_end > 0.5'; write a share in per cent"),
        ("__import__('os') > 0", "must be like"),
    ],
)
def test_what_is_no_limit_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected):
        PrepareConfig(fail_if=text)
