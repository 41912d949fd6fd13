"""Does a record's key stand for its text, all of it and nothing else?"""

import hashlib
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow.data.records import Message, Record

texts = st.text(st.characters() | st.sampled_from("\x00\x01"), max_size=6)
turns = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts, st.booleans()), max_size=3
).map(tuple)
records = st.builds(Record, st.just("file:1"), texts, texts, texts, turns)


@given(records, records)
def test_keys_are_the_same_if_and_only_if_all_text_is(one, other):
    assert (one.key() == other.key()) == (one == other)
    assert replace(one, id="elsewhere:2").key() == one.key()


def test_text_cannot_move_from_one_field_to_the_next():
    odd = ["", "\x00", "\x01", "\x00\x00", "\x01\x00", "\x00\x01"]
    keys = {Record("", a, b, c).key() for a in odd for b in odd for c in odd}
    assert len(keys) == len(odd) ** 3


def test_a_key_by_hand():
    """The hash by which records have been split from the beginning: old splits stay as they are."""
    expected = hashlib.sha256(b"Add.\x002 2\x004").digest()[:16]
    assert Record("file:1", "Add.", "2 2", "4").key() == expected


def test_half_a_surrogate_pair_has_a_key_too():
    assert Record("", "\ud83d", "", "").key() != Record("", "\ud83e", "", "").key()


def test_a_conversations_key_by_hand():
    turns = (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "So long"),
    )
    parts = [b"Bye", b"", b"So long", b"user", b"Hi", b"assistant", b"Hello", b"user", b"Bye", b"assistant", b"So long"]
    record = Record("file:1", "Bye", "", "So long", turns)
    assert record.key() == hashlib.sha256(b"\x00".join(parts)).digest()[:16]
    marked = replace(record, messages=(turns[0], replace(turns[1], is_trained=False), *turns[2:]))
    assert marked.key() != record.key()
