"""Is a checkpoint whole or not there, and does whatever goes wrong with one leave the others?"""

import errno

import pytest
import torch

from plw_mlflow import checkpoints
from plw_mlflow.checkpoints import Checkpoint, Writer


def checkpoint(step):
    weight = torch.full((3, 2), float(step))
    return Checkpoint(step, {"layer.weight": weight}, {"exp_avg/layer.weight": weight / 2})


def write(folder, *steps, keep=1, after_save=lambda saved: None):
    writer = Writer(folder, keep, after_save)
    for step in steps:
        writer.save(checkpoint(step))
    writer.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_loads(folder, step):
    found, expected = checkpoints.load(folder), checkpoint(step)
    assert found.step == step == checkpoints.newest_step(folder)
    for part in ("weights", "optimizer"):
        assert getattr(found, part).keys() == getattr(expected, part).keys()
        assert all(map(torch.equal, getattr(found, part).values(), getattr(expected, part).values()))


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [4, 9]), (5, [2, 4, 9])])
def test_the_newest_are_kept_and_one_is_loaded(keep, kept, tmp_path):
    write(tmp_path, 2, 4, 9, keep=keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]
    assert_loads(tmp_path, 9)


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoints.load(tmp_path) is None
    assert checkpoints.newest_step(tmp_path) == 0


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.load(tmp_path) is None
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

    def full(tensors, file):
        if "exp_avg/layer.weight" in tensors and tensors["exp_avg/layer.weight"].max() == 2:
            file.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, file)

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
    with pytest.warns(UserWarning, match=r"step-000004 cannot be read"):
        assert checkpoints.load(tmp_path).step == 2
    assert checkpoints.newest_step(tmp_path) == 2
    write(tmp_path, 3, 4)  # the name of the damaged one is free again
    assert_loads(tmp_path, 4)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (2, 999_999, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert checkpoints.newest_step(tmp_path) == 1_000_000


def test_a_folder_is_one_trainings_at_a_time(tmp_path):
    with (
        checkpoints.reserve(tmp_path),
        pytest.raises(ValueError, match="another process"),
        checkpoints.reserve(tmp_path),
    ):
        raise AssertionError("not reached")
    with checkpoints.reserve(tmp_path):
        pass
