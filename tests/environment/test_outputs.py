"""Is nothing of the user's replaced, removed or written through, and nothing of ours left half-written?"""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from plw_mlflow.environment import outputs
from plw_mlflow.errors import RunError
from tests.stores import ROOT


def tree(folder):
    """Every file of a folder with its content, but for our own list and lock; links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name not in (outputs.LIST, outputs.LOCK):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            else:
                found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fill(**files):
    """A builder of a folder."""

    def build(folder):
        for name, content in files.items():
            (folder / name).write_text(content)

    return build


def test_what_was_written_may_be_written_again(tmp_path):
    outputs.write(tmp_path, {"scores.csv": b"1", "fit.json": b"{}"})
    assert outputs.write(tmp_path, {"scores.csv": b"2"}) == [tmp_path / "scores.csv"]
    outputs.write_folders(tmp_path, {"model": fill(config="a", weights="b"), "adapter": fill(adapter="c")})
    outputs.write_folders(tmp_path, {"model": fill(config="d"), "adapter": None})
    with outputs.reserve(tmp_path, ["scores.csv", "fit.json", "model", "adapter"], []):
        outputs.write(tmp_path, {"scores.csv": b"3"})
    assert tree(tmp_path).keys() == {"scores.csv", "fit.json", "model", "model/config"}
    assert (tmp_path / "scores.csv").read_bytes() == b"3"
    assert (tmp_path / "model/config").read_text() == "d"


def test_files_are_as_readable_as_any(tmp_path):
    before = os.umask(0o022)
    try:
        outputs.write(tmp_path, {"scores.csv": b""})
        outputs.write_folders(tmp_path, {"model": fill(config="")})
    finally:
        os.umask(before)
    modes = [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("scores.csv", "model", "model/config")]
    assert modes == ["0o644", "0o755", "0o644"]


def users_file(folder):
    (folder / "scores.csv").write_text("mine")
    return "scores.csv is there, and was not written by plw_mlflow"


def users_model(folder):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    return "model is there, and was not written by plw_mlflow"


def empty_folder(folder):
    (folder / "model").mkdir()
    return "model is there, and was not written by plw_mlflow"


def folder_for_a_file(folder):
    (folder / "scores.csv").mkdir()
    return "scores.csv is there, and was not written by plw_mlflow"


def file_in_our_folder(folder):
    outputs.write_folders(folder, {"model": fill(config="a")})
    (folder / "model/notes").write_text("mine")
    return "model/notes is there, and was not written by plw_mlflow"


def link_to_a_file(folder):
    (folder / "theirs").write_text("precious")
    (folder / "scores.csv").symlink_to(folder / "theirs")
    return "scores.csv is a link, which is not written through"


def dangling_link(folder):
    (folder / "scores.csv").symlink_to(folder / "nothing")
    return "scores.csv is a link, which is not written through"


def link_to_a_folder(folder):
    (folder / "theirs").mkdir()
    (folder / "theirs/config").write_text("precious")
    (folder / "model").symlink_to(folder / "theirs")
    return "model is a link, which is not written through"


def link_in_our_folder(folder):
    outputs.write_folders(folder, {"model": fill(config="a")})
    (folder / "theirs").write_text("precious")
    (folder / "model/config").unlink()
    (folder / "model/config").symlink_to(folder / "theirs")
    return "model/config is a link, which is not written through"


def changed_file(folder):
    outputs.write(folder, {"scores.csv": b"ours"})
    (folder / "scores.csv").write_text("edited")
    return "scores.csv has been changed since it was written"


def damaged_list(folder):
    (folder / outputs.LIST).write_text("[]")
    return "which lists what may be replaced in that folder, cannot be read"


def linked_list(folder):
    (folder / "theirs").write_text('{"files": {}, "unfinished": []}')
    (folder / outputs.LIST).symlink_to(folder / "theirs")
    return "which lists what may be replaced in that folder, cannot be read"


def nested_list(folder):
    (folder / outputs.LIST).write_text("[" * 100_000)
    return "which lists what may be replaced in that folder, cannot be read"


def pipe_for_a_list(folder):
    os.mkfifo(folder / outputs.LIST)
    return "which lists what may be replaced in that folder, cannot be read"


TAKEN = [users_file, users_model, empty_folder, folder_for_a_file, file_in_our_folder, link_to_a_file, dangling_link]
TAKEN += [link_to_a_folder, link_in_our_folder, changed_file, damaged_list, linked_list, nested_list, pipe_for_a_list]


@pytest.mark.parametrize("make", TAKEN)
def test_what_is_not_ours_is_refused_before_the_work_and_when_writing(make, tmp_path):
    message = make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message), outputs.reserve(tmp_path, ["scores.csv", "model"], []):
        pass
    builders = {"model": fill(config=""), "adapter": None}
    is_folder = message.startswith("model")
    with pytest.raises(ValueError, match=message):
        outputs.write_folders(tmp_path, builders) if is_folder else outputs.write(
            tmp_path, {"a": b"", "scores.csv": b""}
        )
    assert tree(tmp_path) == before


def test_an_input_is_not_replaced(tmp_path):
    outputs.write(tmp_path, {"tasks.csv": b"mine"})
    outputs.write_folders(tmp_path, {"model": fill(data="mine")})
    for path, what in ((tmp_path / "tasks.csv", "replace it;"), (tmp_path / "model/data", "replace .*/model;")):
        with (
            pytest.raises(ValueError, match=f"is read by this command, which would {what} give another --output"),
            outputs.reserve(tmp_path, ["tasks.csv", "model"], [path]),
        ):
            pass
    with outputs.reserve(tmp_path, ["fit.json"], [tmp_path / "tasks.csv"]):
        pass  # a command may well read what it does not write


def test_a_folder_is_one_commands_at_a_time(tmp_path):
    with (
        outputs.reserve(tmp_path, [], []),
        pytest.raises(ValueError, match="another command writes into"),
        outputs.reserve(tmp_path, [], []),
    ):
        pass
    with outputs.reserve(tmp_path, [], []):
        pass


def test_a_linked_lock_is_not_followed(tmp_path):
    (tmp_path / outputs.LOCK).symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="cannot be written to"), outputs.reserve(tmp_path, [], []):
        pass
    assert not (tmp_path / "theirs").exists()


def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch):
    outputs.write(tmp_path, {"fit.json": b"1", "report.html": b"1"})
    outputs.write_folders(tmp_path, {"model": fill(config="1")})
    before = tree(tmp_path)
    create = outputs._create

    def full(path, content):
        is_too_large = "report" in path.name
        create(path, content[:1] if is_too_large else content)
        if is_too_large:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "_create", full)
    with pytest.raises(RunError, match="cannot be written to: No space left on device"):
        outputs.write(tmp_path, {"fit.json": b"22", "report.html": b"22"})
    monkeypatch.undo()

    def build(folder):
        (folder / "config").write_text("2")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="cannot be written to: No space left on device"):
        outputs.write_folders(tmp_path, {"model": build})
    assert tree(tmp_path) == before


KILLED = """
import os, sys
from pathlib import Path
from plw_mlflow.environment import outputs

