"""The numbers of README and docs, measured anew:  make claims

paper/claims.json lists them under `numbers`. An entry has the page, the words of it that hold the number (`quote`), the
command that gives it, the hardware and the minutes that takes, and where in what the command leaves the value is found.
An entry fails where the page no longer has these words, so also where its number was edited; where the quote does not
spell the expected value; and where the command gives a value beyond the tolerance. What needs a GPU, or a machine with
nothing else to do, is not run, and is said so; what takes many minutes is run by --all.

An entry may take the place of whole tables: `tables` names a page whose tables between marks must be what the command
prints, to the letter.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
FILE = ROOT / "paper" / "claims.json"
LONG_MINUTES = 5  # an entry that takes longer is run by --all alone
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


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
    spelled: str | None = None  # how the quote spells the expected value, if not as itself
    tables: bool = False


def numbers(file: Path = FILE) -> list[Number]:
    """Every entry of the list."""
    return [Number(**entry) for entry in json.loads(file.read_text())["numbers"]]


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

    def printed(self, command: str) -> str:
        """What a command prints. Raises RuntimeError where it fails."""
        if command not in self._printed:
            words = [sys.executable if word == "python" else word for word in shlex.split(command)]
            environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.root}/output/claims/mlflow.db"} | os.environ
            done = subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            self._printed[command] = done.stdout
        return self._printed[command]

    def value(self, number: Number) -> float:
        """An entry's number as it is now. Raises RuntimeError, or LookupError where it is not found."""
        text = self.printed(number.command) if number.command else ""
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
        needs = {"GPU": "a GPU", "quiet": "a machine that does nothing else"}[number.hardware]
        return "not run", f"needs {needs}: {number.command}"
    if number.minutes > LONG_MINUTES and not are_all_wanted:
        return "not run", f"takes {number.minutes:g} minutes; give --all: {number.command}"
    try:
        if number.tables:
            return _tables(number, measured)
        value = measured.value(number)
    except (RuntimeError, LookupError, OSError, ValueError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    assert number.expected is not None
    verdict = "passed" if abs(value - number.expected) <= number.tolerance else "failed"
    return verdict, f"{value:.6g}, expected {number.expected:g} within {number.tolerance:g}"


def _tables(number: Number, measured: Measurements) -> tuple[str, str]:
    """Whether every table of a page is what the command prints."""
    assert number.command is not None
    printed, page = measured.printed(number.command), (measured.root / number.page).read_text()
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    wrong = [name for name, table in tables if table not in printed]
    if wrong or not tables:
        return "failed", f"{number.page}, tables not as measured: {', '.join(wrong) or 'there are none'}"
    return "passed", f"{len(tables)} tables with {sum(len(NUMBER.findall(table)) for _, table in tables)} numbers"


def coverage(listed: list[Number], root: Path = ROOT) -> list[str]:
    """How many of each page's numbers the list holds, a line a page."""
    lines = []
    for page in ["README.md", *(f"docs/{path.name}" for path in sorted((root / "docs").glob("*.md")))]:
        text = (root / page).read_text()
        tables = "".join(re.findall(r"<!-- \w+ -->\n(.*?)\n<!-- end -->", text, re.DOTALL))
        covered = sum(1 for number in listed if number.page == page and not number.tables)
        covered += len(NUMBER.findall(tables)) * any(number.tables and number.page == page for number in listed)
        lines.append(f"{page}: {covered} of {len(NUMBER.findall(text))} numbers are listed")
    return lines


@click.command(help=__doc__)
@click.option("--all", "are_all_wanted", is_flag=True, help=f"Also what takes more than {LONG_MINUTES} minutes.")
@click.option("--quotes", "are_quotes_alone", is_flag=True, help="Only compare the pages with the list; run nothing.")
def main(are_all_wanted: bool, are_quotes_alone: bool) -> None:
    (ROOT / "output" / "claims").mkdir(parents=True, exist_ok=True)
    listed, measured = numbers(), Measurements(ROOT)
    counts = dict.fromkeys(("passed", "failed", "not run"), 0)
    for number in listed:
        if are_quotes_alone:
            fault = misquoted(number)
            verdict, why = ("failed", fault) if fault else ("passed", "as the list has it")
        else:
            verdict, why = judge(number, measured, are_all_wanted=are_all_wanted)
        counts[verdict] += 1
        print(f"{verdict:8} {number.page}, {number.id}: {number.claim}: {why}", flush=True)
    print("\nNumbers, and how many of them this list can check (dates, versions and examples are counted, too):")
    print("\n".join(coverage(listed)))
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
