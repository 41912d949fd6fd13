"""Do README and docs say what paper/claims.json expects, and is an edited number found?"""

import dataclasses
import json
import re
import shutil

import pytest

from benchmarks import claims
from tests.stores import ROOT

LISTED, SECTIONS = claims.numbers(), claims.sections()


def number(id):
    return next(one for one in LISTED if one.id == id)


@pytest.fixture
def copy(tmp_path):
    """The pages and the tables in another folder."""
    for name in ("README.md", "docs", "paper"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("one", LISTED, ids=lambda one: one.id)
def test_a_page_says_what_the_list_expects(one):
    assert claims.misquoted(one) is None


@pytest.mark.parametrize("one", SECTIONS, ids=lambda one: f"{one.page}, {one.heading}")
def test_a_section_has_the_numbers_that_are_listed(one):
    text = claims.sections_of(ROOT, one.page).get(one.heading, "")
    fault = claims.changed(one, text)
    assert fault is None, f"{fault}; python -m benchmarks.claims --accept makes the list follow"


def test_every_number_of_every_page_is_listed_with_what_it_claims():
    assert claims.unlisted(SECTIONS, ROOT) == []


def test_the_list_is_sound():
    assert len({one.id for one in LISTED}) == len(LISTED) > 40
    assert {one.hardware for one in LISTED} <= {"CPU", *claims.NEEDS}
    for one in SECTIONS:
        assert (one.command is None) == (one.hardware is None) == (one.within is None)
        assert one.hardware in {None, "CPU", *claims.NEEDS}
    told = json.loads(claims.FILE.read_text())
    assert claims._dumped(told) == claims.FILE.read_text()
    for claim in told["study"]:
        assert {"command", "hardware", "minutes"} <= claim.keys()
    for command in [*(one["command"] for one in told["study"]), *(one.command for one in SECTIONS if one.command)]:
        for module in re.findall(r"python -m ((?:entrypoints|benchmarks)\S*)", command):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    for one in LISTED:
        assert one.tables or one.expected is not None
        assert one.command or one.file


def test_an_edited_number_of_a_page_fails(copy):
    one = number("ratio-AlpacaDataShort")
    measured = claims.Measurements(copy)
    assert claims.judge(one, measured, are_all_wanted=False)[0] == "passed"
    page = copy / "README.md"
    page.write_text(page.read_text().replace("ratio 0.08)", "ratio 0.09)"))
    verdict, why = claims.judge(one, measured, are_all_wanted=False)
    assert (verdict, why) == ("failed", f"README.md does not say: {one.quote}")
    edited = dataclasses.replace(one, quote=one.quote.replace("0.08", "0.09"))
    assert claims.judge(edited, measured, are_all_wanted=False) == (
        "failed",
        "'`AlpacaDataShort`, ratio 0.09)' does not spell the expected 0.08",
    )
    both = dataclasses.replace(edited, expected=0.09, spelled=None)
    verdict, why = claims.judge(both, measured, are_all_wanted=False)
    assert (verdict, why) == ("failed", "0.082, expected 0.09 within 0.005")


def test_an_edited_number_of_a_table_fails(copy):
    one, page = number("study-tables"), copy / "docs" / "study.md"
    tables = re.findall(r"<!-- \w+ -->\n(.*?)\n<!-- end -->", page.read_text(), re.DOTALL)
    measured = claims.Measurements(copy)
    measured._printed[one.command] = "\n\n".join(tables)
    assert claims.judge(one, measured, are_all_wanted=False)[0] == "passed"
    page.write_text(page.read_text().replace("| **as printed** | 4.928", "| **as printed** | 4.929"))
    assert claims.judge(one, measured, are_all_wanted=False) == (
        "failed",
        "docs/study.md, tables not as measured: table3",
    )


def test_an_edited_number_of_any_section_fails_until_it_is_accepted(copy):
    page, file = copy / "docs" / "training.md", copy / "paper" / "claims.json"
    page.write_text(page.read_text().replace("| LoRA | 13,353 | 152 |", "| LoRA | 13,353 | 153 |"))
    page.write_text(page.read_text() + "\n## Anew\n\nIt takes half a minute, in 3 of 4 cases.\n")
    memory = next(one for one in SECTIONS if one.heading == "Memory")
    verdict, why = claims.judge_section(memory, copy, LISTED)
    assert (verdict, why.partition(";")[0]) == ("failed", "the page says 153 where the list has 152")
    assert claims.unlisted(SECTIONS, copy) == ["docs/training.md, Anew"]
    assert claims.accept(file, copy) == [
        "docs/training.md, Memory: the page says 153 where the list has 152",
        "docs/training.md, Anew: the page says half 3 4 where the list has nothing",
        "docs/training.md, Anew: is new; say in the list what its numbers claim",
    ]
    assert claims.accept(file, copy) == []
    memory = next(one for one in claims.sections(file) if one.heading == "Memory")
    verdict, why = claims.judge_section(memory, copy, LISTED)
    assert (verdict, "needs a machine that does nothing else" in why) == ("not run", True)
    assert claims.unlisted(claims.sections(file), copy) == ["docs/training.md, Anew"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12,345.6 MiB, p = 4 × 10⁻⁷, 2e-5, w_p", "12,345.6|4 × 10⁻⁷|2e-5"),
        ("half a minute, between six and eight minutes, one of two models", "half|six|eight|two"),
        (
            "a correlation of +0.5 (-3 to 4), slope=-0.0391,bend=+2; from 0-1, Two of five",
            "+0.5|-3|4|-0.0391|+2|0|1|Two|five",
        ),
        ("v1 of 7B-3 and toy-2", "7|3|2"),
    ],
)
def test_what_counts_as_a_number(text, numbers):
    assert claims.spelled_in(text) == numbers


