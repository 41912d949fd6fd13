"""Does docs/study.md say what the code finds?"""

import re

import pytest

from benchmarks import study
from tests.stores import ROOT

PAGE = (ROOT / "docs/study.md").read_text()
PROSE = " ".join(PAGE.split())


@pytest.mark.parametrize("name", study.TABLES)
def test_a_table_of_the_page_is_what_the_code_gives(name):
    assert study.marked(name, study.TABLES[name]()) in PAGE


def test_the_page_has_no_other_tables():
    assert re.findall(r"<!-- (\w+) -->", PAGE.replace("<!-- end -->", "")) != []
    assert set(re.findall(r"<!-- (\w+) -->", PAGE)) == {*study.TABLES, "end"}


def test_the_prose_has_the_numbers_of_the_code():
    missing = {name: headline for name, headline in study.headlines().items() if headline not in PROSE}
    assert missing == {}


def test_what_the_page_claims_in_words():
    crossed = {dataset: study.fitted(dataset, "crossed") for dataset in study.DATASETS}
    assert all(fit.joint_p > 0.05 for fit in crossed.values())
    answers = {answer.dataset: answer for answer in study.analysis().answers}
    peaks = [task for task in answers[study.SHORT].by_task if task.optimum_plw is not None]
    assert {task.task_type for task in peaks} == {"multiple-choice"}
    assert all(0.1 <= task.optimum_plw < 0.21 for task in peaks)
    assert len(answers[study.SHORT].by_task) - len(peaks) == 5
    for dataset in (study.PLAIN, study.CLEANED):
        assert answers[dataset].equivalence.p < 0.05
    for group in [(study.PLAIN, study.SHORT), (study.CLEANED, study.SHORT), study.DATASETS]:
        assert study.compared(study.scores(), group).tests[0].p > 0.05
    for model in study.fitting.FITS:
        if model == "fixed-tasks":  # of these tasks alone, where small effects show
            continue
        plain, cleaned = (study.fitted(dataset, model) for dataset in (study.PLAIN, study.CLEANED))
        assert plain.delta_interval == plain.optimum_set[0] == [0, 1]
        assert 0.33 < plain.optimum_plw < 0.35
        assert cleaned.coefficients["w_p^2"] > 0
    assert answers[study.PLAIN].bootstraps[0].interval == [0, 1]


def test_figures_are_drawn():
    for name, draw in study.FIGURES.items():
        assert draw().startswith(b"\x89PNG")
        assert (ROOT / "docs" / name).stat().st_size > 20_000
