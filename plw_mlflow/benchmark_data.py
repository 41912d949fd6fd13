"""Benchmark documents from local files, in the field format of the hub's data sets.

Only where a task's documents come from changes: its prompts, its metrics and its version stay its own. So every reader
here ends in what the hub gives, whatever the file looks like.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plw_mlflow.errors import first_line

Document = dict[str, Any]
Reader = Callable[[Sequence[str]], list[Document]]


@dataclass(frozen=True)
class Local:
    """Where a task's documents lie in a folder, and how its files become documents."""

    files: tuple[str, ...]  # those that are scored, as the reader wants them
    read: Reader  # from the files' texts
    examples: tuple[str, ...] = ()  # those that few-shot examples are drawn from (empty: the task has none)


@dataclass(frozen=True)
class Documents:
    """A task's documents."""

    scored: list[Document]
    examples: list[Document] | None  # None: there is no file of them
    sha256: dict[str, str]  # of every file read, by its name


def find(task: str, folder: Path) -> Documents:
    """The documents of a task in LOCAL. Raises ValueError where its files are missing or damaged, naming the first."""
    local = LOCAL[task]
    scored = locate(task, folder)
    examples = [path for name in local.examples if (path := _nearest(name, folder)) is not None]
    has_examples = bool(local.examples) and len(examples) == len(local.examples)
    read = [*scored, *(examples if has_examples else [])]
    return Documents(
        _read(task, scored, local.read),
        _read(task, examples, local.read) if has_examples else None,
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in read},
    )


def locate(task: str, folder: Path) -> list[Path]:
    """The files of a task in LOCAL that are scored. Raises ValueError where one is missing, naming it."""
    return [_locate(task, name, folder) for name in LOCAL[task].files]


def overrides(config: dict[str, Any], documents: Documents) -> dict[str, Any]:
    """What of a task's config makes the harness take these documents; without examples the task runs 0-shot."""
    is_test = config.get("test_split") is not None
    scored = config["test_split"] if is_test else config["validation_split"]
    splits = {scored: documents.scored}
    if documents.examples is not None:
        splits["train"] = documents.examples

    # A function, as the harness copies configs deeply, and writes into its results what it cannot print the source of.
    def custom_dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(some) for split, some in splits.items()}

    return {
        "custom_dataset": custom_dataset,
        "training_split": None if documents.examples is None else "train",
        "validation_split": None if is_test else scored,
        "fewshot_split": None,  # then examples are drawn from the training split
    } | ({"num_fewshot": 0} if documents.examples is None else {})


def examples_files(task: str) -> str:
    """The files that a task's few-shot examples would be in, for a message."""
    return " and ".join(LOCAL[task].examples) or "a file of examples"


def _locate(task: str, name: str, folder: Path) -> Path:
    path = _nearest(name, folder)
    if path is None:
        raise ValueError(f"task {task} reads {folder / name}, which does not exist, nor in a folder below, nor as .gz")
    return path


def _nearest(name: str, folder: Path) -> Path | None:
    """The file of that name in a folder, or in the folders down to two below it; packed or not."""
    for depth in ("", "*/", "*/*/"):
        for ending in ("", ".gz"):
            if found := sorted(folder.glob(f"{depth}{name}{ending}")):
                return found[0]
    return None


def _read(task: str, paths: Sequence[Path], read: Reader) -> list[Document]:
    texts = []
    for path in paths:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            texts.append(data.decode("utf-8-sig"))
        except (OSError, EOFError, UnicodeDecodeError) as error:  # the first two are also those of a damaged .gz
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    try:
        documents = read(texts)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, csv.Error) as error:
        told = f"field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{' with '.join(map(str, paths))} is not what task {task} reads: {told}") from None
    if not documents:
        raise ValueError(f"{' with '.join(map(str, paths))} holds no document for task {task}")
    return documents


# Readers.


def _lines(text: str) -> list[str]:
    """Lines between newlines alone: other characters that end lines for `splitlines` occur within sentences."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _json_lines(text: str, read: Callable[[Any], Document]) -> list[Document]:
    documents = []
    for number, line in enumerate(_lines(text), start=1):
        try:
            documents.append(read(json.loads(line)))
        except KeyError as error:
            raise ValueError(f"line {number}: field {error} is missing") from None
        except (TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"line {number}: {first_line(error)}") from None
    return documents


def _chosen(row: Any, question: str) -> Document:
    """A question with lettered options. `question`: the field's name on the hub, which has number labels in places."""
    if isinstance(row["choices"], dict):  # as the hub has it
        if row["answerKey"].strip() not in row["choices"]["label"]:
            raise ValueError(f"answerKey {row['answerKey']!r} is none of its labels")
        return {question: row[question], "choices": row["choices"], "answerKey": row["answerKey"].strip()}
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    if row["answer"] not in range(len(labels)):
        raise ValueError(f"answer {row['answer']!r} is not the index of one of {len(labels)} choices")
    return {
        question: row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["answer"]],
    }


def _arc(texts: Sequence[str]) -> list[Document]:
    return _json_lines(texts[0], lambda row: _chosen(row, "question"))


