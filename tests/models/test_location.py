"""Does a name stand for one model, and does its digest follow the weights?"""

import pytest

from plw_mlflow.models import location
from plw_mlflow.toy import TOY_FOLDER
from tests.conftest import tiny_llama


def test_a_digest_follows_the_weights_and_nothing_else(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("notes")
    assert location.digest(str(tmp_path / "a")) == location.digest(str(tmp_path / "b"))
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "b")
    assert location.digest(str(tmp_path / "a")) != location.digest(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name@abc123", ("org/name", "abc123")),
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("toy", (str(TOY_FOLDER), None)),
        ("llama-2-7b", ("meta-llama/Llama-2-7b-hf", "01c7f73d771dfac7d292323805ebc428287df4f9")),
    ],
)
def test_a_name_may_pin_a_revision(name, expected):
    found = location.locate(name)
    assert (found.path, found.revision) == expected
