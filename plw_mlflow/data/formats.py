"""Formats: how a row becomes a record, whatever its fields are called.

Text is never lost without a word: a row with text that has no certain place in the record is a Fault, and fields that
are not read are reported (`unread`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from plw_mlflow.data import files
from plw_mlflow.data.records import Fault, Message, Record
from plw_mlflow.errors import UserError

FIELDS = {  # by format, those of instruction, input (optional; None: it has no field) and output
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "prompt-completion": ("prompt", None, "completion"),
}
OWN_FIELDS = {format: frozenset(field for field in fields if field) for format, fields in FIELDS.items()}
CONVERSATION_FIELDS = ("messages", "conversations")
SYSTEM_FIELDS = ("system", "system_prompt")
TOOL_FIELDS = ("tools", "functions")
INPUT_FIELDS = ("input", "context")
# Fields that hold text of a prompt or an answer. Where the format does not say how such a field belongs to a record, it
# is left out only if the caller has chosen the format. A `prompt` beside an instruction or a conversation is not among
# them, as it repeats their text.
TEXT_FIELDS = (
    *("instruction", *INPUT_FIELDS, "output", "response", "completion", "history", *CONVERSATION_FIELDS),
    *("reasoning_content", "reasoning", "thinking"),
)
# Marks by which trainers choose what to train on: OpenAI's and OpenChat's, axolotl's (two), ms-swift's.
TURN_MARKS = ("weight", "train", "train_on_turn", "loss")
RECORD_MARKS = ("weight", "train")
TOKEN_MARKS = ("loss_mask", "train_detail")
READ_BESIDE_TEXTS = {*SYSTEM_FIELDS, *TOOL_FIELDS, *RECORD_MARKS, *TOKEN_MARKS}
READ_FIELDS = {format: {*fields, "history", *READ_BESIDE_TEXTS} for format, fields in FIELDS.items()}
READ_FIELDS["chat"] = {*CONVERSATION_FIELDS, *READ_BESIDE_TEXTS}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TURN_NAMES = (("role", "from"), ("content", "value"))  # the fields of a turn, by both of their names
REFUSED_IN_TURNS = {  # other fields of a turn, and why a turn that has one cannot be used
    **dict.fromkeys(("tool_calls", "function_call", *TOOL_FIELDS), "which no template here is given"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "refusal"),
        "which is text of the turn outside its content; put it into the content or remove it",
    ),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "which is no text"),
    **dict.fromkeys(TOKEN_MARKS, "but an answer is trained on as a whole or not at all"),
}
TURN_FIELDS = {*itertools.chain.from_iterable(TURN_NAMES)}  # fields of a turn that are always read


def detect(first_rows: Iterable[Any], name: str) -> str:
    """The format most of the first rows have. Raises UserError where none has any, or two are equally likely.

    A field that holds nothing is none: Parquet has every field in every row.
    """
    rows_by_format: Counter[str] = Counter()
    first_fields: list[str] = []
    faults = []
    for row in first_rows:
        if isinstance(row, dict):
            fields = [field for field, value in row.items() if value is not None]
            first_fields = first_fields or fields
            rows_by_format.update(format for format in [*FIELDS, "chat"] if _has(fields, format))
        faults.append(_not_an_object(row))
    if not faults:
        raise UserError(f"{name} holds no record")
    if faults[0] and all(faults):
        raise UserError(f"{name}: record 1 {faults[0].text}{_way_out(faults[0].text, name, is_only=len(faults) == 1)}")
    if not rows_by_format:
        if len(faults) == 1 and (list_field := _list_of_records(row)):
            raise UserError(
                f"{name} is one JSON object, which holds its records in the list {list_field!r}; a file must hold the "
                "list itself: write it into a file of its own"
            )
        raise UserError(
            f"{name} has records of no known format (the first has the fields {_listed(first_fields)}): "
            + "; ".join(f"{format} needs {' and '.join(map(repr, _needed(format)))}" for format in FIELDS)
            + f"; chat needs {' or '.join(map(repr, CONVERSATION_FIELDS))}. Rename the fields"
        )
    (best, count), *others = rows_by_format.most_common()
    if others and others[0][1] == count:
        raise UserError(f"{name} could be of format {best} or {others[0][0]}; say which with --format")
    return best


def record(
    row: Any,
    id: str,
    format: str,
    *,
    is_given: bool = False,
    keep_empty: bool = False,
) -> Record | Fault:
    """A row as a record, or a Fault that says why it cannot be one.

    is_given: the caller has chosen the format, so that text in fields of other formats is left out.
    keep_empty: an empty completion is no fault.
    """
    if fault := _not_an_object(row):
        return fault
    if not _has(row, format):
        lacking = next((field for field in _needed(format) if field not in row), None)
        lacking = "messages" if lacking is None else lacking
        return Fault(f"lacks the field {lacking!r} (it has {_listed(row)})")
    has_more = not _is_plain(row, format)  # most rows have nothing more, and skip the checks below
    if has_more and (fault := _unusable_fields(row)):
        return fault
    as_record = _record_of_chat(row, id) if format == "chat" else _record_of_texts(row, id, format)
    if isinstance(as_record, Fault):
        return as_record
    if has_more and not is_given and (field := _left_out(row, as_record, format)):
        return Fault(
            f"has text in the field {field!r}, and how it belongs to a record of format {format} is not certain "
            f"(--format {format} leaves it out and counts it)"
        )
    empty = _empty_answer(as_record, format)
    if empty and not keep_empty:
        return Fault(f"has an empty completion ({empty})")
    if not as_record.instruction.strip():
        return Fault("has an empty instruction")
    return as_record


def unread(row: dict[str, Any], format: str, completion_turns: Literal["last", "every"] = "last") -> list[str]:
    """The fields of a usable row that hold something and are not read; those of its turns as `messages[].NAME`."""
    names: list[str] = []
    if not _is_plain(row, format):
        read = READ_FIELDS[format] if format == "chat" else READ_FIELDS[format] | {_input_field(row, format)}
        names += [field for field, value in row.items() if value is not None and field not in read]
    if format == "chat":
        field = _conversation_field(row)
        names += dict.fromkeys(f"{field}[].{name}" for name in _unread_of_turns(row[field], completion_turns))
    return names


def _unread_of_turns(turns: list[dict[str, Any]], completion_turns: str) -> Iterator[str]:
    for number, turn in enumerate(turns, start=1):
        content = _either(turn, "content", "value")
        if turn.keys() <= TURN_FIELDS and isinstance(content, str):
            continue
        is_answer = ROLES[_either(turn, "role", "from")] == "assistant"
        is_completion = is_answer and (completion_turns == "every" or number == len(turns))
        for name, value in turn.items():
            # If only the last answer is trained on, a mark that asks to train on an earlier one is not followed.
            is_followed = name in TURN_MARKS and is_answer and (is_completion or not _mark(value))
            if value is not None and name not in TURN_FIELDS and name not in REFUSED_IN_TURNS and not is_followed:
                yield name
        for part in content if isinstance(content, list) else ():
            yield from (f"content[].{name}" for name, value in part.items() if value and name not in ("type", "text"))


def _not_an_object(row: Any) -> Fault | None:
    if isinstance(row, dict | Fault):
        return row if isinstance(row, Fault) else None
    return Fault(f"is a JSON {type(row).__name__}, not an object")


def _way_out(fault: str, name: str, *, is_only: bool) -> str:
    """What may help where no row of a file is an object. fault: of its first row, which may be the only one."""
    if is_only and fault.startswith(files.TOO_LONG):
        return "; if it is an object around all the records, write the list of them into a file of its own"
    if files.delimiter(Path(name)) or not fault.startswith(files.NOT_TEXT):
        return ""
    return " (a file is read as JSON unless its name ends in .csv or .tsv, or its content is Parquet's)"


def _listed(fields: Iterable[str]) -> str:
    """The first of some names, as they are listed in a message."""
    names = [repr(field if len(field) <= 100 else field[:97] + "...") for field in itertools.islice(fields, 21)]
    return ", ".join([*names[:20], "..."] if len(names) > 20 else names) or "none"


def _list_of_records(row: Any) -> str | None:
    """The field of a file's only row that holds a list of records."""
    for field, value in row.items() if isinstance(row, dict) else ():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and any(_has(first, format) for format in (*FIELDS, "chat")):
            return str(field)
    return None


