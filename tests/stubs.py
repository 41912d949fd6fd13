"""Language models without a model: they answer the harness from the raw benchmark files, which they read themselves.

They share no code with local_documents.py, so that a wrong answer key there does not agree with theirs.
"""

import json
import random

from lm_eval.api.model import LM

LANGUAGES = {"en": "English", "fr": "French", "de": "German", "ro": "Romanian"}


class Known(LM):
    """Knows which answers are right.

    A continuation has the log-likelihood that `prefer` makes of whether it is right, and of its length; a translation
    is the reference where a right one is sure, and empty otherwise.
    """

    def __init__(self, folder, prefer):
        super().__init__()
        self.prefer = prefer
        self.right, self.translations = read(folder)

    def loglikelihood(self, requests):
        return [(self.prefer(self.is_right(*request.args), len(request.args[1])), False) for request in requests]

    def is_right(self, context, continuation):
        return (context.split("\n\n")[-1], continuation) in self.right

    def generate_until(self, requests):
        assert all(request.args[1]["until"] == ["\n"] for request in requests)
        is_sure = self.prefer(True, 1) == 0
        return [self.translations[request.args[0]] if is_sure else "" for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no task here asks for this")


def knowing(is_right, length):
    return 0 if is_right else -1e6


def misled(is_right, length):
    return -1e6 if is_right else -length


def guessing(seed):
    """Any answer is as likely as another, and so it is divided by its length, as acc_norm has it."""
    draw = random.Random(seed)
    return lambda is_right, length: -length * draw.random()


def read(folder):
    """Every right (last paragraph of a context, continuation), and the translation that each prompt asks for."""

    def lines(name):
        return (folder / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")

    right = set()
    for name in ("arc_challenge_test.jsonl", "arc_easy_test.jsonl"):
        for row in map(json.loads, lines(name)):
            right.add((f"Question: {row['question']}\nAnswer:", f" {row['choices'][row['answer']]}"))
    for row, label in zip(map(json.loads, lines("piqa_valid.jsonl")), lines("piqa_valid-labels.lst"), strict=True):
        right.add((f"Question: {row['goal']}\nAnswer:", f" {row['sol2'] if label == '1' else row['sol1']}"))
    for row in map(json.loads, lines("winogrande_dev.jsonl")):
        before, after = row["sentence"].split("_")
        right.add((before + row[f"option{row['answer']}"], f" {after.strip()}"))
    for row in json.loads((folder / "TruthfulQA_mc_task.json").read_text(encoding="utf-8")):
        for targets in (row["mc1_targets"], row["mc2_targets"]):
            right |= {(f"Q: {row['question']}\nA:", f" {text}") for text, is_true in targets.items() if is_true}
    translations = {}
    for year, other in ((2014, "fr"), (2016, "de"), (2016, "ro")):
        for source, target in (("en", other), (other, "en")):
            asked = f"Translate the following from {LANGUAGES[source]} to {LANGUAGES[target]}\n"
            files = (lines(f"wmt/newstest{year}.en-{other}.{language}") for language in (source, target))
            translations |= {f"{asked}{one}\n": translated for one, translated in zip(*files, strict=True)}
    return right, translations