def _openbookqa(texts: Sequence[str]) -> list[Document]:
    return _json_lines(texts[0], lambda row: _chosen(row, "question_stem"))


def _winogrande(texts: Sequence[str]) -> list[Document]:
    def read(row: Any) -> Document:
        answer = str(row["answer"])  # a string on the hub
        if answer not in ("1", "2"):
            raise ValueError(f"answer {row['answer']!r} is neither 1 nor 2")
        if row["sentence"].count("_") != 1:
            raise ValueError("the sentence does not have one _")
        return {name: row[name] for name in ("sentence", "option1", "option2")} | {"answer": answer}

    return _json_lines(texts[0], read)


def _piqa(texts: Sequence[str]) -> list[Document]:
    rows = _json_lines(texts[0], lambda row: {name: row[name] for name in ("goal", "sol1", "sol2")})
    labels = _lines(texts[1])
    if len(labels) != len(rows):
        raise ValueError(f"{len(rows)} questions, but {len(labels)} labels")
    if other := set(labels) - {"0", "1"}:
        raise ValueError(f"label {min(other)!r} is neither 0 nor 1")
    return [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _truthful_choice(*targets: str) -> Reader:
    """TruthfulQA's own file, in which the options of a question are a dictionary from text to truth."""

    def read(texts: Sequence[str]) -> list[Document]:
        documents = []
        for number, row in enumerate(json.loads(texts[0]), start=1):
            document = {"question": row["question"]}
            for name in targets:
                labels = list(row[name].values())
                if not {0, 1} == set(labels):
                    raise ValueError(f"question {number}: {name} must have answers labelled 1 and answers labelled 0")
                if name != "mc2_targets" and labels != [1] + [0] * (len(labels) - 1):
                    # The harness takes the first option for the true one.
                    raise ValueError(f"question {number}: the first of {name}, and no other, must be labelled 1")
                document[name] = {"choices": list(row[name]), "labels": labels}
            documents.append(document)
        return documents

    return read


def _truthful_generation(texts: Sequence[str]) -> list[Document]:
    def several(cell: str) -> list[str]:
        return [answer.strip() for answer in cell.split(";") if answer.strip()]

    return [
        {
            "type": row["Type"],
            "category": row["Category"],
            "question": row["Question"],
            "best_answer": row["Best Answer"],
            "correct_answers": several(row["Correct Answers"]),
            "incorrect_answers": several(row["Incorrect Answers"]),
            "source": row["Source"],
        }
        for row in csv.DictReader(io.StringIO(texts[0], newline=""), strict=True)
    ]


def _lambada(texts: Sequence[str]) -> list[Document]:
    return _json_lines(texts[0], lambda row: {"text": f"{row['context']} {row['continuation']}"})


def _pairs(first: str, second: str) -> Reader:
    """Two files of sentences, the languages' codes given; the same documents serve both directions."""

    def read(texts: Sequence[str]) -> list[Document]:
        one, other = map(_lines, texts)
        if len(one) != len(other):
            raise ValueError(f"{len(one)} lines in {first}, but {len(other)} in {second}")
        return [{"translation": {first: a, second: b}} for a, b in zip(one, other, strict=True)]

    return read


def _translation() -> dict[str, Local]:
    """WMT's test sets under sacreBLEU's names, for the harness's tasks and the study's."""
    found = {}
    for year, other in ((14, "fr"), (16, "de"), (16, "ro")):
        files = tuple(f"newstest20{year}.en-{other}.{language}" for language in ("en", other))
        for direction in (f"en-{other}", f"{other}-en"):
            for name in (f"wmt{year}-{direction}", f"huerta2024_wmt{year}-{direction}"):
                found[name] = Local(files, _pairs("en", other))
    return found


LOCAL: dict[str, Local] = {
    "arc_easy": Local(("arc_easy_test.jsonl",), _arc, ("arc_easy_train.jsonl",)),
    "arc_challenge": Local(("arc_challenge_test.jsonl",), _arc, ("arc_challenge_train.jsonl",)),
    "openbookqa": Local(("openbookqa_test.jsonl",), _openbookqa, ("openbookqa_train.jsonl",)),
    "winogrande": Local(("winogrande_dev.jsonl",), _winogrande, ("winogrande_train.jsonl",)),
    "piqa": Local(("piqa_valid.jsonl", "piqa_valid-labels.lst"), _piqa, ("piqa_train.jsonl", "piqa_train-labels.lst")),
    "truthfulqa_mc0": Local(("TruthfulQA_2025_binary.json",), _truthful_choice("mc0_targets")),
    "truthfulqa_mc1": Local(("TruthfulQA_mc_task.json",), _truthful_choice("mc1_targets")),
    "truthfulqa_mc2": Local(("TruthfulQA_mc_task.json",), _truthful_choice("mc2_targets")),
    "truthfulqa_gen": Local(("TruthfulQA.csv",), _truthful_generation),
    "lambada_openai": Local(("lambada_openai.jsonl",), _lambada),
} | _translation()