def _needed(format: str) -> list[str]:
    """The fields a row of a format must have; of a chat, one of two is enough."""
    if format == "chat":
        return []
    instruction, _, output = FIELDS[format]
    return [str(instruction), str(output)]


def _has(fields: Container[str], format: str) -> bool:
    if format == "chat":
        return any(field in fields for field in CONVERSATION_FIELDS)
    return all(field in fields for field in _needed(format))


def _is_plain(row: dict[str, Any], format: str) -> bool:
    """Whether a row has its format's own texts and no other field."""
    return len(row) == 1 if format == "chat" else row.keys() <= OWN_FIELDS[format]


def _holds(value: Any) -> bool:
    """Whether a field's value is neither empty nor blank."""
    return bool(value.strip() if isinstance(value, str) else value)


def _holds_any(value: Any) -> bool:
    """The same for a list or an object, which may be spelled as text."""
    return _holds(value) and value not in ("[]", "{}")


def _either(row: dict[str, Any], name: str, other: str) -> Any:
    """The value of the first of two fields that has one."""
    value = row.get(name)
    return row.get(other) if value is None else value


def _mark(value: Any) -> bool | None:
    """Whether a mark asks to train on something; None if it is none of 0, 1, false and true."""
    if isinstance(value, str):
        return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(value.lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _marked(fields: dict[str, Any], names: Iterable[str], where: str = "") -> bool | Fault:
    """Whether something is to be trained on, according to its marks among `names`; true without any."""
    marks = {name: fields[name] for name in names if fields.get(name) not in (None, "")}
    says = {_mark(value) for value in marks.values()}
    for name, value in marks.items():
        if _mark(value) is None:
            return Fault(
                f"has the {name} {value!r}{where}, where only 0 and 1 (or false and true) can be followed; change it, "
                f"or rename the field if it means something else"
            )
    if len(says) > 1:
        return Fault(f"has marks that contradict each other{where}: {', '.join(marks)}")
    return says != {False}


def _unusable_fields(row: dict[str, Any]) -> Fault | None:
    """The first reason, in the fields beside the texts, why a row cannot be used."""
    if any(_holds_any(row.get(field)) for field in TOOL_FIELDS):
        return Fault("has tools, which no template here is given")
    masks = [*TOKEN_MARKS, *(["labels"] if _holds_any(row.get("input_ids")) else [])]
    if field := next((field for field in masks if _holds_any(row.get(field))), None):
        return Fault(f"has {field}, by which parts of a text are chosen to be trained on; nothing here follows it")
    systems = {field: row[field] for field in SYSTEM_FIELDS if row.get(field)}
    for field, text in systems.items():
        if not isinstance(text, str):
            return Fault(f"has something other than text as its {field}")
    if len({*systems.values()}) > 1:
        return Fault(f"has two system texts ({' and '.join(systems)}), which differ; remove one")
    is_trained = _marked(row, RECORD_MARKS)
    if isinstance(is_trained, Fault):
        return is_trained
    return None if is_trained else Fault("is marked as not to be trained on (by its weight, or train)")


def _input_field(row: dict[str, Any], format: str) -> str | None:
    """The field that holds a row's input: the format's own, or, where that has nothing, the one of another format.

    In the format prompt-completion there is none, as a prompt may have its input within.
    """
    own = FIELDS[format][1]
    if own is None or _holds(row.get(own)):
        return own
    return next((field for field in INPUT_FIELDS if _holds(row.get(field))), own)


def _left_out(row: dict[str, Any], as_record: Record, format: str) -> str | None:
    """A field with text of a prompt or an answer that is nowhere in the row's record."""
    texts = {
        as_record.instruction,
        as_record.input,
        as_record.output,
        *(message.content for message in as_record.messages),
    }
    read = READ_FIELDS[format] if format == "chat" else {*FIELDS[format], _input_field(row, format), "history"}
    for field in TEXT_FIELDS:
        value = row.get(field)
        if value and field not in read and _holds(value) and (not isinstance(value, str) or value not in texts):
            return field
    return None


def _empty_answer(as_record: Record, format: str) -> str | None:
    """The place of the first empty answer, except for answers that are marked as not to be trained on."""
    for number, message in enumerate(as_record.messages[:-1], start=1):
        if message.role == "assistant" and message.is_trained and not message.content.strip():
            return f"turn {number}"
    if as_record.output.strip():
        return None
    return str(FIELDS[format][2]) if format in FIELDS else "last assistant turn"


def _record_of_texts(row: dict[str, Any], id: str, format: str) -> Record | Fault:
    texts = []
    instruction_field, _, output_field = FIELDS[format]
    for field in (instruction_field, _input_field(row, format), output_field):
        text = row.get(field) if field else None
        if text is not None and not isinstance(text, str):
            return Fault(f"has something other than text as its {field}")
        if text and not _is_text(text):
            return Fault(f"has half a surrogate pair in its {field}, which is no character")
        texts.append(text or "")
    instruction, input, output = texts
    system, history = _system(row), row.get("history") or []
    if not (system or history):
        return Record(id, instruction, input, output)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return Fault("has something other than a list of pairs, question and answer, as its history")
    last_question = f"{instruction}\n{input}" if input else instruction
    turns = [{"role": "system", "content": system}] if system else []
    for pair in [*history, [last_question, output]]:
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _conversation(turns, id)


def _system(row: dict[str, Any]) -> str:
    """The system text beside the other fields of a row; empty if there is none."""
    return next((row[field] for field in SYSTEM_FIELDS if row.get(field)), "")


def _conversation_field(row: dict[str, Any]) -> str:
    """The field that holds a row's conversation: one with turns in it, if there is one."""
    fields = sorted(CONVERSATION_FIELDS, key=lambda field: (not row.get(field), row.get(field) is None))
    return fields[0]


def _record_of_chat(row: dict[str, Any], id: str) -> Record | Fault:
    first, second = (row.get(field) for field in CONVERSATION_FIELDS)
    if first and second and first != second:
        return Fault(f"has both {' and '.join(CONVERSATION_FIELDS)}, which differ; remove one")
    turns = row[_conversation_field(row)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict | Fault) for turn in turns):
        return Fault("has something other than a list of turns as its conversation")
    conversation = _conversation(turns, id)
    if isinstance(conversation, Fault) or not (system := _system(row)):
        return conversation
    own = [message.content for message in conversation.messages if message.role == "system"]
    if not own:
        return _conversation([{"role": "system", "content": system}, *turns], id)
    return conversation if own == [system] else Fault("has a system text beside a system turn that differs; remove one")


