"""Does the report tell what the analysis found, escape what the data say, and appear whole or not at all?"""

import base64
import dataclasses
import html.parser
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats

from plw_mlflow import drawing
from plw_mlflow.analysis import analyze, exports, figures, optima, report, residuals, score_table, wording
from plw_mlflow.analysis.axes import percent
from plw_mlflow.environment import outputs
from plw_mlflow.transforms import EXPONENT, make_transform
from tests.analysis.test_analyze import STUDY_PLWS, fit_one, simulate

PNG = b"\x89PNG\r\n\x1a\n"
COMMAND = "python -m entrypoints.analyze --scores FILE.csv --output DIR"
SVG = "data:image/svg+xml;base64,"
STUDY = Path(__file__).parents[2] / "paper" / "tables" / "v1_scores.csv"


class Page(html.parser.HTMLParser):
    """What a browser would show of a page, its tables as lists of cells, and which tags and sources it would obey."""

    def __init__(self, page: str):
        super().__init__()
        self.shown, self.tags, self.sources = "", set(), []
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(page)
        self.shown = " ".join(self.shown.split())
        self.tables = [[[" ".join(cell.split()) for cell in row] for row in table] for table in self.tables]

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "br" and self._cell:
            self.handle_data(" | ")

    def handle_endtag(self, tag):
        if tag in ("tr", "table"):
            self._cell = False

    def handle_data(self, data):
        self.shown += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def rows(self, *header: str) -> dict[tuple[str, str], list[str]]:
        """The rows of the table whose header begins so, by the row of one cell above them and their first cell."""
        (table,) = (table for table in self.tables if table[0][: len(header)] == list(header))
        found, group = {}, ""
        for row in table[1:]:
            if len(row) == 1:
                group = row[0]
            else:
                found[group, row[0]] = row[1:]
        return found


