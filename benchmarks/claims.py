"""The numbers of README and docs, guarded and measured anew:  make claims

paper/claims.json has two lists of them. `pages` has all: for each section of each page its numbers in their order, and
what they claim; where they were measured, also the command, the hardware, the minutes, and the share of a value within
which it should be found again. A section is guarded: it fails where its page has other numbers, in digits or in words,
in prose, tables and examples; that says nothing of whether they are right. "One" and ordinals are no numbers here.
Whoever has measured anew, or edits a page, has the list follow by --accept, which says what it changes.

`numbers` has those that a command here measures by itself. An entry has the words of the page that hold the number
(`quote`), and where in what the command leaves the value is found. It fails where the page no longer has these words;
where they do not spell the expected value; and where the command gives a value beyond the tolerance. An entry may take
the place of whole tables: `tables` names a page whose tables between marks must be what the command prints, to the
letter. What needs a GPU, or a machine with nothing else to do, is not run, and is said so; what takes many minutes is
run by --all.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
FILE = ROOT / "paper" / "claims.json"
LONG_MINUTES = 5  # an entry that takes longer is run by --all alone
SUPERSCRIPTS = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
WORDS = (
    "half|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|hundred"
)
# In digits, with a sign where something opens before it, with thousands and a power of ten; or in words.
NUMBER = re.compile(
    rf"(?:(?:^|(?<=[\s(|=,\[]))[-+−])?(?<![\w.])\d+(?:,\d{{3}})*(?:\.\d+)?(?:e[-+]?\d+)?(?: × 10[{SUPERSCRIPTS}]+)?"
    rf"|\b(?i:{WORDS})\b"
)
NEEDS = {"GPU": "a GPU", "quiet": "a machine that does nothing else", "other": "what this machine may not have"}


@dataclass(frozen=True)
class Number:
    """A number that a page of ours claims, and how to measure it."""

    id: str
    page: str
    quote: str  # words of the page that hold the number; line breaks count as blanks
    claim: str
    hardware: str  # CPU, GPU, or quiet: a machine that does nothing else, as for times
    minutes: float
    command: str | None = None  # None where it is compared with a file of the repository alone
    file: str | None = None  # where the value is: JSON or CSV, what the command leaves; None for what it prints
    at: list[str | int] = field(default_factory=list)  # the way to it: keys; key=value picks from a list or rows
    pattern: str | None = None  # in what is printed, with one group
    expected: float | None = None
    tolerance: float = 0.0
    factor: float | None = None  # in place of a tolerance: the value may be so many times as large, or as small
    spelled: str | None = None  # how the quote spells the expected value, if not as itself
    tables: bool = False

    def accepts(self, value: float) -> bool:
        """Whether a measured value is the expected one, within what is allowed."""
        assert self.expected is not None
        if self.factor is not None:
            return self.expected / self.factor <= value <= self.expected * self.factor
        return abs(value - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Section:
    """The numbers of a section of a page, and what they claim."""

    page: str
    heading: str
    numbers: str  # as the page spells them, in their order, parted by |
    claim: str = ""
    command: str | None = None  # that measures them; None where nothing is measured, as with defaults and limits
    hardware: str | None = None  # as of a Number, or other: services, packages or files that may not be here
    minutes: float | None = None
    within: float | None = None  # the share of a value within which it should be found again


def numbers(file: Path = FILE) -> list[Number]:
    """Every entry with a value."""
    return [Number(**entry) for entry in json.loads(file.read_text())["numbers"]]


def sections(file: Path = FILE) -> list[Section]:
    """Every section that is listed."""
    pages = json.loads(file.read_text())["pages"]
    return [Section(page, heading, **told) for page, listed in pages.items() for heading, told in listed.items()]


def pages_of(root: Path) -> list[str]:
    """The pages whose numbers are listed."""
    return ["README.md", *(f"docs/{path.name}" for path in sorted((root / "docs").glob("*.md")))]


def sections_of(root: Path, page: str) -> dict[str, str]:
    """The text of each section of a page that holds numbers, by its heading, with its examples of code."""
    fence = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
    # A comment in an example is no heading.
    text = fence.sub(lambda block: re.sub("^#", " #", block[0], flags=re.MULTILINE), (root / page).read_text())
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    return {heading: part for heading, part in found.items() if NUMBER.search(part)}


def spelled_in(text: str) -> str:
    """The numbers of a text, in their order, as a Section has them."""
    return "|".join(NUMBER.findall(" ".join(text.split())))


def changed(section: Section, text: str) -> str | None:
    """In what the numbers of a text differ from those that are listed, if in anything."""
    there, here = section.numbers.split("|"), spelled_in(text).split("|")
    steps = difflib.SequenceMatcher(None, there, here, autojunk=False).get_opcodes()
    told = [
        f"{' '.join(here[start:end]) or 'nothing'} where the list has {' '.join(there[begin:stop]) or 'nothing'}"
        for kind, begin, stop, start, end in steps
        if kind != "equal"
    ]
    return f"the page says {'; '.join(told[:3])}{' and more' * (len(told) > 3)}" if told else None


def judge_section(section: Section, root: Path, listed: list[Number]) -> tuple[str, str]:
    """The verdict on a section (guarded, failed or not run), and why: that its numbers are listed measures none."""
    text = sections_of(root, section.page).get(section.heading, "")
    if fault := changed(section, text):
        return "failed", f"{fault}; --accept makes the list follow"
    as_listed = f"its numbers ({len(section.numbers.split('|'))}) are as listed"
    if section.command is None:
        return "guarded", f"{as_listed}; nothing measures them"
    flat = " ".join(text.split())
    measured = [number for number in listed if number.page == section.page and _is_measured_in(number, text, flat)]
    if section.hardware == "CPU" and measured:
        return "guarded", f"{as_listed}; entries that measure some: {', '.join(number.id for number in measured)}"
    minutes = "hours" if section.minutes is None else f"{section.minutes:g} minutes"
    needs = NEEDS.get(section.hardware or "", f"{minutes}, and a person who compares")
    return "not run", f"{as_listed}; measuring them anew, within {section.within:.0%}, needs {needs}: {section.command}"


def _is_measured_in(number: Number, text: str, flat: str) -> bool:
    return "<!-- end -->" in text if number.tables else " ".join(number.quote.split()) in flat


def unlisted(listed: list[Section], root: Path) -> list[str]:
    """The sections that hold numbers and are not listed, or are listed without saying what they claim."""
    said = {(section.page, section.heading) for section in listed if section.claim}
    return [
        f"{page}, {name}" for page in pages_of(root) for name in sections_of(root, page) if (page, name) not in said
    ]


def accept(file: Path, root: Path) -> list[str]:
    """Make the list of sections follow the pages; gives a line for each change."""
    told, lines = json.loads(file.read_text()), []
    for page in pages_of(root):
        before, now = told["pages"].get(page, {}), sections_of(root, page)
        for heading, text in now.items():
            fault = changed(Section(page, heading, **before.get(heading, {"numbers": ""})), text)
            lines += [f"{page}, {heading}: {fault}"] if fault else []
            lines += [] if heading in before else [f"{page}, {heading}: is new; say in the list what its numbers claim"]
        lines += [f"{page}, {heading}: is gone" for heading in before if heading not in now]
        told["pages"][page] = {
            heading: {"claim": ""} | before.get(heading, {}) | {"numbers": spelled_in(text)}
            for heading, text in now.items()
        }
    file.write_text(_dumped(told))
    return lines


def _dumped(told: dict[str, Any]) -> str:
    """The list as a file: a line for each entry, so that changes can be read."""

    def entries(part: Any) -> str:
        line = partial(json.dumps, ensure_ascii=False)
        if isinstance(part, list):
            return "[\n" + ",\n".join(f"  {line(entry)}" for entry in part) + "\n ]"
        if isinstance(part, dict):
            pages = (
                f"  {line(page)}: {{\n"
                + ",\n".join(f"   {line(name)}: {line(one)}" for name, one in of.items())
                + "\n  }"
                for page, of in part.items()
            )
            return "{\n" + ",\n".join(pages) + "\n }"
        return str(line(part))

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {entries(part)}" for key, part in told.items()) + "\n}\n"


def prose(root: Path, page: str) -> str:
    """A page without line breaks."""
    return " ".join((root / page).read_text().split())


def misquoted(number: Number, root: Path = ROOT) -> str | None:
    """What is wrong between an entry and its page, if anything is."""
    if number.tables:
        return None
    if " ".join(number.quote.split()) not in prose(root, number.page):
        return f"{number.page} does not say: {number.quote}"
    spelled = f"{number.expected:g}" if number.spelled is None else number.spelled
    if spelled not in number.quote:
        return f"{number.quote!r} does not spell the expected {spelled}"
    return None


class Measurements:
    """What commands print; each is run once."""

    def __init__(self, root: Path) -> None:
        self.root, self._printed = root, dict[str, str]()
        self.count = 0  # of the entries measured
        self.store = root / "output" / "claims" / "store"  # of this call alone: what was measured before is not taken

    def printed(self, command: str) -> str:
        """What a command prints. Raises RuntimeError where it fails."""
        if command not in self._printed:
            words = [sys.executable if word == "python" else word for word in shlex.split(command)]
            environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.store}/mlflow.db"}
            done = subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            self._printed[command] = done.stdout
        return self._printed[command]

    def value(self, number: Number) -> float:
        """An entry's number as it is now. Raises RuntimeError, or LookupError where it is not found."""
        text = self.printed(number.command) if number.command else ""
        self.count += 1
        if number.file is None:
            if (found := re.search(number.pattern or "", text)) is None:
                raise LookupError(f"{number.command} prints nothing like {number.pattern}")
            return float(found[1])
        content = (self.root / number.file).read_text()
        return float(walk(json.loads(content) if number.file.endswith(".json") else rows_of(content), number.at))


