"""Does one process alone hold a claim, and is that of a dead one taken over by one alone?"""

import subprocess
import sys
import threading

import mlflow
import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from plw_mlflow.environment import processes
from plw_mlflow.tracking import claims
from plw_mlflow.tracking.claims import Claims
from tests.stores import Place


@pytest.fixture
def client(tmp_path):
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


def names(client):
    return sorted(model.name for model in client.search_registered_models())


@pytest.fixture
def a_dead_process():
    """The identity of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = processes.identity(process.pid)
        assert processes.has_ended(identity) is False
        process.communicate(b"\n")
    return identity


def test_a_claim_is_held_by_one_until_it_is_released(client):
    one, other = Claims(), Claims()
    assert one.take("work")
    assert not other.take("work")
    assert other.of_others("wo") == {"work"}
    assert one.of_others("wo") == set()
    one.release("work")
    assert names(client) == []
    assert other.take("work")


def test_a_claim_of_a_process_that_has_ended_is_taken_over(client, monkeypatch, a_dead_process):
    take_as(a_dead_process, monkeypatch)
    one, other = Claims(), Claims()
    assert one.take("work")
    assert names(client) == ["plw-claim-work-1", "plw-claim-work-2"]
    assert not other.take("work")
    one.release("work")
    assert names(client) == []


def test_a_claim_of_another_machine_is_abandoned_after_silence_alone(client, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    take_as("another-boot/1/2/3", monkeypatch)
    here = Claims()
    for seconds in (0, claims.SILENT_SECONDS):
        now[0] = seconds
        assert not here.take("work")
        client.set_registered_model_tag("plw-claim-work-1", "plw.alive", f"a sign at {seconds}")
    for _ in range(4):
        now[0] += claims.UNSEEN_SECONDS
        assert not here.take("work")  # as it has given a sign
    now[0] += 1
    assert here.take("work")


def test_silence_that_nobody_has_heard_does_not_count(client, monkeypatch):
    """While the store was away, the holder could not give a sign either."""
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    take_as("another-boot/1/2/3", monkeypatch)
    here = Claims()
    assert not here.take("work")
    now[0] += claims.SILENT_SECONDS + 1
    assert not here.take("work")


def take_as(identity, monkeypatch, name="work"):
    """Take a claim as another process."""
    with monkeypatch.context() as patch:
        patch.setattr(processes, "identity", lambda pid=None: identity)
        taker = Claims()
        assert taker.take(name)
    return taker


def test_who_comes_late_to_an_abandoned_claim_gives_way(client, monkeypatch, a_dead_process):
    """Late: has seen the dead process' claim, which somebody else has taken over and released since."""
    take_as(a_dead_process, monkeypatch)
    late, other, third = Claims(), Claims(), Claims()
    seen = frozenset({client.get_registered_model("plw-claim-work-1").tags["plw.holder"]})
    assert other.take("work")
    other.release("work")
    assert third.take("work")  # a new claim with the number of the dead one
    assert not late._create("work", 2, seen, process="")
    assert names(client) == ["plw-claim-work-1"]
    assert not late.take("work")


def test_a_dead_claim_above_that_of_a_living_process_frees_nothing(client, a_dead_process):
    """It is of a process that came late, and died before it could give way."""
    assert Claims().take("work")
    tags = {"plw.holder": "late", "plw.process": a_dead_process, "plw.alive": "once"}
    client.create_registered_model("plw-claim-work-2", tags)
    one = Claims()
    assert not one.take("work")
    assert one.of_others("work") == {"work"}


def test_a_claim_that_could_not_be_removed_can_be_taken_again_by_its_holder(client, monkeypatch):
    one = Claims()
    assert one.take("work")
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_remove", refuse)
        one.release("work")
    assert names(client) == ["plw-claim-work-1"]
    assert not Claims().take("work")
    assert one.take("work")
    one.release("work")
    assert names(client) == []


def refuse(claim):
    raise MlflowException("no", error_code=PERMISSION_DENIED)


def test_a_claim_of_somebody_else_is_not_removed(client):
    one = Claims()
    assert one.take("work")
    client.delete_registered_model("plw-claim-work-1")
    other = Claims()
    assert other.take("work")
    one.release("work")
    assert names(client) == ["plw-claim-work-1"]
    other.release("work")
    assert names(client) == []


def test_what_dead_processes_have_left_is_known_and_is_removed_by_who_takes_it(client, monkeypatch, a_dead_process):
    take_as(a_dead_process, monkeypatch, "one")
    take_as(a_dead_process, monkeypatch, "other")
    here = Claims()
    assert here.take("one")
    assert here.abandoned("o") == {"other"}
    with here.giving_signs_of_life():
        assert here.take("other")
    assert names(client) == []  # at the end of the block, both are given back


def test_a_claim_that_is_given_back_while_another_process_asks_for_it_is_no_error(client, monkeypatch):
    """MLflow refuses to make what exists, and then looks at it, when it no longer exists."""
    one, other = Claims(), Claims()
    look = SqlAlchemyStore.get_registered_model

    @sqlalchemy.event.listens_for(SqlRegisteredModel, "before_insert", once=True)
    def take_it_first(*_):
        assert other.take("work")
        monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", give_it_back_and_look)

    def give_it_back_and_look(store, name):
        monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", look)
        other.release("work")
        return look(store, name)

    assert not one.take("work")
    assert one.take("work")


def test_of_many_threads_one_takes_a_claim(client):
    taken = []
    barrier = threading.Barrier(8)

    def take():
        barrier.wait()
        if Claims().take("work"):
            taken.append(threading.get_ident())

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_what_is_called_like_a_claim_and_is_none_is_in_nobodys_way(client):
    for name in ("plw-claim-work-now", "plw-claim-work-", "plw-claim-work-1-x"):
        client.create_registered_model(name)
    claimant = Claims()
    assert claimant.take("work")
    assert claimant.of_others("wo") == set()
    claimant.release("work")
    assert len(names(client)) == 3


def test_a_claim_with_forged_tags_is_a_strangers_claim(client):
    boot, namespace, *_ = processes.identity().split("/")
    for number, process in enumerate(
        (f"{boot}/{namespace}", f"{boot}/{namespace}/x/1", f"{boot}/{namespace}/9/9/9"), 1
    ):
        client.create_registered_model(f"plw-claim-work{number}-1", {"plw.process": process})
        assert not Claims().take(f"work{number}")
