"""Are the tasks that a list names loaded, and do they read local files?"""

import json

import pytest

from plw_mlflow.config import ScoreOptions
from plw_mlflow.evaluation import tasks
from plw_mlflow.evaluation.tasks import load_tasks


@pytest.fixture
def arc(tmp_path):
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [str(2 * n), "none", "many"], "answer": 0} for n in range(1, 4)
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_local_file_gives_the_harness_its_own_task(arc):
    (task,) = load_tasks(ScoreOptions(tasks="arc_easy", data_dir=arc)).loaded
    document = next(iter(task.test_docs()))
    assert task.doc_to_text(document) == "Question: What is 1 and 1?\nAnswer:"
    assert task.doc_to_choice(document) == ["2", "none", "many"]
    assert task.doc_to_target(document) == 0
    assert [metric["metric"] for metric in task.config.metric_list] == ["acc", "acc_norm"]


def test_a_group_or_tag_of_the_harness_reads_local_files_too():
    from lm_eval.tasks._index import Entry, Kind

    index = {
        "mine": Entry("mine", Kind.GROUP, None, {"group": "mine", "task": ["piqa", {"task": "arc"}, "gone"]}),
        "arc": Entry("arc", Kind.TAG, None, None, {"arc_easy", "arc_challenge"}),
        "piqa": Entry("piqa", Kind.TASK, None),
    }
    assert list(tasks._leaves("mine", index)) == ["piqa", "arc_challenge", "arc_easy"]


def test_an_unknown_task_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match="there is no task 'toy_shrt'; the nearest are toy_short"):
        load_tasks(ScoreOptions(tasks="toy,toy_shrt"))


def test_a_task_that_needs_another_package_is_told_in_one_line(monkeypatch):
    def needs(*_):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", needs)
    with pytest.raises(
        ValueError, match="the tasks toy need a package that is not installed: No module named 'langdetect"
    ):
        load_tasks(ScoreOptions(tasks="toy"))
