"""Is the format of rows found out, is every row the record it should be, and is each unusable one told why?"""

import itertools

import pytest

from plw_mlflow.data import files, formats
from plw_mlflow.data.records import Fault, Message, Record

GOOD = {"instruction": "Add.", "input": "2 2", "output": "4"}
CHAT = [{"role": "user", "content": "Add 2 2."}, {"role": "assistant", "content": "4"}]


def test_an_object_around_the_records_is_told_with_its_field():
    assert formats.detect([{"data": GOOD["output"], **GOOD}], "data") == "alpaca"
    for rows in ([GOOD], [{"messages": CHAT}]):
        with pytest.raises(
            ValueError, match=r"is one JSON object, which holds its records in the list 'train'; .* its own$"
        ):
            formats.detect([{"version": 1, "train": rows}], "data.json")
    with pytest.raises(ValueError, match="of no known format"):
        formats.detect([{"data": [{"question": "a"}]}], "data.json")


def test_many_fields_are_not_all_told():
    with pytest.raises(ValueError, match=r"'19', \.\.\.\)") as raised:
        formats.detect([{str(number): GOOD for number in range(1000)}], "data.json")
    assert len(str(raised.value)) < 600


ROWS = {
    "alpaca": [GOOD, {"instruction": "Add.", "output": "4"}, GOOD | {"input": None}],
    "dolly": [{"instruction": "Add.", "context": "2 2", "response": "4", "category": "sums"}],
    "prompt-completion": [{"prompt": "Add 2 2.", "completion": "4"}],
    "chat": [{"messages": CHAT}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
}


@pytest.mark.parametrize(("format", "rows"), ROWS.items())
def test_a_format_is_known_by_its_fields(format, rows):
    for row in rows:
        assert formats.detect([{}, row, row, None, {"prompt": "other"}], "data") == format


def test_a_field_without_a_value_says_nothing_of_the_format():
    """Parquet files made of several kinds of rows have the fields of all in each."""
    row = dict.fromkeys(["instruction", "output", "messages"]) | {"conversations": CHAT}
    assert formats.detect([row], "data") == "chat"
    assert formats.record(row, "f:1", "chat") == formats.record({"messages": CHAT}, "f:1", "chat")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data holds no record"),
        (
            [Fault("is not JSON: a"), Fault("is not JSON: b")],
            r"data: record 1 is not JSON: a \(a file is read as JSON unless its name ends in .csv or .tsv, .*\)",
        ),
        (["a", Fault("is not JSON: b")], "data: record 1 is a JSON str, not an object"),
    ],
)
def test_a_file_without_a_single_object_is_not_blamed_on_its_fields(rows, expected):
    with pytest.raises(ValueError, match=f"^{expected}$"):
        formats.detect(rows, "data")


def test_an_unknown_format_is_told_with_its_fields_and_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)data .*'question', 'answer'.*alpaca needs 'instruction' and 'output'"):
        formats.detect([{"question": "a", "answer": "b"}], "data")


def test_of_two_formats_neither_is_guessed():
    with pytest.raises(ValueError, match=r"alpaca or dolly.*--format"):
        formats.detect([GOOD | {"response": "four"}], "data")


def test_each_format_gives_the_same_record():
    assert formats.record(GOOD, "f:1", "alpaca") == Record("f:1", "Add.", "2 2", "4")
    assert formats.record(ROWS["dolly"][0], "f:1", "dolly") == Record("f:1", "Add.", "2 2", "4")
    found = formats.record(ROWS["prompt-completion"][0], "f:1", "prompt-completion")
    assert found == Record("f:1", "Add 2 2.", "", "4")


