"""Benchmark documents from local files, in the fields of the hub's data sets.

Only the source of a task's documents changes. Its prompts, metrics and version stay the same, so that every reader here
gives the fields that the hub gives, whatever the file looks like. A faulty file is refused when it is read, which is
before a model is trained and not when it is scored.
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

MAX_BYTES = 1 << 28  # of a file, unpacked; the largest of the files in LOCAL has 2 MB

LABELS = ("answerKey", "answer", "label")  # fields that hold the right option

Document = dict[str, Any]
Reader = Callable[[Sequence[str]], list[Document]]


@dataclass(frozen=True)
class Local:
    """The files of a task's documents, and how they are read."""

    files: tuple[str, ...]  # of the documents that are scored, in the order that the reader takes
    read: Reader  # makes documents of the files' texts
    examples: tuple[str, ...] = ()  # files that few-shot examples are drawn from (empty: the task has none)


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
    """The values in a task's config that make the harness take these documents; without examples it runs 0-shot."""
    is_test = config.get("test_split") is not None
    scored = config["test_split"] if is_test else config["validation_split"]
    splits = {scored: documents.scored}
    if documents.examples is not None:
        splits["train"] = documents.examples

    # A function, as the harness copies all other values of its configs deeply and writes them into its results.
    def custom_dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(of_split) for split, of_split in splits.items()}

    return {
        "custom_dataset": custom_dataset,
        "training_split": None if documents.examples is None else "train",
        "validation_split": None if is_test else scored,
        "fewshot_split": None,  # then examples are drawn from the training split
    } | ({"num_fewshot": 0} if documents.examples is None else {})


def examples_files(task: str) -> str:
    """The names of the files that hold a task's few-shot examples, for a message."""
    return " and ".join(LOCAL[task].examples) or "a file of examples"


def _locate(task: str, name: str, folder: Path) -> Path:
    path = _nearest(name, folder)
    if path is None:
        raise UserError(f"task {task} reads {folder / name}, which does not exist, nor in a folder below, nor as .gz")
    return path


def _nearest(name: str, folder: Path) -> Path | None:
    """The file of that name in a folder or up to two folders below it, packed or not; None where there is none."""
    for depth in ("", "*/", "*/*/"):
        for ending in ("", ".gz"):
            if paths := sorted(folder.glob(f"{depth}{name}{ending}")):
                return paths[0]
    return None


def _content(path: Path) -> bytes:
    """A file's bytes, as they lie on the disk."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return _bounded(path, content)


def _check_labels(named: str, documents: list[Document]) -> None:
    """Raise UserError where a question occurs twice, with different answers."""
    labels: dict[str, Any] = {}
    for number, document in enumerate(documents, start=1):
        label = [document.get(name) for name in LABELS]
        question = json.dumps({name: value for name, value in document.items() if name not in LABELS}, sort_keys=True)
        if labels.setdefault(question, label) != label:
            raise UserError(f"{named}: question {number} occurs before, with another answer")


def _bounded(path: Path, content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES >> 20} MiB, more than any file of these benchmarks")
    return content


def _read(task: str, contents: dict[Path, bytes], read: Reader) -> list[Document]:
    texts = []
    for path, content in contents.items():
        try:
            if path.suffix == ".gz":
                with gzip.open(io.BytesIO(content)) as file:
                    content = _bounded(path, file.read(MAX_BYTES + 1))
            texts.append(content.decode("utf-8-sig"))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # all but the last come of a damaged .gz
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    named = " with ".join(map(str, contents))
    try:
        documents = read(texts)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError, csv.Error) as error:
        fault = f"field {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{named} is not what task {task} reads: {fault}") from None
    _check_labels(named, documents)
    if not documents:
        raise UserError(f"{named} holds no document for task {task}")
    return documents


# Readers.


def _json(text: str) -> Any:
    """A JSON value. Raises UserError where an object has a key twice: the later value would silently win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
        return content

    return json.loads(text, object_pairs_hook=unique)


def _text(row: Any, name: str) -> str:
    """The content of a field, which must be a text."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"its {name} must be a text, and is {value!r}"[:200])
    value.encode()  # raises ValueError for half a surrogate pair, which the tokenizer cannot take
    return value


def _options(texts: Any) -> list[str]:
    """The options of a question: at least two and no two alike, as one of them is right and the others are wrong."""
    if not isinstance(texts, list) or len(texts) < 2:
        raise UserError("its options must be a list of two texts or more")
    options = [_text(texts, place) for place in range(len(texts))]  # type: ignore[arg-type]
    if len(set(options)) < len(options):
        raise UserError(f"its option {next(option for option in options if options.count(option) > 1)!r} occurs twice")
    return options


def _lines(text: str) -> list[str]:
    """The lines of a text. Unlike for `splitlines`, only newlines end them: the other characters occur in sentences."""
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
    """A question with lettered options.

    question: the name of the question's field on the hub. Rows may have the hub's form, where labels can be numbers, or
    a list of options and the index of the right one.
    """
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
    """A reader of TruthfulQA's own file, where a question's options are a dictionary from text to 1 (true) or 0."""

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
    """A reader of two files of sentences in two languages. The same documents serve both directions."""

    def read(texts: Sequence[str]) -> list[Document]:
        firsts, seconds = map(_lines, texts)
        if len(firsts) != len(seconds):
            raise UserError(f"{len(firsts)} lines in {first}, but {len(seconds)} in {second}")
        return [{"translation": {first: a, second: b}} for a, b in zip(firsts, seconds, strict=True)]

    return read


def _translation() -> dict[str, Local]:
    """WMT's test sets under sacreBLEU's names, for the harness's tasks and the study's."""
    local = {}
    for year, other in ((14, "fr"), (16, "de"), (16, "ro")):
        files = tuple(f"newstest20{year}.en-{other}.{language}" for language in ("en", other))
        for direction in (f"en-{other}", f"{other}-en"):
            for name in (f"wmt{year}-{direction}", f"huerta2024_wmt{year}-{direction}"):
                local[name] = Local(files, _pairs("en", other))
    return local


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
