"""Is a cell known by what decides it, and by nothing else?"""

import json
import shutil

import pytest

from plw_mlflow.config import SweepConfig
from plw_mlflow.errors import UserError
from plw_mlflow.sweep import grid
from plw_mlflow.toy import TOY_FOLDER


@pytest.fixture
def data(tmp_path):
    def write(name, answer="4"):
        file = tmp_path / name
        file.write_text(json.dumps({"instruction": "2 + 2", "input": "", "output": answer}) + "\n")
        return str(file)

    return write


def plan(tmp_path, **options):
    return grid.plan(SweepConfig(**{"cache_dir": tmp_path / "cache", "dataset": "toy-short"} | options))


def identities(planned):
    return [cell.identity for cell in planned.cells]


def test_every_combination_is_a_cell_of_its_own(tmp_path):
    planned = plan(tmp_path, plw="0,0.1", seed="1,2", learning_rate="0.001,0.002")
    assert len(set(identities(planned))) == 8
    assert planned.cells[0].name == "plw 0 seed 1 learning-rate 0.001 toy-short toy full"


def test_a_cell_without_an_example_to_train_on_is_named_before_any_begins(tmp_path):
    planned = plan(tmp_path, plw="0,0.1", max_records="60", max_tokens="512,4")
    with pytest.raises(UserError) as raised:
        grid.check(planned.cells, are_here=True)
    (fault,) = str(raised.value).split("; ")
    assert fault.startswith("plw 0 max-tokens 4 toy-short toy full seed 1234: no example of toy-short is left")
    grid.check([cell for cell in planned.cells if cell.config.max_tokens == 512], are_here=True)


def test_a_grid_is_the_same_in_another_order_and_what_does_not_decide_does_not_count(tmp_path):
    one = plan(tmp_path, plw="0,0.1", seed="1,2")
    other = plan(tmp_path, plw="0.1,0", seed="2,1", jobs=3, output=tmp_path / "out", save_every=5)
    assert one.identity == other.identity
    assert set(identities(one)) == set(identities(other))
    assert plan(tmp_path, plw="0,0.1", seed="1,3").identity != one.identity


def test_files_count_by_what_is_in_them(tmp_path, data):
    first = plan(tmp_path, dataset=data("a.jsonl"), plw="0")
    assert identities(plan(tmp_path, dataset=data("b.jsonl"), plw="0")) == identities(first)
    changed = plan(tmp_path, dataset=data("a.jsonl", answer="5"), plw="0")
    assert identities(changed) != identities(first)
    assert changed.identity == first.identity  # so that the sweep is found again, and says what has changed
    name = f"data set {tmp_path / 'a.jsonl'}"
    assert changed.contents[name] != first.contents[name]


def test_what_is_mixed_into_what_counts(tmp_path, data):
    files = f"{data('a.jsonl')},{data('b.jsonl', answer='5')}"
    planned = plan(tmp_path, dataset=files, mix=files, mix_share=0.7, plw="0")
    assert len(set(identities(planned))) == len(planned.cells) == 4


def test_one_cell_under_two_names_is_one_cell(tmp_path, data, capsys):
    planned = plan(tmp_path, dataset=f"{data('a.jsonl')},{data('copy.jsonl')}", plw="0,1")
    assert len(planned.cells) == 2
    assert "left out, as others are the same under another name: 2 cells" in capsys.readouterr().out


def test_cells_that_differ_in_their_scoring_alone_have_one_training(tmp_path):
    four, eight = plan(tmp_path, plw="0", limit="4,8").cells
    assert four.identity != eight.identity
    assert four.training == eight.training
    (other,) = plan(tmp_path, plw="0.1", limit=4).cells
    assert other.training != four.training


def test_a_models_own_tokenizer_counts(tmp_path):
    folder = shutil.copytree(TOY_FOLDER, tmp_path / "model")
    before = plan(tmp_path, model=str(folder), plw="0")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    assert identities(plan(tmp_path, model=str(folder), plw="0")) != identities(before)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"plw": ","}, "plw names nothing"),
        ({"plw": "0,0.1,-1"}, "plw must be a number of 0 or more, got -1"),
        ({"learning_rate": "0.1,0"}, "learning-rate must be a number above 0, got 0"),
        ({"seed": "1,a"}, "seed must be whole numbers, got 1, a"),
        ({"method": "full,nope"}, "method must be full or lora or dora or qlora, got nope"),
        ({"plw": "0,0"}, "plw names a value twice: 0, 0"),
    ],
)
def test_a_fault_in_one_place_of_a_list_is_named(options, fault):
    with pytest.raises(UserError) as raised:
        SweepConfig(**options)
    assert fault in str(raised.value)
