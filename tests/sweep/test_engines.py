"""Are cells taken from the account, run by an engine, and accounted for, whatever becomes of the engine's machines?"""

import importlib
import signal
import socket
import time

import pytest

from plw_mlflow.config import SweepConfig
from plw_mlflow.environment import processes
from plw_mlflow.errors import UserError, without_passwords
from plw_mlflow.sweep import account as accounts
from plw_mlflow.sweep import local, ray_tasks, running, slurm_jobs
from plw_mlflow.sweep.display import Lines
from plw_mlflow.sweep.running import Ended
from tests.sweep.test_account import finish, open_account, store  # noqa: F401


class Fake:
    """An engine whose cells are cut short so often before each ends: by default, their machines are lost."""

    poll_seconds = 0.0

    def __init__(self, store, losses, status=None, *, gets_further=False):  # noqa: F811
        self.store, self.losses, self.cells, self.folder = store, losses, [], None
        self.status, self.gets_further = status, gets_further
        self.starts = []

    def room(self, running):
        return None if running == 0 else 0

    def start(self, cells, folder):
        self.starts.append([begun.run_id for begun in cells])
        self.cells += cells
        self.folder = folder

    def ended(self):
        over, self.cells = self.cells, []
        is_lost = len(self.starts) <= self.losses
        for begun in over:
            if not is_lost:
                finish(self.store, begun.run_id)
            elif self.gets_further:
                self.store.set_tag(begun.run_id, "plw.checkpoint", f"cell/step-{len(self.starts)}")
        return [Ended(begun, self.status if is_lost else 0, self.folder / "none") for begun in over]

    def end(self, patience):
        self.cells = []


def test_cells_whose_machine_is_lost_go_on_in_their_runs(store, open_account):  # noqa: F811
    account = open_account()
    engine = Fake(store, losses=2)
    running.run(account, engine, Lines(account))
    assert account.finished == account.cells
    assert engine.starts == [engine.starts[0]] * 3
    assert len(engine.starts[0]) == len(account.cells)
    cells = [run for run in store.search_runs(["0"]) if "plw.identity" in run.data.tags]
    assert {run.info.status for run in cells} == {"FINISHED"}


@pytest.mark.parametrize(
    ("status", "how"),
    [
        (None, "its machine was lost"),
        (processes.INTERRUPTED, "it was interrupted"),
        (-signal.SIGTERM, "it was interrupted"),
        (-signal.SIGINT, "it was interrupted"),
    ],
)
def test_cells_that_are_cut_short_again_and_again_fail(status, how, store, open_account):  # noqa: F811
    account = open_account()
    engine = Fake(store, losses=100, status=status)
    running.run(account, engine, Lines(account))
    assert account.failed == account.cells
    assert len(engine.starts) == accounts.MOST_CUT_SHORT
    why = f"it was cut short 5 times without getting further; the last time, {how}"
    assert why in account.failure(account.cells[0])


def test_cells_that_get_further_each_time_go_on(store, open_account):  # noqa: F811
    account = open_account()
    engine = Fake(store, losses=2 * accounts.MOST_CUT_SHORT, status=processes.INTERRUPTED, gets_further=True)
    running.run(account, engine, Lines(account))
    assert account.finished == account.cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("partition=gpu,exclude=n1,n2,time=2:00:00", {"partition": "gpu", "exclude": "n1,n2", "time": "2:00:00"}),
        ("mail-type=END", {"mail_type": "END"}),
    ],
)
def test_options_of_slurm(text, expected):
    assert SweepConfig(engine="slurm", slurm=text).slurm_options() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "slurm", "slurm": "gpu"}, "slurm must be like partition=gpu"),
        ({"engine": "slurm", "slurm": "partition=gpu\nrm x,time=1"}, "slurm must be like partition=gpu"),
        ({"engine": "slurm", "slurm": "../x=1"}, "slurm must be like partition=gpu"),
        (
            {"engine": "slurm", "slurm": "wrap=true,test-only=1"},
            "leave what a job runs and writes to the sweep, got test_o",
        ),
        ({"engine": "slurm", "slurm": "output=/etc/motd"}, "leave what a job runs and writes to the sweep, got output"),
        ({"engine": "slurm", "slurm": "cluster=pbs"}, "the cluster of slurm must be slurm or local"),
        ({"slurm": "partition=gpu"}, "slurm is for another engine"),
        ({"ray_address": "auto"}, "ray-address is for another engine"),
    ],
)
def test_options_of_engines_that_are_wrong(options, message):
    with pytest.raises(UserError, match=message):
        SweepConfig(**options)


@pytest.mark.parametrize(("name", "version"), [("ray", r"ray==\d"), ("submitit", r"submitit==\d")])
def test_a_missing_extra_is_told_with_how_to_get_it(name, version, monkeypatch):
    def missing(asked):
        raise ModuleNotFoundError(name=asked)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=f"the package {name} is missing; get it with: pip install {version}"):
        local.extra(name)


def test_a_ray_address_where_nobody_answers_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"there is no Ray cluster at {address}: Connection refused"):
        ray_tasks._connect(None, address)
    with pytest.raises(UserError, match="ray-address must be HOST:PORT"):
        ray_tasks._connect(None, "nowhere")
    assert time.monotonic() - started < 5


def test_a_machine_without_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no SLURM here"):
        slurm_jobs._check({"partition": "gpu"})


def test_a_password_in_rays_address_is_not_shown(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"ray://me:secret@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError) as refused:
            ray_tasks._connect(None, address)
    assert "secret" not in without_passwords(str(refused.value))  # as every command prints it
    assert "there is no Ray cluster at ray://" in str(refused.value)
