"""MLflow stores for tests. Making one takes seconds of migrations, so one is made and the others are copies."""

import functools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import mlflow

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _template():
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


def make_store(folder):
    """Put a new tracking store into a folder; gives its URI."""
    shutil.copy(_template(), folder / "mlflow.db")
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.execute("UPDATE experiments SET artifact_location = ?", (f"{folder}/mlruns/0",))
    return f"sqlite:///{folder}/mlflow.db"


class Place:
    """A folder with a tracking store in it, and the entry points run there in processes of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.uri = make_store(folder)

    @cached_property
    def client(self):
        return mlflow.MlflowClient(self.uri)

    def environment(self, **more):
        ours = {
            "MLFLOW_TRACKING_URI": self.uri,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return os.environ | ours | more

    def start(self, name, *arguments, **more):
        """Begin an entry point; `more` is environment."""
        command = [sys.executable, "-m", f"entrypoints.{name}", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(**more), stdout=pipe, stderr=pipe, text=True
        )

    def run(self, name, *arguments, status=0, **more):
        """Run an entry point to its end, which must be `status`; gives what it printed, and its errors."""
        process = self.start(name, *arguments, **more)
        out, err = process.communicate(timeout=240)
        assert process.returncode == status, err
        return out, err

    def runs(self):
        """All runs, the newest first."""
        return list(self.client.search_runs(["0"], order_by=["attributes.start_time DESC"]))
