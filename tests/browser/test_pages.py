"""MLflow's pages on the store of `make ui`, in Debian's Chromium, as a person sees them.

PLW_TEST_STORE names the store's folder (`make test-browser` says so); without it nothing here runs. Each test leaves a
picture of what it saw in output/browser.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import mlflow
import pytest
import requests

from plw_mlflow.tracking import pages
from tests.stores import ROOT

STORE = os.environ.get("PLW_TEST_STORE", "")
pytestmark = pytest.mark.skipif(not STORE, reason="PLW_TEST_STORE names no store to look at")

CELLS = 8  # of the study
WIDE, HIGH = 1400, 900
SECONDS = 60  # in which a page shows what is waited for, on a busy machine


@pytest.fixture(scope="module")
def store():
    return mlflow.MlflowClient(f"sqlite:///{STORE}/mlflow.db")


@pytest.fixture(scope="module")
def sweep(store):
    (run,) = store.search_runs([cells_experiment(store)], "tags.`plw.grid` LIKE '%'")
    return run


@pytest.fixture(scope="module")
def server():
    """The address of MLflow's pages."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, cwd=STORE, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 2 * SECONDS
            while time.monotonic() < deadline:
                assert process.poll() is None, "MLflow's pages could not be started"
                try:
                    requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except requests.ConnectionError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, Chromium has no sandbox; it sees nothing but this test's own pages.
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request):
    """A page of a browser that has never been here before, and a picture of it at the end."""
    page = browser.new_page(viewport={"width": WIDE, "height": HIGH})
    page.set_default_timeout(SECONDS * 1000)
    yield page
    folder = ROOT / "output" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{request.node.name.removeprefix('test_')}.png")
    page.close()


def cells_experiment(store):
    return store.get_experiment_by_name("plw").experiment_id


def open_page(page, address):
    """Open a page of MLflow, and close the panel that it shows beside its pages at first."""
    page.goto(address)
    page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()


def link(tags, pattern):
    """The first link in a description whose page a pattern finds."""
    return re.search(rf"\]\((#[^)]*{pattern}[^)]*)\)", tags["mlflow.note.content"])[1]


