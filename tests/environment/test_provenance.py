"""Is other code refused than MLflow's record of the run names?"""

import shutil
from pathlib import Path

import pytest
import torch

from plw_mlflow.environment import container, provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """As in the image: its code in one folder, the project's in another."""
    for name in ("image", "project"):
        (tmp_path / name / "plw_mlflow").mkdir(parents=True)
        (tmp_path / name / "plw_mlflow" / "loss.py").write_text("loss = 1\n")
        (tmp_path / name / "entrypoints").mkdir()
        (tmp_path / name / "conda.yaml").write_text("name: plw_mlflow\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "image")
    monkeypatch.setattr(container, "IMAGE_ROOT", tmp_path / "image")
    monkeypatch.setenv("PLW_IMAGE", "plw_mlflow:0")
    monkeypatch.setenv("PLW_GIT_COMMIT", COMMIT)
    monkeypatch.setenv("PLW_FOLDER", str(tmp_path / "project"))
    return tmp_path


def test_the_same_code_may_run_whatever_the_commits(folders):
    (folders / "project" / "README.md").write_text("of another commit\n")
    (folders / "image" / "plw_mlflow" / "__pycache__").mkdir()
    (folders / "image" / "plw_mlflow" / "__pycache__" / "loss.pyc").write_text("made by running")
    provenance.check_image("f" * 40)


@pytest.mark.parametrize("file", ["plw_mlflow/loss.py", "plw_mlflow/new.yaml", "entrypoints/main.py", "conda.yaml"])
def test_other_code_is_refused(folders, file):
    (folders / "project" / file).write_text("loss = 2\n")
    with pytest.raises(ValueError, match=r"was built from other code than .*project holds now; build it again"):
        provenance.check_image(COMMIT)


def test_a_renamed_file_is_other_code(folders):
    shutil.move(folders / "project/plw_mlflow/loss.py", folders / "project/plw_mlflow/losses.py")
    with pytest.raises(ValueError, match="other code"):
        provenance.check_image(COMMIT)


def test_without_the_folder_the_commits_are_compared(folders, monkeypatch):
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


def test_outside_the_image_and_under_build_image_there_is_nothing_to_compare(folders, monkeypatch):
    (folders / "project" / "plw_mlflow" / "loss.py").write_text("loss = 2\n")
    monkeypatch.setattr(provenance, "ROOT", folders / "copied")  # the folder's own code, put over the image's
    provenance.check_image("f" * 40)
    monkeypatch.setattr(provenance, "ROOT", folders / "image")
    monkeypatch.delenv("PLW_IMAGE")
    provenance.check_image("f" * 40)


def test_the_commit_is_the_images_in_the_image_and_gits_outside(folders, monkeypatch):
    assert provenance.commit() == COMMIT
    monkeypatch.setattr(provenance, "ROOT", Path(__file__).resolve().parents[2])
    assert provenance.commit() != COMMIT


def test_the_fingerprint_is_text_that_names_what_numbers_depend_on():
    fingerprint = provenance.fingerprint()
    assert fingerprint["torch"] == torch.__version__.partition("+")[0] or fingerprint["torch"] == torch.__version__
    assert {"python", "processor", "device", "devices", "threads", "processes", "transformers", "lm-eval"} <= set(
        fingerprint
    )
    assert all(isinstance(value, str) and value for value in fingerprint.values())
