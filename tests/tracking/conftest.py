"""What the tests of tracking share: a store of their own, and runs with scores in it."""

import mlflow
import pytest

from plw_mlflow.tracking import connection, outbox
from tests.stores import Place


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    return place.client


@pytest.fixture
def impatient(monkeypatch):
    """Nothing is waited for: whoever sleeps until the store is back fails."""
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: pytest.fail("the store is there"))
    monkeypatch.setattr(outbox, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.01, 0.1))


@pytest.fixture
def untagged_by_others(monkeypatch):
    """Whoever removes a tag finds that another process has removed it just before."""
    delete = mlflow.MlflowClient.delete_tag

    def delete_after_the_other(client, *which):
        delete(client, *which)
        delete(client, *which)

    monkeypatch.setattr(mlflow.MlflowClient, "delete_tag", delete_after_the_other)