def listed(page):
    """The rows of the list of runs, from above, once it has all cells: what each has under each heading."""
    page.get_by_text(f"{CELLS} matching runs").wait_for()
    page.locator(".ag-center-cols-container").get_by_text(re.compile(r"0\.\d")).first.wait_for()
    headings = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".ag-header-cell")].map(
            cell => [cell.getAttribute("col-id"), cell.innerText.trim()]))"""
    )
    cells = page.evaluate(
        """() => [...document.querySelectorAll(".ag-row")].flatMap(row => [...row.querySelectorAll("[col-id]")].map(
            cell => [row.getAttribute("row-index"), cell.getAttribute("col-id"), cell.innerText.trim()]))"""
    )
    rows = {}
    for index, column, text in cells:
        rows.setdefault(int(index), {})[headings.get(column) or column] = text
    return [rows[index] for index in sorted(rows)]


def loaded_width(image):
    """How many pixels an image has; 0 where it could not be loaded."""
    image.wait_for()
    return image.evaluate(
        "element => element.complete ? element.naturalWidth : "
        "new Promise(done => { element.onload = element.onerror = () => done(element.naturalWidth) })"
    )


def number(text):
    """A number of the list, which cuts long ones off."""
    return float(text.rstrip("….") or "nan")


def test_the_experiment_opens_on_the_list_of_cells(page, server, store):
    """By the link in its description, in a browser that would open on GenAI."""
    experiment = store.get_experiment(cells_experiment(store))
    open_page(page, f"{server}/{link(experiment.tags, 'viewStateShareKey')}")
    rows = listed(page)
    assert len(rows) == CELLS
    assert {float(row["plw"]) for row in rows} == {0, 0.02, 0.1, 0.5}
    for row in rows:
        share = number(row["prompt_share"])
        assert (share == 0) == (float(row["plw"]) == 0)
        assert 0 <= share < 1
        assert 0 < number(row["score"]) < 1
    assert page.get_by_text("Which prompt loss weight (PLW) suits a model and its data?").is_visible()
    assert page.get_by_role("link", name="Models", exact=True).is_visible()  # which GenAI's pages do not offer
    assert not page.get_by_role("link", name="Judges", exact=True).is_visible()


def test_a_list_for_a_sweep_rises_with_the_plw_and_shows_its_tasks(page, server, sweep):
    open_page(page, f"{server}/{link(sweep.data.tags, 'viewStateShareKey')}")
    rows = listed(page)
    plws = [float(re.search(r"plw (\S+)", row["Run Name"])[1]) for row in rows]
    assert plws == sorted(plws)
    assert len(plws) == CELLS
    assert "toy_choice/acc" in rows[0]


def test_charts_show_the_score_against_the_plw(page, server, store):
    experiment = store.get_experiment(cells_experiment(store))
    open_page(page, f"{server}/{link(experiment.tags, 'CHART')}")
    page.get_by_text("w_p vs. score").wait_for()
    page.locator(".js-plotly-plot .scatterlayer .point").nth(CELLS - 1).wait_for()


def test_runs_are_compared_by_score_against_plw(page, server, store):
    experiment = store.get_experiment(cells_experiment(store))
    open_page(page, f"{server}/{link(experiment.tags, 'viewStateShareKey')}")
    listed(page)
    page.get_by_test_id("select-all-checkbox").or_(page.locator(".ag-header-select-all")).first.click()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("tab", name="Scatter Plot").click()
    for axis, name in (("x", "plw"), ("y", "score")):
        page.locator(f"#{axis}-axis-selector").click()
        page.get_by_role("option", name=name, exact=True).click()
    page.locator(".js-plotly-plot .g-ytitle").get_by_text("score").wait_for()
    drawn = page.evaluate(
        "document.querySelector('.js-plotly-plot').data.flatMap(({x, y}) => x.map((_, i) => [x[i], y[i]]))"
    )
    cells = store.search_runs([experiment.experiment_id], "tags.`plw.cell` LIKE '%'")
    expected = sorted((float(cell.data.params["plw"]), cell.data.metrics["score"]) for cell in cells)
    assert sorted((float(plw), float(score)) for plw, score in drawn) == [pytest.approx(pair) for pair in expected]


def test_a_run_says_what_it_is_and_shows_its_figure(page, server, sweep, store):
    cell = store.search_runs([sweep.info.experiment_id], "params.plw = '0.1'")[0]
    open_page(page, f"{server}/{pages.run_page(cell.info.experiment_id, cell.info.run_id)}")
    page.get_by_text("Show more").click()
    assert page.get_by_text(f"Score {cell.data.metrics['score']:.4g} at PLW 0.1").is_visible()
    assert page.get_by_text("what differs from its other cells: plw 0.1, seed").is_visible()
    assert page.get_by_text("python -m entrypoints.main --plw 0.1").is_visible()
    page.get_by_role("link", name="The lengths of its data").wait_for()
    page.goto(f"{server}/{link(cell.data.tags, 'profile.png')}")
    assert loaded_width(page.get_by_alt_text("profile.png")) > 600


def test_a_sweep_says_its_answer_with_its_curve(page, server, sweep):
    open_page(page, f"{server}/{pages.run_page(sweep.info.experiment_id, sweep.info.run_id)}")
    page.get_by_text(f"{CELLS} of {CELLS} cells finished").wait_for()
    assert page.get_by_text("toy-short: ").first.is_visible()
    assert page.get_by_role("heading", name="toy-short plw 0,0.02,0.1,0.5").is_visible()
    for metric in ("best_score", "best_plw"):
        assert page.get_by_role("link", name=metric).is_visible()
    page.get_by_text("Show more").click()
    assert loaded_width(page.locator("img[src^=get-artifact]").first) > 600


def test_the_registered_model_has_its_alias_its_card_and_its_signature(page, server, store):
    version = store.get_model_version_by_alias("plw-toy-toy-short", "best")
    open_page(page, f"{server}/#/models/plw-toy-toy-short/versions/{version.version}?{pages.TRAINING}")
    page.get_by_text(re.compile(r"^@?\s*best$")).first.wait_for()
    page.get_by_text("Intended use").first.wait_for()
    page.get_by_text(re.compile(r"Inputs \([1-9]")).wait_for()


@pytest.mark.parametrize("width", [1400, 400])
def test_the_report_fits_the_screen(page, sweep, store, tmp_path, width):
    report = store.download_artifacts(sweep.info.run_id, "report.html", str(tmp_path))
    page.set_viewport_size({"width": width, "height": HIGH})
    page.goto(f"file://{report}")
    assert page.locator("h1").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
