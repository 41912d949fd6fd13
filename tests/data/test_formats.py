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


TEXT_BESIDE = [
    (GOOD | {"context": "3 3"}, "alpaca", "context"),
    (GOOD | {"response": "four"}, "alpaca", "response"),
    (GOOD | {"completion": "four"}, "alpaca", "completion"),
    (GOOD | {"thinking": "2 and 2 are 4."}, "alpaca", "thinking"),
    (GOOD | {"messages": CHAT}, "alpaca", "messages"),
    ({"prompt": "Add.", "input": "2 2", "completion": "4"}, "prompt-completion", "input"),
    ({"prompt": "2 2", "instruction": "Add.", "completion": "4"}, "prompt-completion", "instruction"),
    ({"messages": CHAT, "context": "3 3"}, "chat", "context"),
    ({"messages": CHAT, "output": "four"}, "chat", "output"),
    ({"messages": CHAT, "history": [["Hi", "Hello"]]}, "chat", "history"),
]


@pytest.mark.parametrize(("row", "format", "field"), TEXT_BESIDE)
def test_text_whose_place_is_not_certain_stops_the_reading_unless_the_format_was_chosen(row, format, field):
    found = formats.record(row, "f:1", format)
    assert isinstance(found, Fault)
    assert found.text.startswith(f"has text in the field {field!r}")
    assert f"--format {format}" in found.text
    assert isinstance(formats.record(row, "f:1", format, is_given=True), Record)
    assert field in formats.unread(row, format)


def test_text_that_the_record_has_anyway_is_not_lost():
    for row in ({"messages": CHAT, "response": "4", "prompt": "Add 2 2."}, {"messages": CHAT, "context": ""}):
        assert isinstance(formats.record(row, "f:1", "chat"), Record)
    assert isinstance(formats.record(GOOD | {"context": "2 2", "response": "4"}, "f:1", "alpaca"), Record)


def answers(*marks):
    """A conversation whose answers have these marks."""
    turns = [[turn("user", "Hi"), turn("assistant", f"{number}") | mark] for number, mark in enumerate(marks)]
    return {"messages": [one for pair in turns for one in pair]}


@pytest.mark.parametrize(
    ("mark", "is_trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train_on_turn": False}, False),
        ({"loss": "false"}, False),
        ({"weight": 0, "train": False}, False),
    ],
)
def test_the_mark_of_an_answer_says_whether_it_is_trained_on(mark, is_trained):
    row = answers(mark, {})
    found = formats.record(row, "f:1", "chat")
    assert [message.is_trained for message in found.messages] == [True, is_trained, True, True]
    assert formats.unread(row, "chat", "every") == []


def test_marks_that_are_not_followed_are_known():
    """The mark of a prompt, whose weight is PLW, and one by which an earlier answer is trained on, where only the last
    is."""
    row = answers({"weight": 1}, {"weight": 1})
    assert formats.unread(row, "chat", "every") == []
    assert formats.unread(row, "chat", "last") == ["messages[].weight"]
    row["messages"][0]["train"] = False
    assert formats.unread(row, "chat", "every") == ["messages[].train"]


def test_what_is_not_read_of_turns_is_known_by_the_name_of_the_list():
    row = {"conversations": [turn("user", "Hi") | {"name": "Ann", "id": None}, turn("assistant", "4") | {"name": "B"}]}
    assert formats.unread(row, "chat") == ["conversations[].name"]
    cached = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "image": None}]
    row = {"messages": [turn("user", cached), CHAT[1]], "topic": "sums"}
    assert formats.unread(row, "chat") == ["topic", "messages[].content[].cache_control"]


def test_content_in_parts_is_read_where_all_are_text():
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "2 2.", "image": None}]
    found = formats.record({"messages": [turn("user", parts), CHAT[1]]}, "f:1", "chat")
    assert found == formats.record({"messages": CHAT}, "f:1", "chat")


