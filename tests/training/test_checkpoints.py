"""Is a checkpoint whole or not there, and does whatever goes wrong with one leave the others?"""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plw_mlflow.training import checkpoints
from plw_mlflow.training.checkpoints import Checkpoint, Writer


def checkpoint(step):
    weight = torch.full((3, 2), float(step))
    return Checkpoint(step, {"layer.weight": weight}, {"exp_avg/layer.weight": weight / 2})


def write(folder, *steps, keep=1, after_save=lambda saved: None):
    writer = Writer(folder, "cell", keep, after_save)
    for step in steps:
        writer.save(checkpoint(step))
    writer.wait()


def load(folder, check_fit=lambda found: None):
    return checkpoints.load(folder, "cell", check_fit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_loads(folder, step):
    found, expected = load(folder), checkpoint(step)
    assert found.step == step == checkpoints.newest_step(folder)
    assert_holds(found, expected.weights | expected.optimizer)


def assert_holds(found, expected):
    assert found.shapes == {name: (list(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    found.read_into(tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [4, 9]), (5, [2, 4, 9])])
def test_the_newest_are_kept_and_one_is_loaded(keep, kept, tmp_path):
    write(tmp_path, 2, 4, 9, keep=keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]
    assert_loads(tmp_path, 9)


def test_an_empty_folder_has_none(tmp_path):
    assert load(tmp_path) is None
    assert checkpoints.newest_step(tmp_path) == 0


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "weights.safetensors").write_bytes(b"half")
    assert load(tmp_path) is None
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-000003"]


def test_the_caller_hears_of_each_once_it_is_complete_and_the_one_before_gone(tmp_path):
    seen = []
    write(tmp_path, 1, 2, after_save=lambda saved: seen.append((saved.name, names(tmp_path))))
    assert seen == [("step-000001", ["step-000001"]), ("step-000002", ["step-000002"])]


def test_what_the_caller_raises_is_raised_again(tmp_path):
    def fail(saved):
        raise ConnectionError("the store is gone")

    with pytest.raises(ConnectionError, match="the store is gone"):
        write(tmp_path, 1, after_save=fail)
    assert_loads(tmp_path, 1)


def test_a_full_disk_keeps_the_last_checkpoint_and_training_goes_on(tmp_path, monkeypatch):
    """In the middle of the second one; the third finds room again."""
    whole = checkpoints.save_file

    def full(tensors, file, metadata):
        if "exp_avg/layer.weight" in tensors and tensors["exp_avg/layer.weight"].max() == 2:
            file.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, file, metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    seen = []
    with pytest.warns(UserWarning, match=r"step 4, of 0 MiB, cannot be written .*No space left.* step 2 is kept"):
        write(tmp_path, 2, 4, after_save=lambda saved: seen.append(saved.name))
    assert names(tmp_path) == seen == ["step-000002"]
    assert_loads(tmp_path, 2)
    write(tmp_path, 6)
    assert_loads(tmp_path, 6)


@pytest.mark.parametrize("part", ["weights", "optimizer"])
@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:20]), lambda file: file.unlink()])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(damage, part, tmp_path):
    write(tmp_path, 2, 4, keep=2)
    damage(tmp_path / "step-000004" / f"{part}.safetensors")
    with pytest.warns(UserWarning, match=r"step-000004 cannot be used .* set aside"):
        assert load(tmp_path).step == 2
    assert checkpoints.newest_step(tmp_path) == 2
    write(tmp_path, 3, 4)  # the name of the damaged one is free again
    assert_loads(tmp_path, 4)


