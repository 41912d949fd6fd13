"""MLflow's tracking server in a process of its own, to be killed and started again; and a line to it that breaks.

Starting `mlflow server` takes seconds of imports, so a process imports it once and forks whenever one is wanted:
python -m tests.servers PORT
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A tracking server on an SQLite store that is there already."""

    def __init__(self, store, folder):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        environment = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": store,  # as `mlflow server` gives its options to its workers
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "tests.servers", str(self.port)]
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._pid = None

    def start(self):
        """Start it, unless it runs, and return when it answers."""
        if self._pid is not None:
            return
        self._parent.stdin.write("start\n")
        self._parent.stdin.flush()
        self._pid = int(self._parent.stdout.readline())
        while True:
            with suppress(OSError):
                answer = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                answer.request("GET", "/health")
                if answer.getresponse().status == 200:
                    return
            time.sleep(0.05)

    def kill(self):
        """Kill it with SIGKILL."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            assert int(self._parent.stdout.readline()) == self._pid
            self._pid = None

    def close(self):
        self.kill()
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()


class Local:
    """A server of this process, which one class answers for."""

    def __init__(self, handler):
        handler.log_message = lambda *_: None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


class Line(Local):
    """A line to a server that, asked for one of `breaking`, passes the request on and then loses the answer.

    breaking: ends of paths, each for one request.
    """

    def __init__(self, server):
        self.breaking = []
        self.broken = []  # those that were
        line = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                passed = http.client.HTTPConnection("127.0.0.1", server.port)
                passed.request(self.command, self.path, body, dict(self.headers))
                answer = passed.getresponse()
                content = answer.read()
                end = next((end for end in line.breaking if self.path.endswith(end)), None)
                if end is not None:
                    line.breaking.remove(end)
                    line.broken.append(end)
                    return  # an HTTP/1.0 server closes the connection then
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        super().__init__(Handler)


class Refusing(Local):
    """A server, or a proxy in its place, that answers every request with one status and no more."""

    def __init__(self, status):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_HEAD = do_GET

        super().__init__(Handler)


def main(port):
    import uvicorn
    from mlflow.server.fastapi_app import app

    def reaped(number, frame):
        print(os.wait()[0], flush=True)

    signal.signal(signal.SIGCHLD, reaped)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(2, 1)
            uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
