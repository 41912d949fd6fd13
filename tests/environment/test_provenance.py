"""Is other code than MLflow's record names refused, and a store that a container would take with it?"""

import shutil
from pathlib import Path

import pytest

from plw_mlflow.environment import provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def container(tmp_path, monkeypatch):
    """As in the image: its code in one folder, the project's in another."""
    for name in ("image", "project"):
        (tmp_path / name / "plw_mlflow").mkdir(parents=True)
        (tmp_path / name / "plw_mlflow" / "loss.py").write_text("loss = 1\n")
        (tmp_path / name / "entrypoints").mkdir()
        (tmp_path / name / "conda.yaml").write_text("name: plw_mlflow\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "image")
    monkeypatch.setattr(provenance, "IMAGE_ROOT", tmp_path / "image")
    monkeypatch.setenv("PLW_IMAGE", "plw_mlflow:0")
    monkeypatch.setenv("PLW_GIT_COMMIT", COMMIT)
    monkeypatch.setenv("PLW_FOLDER", str(tmp_path / "project"))
    return tmp_path


def test_the_same_code_may_run_whatever_the_commits(container):
    (container / "project" / "README.md").write_text("of another commit\n")
    (container / "image" / "plw_mlflow" / "__pycache__").mkdir()
    (container / "image" / "plw_mlflow" / "__pycache__" / "loss.pyc").write_text("made by running")
    provenance.check_image("f" * 40)


@pytest.mark.parametrize("file", ["plw_mlflow/loss.py", "plw_mlflow/new.yaml", "entrypoints/main.py", "conda.yaml"])
def test_other_code_is_refused(container, file):
    (container / "project" / file).write_text("loss = 2\n")
    with pytest.raises(ValueError, match=r"was built from other code than .*project holds now; build it again"):
        provenance.check_image(COMMIT)


def test_a_renamed_file_is_other_code(container):
    shutil.move(container / "project/plw_mlflow/loss.py", container / "project/plw_mlflow/losses.py")
    with pytest.raises(ValueError, match="other code"):
        provenance.check_image(COMMIT)


def test_without_the_folder_the_commits_are_compared(container, monkeypatch):
    monkeypatch.delenv("PLW_FOLDER")
    provenance.check_image(COMMIT)
    provenance.check_image(None)  # MLflow recorded none: docker run without mlflow run
    with pytest.raises(ValueError, match=f"built from commit {COMMIT}, but MLflow records ffff"):
        provenance.check_image("f" * 40)
    monkeypatch.setenv("PLW_GIT_COMMIT", f"{COMMIT}-dirty")
    with pytest.raises(ValueError, match="-dirty, but MLflow records"):
        provenance.check_image(COMMIT)
    monkeypatch.delenv("PLW_GIT_COMMIT")
    with pytest.raises(ValueError, match="built from commit unknown"):
        provenance.check_image(COMMIT)


def test_outside_the_image_and_under_build_image_there_is_nothing_to_compare(container, monkeypatch):
    (container / "project" / "plw_mlflow" / "loss.py").write_text("loss = 2\n")
    monkeypatch.setattr(provenance, "ROOT", container / "copied")  # the folder's own code, put over the image's
    provenance.check_image("f" * 40)
    monkeypatch.setattr(provenance, "ROOT", container / "image")
    monkeypatch.delenv("PLW_IMAGE")
    provenance.check_image("f" * 40)


def test_the_commit_is_the_images_in_the_image_and_gits_outside(container, monkeypatch):
    assert provenance.commit() == COMMIT
    monkeypatch.setattr(provenance, "ROOT", Path(__file__).resolve().parents[2])
    assert provenance.commit() != COMMIT


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """As if `tmp_path` were a mount, and all else the container's own."""
    monkeypatch.setenv("PLW_IMAGE", "plw_mlflow:0")
    monkeypatch.setattr(provenance, "_in_container", lambda path: path.startswith("/") and str(tmp_path) not in path)
    return tmp_path


def test_a_store_whose_files_would_be_lost_is_refused(mounted):
    store = f"sqlite:///{mounted}/mlflow.db"
    provenance.check_mounted(store, f"{mounted}/mlruns/0")
    provenance.check_mounted(store, f"file://{mounted}/mlruns/0")
    for place in ("/home/her/mlruns/0", "file:///home/her/mlruns/0"):
        with pytest.raises(ValueError, match=r"is not mounted in the container.* -A v=/home/her:/home/her"):
            provenance.check_mounted(store, place)
    with pytest.raises(ValueError, match="-A v=/somewhere/else:/somewhere/else"):
        provenance.check_mounted("http://127.0.0.1:5000", "/somewhere/else")


def test_a_store_elsewhere_or_wholly_in_the_container_is_let_be(mounted, monkeypatch):
    provenance.check_mounted("http://127.0.0.1:5000", "mlflow-artifacts:/0")
    provenance.check_mounted("http://127.0.0.1:5000", "s3://bucket/0")
    provenance.check_mounted("sqlite:////home/plw/mlflow.db", "/home/plw/mlruns/0")  # the entry point has warned of it
    monkeypatch.delenv("PLW_IMAGE")
    provenance.check_mounted("http://127.0.0.1:5000", "/somewhere/else")


def test_what_is_on_no_mount_is_the_containers(tmp_path, monkeypatch):
    lines = [
        "22 1 8:1 / / rw,relatime - ext4 /dev/root rw",
        r"23 22 0:5 / /home/a\040b/j\134 rw - ext4 /dev/sda1 rw",
        "24 22 0:6 / /home/jürgen rw - ext4 /dev/sda1 rw",
    ]
    monkeypatch.setattr(Path, "read_text", lambda self, errors: "\n".join(lines))
    assert provenance.mount_points() == [Path("/"), Path("/home/a b/j\\"), Path("/home/jürgen")]
    assert not provenance._in_container("/home/jürgen/mlruns/0")
    assert not provenance._in_container("/home/a b/j\\/new")
    assert provenance._in_container("/home/jürgens")
    assert not provenance._in_container("s3://bucket")
