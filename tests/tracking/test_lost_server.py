"""A tracking server that is killed, or a line to it that breaks: is every step in the curve once, and nothing lost?"""

import sqlite3
import threading
from contextlib import closing

import mlflow
import pytest

from plw_mlflow import tracking
from plw_mlflow.config import EvaluateConfig, MainConfig, TrainConfig
from plw_mlflow.environment import processes
from plw_mlflow.evaluation.scores import Evaluation, Score, table
from plw_mlflow.tracking import StoredCheckpoints, cards, connection, outbox, resumption
from tests.conftest import byte_tokenizer, tiny_llama
from tests.servers import Line, Refusing, Server
from tests.stores import make_store

SOON = 120.0  # seconds in which what has to come has come, however busy the machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def one_server(folder):
    store = make_store(folder)
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
    with closing(Server(store, folder)) as server:
        yield server


@pytest.fixture
def server(one_server, monkeypatch):
    """A server, and little patience with it."""
    one_server.start()
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.01, 0.1))
    monkeypatch.setattr(resumption, "CURVE_SECONDS", 0.1)
    mlflow.set_tracking_uri(one_server.uri)
    return one_server


def test_a_cell_of_a_sweep_waits_for_a_server_that_is_away_when_it_begins(server, monkeypatch):
    monkeypatch.setattr(connection, "ASK_SECONDS", 0.1)
    monkeypatch.setenv(processes.SWEEP, "1")
    server.kill()
    back = threading.Timer(0.5, server.start)
    back.start()
    with tracking.open_run(TrainConfig(), "cell") as run:
        back.join()
    assert run.client.get_run(run.id).info.status == "FINISHED"


@pytest.fixture
def line(server):
    with closing(Line(server)) as line:
        mlflow.set_tracking_uri(line.uri)
        yield line


def rows(folder, run_id, name="train/loss"):
    """What the database itself holds of a curve, every row of it."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        query = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
        return database.execute(query, (run_id, name)).fetchall()


def curve(first, last):
    return [(step, step / 7) for step in range(first, last + 1)]


def log(run, first, last):
    for step, value in curve(first, last):
        run.curves.log_step({"train/loss": value, "train/grad_norm": value}, step)


def saved(folder, step):
    """A checkpoint's folder, as training leaves it."""
    place = folder / f"step-{step:06d}"
    place.mkdir(parents=True)
    (place / "weights.safetensors").write_text(f"weights of step {step}")
    return place


@pytest.mark.filterwarnings("ignore:the tracking store takes no metrics")
def test_points_whose_answer_was_lost_are_there_once(line, folder):
    with tracking.open_run(TrainConfig(), "cell") as run:
        line.breaking += ["runs/log-batch"] * 3
        log(run, 1, 5)
    assert line.broken == ["runs/log-batch"] * 3
    assert rows(folder, run.id) == rows(folder, run.id, "train/grad_norm") == curve(1, 5)


def test_training_goes_on_while_the_server_is_killed_and_started_again(server, folder, tmp_path):
    with tracking.open_run(TrainConfig(), "cell") as run:
        tracking.begin_cell(run, "c", tmp_path, 0)
        log(run, 1, 3)
        StoredCheckpoints(run, "c").store(saved(tmp_path, 3))
        server.kill()
        log(run, 4, 6)
        run.curves.save_unsent()
        with pytest.warns(UserWarning, match="step-000006 is not in the store"):
            StoredCheckpoints(run, "c").store(saved(tmp_path, 6))
        log(run, 7, 9)
        server.start()
        run.curves.flush()
        StoredCheckpoints(run, "c").store(saved(tmp_path, 9))
        listed = mlflow.MlflowClient().list_artifacts(run.id, "checkpoints")
    assert [item.path for item in listed] == ["checkpoints/step-000009"]
    assert rows(folder, run.id) == curve(1, 9)
    found = mlflow.MlflowClient().get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["plw.checkpoint"] == "c/step-000009"


@pytest.mark.filterwarnings("ignore:the tracking store takes no metrics")
def test_the_successors_of_runs_killed_while_the_server_is_away_have_the_whole_curve(server, folder, tmp_path):
    first = tracking.Run(mlflow.MlflowClient().create_run("0").info.run_id)
    tracking.begin_cell(first, "c", tmp_path, 0)
    log(first, 1, 3)
    first.curves.flush()
    server.kill()
    log(first, 4, 6)
    first.curves.save_unsent()  # the checkpoint of step 6
    log(first, 7, 8)
    first.curves.save_unsent()  # that of step 8 is not completed
    first.curves.close(0)  # killed

    server.start()
    second = tracking.Run(mlflow.MlflowClient().create_run("0").info.run_id)
    second.curves._outbox._send = is_away_again
    tracking.begin_cell(second, "c", tmp_path, 6)
    log(second, 7, 7)
    second.curves.close(0)  # killed before its first checkpoint

    with tracking.open_run(TrainConfig(), "cell") as third:
        tracking.begin_cell(third, "c", tmp_path, 6)
        log(third, 7, 9)
    assert rows(folder, second.id) == []
    assert rows(folder, third.id) == rows(folder, third.id, "train/grad_norm") == curve(1, 9)


def test_a_pod_started_again_sends_what_its_predecessor_could_not(server, folder, tmp_path):
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    first = tracking.Run(run_id)
    tracking.begin_cell(first, "c", tmp_path, 0)
    log(first, 1, 3)
    first.curves.flush()
    first.curves._outbox.close()
    log(first, 4, 6)
    first.curves.save_unsent()

    second = tracking.Run(run_id)
    tracking.begin_cell(second, "c", tmp_path, 6)
    log(second, 7, 7)
    second.curves.flush()
    assert rows(folder, run_id) == curve(1, 7)