def relabel(file, **label):
    """Write a file of a checkpoint with other metadata, None for none."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        label = opened.metadata() | label
    save_file(tensors, file, {name: value for name, value in label.items() if value is not None})


def link(path):
    """Move what is there elsewhere, and put a link to it in its place."""
    elsewhere = path.parents[2 if path.suffix else 1] / "elsewhere"  # beside the cell's folder
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def make_pipe(file):
    file.unlink()
    os.mkfifo(file)


NOT_THIS_CELLS = {
    "another cell": (lambda place: relabel(place / "weights.safetensors", cell="x"), "is of the cell 'x', .*'cell'"),
    "another step": (lambda place: relabel(place / "optimizer.safetensors", step="3"), "is of the step '3', .*'4'"),
    "no cell": (lambda place: relabel(place / "optimizer.safetensors", cell=None), "names no cell: an earlier version"),
    "no step": (lambda place: relabel(place / "weights.safetensors", step=None), "names no step"),
    "no label": (
        lambda place: save_file(checkpoint(4).weights, place / "weights.safetensors"),
        "names no cell: an earlier version or another program",
    ),
    "a link to a file": (lambda place: link(place / "weights.safetensors"), "is a link"),
    "a link to a folder": (link, "is a link"),
    "a pipe": (lambda place: make_pipe(place / "optimizer.safetensors"), "of another kind"),
    "a file": (lambda place: shutil.rmtree(place) or place.write_text("no folder"), "of another kind|Not a directory"),
    "a folder for a file": (
        lambda place: (place / "weights.safetensors").unlink() or (place / "weights.safetensors").mkdir(),
        "of another kind",
    ),
    "a header without an end": (
        lambda place: (place / "weights.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{"),
        "cannot be used",
    ),
    "a type that torch has not": (
        lambda place: (place / "weights.safetensors").write_bytes(
            (place / "weights.safetensors").read_bytes().replace(b'"F32"', b'"F99"')
        ),
        "cannot be used",
    ),
}


@pytest.mark.parametrize("look", ["load", "set aside"])
@pytest.mark.parametrize(("spoil", "why"), NOT_THIS_CELLS.values(), ids=NOT_THIS_CELLS)
def test_what_is_not_this_cells_is_set_aside_and_the_one_before_it_taken(spoil, why, look, tmp_path):
    folder = tmp_path / "cell"
    write(folder, 2, 4, keep=2)
    spoil(folder / "step-000004")
    with pytest.warns(UserWarning, match=r"step-000004 cannot be used \(.*set aside as damaged-step-000004") as told:
        load(folder) if look == "load" else checkpoints.set_aside_unusable(folder, "cell")
    (message,) = [str(one.message) for one in told]
    assert re.search(why, message)
    assert names(folder) == ["damaged-step-000004", "step-000002"]
    assert_loads(folder, 2)
    write(folder, 3, 4)
    assert_loads(folder, 4)


def test_what_training_does_not_expect_is_set_aside_and_the_one_before_it_taken(tmp_path):
    def check_fit(found):
        if found.step > 2:
            raise ValueError("of another model")

    write(tmp_path, 2, 4, 6, keep=3)
    with pytest.warns(UserWarning, match=r"\(of another model\)"):
        assert load(tmp_path, check_fit).step == 2
    assert names(tmp_path) == ["damaged-step-000004", "damaged-step-000006", "step-000002"]


def test_a_renamed_checkpoint_is_not_taken_for_the_step_in_its_name(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000040")
    with pytest.warns(UserWarning, match=r"step-000040 cannot be used .*is of the step '2', and not '40'"):
        assert load(tmp_path) is None


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_whatever_lies_where_it_is_set_aside_is_replaced(kind, tmp_path):
    folder, other = tmp_path / "cell", tmp_path / "other"
    write(folder, 2, 4, keep=2)
    other.mkdir()
    (other / "kept").touch()
    aside = folder / "damaged-step-000004"
    {"file": aside.touch, "folder": aside.mkdir, "link": lambda: aside.symlink_to(other)}[kind]()
    (folder / "step-000004" / "weights.safetensors").unlink()
    with pytest.warns(UserWarning, match="set aside"):
        assert load(folder).step == 2
    assert (aside / "optimizer.safetensors").is_file()
    assert names(other) == ["kept"]


@pytest.mark.parametrize(
    "name", ["step-abc", "step--5", "step-", "step-5", "step-0000005", "step-000000", "step-00002５", "step-000009.bak"]
)
def test_other_names_are_no_checkpoints_and_left_alone(name, tmp_path):
    write(tmp_path, 2)
    (tmp_path / name).mkdir()
    assert_loads(tmp_path, 2)
    write(tmp_path, 4)
    assert names(tmp_path) == sorted(["step-000004", name])


def test_more_files_beside_a_checkpoints_own_are_not_read(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "step-000002" / "optimizer.pt").write_bytes(b"a pickle of a stranger's")
    assert_loads(tmp_path, 2)


def test_links_are_not_written_through(tmp_path):
    folder, other = tmp_path / "cell", tmp_path / "other"
    for path in (folder, other):
        path.mkdir()
    (other / "weights.safetensors").write_text("the user's")
    (folder / "unfinished").symlink_to(other)
    (folder / "lock").symlink_to(other / "weights.safetensors")
    write(folder, 2)
    assert_loads(folder, 2)
    with pytest.raises(ValueError, match=r"cannot be used .*lock"), checkpoints.reserve(folder):
        pass
    (folder / "lock").unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="is a link"), checkpoints.reserve(tmp_path / "link"):
        pass
    assert names(other) == ["weights.safetensors"]
    assert (other / "weights.safetensors").read_text() == "the user's"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    unusable = checkpoints.reserve(tmp_path / "file" / "cell")
    with pytest.raises(ValueError, match=r"file/cell cannot be used .*--checkpoint-dir"), unusable:
        pass


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (2, 999_999, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert checkpoints.newest_step(tmp_path) == 1_000_000


def test_a_folder_that_another_process_begins_to_use_is_not_removed(tmp_path, monkeypatch):
    remove_folder = os.rmdir

    def rmdir(path, *, dir_fd=None):
        if Path(path).name == "cell":  # the last step, before which the other process makes its lock
            (tmp_path / "cell" / "lock").touch()
        remove_folder(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with checkpoints.reserve(tmp_path / "cell"):
        checkpoints.remove(tmp_path / "cell")
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["lock"]
    monkeypatch.undo()
    checkpoints.remove(tmp_path / "cell")
    checkpoints.remove(tmp_path / "cell")  # the other process may have removed it
    assert not (tmp_path / "cell").exists()

    def refuse(path):
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        checkpoints.remove(tmp_path)


def test_a_folder_is_one_trainings_at_a_time(tmp_path):
    with (
        checkpoints.reserve(tmp_path),
        pytest.raises(ValueError, match="another process"),
        checkpoints.reserve(tmp_path),
    ):
        raise AssertionError("not reached")
    with checkpoints.reserve(tmp_path):
        pass
