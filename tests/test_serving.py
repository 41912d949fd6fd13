"""Does `mlflow models serve` answer, and take the parameters of the generation?"""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlflow
import pytest

from plw_mlflow import cell, tracking
from plw_mlflow.config import TrainConfig
from tests.stores import Place

SECONDS = 150.0  # in which the server has to answer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_served_model_answers_with_max_new_tokens(tmp_path, method):
    place = Place(tmp_path)
    mlflow.set_tracking_uri(place.uri)
    config = TrainConfig(method=method, max_records=40, epochs=1, cache_dir=tmp_path, checkpoint_dir=tmp_path / "c")
    with tracking.open_run(config, "cell") as run:
        cell.lead(config, run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/plw-toy-toy-short/1"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(
            command, env=place.environment(), cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        try:
            await_server(port, server, tmp_path / "log.txt")
            short, long = (ask(port, {"max_new_tokens": count}) for count in (1, 12))
            assert short.startswith("Ada")
            assert len("Ada") <= len(short) < len(long)
            assert ask(port, {"max_new_tokens": 12}) == long  # greedy, unless it is asked to draw
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(port, {"max_new_tokens": "many"})
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def ask(port, parameters):
    """What the served model makes of a text."""
    body = json.dumps({"inputs": ["Ada"], "params": parameters}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        (text,) = json.load(answer)["predictions"]
    return text


def await_server(port, server, log):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server does not answer: {log.read_text()}")