@pytest.mark.parametrize(
    ("page", "words", "edited"),
    [
        ("docs/analysis.md", "0.116 now, 0.108 then, 0.104", "0.916 now, 0.308 then, 0.204"),
        ("docs/analysis.md", "78% of its variance", "18% of its variance"),
        ("docs/analysis.md", "slope=0.0511,bend=-0.0391", "slope=0.0511,bend=0.0391"),
        ("docs/analysis.md", "two of five such studies", "four of five such studies"),
        ("docs/study.md", "rank correlation of +0.5", "rank correlation of -0.5"),
    ],
)
def test_an_edit_in_an_example_of_a_sign_or_of_a_word_fails(copy, page, words, edited):
    file = copy / page
    assert words in file.read_text()
    file.write_text(file.read_text().replace(words, edited, 1))
    assert [one.page for one in SECTIONS if claims.judge_section(one, copy, LISTED)[0] == "failed"] == [page]


def test_every_entry_can_be_measured():
    """By what its command prints, or by what it leaves in a file."""
    for one in LISTED:
        assert one.tables or one.pattern or (one.file and one.at), one.id
    case = {"case": "frozen head of 32000, plw 0", "metric": "ms", "ours": 3.8, "peer": "full logits"}
    assert claims.walk([case, {**case, "peer": "bare products"}], number("gpu-loss-0").at) == 3.8


def test_a_tiny_p_may_differ_by_a_factor():
    one = number("toy-p")
    assert [one.accepts(value) for value in (7.7e-10, 1e-10, 7e-9, 1e-11, 1e-8)] == [True, True, True, False, False]


def test_what_cannot_be_run_here_is_said():
    measured = claims.Measurements(ROOT)
    verdict, why = claims.judge(number("gpu-loss-0"), measured, are_all_wanted=True)
    assert (verdict, why) == ("not run", f"needs a GPU: {number('gpu-loss-0').command}")
    verdict, why = claims.judge(number("toy-p"), measured, are_all_wanted=False)
    assert (verdict, why) == ("not run", "takes 25 minutes; give --all: make study")


def test_a_command_that_fails_is_a_failure():
    one = dataclasses.replace(number("default-plw"), command="python -c 'raise SystemExit(3)'")
    verdict, why = claims.judge(one, claims.Measurements(ROOT), are_all_wanted=False)
    assert verdict == "failed"
    assert "ended with 3" in why
    silent = dataclasses.replace(one, command="python -c pass")
    assert claims.judge(silent, claims.Measurements(ROOT), are_all_wanted=False)[0] == "failed"


def test_a_way_of_keys_picks_one():
    tree = {"fits": [{"a": 1, "b": "x", "v": 2}, {"a": 1, "b": "y", "v": 3}]}
    assert claims.walk(tree, ["fits", "a=1&b=y", "v"]) == 3
    with pytest.raises(LookupError, match="2 entries with a=1"):
        claims.walk(tree, ["fits", "a=1", "v"])
