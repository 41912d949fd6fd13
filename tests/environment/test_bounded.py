"""Does what works on a stranger's input end where its bounds are, and only there?"""

import os
import signal

import pytest

from plw_mlflow.environment import bounded
from plw_mlflow.errors import UserError


def work(task):
    """Whatever a test needs done in a process with bounds."""
    if task == "refuse":
        raise UserError("the file is no file")
    if task == "fail":
        raise KeyError("a")
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "print":
        print("nothing of what is yielded")
        os.write(1, b"nor this")
    if task == "fill":
        yield len("x" * (bounded.MEBIBYTES << 21))
    yield os.getpid()
    yield [task, "\ud800"]


def spin(*_):
    """Work without an end, whose time is up at once."""
    signal.setitimer(signal.ITIMER_PROF, 0.01)
    while True:
        pass
    yield


@pytest.fixture(scope="module")
def worker():
    worker = bounded.Worker(work)
    yield worker
    worker.close()


def test_what_a_function_yields_comes_from_one_other_process(worker):
    first, found = worker.results("a")
    again, _ = worker.results("print")
    assert found == ["a", "\ud800"]
    assert os.getpid() != first == again


def test_a_refusal_is_the_callers_message(worker):
    with pytest.raises(ValueError, match="the file is no file") as raised:
        list(worker.results("refuse"))
    assert not isinstance(raised.value, bounded.Exhausted)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("fail", "^fails with KeyError: 'a'$"),
        ("fill", r"^needs more than \d+ MiB of memory$"),
        ("crash", r"^ends the process that works on it \(SIGSEGV\)"),
    ],
)
def test_what_fails_is_told_and_the_next_is_done_by_a_new_process(worker, task, expected):
    first, _ = worker.results("a")
    with pytest.raises(bounded.Exhausted, match=expected):
        list(worker.results(task))
    second, _ = worker.results("a")
    assert first != second


def test_what_is_not_read_to_its_end_leaves_nothing_behind(worker):
    results = worker.results("a")
    first = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert len(list(worker.results("b"))) == 2


def test_what_takes_too_long_is_ended():
    worker = bounded.Worker(spin)
    with pytest.raises(bounded.Exhausted, match=r"^takes more than \d+ seconds to compute$"):
        list(worker.results())