def rows_of(content: str) -> list[dict[str, str]]:
    """A CSV file's rows."""
    return list(csv.DictReader(io.StringIO(content)))


def walk(at: Any, keys: list[str | int]) -> Any:
    """What lies at the end of a way of keys; `name=value&name=value` picks the one entry of a list that has these."""
    for key in keys:
        if isinstance(at, list) and isinstance(key, str):
            wanted = dict(pair.split("=", 1) for pair in key.split("&"))
            found = [
                entry for entry in at if wanted.items() <= {name: str(value) for name, value in entry.items()}.items()
            ]
            if len(found) != 1:
                raise LookupError(f"{len(found)} entries with {key}")
            at = found[0]
        else:
            at = at[key]
    return at


def judge(number: Number, measured: Measurements, *, are_all_wanted: bool) -> tuple[str, str]:
    """The verdict on an entry (passed, failed or not run), and why."""
    if fault := misquoted(number, measured.root):
        return "failed", fault
    if number.hardware != "CPU":
        return "not run", f"needs {NEEDS[number.hardware]}: {number.command}"
    if number.minutes > LONG_MINUTES and not are_all_wanted:
        return "not run", f"takes {number.minutes:g} minutes; give --all: {number.command}"
    try:
        if number.tables:
            return _tables(number, measured)
        value = measured.value(number)
    except (RuntimeError, LookupError, OSError, ValueError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    allowed = f"within {number.tolerance:g}" if number.factor is None else f"up to {number.factor:g} times more or less"
    return "passed" if number.accepts(value) else "failed", f"{value:.6g}, expected {number.expected:g} {allowed}"


def _tables(number: Number, measured: Measurements) -> tuple[str, str]:
    """Whether every table of a page is what the command prints."""
    assert number.command is not None
    measured.count += 1
    printed, page = measured.printed(number.command), (measured.root / number.page).read_text()
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    wrong = [name for name, table in tables if table not in printed]
    if wrong or not tables:
        return "failed", f"{number.page}, tables not as measured: {', '.join(wrong) or 'there are none'}"
    return "passed", f"{len(tables)} tables with {sum(len(NUMBER.findall(table)) for _, table in tables)} numbers"


def coverage(listed: list[Section], root: Path = ROOT) -> list[str]:
    """How many numbers each page has, and how many of them something measures, a line a page."""
    lines = []
    for page in pages_of(root):
        counts = dict.fromkeys((True, False), 0)
        for section in listed:
            if section.page == page:
                counts[section.command is not None] += len(section.numbers.split("|"))
        lines.append(
            f"{page}: {sum(counts.values())} numbers, {counts[True]} in sections with a command that measures them"
        )
    return lines


@click.command(help=__doc__)
@click.option("--all", "are_all_wanted", is_flag=True, help=f"Also what takes more than {LONG_MINUTES} minutes.")
@click.option("--quotes", "are_quotes_alone", is_flag=True, help="Only compare the pages with the list; run nothing.")
@click.option("--accept", "is_accepted", is_flag=True, help="Make the list follow the pages, and say what changes.")
def main(are_all_wanted: bool, are_quotes_alone: bool, is_accepted: bool) -> None:
    if is_accepted:
        print("\n".join(accept(FILE, ROOT) or ["the list is as the pages are"]))
        return
    listed, entries, measured = sections(), numbers(), Measurements(ROOT)
    shutil.rmtree(measured.store, ignore_errors=True)
    measured.store.mkdir(parents=True)
    counts = dict.fromkeys(("passed", "guarded", "failed", "not run"), 0)

    def tell(verdict: str, text: str) -> None:
        counts[verdict] += 1
        print(f"{verdict:8} {text}", flush=True)

    for section in listed:
        verdict, why = judge_section(section, ROOT, entries)
        tell(verdict, f"{section.page}, {section.heading}: {section.claim}: {why}")
    for name in unlisted(listed, ROOT):
        tell("failed", f"{name}: holds numbers of which the list does not say what they claim")
    for claim in json.loads(FILE.read_text())["study"]:
        if "not_judged" in claim:
            tell("not run", f"the study, {claim['id']}: {claim['claim']}: {claim['not_judged']}: {claim['command']}")
    for number in entries:
        if are_quotes_alone:
            fault = misquoted(number)
            verdict, why = ("failed", fault) if fault else ("guarded", "as the list has it")
        else:
            verdict, why = judge(number, measured, are_all_wanted=are_all_wanted)
        tell(verdict, f"{number.page}, {number.id}: {number.claim}: {why}")
    print("\n" + "\n".join(coverage(listed)))
    of_all = sum(len(section.numbers.split("|")) for section in listed)
    print(f"\n{of_all} numbers are guarded, {measured.count} entries were measured in this run")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
