"""Benchmark documents from local files, in the field format of the hub's data sets.

Only where a task's documents come from changes: its prompts, its metrics and its version stay its own. So every reader
here ends in what the hub gives, whatever the file looks like. What is wrong with a file is found as it is read, before
a model is trained, and not when it is scored.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plw_mlflow.errors import UserError, first_line

MOST_BYTES = 1 << 28  # of a file, unpacked; the largest of those that are known has 2 MB

LABELS = ("answerKey", "answer", "label")  # fields that hold the right option

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
    """The documents of a task in LOCAL. Raises UserError where its files are missing or damaged, naming the first."""
    local = LOCAL[task]
    scored = locate(task, folder)
    examples = [path for name in local.examples if (path := _nearest(name, folder)) is not None]
    has_examples = bool(local.examples) and len(examples) == len(local.examples)
    contents = {path: _content(path) for path in [*scored, *(examples if has_examples else [])]}
    return Documents(
        _read(task, {path: contents[path] for path in scored}, local.read),
        _read(task, {path: contents[path] for path in examples}, local.read) if has_examples else None,
        {path.name: hashlib.sha256(content).hexdigest() for path, content in contents.items()},
    )


def locate(task: str, folder: Path) -> list[Path]:
    """The files of a task in LOCAL that are scored. Raises UserError where one is missing, naming it."""
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
        raise UserError(f"task {task} reads {folder / name}, which does not exist, nor in a folder below, nor as .gz")
    return path


def _nearest(name: str, folder: Path) -> Path | None:
    """The file of that name in a folder, or in the folders down to two below it; packed or not."""
    for depth in ("", "*/", "*/*/"):
        for ending in ("", ".gz"):
            if found := sorted(folder.glob(f"{depth}{name}{ending}")):
                return found[0]
    return None


def _content(path: Path) -> bytes:
    """A file's bytes, as they lie on the disk."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return _bounded(path, content)


def _check_labels(named: str, documents: list[Document]) -> None:
    """Raise UserError where one question is there twice, with two answers."""
    known: dict[str, Any] = {}
    for number, document in enumerate(documents, start=1):
        label = [document.get(name) for name in LABELS]
        asked = json.dumps({name: value for name, value in document.items() if name not in LABELS}, sort_keys=True)
        if known.setdefault(asked, label) != label:
            raise UserError(f"{named}: question {number} is there before, with another answer")


def _bounded(path: Path, content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} holds more than {MOST_BYTES >> 20} MiB, which no file of a benchmark here does")
    return content


def _read(task: str, contents: dict[Path, bytes], read: Reader) -> list[Document]:
    texts = []
    for path, content in contents.items():
        try:
            if path.suffix == ".gz":
                with gzip.open(io.BytesIO(content)) as file:
                    content = _bounded(path, file.read(MOST_BYTES + 1))
            texts.append(content.decode("utf-8-sig"))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # but for the last, of a damaged .gz
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    named = " with ".join(map(str, contents))
    try:
        documents = read(texts)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError, csv.Error) as error:
        told = f"field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{named} is not what task {task} reads: {told}") from None
    _check_labels(named, documents)
    if not documents:
        raise UserError(f"{named} holds no document for task {task}")
    return documents


# Readers.


def _json(text: str) -> Any:
    """A JSON value. Raises UserError where an object has one key twice, as a later label would win over an earlier."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
        return found

    return json.loads(text, object_pairs_hook=once)


def _text(row: Any, name: str) -> str:
    """A field that must hold a text."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"its {name} must be a text, and is {value!r}"[:200])
    value.encode()  # half a surrogate pair would stop the tokenizer
    return value


def _options(texts: Any) -> list[str]:
    """The options of a question: two at least, no two alike, as one of them is right and another wrong."""
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError("its options must be a list of two texts or more")
    options = [_text(texts, place) for place in range(len(texts))]  # type: ignore[arg-type]
    if len(set(options)) < len(options):
        raise UserError(f"its option {next(one for one in options if options.count(one) > 1)!r} occurs twice")
    return options