@pytest.mark.parametrize("roles", [("system", "user", "assistant"), ("system", "human", "gpt")])
@pytest.mark.parametrize(
    ("field", "role", "content"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_a_conversation_keeps_all_its_turns(field, role, content, roles):
    order = [(0, "Be brief."), (1, "Hi"), (2, "Hello"), (1, "Add 2 2."), (2, "4")]
    row = {field: [{role: roles[who], content: text} for who, text in order]}
    known = ("system", "user", "assistant")
    messages = tuple(Message(known[who], text) for who, text in order)
    assert formats.record(row, "f:1", "chat") == Record("f:1", "Add 2 2.", "", "4", messages)


def turn(role, content):
    return {"role": role, "content": content}


def said(found):
    return [(message.role[0], message.content) for message in found.messages]


def test_system_and_history_make_a_conversation_of_a_record():
    row = GOOD | {"system": "Be brief.", "history": [["Hi", "Hello"], ["Bye", "So long"]], "tools": [], "functions": ""}
    found = formats.record(row, "f:1", "alpaca")
    earlier = [("s", "Be brief."), ("u", "Hi"), ("a", "Hello"), ("u", "Bye"), ("a", "So long")]
    assert said(found) == [*earlier, ("u", "Add.\n2 2"), ("a", "4")]
    assert (found.instruction, found.input, found.output) == ("Add.\n2 2", "", "4")
    only = formats.record({"prompt": "Hi", "completion": "Hello", "system": "Be brief."}, "f:1", "prompt-completion")
    assert said(only) == [("s", "Be brief."), ("u", "Hi"), ("a", "Hello")]
    assert formats.record(GOOD | {"system": "", "history": []}, "f:1", "alpaca").messages == ()


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_text_beside_a_conversation_opens_it(field):
    expected = [("s", "Be brief."), ("u", "Add 2 2."), ("a", "4")]
    assert said(formats.record({"messages": CHAT, field: "Be brief."}, "f:1", "chat")) == expected
    own = {"messages": [turn("system", "Be brief."), *CHAT], field: "Be brief."}
    assert said(formats.record(own, "f:1", "chat")) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn("system", "Sing."), *CHAT], "system": "Be brief."},
        {"messages": CHAT, "system": "Be brief.", "system_prompt": "Sing."},
        GOOD | {"system": "Be brief.", "system_prompt": "Sing."},
    ],
)
def test_of_two_system_texts_neither_wins(row):
    found = formats.record(row, "f:1", "chat" if "messages" in row else "alpaca")
    assert isinstance(found, Fault)
    assert "system" in found.text
    assert "remove one" in found.text


INPUT_OF_ANOTHER_FORMAT = [
    ({"instruction": "Add.", "input": "2 2", "response": "4"}, "dolly"),
    ({"instruction": "Add.", "context": "2 2", "output": "4"}, "alpaca"),
    ({"instruction": "Add.", "context": "2 2", "input": " ", "output": "4"}, "alpaca"),
    ({"instruction": "Add.", "context": None, "input": "2 2", "response": "4"}, "dolly"),
]


@pytest.mark.parametrize(("row", "format"), INPUT_OF_ANOTHER_FORMAT)
def test_an_input_is_read_under_the_name_it_has_in_another_format(row, format):
    assert formats.detect([row], "data") == format
    assert formats.record(row, "f:1", format) == Record("f:1", "Add.", "2 2", "4")
    assert formats.unread(row, format) == []


TEXT_BESIDE = [*formats.READ_FIELDS["alpaca"], *formats.TEXT_FIELDS]
BESIDE += ["prompt", "question", "text", "rejected", "labels", "topic"]
BESIDE_IN_TURN = [*formats.TURN_FIELDS, *formats.REFUSED_IN_TURNS, *formats.TURN_MARKS, "name", "text", "topic"]


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize(("format", "rows"), ROWS.items())
def test_no_text_of_a_usable_row_is_lost_unsaid(format, rows, is_given):
    """With any two further fields, in the row or in a turn."""
    for names in itertools.combinations(BESIDE, 2):
        further = {
            name: [turn("user", "<u>"), turn("assistant", "<a>")]
            if name in formats.CONVERSATION_FIELDS
            else f"<{name}>"
            for name in names
        }
        for row in rows:
            assert lost(further | row, format, is_given) == []
    for names in itertools.combinations(BESIDE_IN_TURN, 2):
        for place in (0, 1):
            turns = [*CHAT]
            turns[place] = {name: f"<{name}>" for name in names} | turns[place]
            assert lost({"messages": turns}, "chat", is_given) == []


def test_an_empty_completion_may_be_kept():
    assert formats.record(GOOD | {"output": ""}, "f:1", "alpaca", keep_empty=True) == Record("f:1", "Add.", "2 2", "")
    assert isinstance(formats.record(GOOD | {"instruction": ""}, "f:1", "alpaca", keep_empty=True), Fault)


def test_an_object_around_all_the_records_is_told_even_where_it_is_too_long():
    with pytest.raises(
        ValueError, match=r"more than 9 characters .*; if it is an object around all the records, write"
    ):
        formats.detect([files.too_long(9)], "data.json")
