"""Does the report tell what the fit found, escape what the data say, and appear whole or not at all?"""

import html.parser
import json

import numpy as np
import pandas as pd
import pytest

from plw_mlflow import analyze, figures, report
from tests.test_analyze import STUDY_PLWS, simulate

PNG = b"\x89PNG\r\n\x1a\n"


class Text(html.parser.HTMLParser):
    """What a browser would show of a page, and which tags it would obey."""

    def __init__(self, page: str):
        super().__init__()
        self.shown, self.tags, self.sources = "", set(), []
        self.feed(page)

    def handle_data(self, data):
        self.shown += data

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A hostile, gappy table's report: (directory, fits, page)."""
    table = simulate().drop(index=[4, 40])
    table["task"] = table["task"].replace(
        {"task0": "<script>alert(1)</script>", "task1": "_$x$ & y", "task2": "long" * 20}
    )
    table["dataset"] = "../<b>short</b>"
    directory = tmp_path_factory.mktemp("report") / "new"
    fits = analyze.analyze(table)
    report.write(fits, table, directory)
    return directory, fits, (directory / "report.html").read_text()


def test_report_tells_the_numbers_of_the_fit(written):
    _, (fit,), page = written
    shown = " ".join(Text(page).shown.split())
    for expected in (
        fit.verdict,
        f"{fit.optimum_plw:.4f}",
        f"{fit.coefficients['w_p']:.4g} ({fit.standard_errors['w_p']:.2g})",
        f"{fit.p_values['w_p^2']:.2g}",
        "2 of them are missing",
        "python -m entrypoints.analyze --scores",
    ):
        assert expected in shown


def test_report_escapes_names_and_needs_no_other_file(written):
    _, _, page = written
    parsed = Text(page)
    assert "<script>alert(1)</script>" in parsed.shown
    assert not {"script", "b"} & parsed.tags
    assert parsed.sources
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)


def test_files_stay_in_their_directory_and_agree(written):
    directory, (fit,), _ = written
    assert sorted(path.name for path in directory.iterdir()) == ["fit.json", "lmm-b-short-b.png", "report.html"]
    assert sorted(path.name for path in directory.parent.iterdir()) == ["new"]
    told = json.loads((directory / "fit.json").read_text())
    assert told["fits"][0]["coefficients"] == fit.coefficients
    assert told["fits"][0]["figure"] == "lmm-b-short-b.png"
    assert [row["plw"] for row in told["table"]["missing"]] == [0, 0.002236]
    assert (directory / "lmm-b-short-b.png").read_bytes().startswith(PNG)


def test_names_that_differ_in_signs_only_keep_their_own_figures(tmp_path):
    table = pd.concat([simulate(dataset="a/b"), simulate(dataset="a b", seed=2)], ignore_index=True)
    paths = report.write(analyze.analyze(table), table, tmp_path)
    assert sorted(path.name for path in paths) == ["fit.json", "lmm-a-b-1.png", "lmm-a-b.png", "report.html"]


def test_an_error_leaves_nothing_written(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no figure")

    table = simulate()
    fits = analyze.analyze(table)
    monkeypatch.setattr(figures, "draw_curve", fail)
    with pytest.raises(RuntimeError):
        report.write(fits, table, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; --output takes a directory"):
        report.write(fits, table, tmp_path / "file")


def test_tick_labels_keep_their_distance():
    labels = figures.tick_labels([float(plw) for plw in STUDY_PLWS])
    places = list(labels)
    assert labels[0] == "0"
    assert labels[1] == "1"
    assert "0.0022" not in labels.values()  # it would touch 0.0005
    assert np.diff(places).min() > 0.06


def test_centred_scores_hold_what_the_curve_says_of_missing_plws():
    """With no noise each score lies on the curve, also where a task lacks the PLWs at which it would be worst."""
    table = simulate(sd=1e-6, b=(0.5, 0.3, -0.2))
    table = table.drop(index=table.index[(table["task"] == "task0") & (table["plw"] < 0.01)])
    (fit,) = analyze.analyze(table)
    w = table["plw"].to_numpy() ** analyze.EXPONENT
    curve = 0.3 * w - 0.2 * w**2
    assert figures.centred(fit, table) == pytest.approx(curve - curve.mean(), abs=1e-5)
