"""Does a local file become what the hub gives?"""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from plw_mlflow.evaluation import local_documents

LABELS = ["A", "B", "C"]
ARC = '{"question": "Hot?", "choices": ["ice", "fire", "air"], "answer": 1}\n'
PIQA = '{"goal": "Eat.", "sol1": "Chew.", "sol2": "Cook."}\n'
TRUTH = [{"question": "Why?", "mc1_targets": {"So.": 1, "No.": 0}, "mc2_targets": {"No.": 0, "So.": 1, "Yes.": 1}}]
CSV = (
    "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    'Odd,Law,Why?,So,"So; ""Thus"", so;",No; Never,https://x\n'
)
CASES = {
    "arc_easy": (
        {"arc_easy_test.jsonl": ARC},
        {"question": "Hot?", "choices": {"text": ["ice", "fire", "air"], "label": LABELS}, "answerKey": "B"},
    ),
    "arc_challenge": (  # as the hub has it, number labels and all
        {
            "arc_challenge_test.jsonl": json.dumps(
                {"id": "x", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}}
                | {"answerKey": "2"}
            )
        },
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
    ),
    "openbookqa": (
        {"openbookqa_test.jsonl": ARC},
        {"question_stem": "Hot?", "choices": {"text": ["ice", "fire", "air"], "label": LABELS}, "answerKey": "B"},
    ),
    "winogrande": (
        {"winogrande_dev.jsonl": '{"sentence": "He _ it.", "option1": "ate", "option2": "met", "answer": 2}'},
        {"sentence": "He _ it.", "option1": "ate", "option2": "met", "answer": "2"},
    ),
    "piqa": (
        {"piqa_valid.jsonl": PIQA, "piqa_valid-labels.lst": "1\n"},
        {"goal": "Eat.", "sol1": "Chew.", "sol2": "Cook.", "label": 1},
    ),
    "truthfulqa_mc1": (
        {"TruthfulQA_mc_task.json": json.dumps(TRUTH)},
        {"question": "Why?", "mc1_targets": {"choices": ["So.", "No."], "labels": [1, 0]}},
    ),
    "truthfulqa_mc2": (
        {"TruthfulQA_mc_task.json": json.dumps(TRUTH)},
        {"question": "Why?", "mc2_targets": {"choices": ["No.", "So.", "Yes."], "labels": [0, 1, 1]}},
    ),
    "truthfulqa_mc0": (
        {"TruthfulQA_2025_binary.json": json.dumps([{"question": "Why?", "mc0_targets": {"So.": 1, "No.": 0}}])},
        {"question": "Why?", "mc0_targets": {"choices": ["So.", "No."], "labels": [1, 0]}},
    ),
    "truthfulqa_gen": (
        {"TruthfulQA.csv": CSV},
        {
            "type": "Odd",
            "category": "Law",
            "question": "Why?",
            "best_answer": "So",
            "correct_answers": ["So", '"Thus", so'],
            "incorrect_answers": ["No", "Never"],
            "source": "https://x",
        },
    ),
    "lambada_openai": (
        {"lambada_openai.jsonl": '{"context": "It is as it", "continuation": "is"}'},
        {"text": "It is as it is"},
    ),
    "wmt14-en-fr": (
        # U+2028 ends a line for Python, but within a sentence it is a part of it.
        {"newstest2014.en-fr.en": "Yes.\u2028No.\n", "newstest2014.en-fr.fr": "Oui.\r\n"},
        {"translation": {"en": "Yes.\u2028No.", "fr": "Oui."}},
    ),
    "huerta2024_wmt16-ro-en": (
        {"newstest2016.en-ro.en": "Yes.", "newstest2016.en-ro.ro": "Da."},
        {"translation": {"en": "Yes.", "ro": "Da."}},
    ),
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("task", CASES)
def test_documents_are_the_hubs(tmp_path, task):
    files, expected = CASES[task]
    write(tmp_path, files)
    found = local_documents.find(task, tmp_path)
    assert found.scored == [expected]
    assert found.examples is None
    assert found.sha256.keys() == files.keys()


def test_files_may_be_packed_and_lie_in_folders_below(tmp_path):
    below = tmp_path / "eval" / "more"
    below.mkdir(parents=True)
    (below / "arc_easy_test.jsonl.gz").write_bytes(gzip.compress(ARC.encode()))
    assert local_documents.find("arc_easy", tmp_path).scored[0]["answerKey"] == "B"
    write(tmp_path, {"eval/arc_easy_test.jsonl": ARC.replace('"answer": 1', '"answer": 2')})
    assert local_documents.find("arc_easy", tmp_path).scored[0]["answerKey"] == "C"  # the nearer one