def _conversation(turns: list[dict[str, Any]], id: str) -> Record | Fault:
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _message(turn, number)
        if isinstance(message, Fault):
            return message
        messages.append(message)
    if not messages or messages[-1].role != "assistant":
        return Fault("does not end with a turn of the assistant")
    if not messages[-1].is_trained:
        return Fault("ends with an answer that is marked as not to be trained on; end it with one that is")
    user_turns = [message.content for message in messages if message.role == "user"]
    if not user_turns:
        return Fault("has no turn of the user")
    return Record(id, user_turns[-1], "", messages[-1].content, tuple(messages))


def _message(turn: dict[str, Any] | Fault, number: int) -> Message | Fault:
    """One turn, or a Fault that says why it cannot be used; number: of the turn, from 1."""
    if isinstance(turn, Fault):
        return Fault(f"{turn.text} in turn {number}")
    role = _either(turn, "role", "from")
    if not isinstance(role, str) or role not in ROLES:
        return Fault(f"has the role {role!r} in turn {number}, where only {', '.join(ROLES)} are known")
    is_trained: bool | Fault = True
    if not turn.keys() <= TURN_FIELDS:
        for name, why in REFUSED_IN_TURNS.items():
            if _holds_any(turn.get(name)):
                return Fault(f"has {name} in turn {number}, {why}")
        if ROLES[role] == "assistant":
            is_trained = _marked(turn, TURN_MARKS, f" in turn {number}")
    if isinstance(is_trained, Fault):
        return is_trained
    content = _content(_either(turn, "content", "value"), number)
    if isinstance(content, Fault):
        return content
    if not _is_text(content):
        return Fault(f"has half a surrogate pair in its turn {number}, which is no character")
    for name, other in TURN_NAMES if len(turn) > 2 else ():
        values = [turn[field] for field in (name, other) if turn.get(field) is not None]
        values = [ROLES.get(value, value) if name == "role" and isinstance(value, str) else value for value in values]
        if len(values) == 2 and values[0] != values[1]:
            return Fault(f"has both {name} and {other} in turn {number}, which differ")
    return Message(ROLES[role], content, is_trained)  # type: ignore[arg-type]


def _content(content: Any, number: int) -> str | Fault:
    """The text of a turn's content; its parts are joined without a space, as chat templates join them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        for part in content:
            if not isinstance(part, dict):
                break
            if part.get("type") != "text":
                return Fault(f"has a part of type {part.get('type')!r} in turn {number}, where only text can be read")
            if not isinstance(part.get("text"), str):
                break
        else:
            return "".join(part["text"] for part in content)
    return Fault(f"has something other than text as its turn {number}")


def _is_text(text: str) -> bool:
    """Whether a string can be encoded: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
