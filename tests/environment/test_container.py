"""Is a store refused whose files a container would take with it when it ends?"""

from pathlib import Path

import pytest

from plw_mlflow.environment import container


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """As if `tmp_path` were a mount, and all else the container's own."""
    monkeypatch.setenv("PLW_IMAGE", "plw_mlflow:0")
    monkeypatch.setattr(
        container, "_is_lost_with_container", lambda path: path.startswith("/") and str(tmp_path) not in path
    )
    return tmp_path


def test_a_store_whose_files_would_be_lost_is_refused(mounted):
    store = f"sqlite:///{mounted}/mlflow.db"
    container.check_mounted(store, f"{mounted}/mlruns/0")
    container.check_mounted(store, f"file://{mounted}/mlruns/0")
    for place in ("/home/her/mlruns/0", "file:///home/her/mlruns/0"):
        with pytest.raises(ValueError, match=r"is not mounted in the container.* -A v=/home/her:/home/her"):
            container.check_mounted(store, place)
    with pytest.raises(ValueError, match="-A v=/somewhere/else:/somewhere/else"):
        container.check_mounted("http://127.0.0.1:5000", "/somewhere/else")


def test_a_store_elsewhere_or_wholly_in_the_container_is_let_be(mounted, monkeypatch):
    container.check_mounted("http://127.0.0.1:5000", "mlflow-artifacts:/0")
    container.check_mounted("http://127.0.0.1:5000", "s3://bucket/0")
    container.check_mounted("sqlite:////home/plw/mlflow.db", "/home/plw/mlruns/0")  # the entry point has warned of it
    monkeypatch.delenv("PLW_IMAGE")
    container.check_mounted("http://127.0.0.1:5000", "/somewhere/else")


def test_what_is_on_no_mount_is_the_containers(tmp_path, monkeypatch):
    lines = [
        "22 1 8:1 / / rw,relatime - ext4 /dev/root rw",
        r"23 22 0:5 / /home/a\040b/j\134 rw - ext4 /dev/sda1 rw",
        "24 22 0:6 / /home/jürgen rw - ext4 /dev/sda1 rw",
    ]
    monkeypatch.setattr(Path, "read_text", lambda self, errors: "\n".join(lines))
    assert container.mount_points() == [Path("/"), Path("/home/a b/j\\"), Path("/home/jürgen")]
    assert not container._is_lost_with_container("/home/jürgen/mlruns/0")
    assert not container._is_lost_with_container("/home/a b/j\\/new")
    assert container._is_lost_with_container("/home/jürgens")
    assert not container._is_lost_with_container("s3://bucket")