def test_a_turn_may_have_both_names_of_a_field_if_they_say_the_same():
    both = [one | {"from": {"user": "human"}.get(one["role"], "gpt"), "value": one["content"]} for one in CHAT]
    for turns in (both, [dict.fromkeys(("from", "value")) | one for one in CHAT]):
        assert formats.record({"messages": turns}, "f:1", "chat") == formats.record({"messages": CHAT}, "f:1", "chat")


def test_of_two_conversations_neither_wins():
    row = {"messages": CHAT, "conversations": [turn("user", "Hi"), turn("assistant", "Hello")]}
    assert formats.record(row, "f:1", "chat").text.startswith("has both messages and conversations, which differ")
    for empty in ([], None):
        assert said(formats.record(row | {"messages": empty}, "f:1", "chat")) == [("u", "Hi"), ("a", "Hello")]


def test_an_empty_answer_is_a_fault_wherever_it_stands():
    for blank in ("", " \n"):
        turns = [turn("user", "Hi"), turn("assistant", blank), *CHAT]
        found = formats.record({"messages": turns}, "f:1", "chat")
        assert found == Fault("has an empty completion (turn 2)")
        assert said(formats.record({"messages": turns}, "f:1", "chat", keep_empty=True))[1] == ("a", blank)
        turns[1]["weight"] = 0
        assert isinstance(formats.record({"messages": turns}, "f:1", "chat"), Record)


def test_what_is_not_read_is_known():
    row = ROWS["dolly"][0] | {"system": "", "tools": None, "source": None, "weight": 1, "text": "Add. 2 2 4"}
    assert formats.unread(row, "dolly") == ["category", "text"]
    assert formats.unread({"messages": CHAT, "history": [], "prompt": ""}, "chat") == ["history", "prompt"]


