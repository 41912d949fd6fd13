"""Does the card of a registered model say what it is, how it scores, and what its licences forbid?"""

import pytest

from plw_mlflow import tracking
from plw_mlflow.config import MainConfig
from plw_mlflow.data.sources import Source
from plw_mlflow.models import licences
from tests.conftest import byte_tokenizer, tiny_llama
from tests.tracking.helpers import add_scores

pytestmark = pytest.mark.usefixtures("store")
SOURCES = (("AlpacaData", "CC BY-NC 4.0"), ("mine | yours.jsonl", ""))


def test_a_card_says_what_a_model_is_and_flags_licences(store):
    config = MainConfig(model="llama-2-7b", dataset="AlpacaData", mix="mine.jsonl", plw=0.1, seed=7)
    with tracking.open_run(config, "cell") as run:
        run.tag(cell="c", base_model="meta-llama/Llama-2-7b-hf@" + "6" * 40, save_precision="float32")
        sources = [Source(name, "", "a" * 64, licence, "", False, iter) for name, licence in SOURCES]
        told = [{"name": name, "sha256": "a" * 64, "licence": licence, "records": 5} for name, licence in SOURCES]
        run.client.log_dict(run.id, {"sources": told}, "profile.json")
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), config, sources)
        name, number = store.get_run(run.id).data.tags["plw.model_version"].split("/")
        assert "It has not been scored." in store.get_model_version(name, number).description
        add_scores(run, ("a", 0.25), caveats={"a": "only the first 4 of 9 documents"})
    version = store.get_model_version(name, number)
    assert version.tags["plw.noncommercial"] == "true"
    assert version.tags["plw.data_licence"] == "CC BY-NC 4.0"
    for said in (
        "# llama-2-7b on AlpacaData + 0.5 mine.jsonl at PLW 0.1",
        "seed 7",
        "licence: Llama 2 Community License",
        "**Not for commercial use**: the licence of AlpacaData (CC BY-NC 4.0) forbids it.",
        "The licence of mine / yours.jsonl is not known here; look it up before use.",
        "- `a` acc: **0.2500** ± 0.1000 (5 questions, 0 examples before each)",
        "- base: `llama-2-7b` (meta-llama/Llama-2-7b-hf@",
        "model.predict(model.input_example, params=",
        "is **0.2500**",
        "cannot be compared with published scores: a: only the first 4 of 9 documents.",
        "learning-rate `0.001`",
        f'mlflow.pyfunc.load_model("models:/{name}/{number}")',
        f"entrypoints.verify --run-id {run.id}",
        "Nobody has checked",
    ):
        assert said in version.description
    assert len(version.description) <= 5000
    (output,) = store.get_run(run.id).outputs.model_outputs
    assert store.get_logged_model(output.model_id).tags["mlflow.note.content"] == version.description
    assert "Each version is one cell" in store.get_registered_model(name).description


@pytest.fixture
def registered(store):
    """An open run that has registered a model, whose base has no licence that is known, and the version."""
    config = MainConfig(model="tiny")
    with tracking.open_run(config, "cell") as run:
        run.tag(cell="c", base_model="f" * 64, save_precision="float32")
        tracking.log_model(run, tiny_llama(), byte_tokenizer(), config)
        yield run, *store.get_run(run.id).data.tags["plw.model_version"].split("/")


def test_a_licence_that_nobody_knows_permits_nothing(store, registered):
    assert "plw.noncommercial" not in store.get_model_version(*registered[1:]).tags


def test_many_benchmarks_leave_room_for_how_to_load_a_model(store, registered):
    run, name, number = registered
    add_scores(run, *((f"mmlu_high_school_government_and_politics_{task}", 0.25) for task in range(57)))
    text = store.get_model_version(name, number).description
    assert "more, in `scores.csv` of the run" in text
    assert "load_model(" in text
    assert text.endswith("Nobody has checked that what it writes is true or harmless.")
    assert len(text) <= 5000


def test_what_somebody_has_written_of_a_version_stays(store, registered):
    run, name, number = registered
    store.update_model_version(name, number, description="mine")
    add_scores(run, ("a", 0.25))
    assert store.get_model_version(name, number).description == "mine"


def test_a_cell_whose_registered_version_was_deleted_is_scored_all_the_same(store, registered):
    run, name, number = registered
    store.delete_model_version(name, number)
    add_scores(run, ("a", 0.25))
    assert store.get_run(run.id).data.metrics["a/acc"] == 0.25


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"),
        ("# Base", ""),
        ("---\n[\n---\n", ""),
        (None, ""),
    ],
)
def test_the_licence_of_a_base_is_what_its_readme_says(tmp_path, readme, expected):
    (tmp_path / "config.json").write_text("{}")
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licences.of_model(str(tmp_path)) == expected
    assert licences.is_noncommercial(expected) == ("nc" in expected)


def test_known_licences():
    assert licences.of_model("toy") == "MIT"
    assert licences.is_noncommercial(licences.of_model("llama-7b"))
    assert not licences.is_noncommercial(licences.of_model("llama-2-7b"))