replace, number = os.replace, int(sys.argv[2])

def counted(one, other):
    global number
    number -= 1
    if number < 0:
        os._exit(9)
    replace(one, other)

outputs.os.replace = counted
outputs.write(Path(sys.argv[1]), {"fit.json": b"2", "report.html": b"2"})
outputs.write_folders(Path(sys.argv[1]), {"model": lambda folder: (folder / "config").write_text("2")})
"""


@pytest.mark.parametrize("replaced", range(9))
def test_whenever_it_is_killed_the_same_command_may_be_given_again(replaced, tmp_path):
    outputs.write(tmp_path, {"fit.json": b"1", "report.html": b"1"})
    outputs.write_folders(tmp_path, {"model": fill(config="1")})
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(replaced)], cwd=ROOT)
    assert done.returncode == 9
    with outputs.reserve(tmp_path, ["fit.json", "report.html", "model"], []):
        outputs.write(tmp_path, {"fit.json": b"3", "report.html": b"3"})
        outputs.write_folders(tmp_path, {"model": fill(config="3")})
    files = {"fit.json", "report.html", "model", "model/config"}
    assert tree(tmp_path).keys() == files
    listed = json.loads((tmp_path / outputs.LIST).read_text())
    assert (listed["unfinished"], listed["files"].keys()) == ([], {"fit.json", "report.html", "model/config"})


def test_no_folder_is_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with outputs.reserve(None, ["fit.json"], [Path("fit.json")]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_text_of_a_table_is_a_formula():
    frame = pd.DataFrame({"dataset": ["=1+1", "@x", "-a", "b", None], "score": [-0.5, 0.25, 1, 1e-9, 2]})
    text = outputs.table(frame).decode()
    assert text == "dataset,score\n'=1+1,-0.5\n'@x,0.25\n'-a,1.0\nb,1e-09\n,2.0\n"
    assert outputs.table(pd.read_csv(io.StringIO(text))).decode() == text


def test_large_weights_that_somebody_has_changed_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "LARGE_BYTES", 3)
    outputs.write_folders(tmp_path, {"model": fill(weights="1234")})
    outputs.write_folders(tmp_path, {"model": fill(weights="1234")})
    with (tmp_path / "model/weights").open("r+") as file:
        file.write("5")
    with pytest.raises(ValueError, match="model/weights has been changed since it was written"):
        outputs.write_folders(tmp_path, {"model": fill(weights="1234")})


def test_a_file_that_comes_while_a_folder_is_built_is_not_lost(tmp_path):
    outputs.write_folders(tmp_path, {"model": fill(config="1")})

    def build(folder):
        (folder / "config").write_text("2")
        (tmp_path / "model/notes").write_text("mine")

    with pytest.raises(ValueError, match="model/notes is there, and was not written by plw_mlflow"):
        outputs.write_folders(tmp_path, {"model": build})
    assert (tmp_path / "model/notes").read_text() == "mine"
    assert (tmp_path / "model/config").read_text() == "1"


@pytest.mark.parametrize("replaced", range(4))
def test_an_interrupt_between_two_renames_leaves_a_model(replaced, tmp_path, monkeypatch):
    outputs.write_folders(tmp_path, {"model": fill(config="1"), "adapter": fill(config="1")})
    replace, calls = os.replace, []

    def interrupted(one, other):
        if Path(other).name in ("model", "adapter") or "earlier" in Path(other).name:
            calls.append(other)
            if len(calls) == replaced + 1:
                raise KeyboardInterrupt
        replace(one, other)

    monkeypatch.setattr(outputs.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs.write_folders(tmp_path, {"model": fill(config="2"), "adapter": fill(config="2")})
    monkeypatch.undo()
    with outputs.reserve(tmp_path, ["model", "adapter"], []):
        assert {(tmp_path / name / "config").read_text() for name in ("model", "adapter")} <= {"1", "2"}


def test_what_others_may_read_of_a_new_folder_they_may_read_of_all_in_it(tmp_path):
    def build(folder):
        (folder / "weights").touch(0o600)
        (folder / "more").mkdir(0o700)
        folder.chmod(0o700)

    (tmp_path / "new").mkdir()
    outputs.write_folders(tmp_path / "out", {"model": build})
    new, model = ((tmp_path / name).stat().st_mode for name in ("new", "out/model"))
    assert model == new
    assert (tmp_path / "out/model/more").stat().st_mode == new
    assert (tmp_path / "out/model/weights").stat().st_mode & 0o777 == new & 0o666
