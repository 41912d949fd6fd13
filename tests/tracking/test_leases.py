"""Does a cell on another machine end when its sweep does not hold its claim any longer?"""

import os
import signal
import threading

import mlflow
import pytest

from plw_mlflow.tracking import claims, leases
from plw_mlflow.tracking.claims import Claims
from tests.stores import Place


@pytest.fixture
def held(tmp_path, monkeypatch):
    """The claims of a sweep that has claimed a cell, which is told so; looks come quickly."""
    mlflow.set_tracking_uri(Place(tmp_path).uri)
    sweep = Claims()
    assert sweep.take("cell", is_here=False)
    monkeypatch.setenv(leases.CLAIM, sweep.held("cell"))
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.05)
    return sweep


@pytest.fixture
def signals(monkeypatch):
    """What the process would send itself."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    return sent


def give_signs(sweep, monkeypatch, seconds=0.2):
    monkeypatch.setattr(claims, "SIGN_SECONDS", seconds)
    return sweep.giving_signs_of_life()


def test_a_cell_begins_after_a_sign_of_life_and_goes_on_with_more(held, monkeypatch, signals):
    with give_signs(held, monkeypatch), leases.holding_lease():
        begun = True
    assert begun
    assert signals == []


def test_a_cell_of_a_sweep_that_is_silent_does_not_begin(held, monkeypatch, capsys):
    monkeypatch.setattr(leases, "INTERRUPT_SECONDS", 0.2)
    with pytest.raises(KeyboardInterrupt), leases.holding_lease():
        raise AssertionError("it has begun")
    assert "the sweep that this cell belongs to has ended" in capsys.readouterr().out


def test_a_cell_that_was_given_up_does_not_begin(held):
    held.release("cell")
    with pytest.raises(KeyboardInterrupt), leases.holding_lease():
        raise AssertionError("it has begun")


def test_nothing_is_looked_at_on_the_sweeps_own_machine(monkeypatch):
    monkeypatch.setenv(leases.CLAIM, "")
    monkeypatch.setattr(leases, "_sign", lambda *_: pytest.fail("it was looked at"))
    with leases.holding_lease():
        pass


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1.0, []), (100.0, [signal.SIGTERM]), (140.0, [signal.SIGTERM, signal.SIGKILL])]
)
def test_silence_interrupts_a_cell_and_then_kills_it(monkeypatch, signals, seconds, expected):
    looks = iter([*["same"] * round(seconds / leases.LOOK_SECONDS)])
    ended = threading.Event()
    monkeypatch.setattr(ended, "wait", lambda _: ended.is_set())

    def sign(*_):
        if (look := next(looks, None)) is None:
            ended.set()
            return "another"
        return look

    monkeypatch.setattr(leases, "_sign", sign)
    leases._watch("name", "holder", "same", ended)
    assert signals == expected


def test_a_cell_whose_claim_is_another_sweeps_is_killed_at_once(held, monkeypatch, signals):
    held.release("cell")
    assert Claims().take("cell", is_here=False)
    name, holder = os.environ[leases.CLAIM].split()
    leases._watch(name, holder, "a sign", threading.Event())
    assert signals == [signal.SIGKILL]


def test_a_store_that_is_away_is_no_silence(monkeypatch, signals):
    ended, looks = threading.Event(), iter(range(100))
    monkeypatch.setattr(ended, "wait", lambda _: next(looks, None) is None)

    def sign(*_):
        raise ConnectionError

    monkeypatch.setattr(leases, "_sign", sign)
    leases._watch("name", "holder", "same", ended)
    assert signals == []