def _lines(text: str) -> list[str]:
    """Lines between newlines alone: other characters that end lines for `splitlines` occur within sentences."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _json_lines(text: str, read: Callable[[Any], Document]) -> list[Document]:
    documents = []
    for number, line in enumerate(_lines(text), start=1):
        try:
            documents.append(read(_json(line)))
        except KeyError as error:
            raise UserError(f"line {number}: field {error} is missing") from None
        except (TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"line {number}: {first_line(error)}") from None
    return documents


def _chosen(row: Any, question: str) -> Document:
    """A question with lettered options. `question`: the field's name on the hub, which has number labels in places."""
    if isinstance(row["choices"], dict):  # as the hub has it
        options, labels = _options(row["choices"]["text"]), _options(row["choices"]["label"])
        if len(labels) != len(options):
            raise UserError(f"it has {len(options)} options, but {len(labels)} labels")
        if row["answerKey"].strip() not in labels:
            raise UserError(f"answerKey {row['answerKey']!r} is none of its labels")
        return {question: _text(row, question), "choices": row["choices"], "answerKey": row["answerKey"].strip()}
    options = _options(row["choices"])
    labels = [chr(ord("A") + number) for number in range(len(options))]
    if type(row["answer"]) is not int or row["answer"] not in range(len(labels)):
        raise UserError(f"answer {row['answer']!r} is not the index of one of {len(labels)} choices")
    return {
        question: _text(row, "question"),
        "choices": {"text": options, "label": labels},
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
            raise UserError(f"answer {row['answer']!r} is neither 1 nor 2")
        if row["sentence"].count("_") != 1:
            raise UserError("the sentence does not have one _")
        _options([row["option1"], row["option2"]])
        return {name: _text(row, name) for name in ("sentence", "option1", "option2")} | {"answer": answer}

    return _json_lines(texts[0], read)


def _piqa(texts: Sequence[str]) -> list[Document]:
    def question(row: Any) -> Document:
        _options([row["sol1"], row["sol2"]])
        return {name: _text(row, name) for name in ("goal", "sol1", "sol2")}

    rows = _json_lines(texts[0], question)
    labels = _lines(texts[1])
    if len(labels) != len(rows):
        raise UserError(f"{len(rows)} questions, but {len(labels)} labels")
    if other := set(labels) - {"0", "1"}:
        raise UserError(f"label {min(other)!r} is neither 0 nor 1")
    return [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _truthful_choice(*targets: str) -> Reader:
    """TruthfulQA's own file, in which the options of a question are a dictionary from text to truth."""

    def read(texts: Sequence[str]) -> list[Document]:
        documents = []
        for number, row in enumerate(_json(texts[0]), start=1):
            document: Document = {"question": _text(row, "question")}
            for name in targets:
                labels = list(row[name].values())
                if not {0, 1} == set(labels):
                    raise UserError(f"question {number}: {name} must have answers labelled 1 and answers labelled 0")
                if name != "mc2_targets" and labels != [1] + [0] * (len(labels) - 1):
                    # The harness takes the first option for the true one.
                    raise UserError(f"question {number}: the first of {name}, and no other, must be labelled 1")
                document[name] = {"choices": _options(list(row[name])), "labels": labels}
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
            "question": _text(row, "Question"),
            "best_answer": _text(row, "Best Answer"),
            "correct_answers": several(row["Correct Answers"]),
            "incorrect_answers": several(row["Incorrect Answers"]),
            "source": row["Source"],
        }
        for row in csv.DictReader(io.StringIO(texts[0], newline=""), strict=True)
    ]


def _lambada(texts: Sequence[str]) -> list[Document]:
    return _json_lines(texts[0], lambda row: {"text": f"{_text(row, 'context')} {_text(row, 'continuation')}"})


def _pairs(first: str, second: str) -> Reader:
    """Two files of sentences, the languages' codes given; the same documents serve both directions."""

    def read(texts: Sequence[str]) -> list[Document]:
        one, other = map(_lines, texts)
        if len(one) != len(other):
            raise UserError(f"{len(one)} lines in {first}, but {len(other)} in {second}")
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