def is_away_again(points):
    raise ConnectionError("away")


def add_scores(run):
    samples = [{"task": "a", "prediction": "yes"}]
    evaluation = Evaluation([Score("a", "acc", 0.5, 0.1, 5, 0, "1.0", True)], {}, samples)
    tracking.log_scores(run, evaluation, table(evaluation, {"model": "m", "dataset": "d", "plw": 1.0, "seed": 1}))


def test_what_comes_after_the_training_waits_for_the_server(server, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter.json").write_text("{}")
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: server.start())
    with tracking.open_run(MainConfig(), "cell") as run:
        server.kill()
        run.log_folder(tmp_path, "adapter")
        server.kill()
        add_scores(run)
        server.kill()  # and so at the run's end
    assert rows(folder, run.id, "score") == rows(folder, run.id, "a/acc") == [(0, 0.5)]
    found = mlflow.MlflowClient().get_run(run.id)
    assert (found.info.status, found.data.tags["plw.status"]) == ("FINISHED", "scored")
    out = capsys.readouterr().out
    for doing in ("logging adapter", "logging the scores", "ending the run"):
        assert f"{doing}: the tracking store is away; waiting for it, at most 600 s" in out


def test_a_model_is_logged_and_registered_whatever_answers_are_lost(line):
    with tracking.open_run(MainConfig(), "cell") as run:
        line.breaking += ["runs/log-batch", "model-versions/create"]
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), MainConfig())
        add_scores(run)
    assert line.breaking == []
    client = mlflow.MlflowClient()
    (version,) = client.search_model_versions("name = 'plw-toy-toy-short'")
    assert client.get_run(run.id).data.tags["plw.model_version"] == f"plw-toy-toy-short/{version.version}"


def test_samples_whose_answer_was_lost_are_there_once(line):
    with tracking.open_run(MainConfig(), "cell") as run:
        line.breaking += ["samples.json"]
        add_scores(run)
    assert line.broken == ["samples.json"]
    assert len(mlflow.load_table("samples.json", run_ids=[run.id])) == 1


def test_a_model_that_was_cut_off_is_not_the_runs(line):
    with tracking.open_run(MainConfig(), "cell") as run:
        line.breaking += ["runs/outputs"]  # the run names the model before that is there
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), MainConfig())
        expected = run.model_id
        assert len(mlflow.MlflowClient().get_run(run.id).outputs.model_outputs) == 2
        tracking.load_model(run)
    assert line.breaking == []
    assert run.model_id == expected


@pytest.mark.filterwarnings("ignore:the tracking store takes no metrics")
def test_a_server_that_stays_away_is_given_up_with_one_line(server, monkeypatch):
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(connection, "ASK_SECONDS", 0.01)
    run = tracking.Run(mlflow.MlflowClient().create_run("0").info.run_id)
    server.kill()
    log(run, 1, 2)
    with pytest.raises(ConnectionError, match=r"has not taken 4 metrics of run .* within 0 s \(Connection refused"):
        run.curves.flush()
    with pytest.raises(ConnectionError, match=r"logging the scores: the tracking store .* was away for 0 s \(Conn"):
        add_scores(run)
    run.curves.close(0)


def test_an_error_that_is_not_the_stores_is_not_waited_out(server, monkeypatch):
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: pytest.fail("the store is there"))
    calls = []

    def fail():
        calls.append(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        connection.patiently("logging", fail)
    assert len(calls) == 2


def test_no_password_of_an_address_is_shown_or_stored(server, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cards, "write", lambda *_: None)  # this run is no cell, so its model has no card
    mlflow.set_tracking_uri(server.uri.replace("://", "://me:geheim123@"))
    secret = "http://me:geheim123@127.0.0.1:9/v1?token=geheim123"
    config = EvaluateConfig(model=secret)  # a mistake, as which option it is of is not known here
    with tracking.open_run(config, f"evaluate {secret}") as run:
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), MainConfig())
        print(run.address())
    with pytest.raises(ConnectionError, match="gives no answer"), tracking.open_run(config, "another"):
        raise ConnectionError(f"{secret} gives no answer")
    server.kill()
    with pytest.raises(ConnectionError, match=r"the tracking store .* cannot be used: Connection refused"):
        connection.check_reachable()
    shown = capfd.readouterr()
    assert run.id in shown.out
    assert "geheim123" not in shown.out + shown.err
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "MLmodel", "config.json"} <= {path.name for path in kept}
    assert [path for path in kept if b"geheim123" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, ValueError, "cannot be used: .*401.*; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, ValueError, "cannot be used: .*403.*; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (404, ConnectionError, "cannot be used: .*404"),  # of a proxy before a server that is being started
        (503, ConnectionError, "cannot be used: too many 503 error responses"),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_away(monkeypatch, status, kind, message):
    monkeypatch.setattr(connection, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with closing(Refusing(status)) as refusing:
        mlflow.set_tracking_uri(refusing.uri)
        monkeypatch.setattr("urllib3.util.retry.time.sleep", lambda seconds: None)
        with pytest.raises(kind, match=message):
            connection.check_reachable()
        with pytest.raises(kind):
            connection.patiently("logging", mlflow.MlflowClient().search_experiments)
