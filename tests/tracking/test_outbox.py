"""Does every point reach the store once and in order, whatever becomes of the store meanwhile?"""

import math
import os
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plw_mlflow.errors import Refused
from plw_mlflow.tracking import outbox
from plw_mlflow.tracking.outbox import Outbox, Point

POINTS = [
    Point(name, step / 7, step, 1000 + step) for step in range(1, 8) for name in ("train/loss", "train/grad_norm")
]
SOON = 30.0  # seconds in which a thread that does nothing else has had its turn, however busy the machine


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch):
    monkeypatch.setattr(outbox, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.0, 0.001))


class Store:
    """Takes a point it has already for the same one, as MLflow's SQL stores do; fails as it is told."""

    def __init__(self, *failures):
        self.failures = list(failures)  # of the next requests: "away", "answer lost" or None
        self.points = {}
        self.requests = []

    def __call__(self, batch):
        self.requests.append(batch)
        failure = self.failures.pop(0) if self.failures else None
        if failure != "away":
            self.points |= dict.fromkeys(batch)
        if failure is not None:
            raise ConnectionError(failure)


@given(
    st.lists(st.sampled_from(["away", "answer lost", None]), max_size=12),
    st.lists(st.integers(1, 5), max_size=6),
    st.integers(1, 4),
)
@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore:the tracking store takes no metrics")
def test_every_point_arrives_once_and_in_order(failures, sizes, batch):
    outbox.BATCH_POINTS, before = batch, outbox.BATCH_POINTS
    try:
        store = Store(*failures)
        box = Outbox(store)
        left = list(POINTS)
        for size in sizes:
            box.put(left[:size])
            del left[:size]
        box.put(left)
        assert box.wait(SOON)
        box.close()
    finally:
        outbox.BATCH_POINTS = before
    assert list(store.points) == POINTS
    assert box.unsent == []
    assert max(map(len, store.requests)) <= batch


def test_what_the_store_has_taken_is_not_sent_again():
    store = Store()
    box = Outbox(store)
    box.put(POINTS[:4])
    assert box.wait(SOON)
    box.put(POINTS[4:])
    assert box.wait(SOON)
    assert [point for batch in store.requests for point in batch] == POINTS


def test_nobody_who_puts_points_in_waits_for_the_store():
    answer = threading.Event()
    box = Outbox(lambda batch: answer.wait(SOON) or pytest.fail("put has waited"))
    box.put(POINTS[:1])
    box.put(POINTS[1:])
    assert not box.wait(0.01)
    assert box.unsent == POINTS  # none is known to have arrived
    answer.set()
    assert box.wait(SOON)


def test_a_store_that_goes_and_comes_back_is_told_once(capsys, recwarn):
    box = Outbox(Store(*["away"] * 5))
    box.put(POINTS)
    assert box.wait(SOON)
    (told,) = recwarn
    assert re.search(r"takes no metrics since .* \(away\); training goes on", str(told.message))
    assert box.trouble == ""
    assert capsys.readouterr().out.startswith("the tracking store takes metrics again, after")


def test_a_store_that_refuses_is_asked_once_more_and_not_waited_for(recwarn):
    asked = []

    def refuse(batch):
        asked.append(batch)
        raise Refused("run 7 was deleted")

    box = Outbox(refuse)
    box.put(POINTS)
    for _ in range(2):
        before = len(asked)
        assert not box.wait(10 * SOON)  # returns long before that
        assert len(asked) > before
    assert str(box.refusal) == box.trouble == "run 7 was deleted"
    assert box.unsent == POINTS
    box.close()
    (told,) = recwarn
    assert str(told.message).startswith("run 7 was deleted. It is ")
    assert "training goes on" in str(told.message)


@pytest.mark.filterwarnings("ignore:run 7 was deleted")
def test_what_was_refused_is_sent_when_it_is_taken_again():
    answers = [Refused("run 7 was deleted"), Refused("run 7 was deleted"), None]
    store = Store()

    def send(batch):
        if (answer := answers.pop(0) if answers else None) is not None:
            raise answer
        store(batch)

    box = Outbox(send)
    box.put(POINTS)
    while not box.wait(SOON):
        pass
    assert list(store.points) == POINTS
    assert box.refusal is None


@pytest.mark.filterwarnings("ignore:the tracking store takes no metrics")
def test_a_closed_outbox_makes_no_further_attempt():
    asked = threading.Event()

    def away(batch):
        asked.set()
        raise ConnectionError("away")

    box = Outbox(away)
    box.put(POINTS)
    assert asked.wait(SOON)
    box.close()
    box._thread.join(SOON)
    assert not box._thread.is_alive()
    assert box.unsent == POINTS


def test_points_come_back_from_a_file_to_the_bit(tmp_path):
    path = tmp_path / "unsent.jsonl"
    points = [*POINTS, Point("eval/prompt_loss", math.pi * 1e-300, 3, 4), Point("train/loss", math.inf, 1, 2)]
    assert outbox.read(path) == []
    outbox.save(points, path)
    assert outbox.read(path) == points
    outbox.save([], path)
    assert outbox.read(path) == []


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "unsent.jsonl"
    outbox.save(POINTS[:3], path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        outbox.save(POINTS, path)
    assert outbox.read(path) == POINTS[:3]