BAD = [
    (Fault("is broken"), "alpaca", "is broken"),
    ({"instruction": "Add.", "response": "4"}, "alpaca", "lacks the field 'output' (it has 'instruction', 'response')"),
    ({}, "alpaca", "lacks the field 'instruction' (it has none)"),
    ({}, "chat", "lacks the field 'messages' (it has none)"),
    (["Add.", "4"], "alpaca", "is a JSON list, not an object"),
    (None, "chat", "is a JSON NoneType, not an object"),
    (GOOD | {"output": 4}, "alpaca", "has something other than text as its output"),
    (GOOD | {"input": 0}, "alpaca", "has something other than text as its input"),
    (GOOD | {"instruction": ["Add."]}, "alpaca", "has something other than text as its instruction"),
    (GOOD | {"output": ""}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"output": " \n\t"}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"output": None}, "alpaca", "has an empty completion (output)"),
    (GOOD | {"instruction": " "}, "alpaca", "has an empty instruction"),
    (GOOD | {"system": ["Be brief."]}, "alpaca", "has something other than text as its system"),
    (GOOD | {"history": "Hi"}, "alpaca", "has something other than a list of pairs, question and answer"),
    (GOOD | {"history": [["Hi"]]}, "alpaca", "has something other than a list of pairs, question and answer"),
    (GOOD | {"history": [["Hi", 5]]}, "alpaca", "has something other than text as its turn 2"),
    (GOOD | {"tools": [{"name": "add"}]}, "alpaca", "has tools, which no template here is given"),
    ({"messages": CHAT, "functions": '[{"name": "add"}]'}, "chat", "has tools, which no template here is given"),
    ({"messages": CHAT, "system": 5}, "chat", "has something other than text as its system"),
    (GOOD | {"output": "\ud83d"}, "alpaca", "has half a surrogate pair in its output, which is no character"),
    ({"messages": "Hi"}, "chat", "has something other than a list of turns as its conversation"),
    ({"messages": ["Hi"]}, "chat", "has something other than a list of turns as its conversation"),
    ({"messages": []}, "chat", "does not end with a turn of the assistant"),
    ({"messages": [*CHAT, turn("user", "Why?")]}, "chat", "does not end with a turn of the assistant"),
    ({"messages": CHAT[1:]}, "chat", "has no turn of the user"),
    ({"messages": [turn("tool", "4"), *CHAT]}, "chat", "has the role 'tool' in turn 1, where only system, user, human"),
    ({"messages": [turn(["user"], "4"), *CHAT]}, "chat", "has the role ['user'] in turn 1"),
    ({"messages": [turn("user", None), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    ({"messages": [turn("user", "\udc00"), CHAT[1]]}, "chat", "has half a surrogate pair in its turn 1"),
    ({"messages": [CHAT[0], turn("assistant", "")]}, "chat", "has an empty completion (last assistant turn)"),
    (
        {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{"id": 1}]}]},
        "chat",
        "has tool_calls in turn 2, which no templ",
    ),
    (
        {"messages": [CHAT[0], turn("assistant", None) | {"function_call": {}, "tool_calls": [5]}]},
        "chat",
        "has tool_cal",
    ),
    (
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "Hm."}]},
        "chat",
        "has reasoning_content in turn 2, which ",
    ),
    ({"messages": [CHAT[0], CHAT[1] | {"thinking": "Hm."}]}, "chat", "has thinking in turn 2, which is text"),
    ({"messages": [CHAT[0] | {"images": ["a.png"]}, CHAT[1]]}, "chat", "has images in turn 1, which is no text"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]}, "chat", "has the weight 0.5 in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"train": "yes"}]}, "chat", "has the train 'yes' in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": [0]}]}, "chat", "has the weight [0] in turn 2, where only 0 and 1"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 1, "train": False}]}, "chat", "has marks that contradict each other"),
    ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "chat", "ends with an answer that is marked as not to be tr"),
    ({"messages": [CHAT[0], CHAT[1] | {"train_detail": [{"train": 0}]}]}, "chat", "has train_detail in turn 2, but"),
    (GOOD | {"weight": 0}, "alpaca", "is marked as not to be trained on"),
    (GOOD | {"weight": "0.5"}, "alpaca", "has the weight '0.5', where only 0 and 1"),
    (GOOD | {"loss_mask": [0, 1]}, "alpaca", "has loss_mask, by which parts of a text are chosen"),
    (GOOD | {"input_ids": [5, 6], "labels": [-100, 6]}, "alpaca", "has labels, by which parts of a text are chosen"),
    ({"messages": [CHAT[0] | {"from": "gpt"}, CHAT[1]]}, "chat", "has both role and from in turn 1, which differ"),
    ({"messages": [CHAT[0] | {"from": ["gpt"]}, CHAT[1]]}, "chat", "has both role and from in turn 1, which differ"),
    ({"messages": [CHAT[0], CHAT[1] | {"value": "5"}]}, "chat", "has both content and value in turn 2, which differ"),
    (
        {"messages": [turn("user", [{"type": "image_url"}]), CHAT[1]]},
        "chat",
        "has a part of type 'image_url' in turn 1",
    ),
    ({"messages": [turn("user", [{"type": "text"}]), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    ({"messages": [turn("user", []), CHAT[1]]}, "chat", "has something other than text as its turn 1"),
    (
        {"messages": [Fault("has the field 'content' twice"), CHAT[1]]},
        "chat",
        "has the field 'content' twice in turn 1",
    ),
]


@pytest.mark.parametrize(("row", "format", "fault"), BAD)
def test_an_unusable_record_is_told_what_it_lacks(row, format, fault):
    found = formats.record(row, "f:1", format)
    assert isinstance(found, Fault)
    assert found.text.startswith(fault)


def lost(row, format, is_given):
    """The fields with text that neither a row's record has nor is known to be unread; none where it has no record."""
    found = formats.record(row, "f:1", format, is_given=is_given)
    if isinstance(found, Fault):
        return []
    told = formats.unread(row, format)
    parts = [(field, value) for field, value in row.items() if field not in told]
    for field, turns in [part for part in parts if isinstance(part[1], list)]:
        of_turns = [one for turn in turns for one in turn.items() if one[1] not in formats.ROLES]
        parts += [(f"{field}[].{name}", value) for name, value in of_turns]
    return [name for name, value in parts if isinstance(value, str) and name not in told and value not in repr(found)]


BESIDE = [*formats.READ_FIELDS["alpaca"], *formats.TEXT_FIELDS]
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
