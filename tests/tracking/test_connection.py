"""Is a store that cannot be used reported in one line, without its password?"""

import logging
import os
import sqlite3
import subprocess
import sys

import mlflow
import pytest

from plw_mlflow.tracking import connection
from tests.stores import ROOT

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "ftp://me:secret@host/x",
            r"ftp://me:\*\*\*@host/x cannot be used: MLflow knows no such kind of address; .*sqlite",
        ),
        ("sqlite:///{folder}/file/mlflow.db", "cannot be used: .*File exists"),
        ("sqlite:///{folder}", "cannot be used: unable to open database file"),
        ("sqlite:///{folder}/file", "cannot be used: file is not a database"),
        ("sqlite:///file:{folder}/mlflow.db?mode=ro&uri=true", "cannot be used: attempt to write a readonly database"),
        ("postgresql+nosuch://me:secret@host/db", r"postgresql\+nosuch://me:\*\*\*@host/db cannot be used: "),
        ("postgresql://me:se/cret@host:port/db", r"me:\*\*\*@host:port/db cannot be used: it is not a valid address"),
        ("http://me:se/cret@host", r"http://me:\*\*\*@host cannot be used: it is not a valid address"),
        ("file://{folder}/mlruns", "cannot be used: The filesystem tracking backend"),
    ],
)
def test_a_store_that_cannot_be_one_is_said_in_one_line(tmp_path, impatient, uri, message):
    (tmp_path / "file").write_text("no database " * 100)
    mlflow.set_tracking_uri(uri.format(folder=tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        connection.check_reachable()
    assert "\n" not in str(error.value)
    assert "cret" not in str(error.value)


def test_a_locked_store_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.01)
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConnectionError, match=r"cannot be used: database is locked$"):
            connection.check_reachable()


def test_asking_changes_nothing_in_the_store(tmp_path):
    before = (tmp_path / "mlflow.db").read_bytes()
    connection.check_reachable()
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_what_the_database_layer_logs_is_not_shown_beside_the_error(store, capsys):
    connection.check_reachable()
    assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(logging.ERROR)


@pytest.mark.slow
def test_several_processes_make_one_fresh_store(tmp_path):
    """MLflow's migrations race: without a lock, all but one of them end in an error of the database."""
    script = "from plw_mlflow.tracking import connection; connection.check_reachable(); print('well')"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new/ml.db", "PYTHONPATH": str(ROOT)}
    several = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in several] == ["well"] * 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ml.db", "ml.db.lock"]