def two_data_sets() -> pd.DataFrame:
    """A data set with an effect and one without, on tasks of two types, a model and seeds, with noise of their runs."""
    both = [simulate(dataset="short", b=(0.5, 0.1, -0.08)), simulate(dataset="long", b=(0.5, 0.0, 0.0), seed=4)]
    table = pd.concat(both, ignore_index=True)
    return table.assign(task_type=np.where(table["task"] < "task4", "choice", "generation"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two data sets' report: (directory, analysis, page, fit.json)."""
    directory = tmp_path_factory.mktemp("study")
    table = two_data_sets()
    analysis = analyze.analyze(table, margin=0.02, draws=200)
    report.write(analysis, table, directory, COMMAND)
    told = json.loads((directory / "fit.json").read_text())
    return directory, analysis, Page((directory / "report.html").read_text()), told


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A hostile, gappy table's report: (directory, analysis, raw page)."""
    table = simulate().drop(index=[4, 40])
    table["task"] = table["task"].replace(
        {"task0": "<script>alert(1)</script>", "task1": "_$x$ & y", "task2": "long" * 20}
    )
    table["dataset"] = "../<b>short</b>"
    table.attrs["left_out"] = ["run 1 (failed): <i>m</i>"]
    directory = tmp_path_factory.mktemp("report") / "new"
    analysis = analyze.analyze(table, draws=50)
    report.write(analysis, table, directory, COMMAND)
    return directory, analysis, (directory / "report.html").read_text()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not turned into files, which takes most of a report's time."""
    monkeypatch.setattr(drawing, "svg", lambda _: b"<svg/>")
    monkeypatch.setattr(drawing, "png", lambda _: PNG)


def page_of(analysis, table, directory) -> Page:
    report.write(analysis, table, directory, COMMAND)
    return Page((directory / "report.html").read_text())


# ------------------------------------------------------------------------------------------- what it tells


def test_the_answers_are_those_of_fit_json(study):
    _, _, page, told = study
    leads = {(fit["dataset"], fit["model"]): fit for fit in told["fits"]}
    for answer in told["answers"]:
        lead = leads[answer["dataset"], answer["lead"]]
        assert answer["advice"] in page.shown
        for found in (answer["these_tasks"], answer["other_tasks"]):
            assert f"{found['question']} {found['verdict']}" in page.shown
            by = f"{found['p']:.2g}, {found['holm_p']:.2g} corrected for 2 data sets (Holm), by {found['model']}"
            assert by in page.shown
        assert f"{answer['lead']}: {lead['n']} scores, {lead['tasks']} tasks" in page.shown
        equal = answer["equivalence"]
        assert f"largest difference found between two PLWs is {equal['largest_difference']:.3g}" in page.shown
        assert f"of the worst pair: p = {equal['p']:.2g}" in page.shown
        assert f"a margin of {equal['smallest_margin']:.3g}" in page.shown
        assert f"A difference of {equal['detectable']:.3g} would be found" in page.shown
    (difference,) = told["differences"]
    tests = [row for table in page.tables if table[0] == ["test", "p"] for row in table[1:]]
    assert [row[1] for row in tests] == [f"{test['p']:.2g}" for test in difference["tests"]]


def test_every_fit_is_told(study):
    _, _, page, told = study
    coefficients = page.rows("model", "n", "intercept")
    tests = page.rows("model", "joint test")
    assert list(coefficients) == list(tests) == [(fit["dataset"], fit["model"]) for fit in told["fits"]]
    for fit in told["fits"]:
        values, errors, p = fit["coefficients"], fit["standard_errors"], fit["p_values"]
        expected = [str(fit["n"]), f"{values['intercept']:.4g} ({errors['intercept']:.2g})"]
        for term in ("w_p", "w_p^2"):
            expected += [f"{values[term]:.4g} ({errors[term]:.2g})", f"{p[term]:.2g}"]
        row = coefficients[fit["dataset"], fit["model"]]
        assert row[:-1] == expected
        assert ("logit" in row[-1]) == (fit["model"] == "beta")
        assert ("singular" in row[-1]) == fit["is_singular"]
        test, p_value, aic, bic, loglik = tests[fit["dataset"], fit["model"]]
        assert [float(one) for one in p_value.split("|")] == [float(f"{one['p']:.2g}") for one in fit["joint_tests"]]
        assert fit["joint_tests"][0]["test"].replace("^2", "²") in test or fit["joint_tests"][0]["test"] == "F"
        assert (aic, bic) == tuple("–" if one is None else f"{one:.1f}" for one in (fit["aic"], fit["bic"]))
        assert loglik == ("–" if fit["loglik"] is None else f"{fit['loglik']:.2f}" + " R" * fit["is_restricted"])


def test_every_estimate_of_the_optimum_is_told(study):
    _, analysis, page, _ = study
    tables = [table for table in page.tables if table[0][:2] == ["by", "peak at PLW"]]
    assert len(tables) == 2
    for answer, table in zip(analysis.answers, tables, strict=True):
        rows = {row[0]: row[1:] for row in table[1:] if len(row) > 1}
        for fit in (fit for fit in analysis.fits if fit.dataset == answer.dataset):
            peak, fieller, delta, inside = rows[fit.model]
            assert inside == percent(fit.interior_probability)
            if fit.optimum_plw is None:
                assert peak.startswith("none; highest at ")
                assert delta == "–"
            else:
                assert peak == f"{fit.optimum_plw:.3g}"
                assert delta == "{:.3g} to {:.3g}".format(*fit.delta_interval)
            for ends in fit.optimum_set or []:
                assert "{:.3g} to {:.3g}".format(*ends) in fieller
        for one in answer.bootstraps:
            _, _, interval, inside = rows["tasks and seeds" if one.over == "both" else one.over]
            assert interval == "{:.3g} to {:.3g}".format(*one.interval)
            assert inside == percent(one.interior)
        for task in answer.by_task:
            assert rows[task.task][0].endswith(f"{task.best_plw:.3g}")
        for kind, fit in answer.by_type:
            assert rows[f"{kind} ({fit.model})"][3] == percent(fit.interior_probability)


def test_every_scale_and_axis_is_told(study):
    _, analysis, page, _ = study
    for number, answer in enumerate(analysis.answers):
        for head, variants, words in (
            ("scores", answer.scales, wording.SCALE_WORDS),
            ("PLW", answer.axes, wording.AXIS_WORDS),
        ):
            table = [one for one in page.tables if one[0][:2] == [head, "joint p"]][number]
            assert [row[0] for row in table[1:]] == [words[one.name] for one in variants]
            assert [row[1] for row in table[1:]] == [f"{one.joint_p:.2g}" for one in variants]


def test_the_account_of_cells(hostile):
    _, analysis, raw = hostile
    page = Page(raw)
    assert "a full grid has 120 scores; 2 of them are missing." in page.shown
    assert "run 1 (failed): <i>m</i>" in page.shown
    counts = page.rows("data set", "model")["", "../<b>short</b>"]
    assert sorted(counts[1:]) == ["11"] * 2 + ["12"] * 8
    missing = next(table for table in page.tables if table[0][:2] == ["model", "data set"])
    assert [row[2:4] for row in missing[1:]] == [["0", "0"], ["0.00224", "0"]]
    assert {row[4] for row in missing[1:]} <= {one.task for one in analysis.answers[0].by_task}
    assert "Left out: 2 of 20 runs (not scored on every task)." in page.shown
    assert "python -m entrypoints.analyze --scores" in page.shown


def test_the_first_screen_is_the_answers_and_the_raw_scores(study):
    """In plain words, with a curve each; what needs more words comes after it."""
    directory, analysis, _, _ = study
    raw = (directory / "report.html").read_text()
    screen = raw[raw.index("<header>") : raw.index("<nav>")]
    assert screen.count("<img") == len(analysis.answers)
    words = Page(screen).shown
    assert not [word for word in ("Open", "Holm", "crossed", "lmm", "Hotelling") if word in words]
    these, others = (words.index(finding.question) for finding in analysis.answers[0].findings)
    assert words.index(analysis.answers[0].advice) < these < others
    (table,) = Page(screen).tables
    assert table[0] == ["PLW", "long", "short"]
    rows = two_data_sets()
    for plw, *shown in table[1:]:
        for dataset, text in zip(table[0][1:], shown, strict=True):
            of = rows[(rows["dataset"] == dataset) & np.isclose(rows["plw"], float(plw), rtol=0.01)]
            cells = of.groupby("seed")["score"].mean()
            assert text == f"{cells.mean():.4f} ± {cells.std() / np.sqrt(2):.4f}"


def test_the_models_tables_are_folded_away(study):
    raw = (study[0] / "report.html").read_text()
    models = raw[raw.index('<section id="models">') : raw.index('<section id="account">')]
    assert models.count("<details>") == 3
    assert "<table>" not in "".join(part.split("</details>")[-1] for part in models.split("<details>"))


@pytest.mark.parametrize(
    ("matters_little", "kind", "colour"),
    [(True, "yes", "none"), (False, "yes", "effect"), (False, "perhaps", "unsure")],
)
def test_a_card_is_marked_by_what_was_found(study, matters_little, kind, colour):
    answer = study[1].answers[0]
    these = dataclasses.replace(answer.these_tasks, kind=kind)
    assert report.colour_of(dataclasses.replace(answer, matters_little=matters_little, these_tasks=these)) == colour


def with_few_runs(runs=4, tasks=8, **options):
    """Scores of one model at so many PLWs, which rise by far more than their noise."""
    table = simulate(seeds=1, tasks=tasks, b=(0.3, 0.4, -0.1), sd_task=0.05, **options)
    return table[table["plw"].isin([0, 0.01, 0.1, 1][-runs:])].reset_index(drop=True)


@pytest.mark.parametrize(("runs", "tasks"), [(3, 3), (4, 8)])
def test_too_few_runs_are_said_on_the_card_and_not_in_red(tmp_path, runs, tasks):
    table = with_few_runs(runs, tasks)
    analysis = analyze.analyze(table, margin=0.9, draws=0)
    (answer,) = analysis.answers
    assert answer.lead.joint_p < 0.05
    assert answer.other_tasks.kind == "untold"
    drawn = report.drawings(analysis, table)
    assert ("no-effect", "") not in drawn
    assert drawing.SURE_RED.encode().lower() not in drawing.svg(drawn["curve", "short"]).lower()
    shown = page_of(analysis, table, tmp_path).shown
    card = shown[: shown.index("Mean scores, as they are")]
    if runs == 3:
        assert card.count("These scores cannot tell: ") == 2
        assert "p =" not in card
        assert "these runs cannot tell" in "".join(text.get_text() for text in drawn["answer", "short"].findobj(Text))
    else:
        assert "Too few runs to tell: there are 4, and it takes at least 7." in card
        assert "p =" not in card[card.index("Would it move others like them?") :]
    assert "matters here" not in shown
    assert "Is there no effect?" not in shown
    assert "the curve peaks at" not in shown
    assert "probability of a peak inside is" not in shown
    assert "These are too few runs to tell, so nothing here can be relied on." in " ".join(shown.split())


@pytest.mark.usefixtures("undrawn")
def test_differences_beyond_the_scale_of_scores_are_told_in_words(tmp_path, study):
    _, analysis, _, _ = study
    unlimited = [
        dataclasses.replace(
            one,
            equivalence=dataclasses.replace(one.equivalence, smallest_margin=None, detectable=None, p=0.9),
            holm_p=0.8,
            lead=dataclasses.replace(one.lead, joint_tests=[dataclasses.replace(one.lead.joint_tests[0], p=0.8)]),
        )
        for one in analysis.answers
    ]
    shown = page_of(dataclasses.replace(analysis, answers=unlimited), two_data_sets(), tmp_path).shown
    assert "no margin within the range of the scores would have passed" in shown
    assert "No difference that the range of the scores allows would be found by 4 of 5 studies" in shown


def test_one_interval_leads_everywhere():
    """On the card, in the verdict, the shading and fit.json: Fieller's set, which has a gap here."""
    table = score_table.read_scores(STUDY)
    analysis = analyze.analyze(table, draws=0)
    told = exports.to_json(analysis, table)
    short = next(one for one in analysis.answers if one.dataset == "AlpacaDataShort")
    assert len(short.lead.optimum_set) == 2
    words = "0 to 0.0338 or 0.0802 to 1"
    assert f"(95 % interval {words}" in short.verdict
    (fit,) = (one for one in told["fits"] if (one["dataset"], one["model"]) == ("AlpacaDataShort", "crossed"))
    assert fit["optimum_set"] == short.lead.optimum_set
    assert fit["delta_interval"] == short.lead.delta_interval
    assert "optimum_interval" not in json.dumps(told)
    axes = figures.draw_overview(analysis.answers, table).axes[2]
    spans = [(box.get_x(), box.get_x() + box.get_width()) for box in axes.patches]
    transform = make_transform("w_p", STUDY_PLWS)
    assert spans == [pytest.approx(tuple(transform(ends))) for ends in short.lead.optimum_set]
    curve = figures.draw_curve(short.lead, table[table["dataset"] == "AlpacaDataShort"], shows_effect=False)
    labels = [text.get_text().replace("\n", " ") for text in curve.axes[0].get_legend().get_texts()]
    low, high = short.lead.delta_interval
    assert f"peak, perhaps chance: PLW 0.243 95 %: {words}" in labels
    assert f"by the delta method: {low:.3g} to {high:.3g}" in labels
    lead, delta = [one for one in optima.estimates(short, analysis.fits[:6]) if one.is_lead]
    assert (lead.method, delta.method) == ("Fieller", "delta")


def test_unbounded_intervals_are_said_in_words():
    def told(intervals, is_unbounded):
        return optima.interval_text(
            optima.OptimumEstimate("Model", "lmm", "Fieller", 0.2, 0.2, intervals, is_unbounded, 0.9)
        )

    assert told([[0.1, 0.5]], False) == "0.1 to 0.5"
    assert told([[0.0, 0.03], [0.09, 1.0]], True) == "0 to 0.03 and 0.09 to 1, and on beyond: unbounded"
    assert told([], True) == "unbounded, none of it inside"
    assert [percent(share) for share in (0, 0.001, 0.5, 0.999, 1)] == [
        "0 %",
        "< 1 %",
        "50 %",
        "> 99 %",
        "100 %",
    ]


def test_a_conclusion_that_turns_is_named(study):
    answer = study[1].answers[1]
    other = dataclasses.replace(answer.scales[2], joint_p=1.0 if answer.lead.joint_p < 0.05 else 0.0)
    turned = dataclasses.replace(answer, scales=[*answer.scales[:2], other, *answer.scales[3:]])
    assert wording.SCALE_WORDS["minmax"] in wording.stability(turned)
    assert "is otherwise under" in wording.stability(turned)


# ------------------------------------------------------------------------------------ whatever there is of it


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("tasks", "lead"), [(1, "ols-task"), (2, "lmm")])
def test_few_tasks_are_reported_by_what_they_allow(tmp_path, tasks, lead):
    table = simulate(tasks=tasks)
    page = page_of(analyze.analyze(table, draws=0), table, tmp_path)
    assert f"{lead}: {20 * tasks} scores" in page.shown
    assert "crossed" in [row[0] for row in page.tables[-1]]  # among what these scores do not allow
    assert f"{lead} leads, as crossed cannot be fitted" in page.shown


@pytest.mark.usefixtures("undrawn")
def test_absent_pieces_leave_no_hole(tmp_path, study):
    _, analysis, _, _ = study
    bare = [
        dataclasses.replace(one, equivalence=None, bootstraps=[], by_task=[], by_type=[], scales=[], axes=[])
        for one in analysis.answers
    ]
    analysis = dataclasses.replace(analysis, answers=bare, differences=[], refusals=[])
    page = page_of(analysis, two_data_sets(), tmp_path)
    assert "Is there no effect?" not in page.shown
    assert "Under other scales" not in page.shown
    assert "These scores allowed everything." in page.shown
    assert "None" not in page.shown
    assert (tmp_path / "tasks.csv").read_text().startswith("dataset,task,task_type,intercept")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("axis", ["logit", "rank", "plw", "share"])
def test_other_axes_and_scales_are_drawn_and_told(tmp_path, axis):
    table = simulate(keep=0.97)
    table = score_table.add_prompt_shares(table, dict.fromkeys(table["dataset"], 0.1))
    analysis = analyze.analyze(table, "zscore", axis=axis, draws=0)
    shown = page_of(analysis, table, tmp_path).shown
    assert f"Curves are parabolas in w_p = {wording.AXIS_WORDS[axis]}" in shown


@pytest.mark.usefixtures("undrawn")
def test_a_column_that_tells_runs_apart_is_compared_and_counted(tmp_path):
    table = pd.concat(
        [simulate().assign(learning_rate="low"), simulate(seed=2, b=(0.2, 0.0, 0.0)).assign(learning_rate="high")],
        ignore_index=True,
    ).drop(index=7)
    analysis = analyze.analyze(table, by=("learning_rate",), draws=0)
    page = page_of(analysis, table, tmp_path)
    counts = next(table for table in page.tables if table[0][:3] == ["data set", "model", "learning_rate"])
    assert [row[:4] for row in counts[1:]] == [["short", "m", "high", "12"], ["short", "m", "low", "12"]]
    assert counts[2].count("11") == 1
    assert "By learning_rate: high, low" in page.shown
    lead = analysis.answers[0].lead
    distance = pd.Series(figures.centred(lead, table, ("learning_rate",)))
    assert distance.groupby(table["learning_rate"].to_numpy()).mean().abs().max() < 0.001  # their levels differ by 0.3


# ------------------------------------------------------------------------------------------------ safe to open


def test_report_escapes_names_and_needs_no_other_file(hostile):
    _, _, raw = hostile
    parsed = Page(raw)
    assert "<script>alert(1)</script>" in parsed.shown
    assert not {"script", "b", "i", "link", "iframe", "object"} & parsed.tags
    images = [source for source in parsed.sources if not source.startswith("#")]
    assert len(images) == 6
    assert "url(" not in raw
    assert "@import" not in raw
    for image in images:
        assert image.startswith(SVG)
        for element in ET.fromstring(base64.b64decode(image.removeprefix(SVG))).iter():
            assert element.tag.rpartition("}")[2] != "script"
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png"))


def test_links_lead_somewhere(study, hostile):
    for raw in ((study[0] / "report.html").read_text(), hostile[2]):
        links = [source for source in Page(raw).sources if source.startswith("#")]
        assert links
        assert all(f'id="{link[1:]}"' in raw for link in links)


# -------------------------------------------------------------------------------------------------- the files


def test_files_stay_in_their_directory_and_agree(hostile):
    directory, analysis, _ = hostile
    drawn = [f"{what}-b-short-b" for what in ("answer", "curve", "optimum", "residuals", "tasks")] + ["no-effect"]
    expected = {"fit.json", "report.html", "fits.csv", "answers.csv", "tasks.csv"}
    expected |= {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert {path.name for path in directory.iterdir()} == expected | {outputs.LIST}
    assert sorted(path.name for path in directory.parent.iterdir()) == ["new"]
    told = json.loads((directory / "fit.json").read_text())
    assert told["fits"][0]["coefficients"] == analysis.fits[0].coefficients
    assert [answer["figure"] for answer in told["answers"]] == ["curve-b-short-b.png"]
    assert [row["plw"] for row in told["table"]["missing"]] == [0, 0.002236]
    for name in drawn:
        assert (directory / f"{name}.png").read_bytes().startswith(PNG)
        assert ET.parse(directory / f"{name}.svg").getroot().tag.endswith("svg")


def test_csv_files_are_tidy_and_equal_fit_json(study):
    directory, _, _, told = study
    fits, answers, tasks = (pd.read_csv(directory / f"{name}.csv") for name in ("fits", "answers", "tasks"))
    assert list(fits) == ["dataset", "model", "term", "estimate", "standard_error", "df", "p"]
    assert not fits.duplicated(["dataset", "model", "term"]).any()
    assert len(answers) == len(told["fits"])
    assert answers.groupby("dataset")["is_lead"].sum().eq(1).all()
    by_fit = answers.set_index(["dataset", "model"])
    for fit in told["fits"]:
        mine = fits[(fits["dataset"] == fit["dataset"]) & (fits["model"] == fit["model"])].set_index("term")
        assert mine["estimate"].to_dict() == fit["coefficients"]
        assert mine["standard_error"].to_dict() == fit["standard_errors"]
        assert mine["p"].dropna().to_dict() == fit["p_values"]
        assert mine["df"].isna().all() == (fit["model"] == "beta")
        row = by_fit.loc[(fit["dataset"], fit["model"])]
        assert row["joint_p"] == fit["joint_p"]
        assert json.loads(row["optimum_set"]) == fit["optimum_set"]
        given = [None if pd.isna(row[name]) else row[name] for name in ("optimum_plw", "delta_low", "delta_high")]
        assert given == [fit["optimum_plw"], *(fit["delta_interval"] or [None, None])]
    for answer in told["answers"]:
        assert by_fit.loc[(answer["dataset"], answer["lead"]), "holm_p"] == answer["holm_p"]
        mine = tasks[tasks["dataset"] == answer["dataset"]].set_index("task")
        assert mine["w_p"].to_dict() == {one["task"]: one["coefficients"]["w_p"] for one in answer["by_task"]}
        assert mine["best_plw"].to_dict() == {one["task"]: one["best_plw"] for one in answer["by_task"]}
        assert set(mine["task_type"]) == {"choice", "generation"}


def test_names_that_differ_in_signs_or_capitals_only_keep_their_own_figures():
    keys = [("curve", name) for name in ("a/b", "a b", "A b", "a-b-1", "", "///")]
    names = report.file_names(keys)
    assert len({name.lower() for name in names.values()}) == len(keys)
    assert names["curve", "a/b"] == "curve-a-b"
    assert names["curve", ""] == "curve"
    assert names["curve", "///"] == "curve-dataset"


@pytest.mark.usefixtures("undrawn")
def test_an_error_leaves_nothing_written(tmp_path, monkeypatch, study):
    def fail(*_, **__):
        raise RuntimeError("no figure")

    analysis, table = study[1], two_data_sets()
    monkeypatch.setattr(figures, "draw_curve", fail)
    with pytest.raises(RuntimeError):
        report.write(analysis, table, tmp_path / "new", COMMAND)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; --output takes a directory"):
        report.write(analysis, table, tmp_path / "file", COMMAND)


# ------------------------------------------------------------------------------------------------ the figures


def test_a_figure_is_the_same_bytes_each_time():
    table = simulate()
    fit = fit_one(table)
    one, other = (drawing.svg(figures.draw_curve(fit, table, shows_effect=True)) for _ in range(2))
    assert one == other


def test_centred_scores_hold_what_the_curve_says_of_missing_plws():
    """With no noise each score lies on the curve, also where a task lacks the PLWs at which it would be worst."""
    table = simulate(sd=1e-6, b=(0.5, 0.3, -0.2))
    table = pd.concat([table.assign(model="one"), table.assign(model="two", score=table["score"] + 0.1)])
    table = table.reset_index(drop=True)
    table = table.drop(index=table.index[(table["task"] == "task0") & (table["plw"] < 0.01)])
    fit = fit_one(table, "ols-task")
    w = table["plw"].to_numpy() ** EXPONENT
    curve = 0.3 * w - 0.2 * w**2
    assert figures.centred(fit, table) == pytest.approx(curve - curve.mean(), abs=1e-5)


def test_the_band_is_the_t_interval_of_a_difference(study):
    """From PLW 0 to 1 the curve rises by w_p + w_p^2, whose variance is written out here."""
    lead = study[1].answers[0].lead
    height, reach = figures.band(lead, np.array([[0.0, 1.0, 1.0]]))
    covariance = np.array(lead.covariance)
    variance = covariance[1, 1] + covariance[2, 2] + 2 * covariance[1, 2]
    freedom = min(lead.degrees_of_freedom["w_p"], lead.degrees_of_freedom["w_p^2"])
    assert height[0] == pytest.approx(lead.coefficients["w_p"] + lead.coefficients["w_p^2"])
    assert reach[0] == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    unbounded = dataclasses.replace(lead, degrees_of_freedom=dict.fromkeys(lead.degrees_of_freedom))
    assert figures.band(unbounded, np.array([[0.0, 1.0, 1.0]]))[1][0] == pytest.approx(1.959964 * np.sqrt(variance))


def test_residuals_are_what_polynomials_leave():
    table = simulate(tasks=4)
    fit = fit_one(table)
    left = residuals.residuals(fit, table)
    for task, mine in table.groupby("task"):
        w, y = mine["plw"] ** EXPONENT, mine["score"]
        expected = y - np.polynomial.Polynomial.fit(w, y, 2)(w)
        found = left[left["task"] == task]
        assert sorted(found["residual"]) == pytest.approx(sorted(expected))
        assert found["sd"].iloc[0] == pytest.approx(np.sqrt((expected**2).sum() / (len(mine) - 3)))
    assert residuals.residuals(fit, table[table["plw"].isin([0, 0.1, 1]) & (table["seed"] == 0)]).empty


def test_many_points_become_one_picture():
    """Each by itself would make an SVG of megabytes."""
    rows = pd.DataFrame({"task": "a", "fitted": 0.5, "residual": np.linspace(-1, 1, 5000), "sd": 1.0})
    drawn = drawing.svg(residuals.draw_residuals(rows.assign(standardised=rows["residual"])))
    assert len(drawn) < 500_000
    assert b"data:image/png" in drawn
