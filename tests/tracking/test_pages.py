"""Can the commands that are printed beside addresses be pasted into a shell?"""

import shlex

import mlflow

from plw_mlflow.tracking import pages


def test_a_store_with_blanks_in_its_place_is_one_word_of_the_command(tmp_path):
    folder = tmp_path / "my stores; and more"
    folder.mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    command = pages.opened("#/x").partition("    then open ")[0]
    assert shlex.split(command) == ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