def test_examples_come_from_their_own_files(tmp_path):
    write(tmp_path, CASES["piqa"][0] | {"piqa_train.jsonl": PIQA + PIQA.replace("Eat", "Cook")})
    assert local_documents.find("piqa", tmp_path).examples is None  # they lack their labels
    write(tmp_path, {"piqa_train-labels.lst": "0\n1\n"})
    found = local_documents.find("piqa", tmp_path)
    assert [example["label"] for example in found.examples] == [0, 1]
    assert len(found.sha256) == 4


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        ("piqa", {"piqa_valid.jsonl": PIQA}, "task piqa reads FOLDER/piqa_valid-labels.lst, which does not exist"),
        ("piqa", {"piqa_valid.jsonl": PIQA * 2, "piqa_valid-labels.lst": "1\n"}, "2 questions, but 1 labels"),
        ("piqa", {"piqa_valid.jsonl": PIQA, "piqa_valid-labels.lst": "2\n"}, "label '2' is neither 0 nor 1"),
        ("arc_easy", {"arc_easy_test.jsonl": ARC + "{"}, "what task arc_easy reads: line 2: Expecting"),
        ("arc_easy", {"arc_easy_test.jsonl": '{"question": "?"}'}, "line 1: field 'choices' is missing"),
        ("arc_easy", {"arc_easy_test.jsonl": ARC.replace("1}", "3}")}, "answer 3 is not the index of one of 3 choices"),
        ("arc_easy", {"arc_easy_test.jsonl": ""}, "holds no document for task arc_easy"),
        ("arc_easy", {"arc_easy_test.jsonl": "[]"}, "line 1: list indices must be integers"),
        ("winogrande", {"winogrande_dev.jsonl": '{"sentence": "He.", "answer": 1}'}, "does not have one _"),
        ("truthfulqa_mc1", {"TruthfulQA_mc_task.json": json.dumps(TRUTH)[:50]}, "what task truthfulqa_mc1 reads"),
        (
            "truthfulqa_mc1",
            {"TruthfulQA_mc_task.json": '[{"question": "?", "mc1_targets": {"No.": 0, "So.": 1}}]'},
            "question 1: the first of mc1_targets, and no other, must be labelled 1",
        ),
        ("arc_easy", {"arc_easy_test.jsonl": ARC.replace("fire", "ice")}, "line 1: its option 'ice' occurs twice"),
        ("arc_easy", {"arc_easy_test.jsonl": ARC.replace('"fire"', "7")}, "line 1: its 1 must be a text, and is 7"),
        (
            "arc_easy",
            {"arc_easy_test.jsonl": ARC.replace('"Hot?"', "null")},
            "its question must be a text, and is None",
        ),
        ("arc_easy", {"arc_easy_test.jsonl": ARC.replace("1}", "true}")}, "answer True is not the index"),
        ("arc_easy", {"arc_easy_test.jsonl": ARC.replace("Hot?", "\\ud800")}, "line 1: 'utf-8' codec can't encode"),
        (
            "arc_easy",
            {"arc_easy_test.jsonl": ARC.replace("{", '{"answer": 0, ')},
            "the key 'answer' occurs twice in one",
        ),
        ("arc_easy", {"arc_easy_test.jsonl": "[" * 100_000}, "line 1: maximum recursion depth"),
        (
            "piqa",
            {"piqa_valid.jsonl": PIQA.replace("Cook", "Chew"), "piqa_valid-labels.lst": "1\n"},
            "'Chew.' occurs tw",
        ),
        (
            "arc_easy",
            {"arc_easy_test.jsonl": ARC + ARC.replace('"answer": 1', '"answer": 2')},
            "question 2 occurs before, with another answer",
        ),
        (
            "winogrande",
            {"winogrande_dev.jsonl": '{"sentence": "He _.", "option1": "a", "option2": "a", "answer": 1}'},
            "its option 'a' occurs twice",
        ),
        (
            "truthfulqa_mc1",
            {"TruthfulQA_mc_task.json": '[{"question": "?", "mc1_targets": {"So.": 1, "No.": 0, "So.": 0}}]'},
            "the key 'So.' occurs twice in one object",
        ),
        ("truthfulqa_gen", {"TruthfulQA.csv": "Question\nWhy?\n"}, "field 'Type' is missing"),
        ("wmt16-de-en", {"newstest2016.en-de.en": "a\nb\n", "newstest2016.en-de.de": "a\n"}, "2 lines in en, but 1 in"),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path, task, files, message):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"FOLDER|\.") as error:
        local_documents.find(task, tmp_path)
    assert message.replace("FOLDER", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)
    assert Path(next(iter(local_documents.LOCAL[task].files))).stem in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(ARC.encode())[:-9],
        b"no gzip",
        gzip.compress(b"\xff"),
        gzip.compress(ARC.encode())[:20] + b"x" * 30,
    ],
    ids=["cut off", "no gzip", "not UTF-8", "damaged inside"],
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    (tmp_path / "arc_easy_test.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl\.gz cannot be read"):
        local_documents.find("arc_easy", tmp_path)


def test_a_file_that_unpacks_to_more_than_any_benchmark_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(local_documents, "MAX_BYTES", 1000)
    (tmp_path / "arc_easy_test.jsonl.gz").write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl\.gz holds more than 0 MiB"):
        local_documents.find("arc_easy", tmp_path)
    (tmp_path / "arc_easy_test.jsonl").write_bytes(b" " * 1001)
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl holds more than 0 MiB"):
        local_documents.find("arc_easy", tmp_path)


def test_the_digest_is_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """Even if the file changes meanwhile: each is opened once."""
    path = tmp_path / "arc_easy_test.jsonl"
    path.write_text(ARC)
    opened = Path.open

    def once(self, *how):
        file = opened(self, *how)
        self.unlink()
        return file

    monkeypatch.setattr(Path, "open", once)
    found = local_documents.find("arc_easy", tmp_path)
    assert found.sha256 == {path.name: hashlib.sha256(ARC.encode()).hexdigest()}


def test_the_real_files_are_read_whole(shared):
    """Counts as the data's own README tells them."""
    expected = {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "winogrande": 1267, "piqa": 1838}
    expected |= {"truthfulqa_mc0": 790, "truthfulqa_mc1": 817, "truthfulqa_mc2": 817, "truthfulqa_gen": 817}
    expected |= {"lambada_openai": 5153, "wmt14-fr-en": 3003, "wmt16-en-de": 2999, "huerta2024_wmt16-en-ro": 1999}
    found = {task: len(local_documents.find(task, shared / "data").scored) for task in expected}
    assert found == expected
