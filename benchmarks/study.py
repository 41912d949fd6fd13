"""The published study and WIT's runs analysed anew: every number and figure of docs/study.md.

python -m benchmarks.study               prints its tables
python -m benchmarks.study --write docs  puts them into docs/study.md, between the marks, and draws the figures
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import numpy as np
import pandas as pd

from plw_mlflow.advice import advise, evidence, evidence_figure
from plw_mlflow.analysis import analyze, claims, score_table, wording
from plw_mlflow.analysis.answers import Analysis
from plw_mlflow.analysis.score_table import rescale
from plw_mlflow.analysis.statistics import design, differences, fitting, joint, lack_of_fit, over_tasks, task_curves
from plw_mlflow.analysis.statistics.differences import Difference
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.transforms import AXES, CURVE_TERMS, EXPONENT, make_transform

SHORT, PLAIN, CLEANED = "AlpacaDataShort", "AlpacaData", "AlpacaDataCleaned"
DATASETS = (PLAIN, CLEANED, SHORT)
WIT_SETS = ("Tulu-v2", "Alpaca-Cleaned", "LIMA")  # by generation ratio
MARGIN = 0.01  # one point of accuracy or BLEU
AXIS_NAMES = {
    "w_p": "`w_p`: PLW^0.30103",
    "plw": "`plw`",
    "logit": "`logit` of PLW",
    "rank": "`rank` of PLW",
    "share": "`share` of the prompts",
    "w_share": "`w_share`: share^0.30103",
    "w_odds": "`w_odds`: (weight of prompts / of completions)^0.30103",
}
RATIOS = (0.01, 0.08, 0.3, 1.0, 3.0, 10.0)


# ------------------------------------------------------------------------------------------------- the fits


@cache
def scores() -> pd.DataFrame:
    """The study's 480 scores, as fractions, with the prompts' share of the loss weight by its Table 1."""
    table = score_table.read_scores(evidence.TABLES / "v1_scores.csv")
    return score_table.add_prompt_shares(table, evidence.printed_ratios())


@cache
def analysis() -> Analysis:
    """All that `python -m entrypoints.analyze --scores paper/tables/v1_scores.csv --margin 0.01` finds."""
    return analyze.analyze(scores(), margin=MARGIN)


def grid(table: pd.DataFrame, name: str = "", by: str | None = None, axis: str = "w_p") -> design.Grid:
    """A checked table as the models take it."""
    return design.grid(table, name, make_transform(axis, table["plw"], score_table.prompt_odds(table)), by=by)


@cache
def fitted(dataset: str, model: str, scale: str = "none", axis: str = "w_p") -> Fit:
    """One model of one of the study's data sets; the scale `mixed` has BLEU in 0..100 and the rest in 0..1."""
    return fitting.fit(model, grid_of(dataset, scale, axis))


def grid_of(dataset: str, scale: str = "none", axis: str = "w_p") -> design.Grid:
    """One of the study's data sets as the models take it, its scores on a scale as `fitted` has it."""
    table = scores()
    if scale == "mixed":
        table = table.assign(score=table["score"].where(table["metric"] != "bleu", 100 * table["score"]))
    else:
        table = rescale(table, scale)
    return grid(table[table["dataset"] == dataset], dataset, axis=axis)


@cache
def wit(most: float) -> pd.DataFrame:
    """WIT's runs of PLWs up to `most`."""
    table = score_table.add_prompt_shares(evidence.wit_scores(), evidence.wit_ratios())
    return table[table["plw"] <= most]


@cache
def wit_fitted(dataset: str, model: str, most: float) -> Fit:
    """One model of one of WIT's data sets, each language model playing a task."""
    table = wit(most)
    return fitting.fit(model, grid(table[table["dataset"] == dataset], dataset))


def compared(table: pd.DataFrame, datasets: Sequence[str], axis: str = "w_p") -> Difference:
    """The test of a difference between data sets."""
    return differences.compare_curves(grid(table[table["dataset"].isin(datasets)], by="dataset", axis=axis), "dataset")


@cache
def evidence_points() -> tuple[evidence.EvidencePoint, ...]:
    """All published points."""
    return tuple(evidence.published())


# ------------------------------------------------------------------------------------------------- writing


def p_value(p: float) -> str:
    """Two digits; small ones as powers of ten."""
    return f"{p:.2g}" if p >= 0.001 else re.sub("e-0*", "e-", f"{p:.0e}")


def span(low: float, high: float) -> str:
    """An interval of PLWs."""
    return f"{low:.2g} to {high:.2g}"


def best(plw: float | None, interval: Sequence[float] | None) -> str:
    """A best PLW with its interval."""
    return "none inside" if plw is None or interval is None else f"{plw:.2g} ({span(*interval)})"


def best_of(curve: task_curves.TaskCurve) -> str:
    """A task's best PLW with its interval, or the end of the range that is best."""
    inside = best(curve.optimum_plw, curve.delta_interval)
    return inside + (f"; highest at {curve.best_plw:.2g}" if curve.optimum_plw is None else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fieller(fit: Fit) -> str:
    """Fieller's set within the range."""
    return " and ".join(span(*pair) for pair in fit.optimum_set or []) + (
        ", unbounded" if fit.optimum_set_is_unbounded else ""
    )


def error(fit: Fit, term: str) -> str:
    """A coefficient and its standard error."""
    return f"{fit.coefficients[term]:+.3f} ({fit.standard_errors[term]:.3f})"


# ------------------------------------------------------------------------------------------------- tables


def table3() -> str:
    """The printed Table 3 and what the study's figures give, on the scales it may have used."""
    printed = pd.read_csv(evidence.TABLES / "v1_table3_regression.csv").set_index("dataset")
    intercept, slope, bend = (float(printed[name][SHORT]) for name in ("intercept", "coef_wp", "coef_wp2"))
    turn = -slope / (2 * bend)
    rows = [["**as printed**", f"{intercept:.3f}", f"{slope:+.3f}", f"{bend:+.3f}"]]
    rows[0].append(f"{turn:.2f}, PLW {turn ** (1 / EXPONENT):.3f}")
    rows[0] += [f"{printed['p_value'][name]:.3f}" for name in reversed(DATASETS)]
    names = {
        "none": "all as fractions",
        "mixed": "BLEU 0..100, the rest 0..1",
        "minmax": "each task min-max",
        "zscore": "each task z-scored",
    }
    for scale, name in names.items():
        fit = fitted(SHORT, "lmm", scale)
        assert fit.vertex_wp is not None
        turns = (
            f"{fit.vertex_wp:.2f}, PLW {fit.optimum_plw:.3f}" if fit.optimum_plw else f"{fit.vertex_wp:.2f}, outside"
        )
        coefficients = [f"{fit.coefficients['intercept']:.3f}", *(f"{fit.coefficients[t]:+.3f}" for t in CURVE_TERMS)]
        p = [p_value(fitted(other, "lmm", scale).joint_p) for other in reversed(DATASETS)]
        rows.append([name, *coefficients, turns, *p])
    head = ["scale", "intercept", "w_p", "w_p²", "turns at w_p", "p, Short", "p, Cleaned", "p, AlpacaData"]
    return markdown(head, rows)


def by_model() -> str:
    """Joint p of every model for every data set."""
    rows = []
    for model in fitting.FITS:
        fits = [fitted(dataset, model) for dataset in DATASETS]
        rows.append([f"`{model}`", fits[-1].joint_tests[0].test, *(p_value(fit.joint_p) for fit in fits)])
        rows[-1] += [error(fits[-1], term) for term in CURVE_TERMS]
        rows[-1].append("" if fits[-1].aic is None else f"{fits[-1].aic:.0f}")
    head = ["model", "test", *(f"p, {name}" for name in DATASETS), "Short: w_p (SE)", "w_p² (SE)", "AIC"]
    return markdown(head, rows)


def by_method() -> str:
    """The best PLW of AlpacaDataShort by every model and method."""
    rows = []
    for model in fitting.FITS:
        fit = fitted(SHORT, model)
        shown = [f"{fit.optimum_plw:.3f}", span(*(fit.delta_interval or ())), fieller(fit)]
        shown.append(f"{fit.interior_probability:.3f}")
        rows.append([f"`{model}`", *shown])
    (answer,) = [one for one in analysis().answers if one.dataset == SHORT]
    (resampled,) = answer.bootstraps
    rows.append(["bootstrap over tasks", "", span(*resampled.interval), "", f"{resampled.interior:.3f}"])
    return markdown(["model", "best PLW", "95 %, delta", "95 %, Fieller", "chance of a peak inside"], rows)


def by_task() -> str:
    """Each task's own curve, and each type's."""
    answers = {answer.dataset: answer for answer in analysis().answers}
    rows = []
    for number, curve in enumerate(answers[SHORT].by_task):
        p = [p_value(answers[dataset].by_task[number].joint_p) for dataset in DATASETS]
        rows.append([curve.task, str(curve.task_type), *p, best_of(curve)])
    types = {dataset: dict(answers[dataset].by_type) for dataset in DATASETS}
    for kind, fit in types[SHORT].items():
        p = [p_value(types[dataset][kind].joint_p) for dataset in DATASETS]
        where = best(fit.optimum_plw, fit.delta_interval)
        where += f"; highest at {wording.highest_end(fit):.2g}" if fit.optimum_plw is None else ""
        rows.append([f"**{kind}**", f"{fit.tasks} task{'s' * (fit.tasks > 1)}, `{fit.model}`", *p, where])
    return markdown(["task", "type", *(f"p, {name}" for name in DATASETS), "Short: best PLW (95 %, delta)"], rows)


def by_scale() -> str:
    """AlpacaDataShort under every scale and on every axis."""
    names = {
        ("none", "w_p"): "fractions, w_p = PLW^0.30103",
        ("minmax", "w_p"): "each task min-max",
        ("zscore", "w_p"): "each task z-scored",
        ("none", "logit"): "logit of PLW",
        ("none", "rank"): "rank of PLW",
        ("none", "plw"): "PLW itself",
        ("none", "share"): "the prompts' share of the loss weight",
        ("none", "w_share"): "that share^0.30103",
    }
    rows = []
    for (scale, axis), name in names.items():
        shown = []
        for model in ("crossed", "lmm"):
            fit = fitted(SHORT, model, scale, axis)
            shown += [p_value(fit.joint_p), best(fit.optimum_plw, fit.delta_interval)]
        misfit = lack_of_fit.lack_of_fit(grid_of(SHORT, scale, axis))
        assert misfit is not None
        rows.append([name, *shown, p_value(misfit.p)])
    head = ["scale or axis"]
    for model in ("crossed", "lmm"):
        head += [f"p, `{model}`", "best PLW (95 %, delta)"]
    return markdown([*head, "lack of fit, p"], rows)


def between() -> str:
    """Direct tests between the study's data sets."""
    return _between(scores(), DATASETS)


def _between(table: pd.DataFrame, datasets: Sequence[str]) -> str:
    pairs = [(first, second) for i, first in enumerate(datasets) for second in datasets[i + 1 :]]
    rows = []
    for group in [*pairs, tuple(datasets)]:
        tests = {test.test: p_value(test.p) for test in compared(table, group).tests}
        over = tests.get("Hotelling's T^2 over tasks", "too few tasks")
        rows.append([" / ".join(group), over, tests["likelihood ratio, lmm"]])
    return markdown(["data sets", "p, over tasks (Hotelling)", "p, likelihood ratio of `lmm`"], rows)


def by_axis() -> str:
    """All data sets of a collection of runs described together, on every axis."""
    collections = {
        "the study, 60 runs": (scores(), DATASETS),
        "WIT, 60 runs, PLW to 1": (wit(1.0), WIT_SETS),
        "WIT, 90 runs, PLW to 5": (wit(5.0), WIT_SETS),
    }
    return axes_table(collections)


def axes_table(collections: Mapping[str, tuple[pd.DataFrame, Sequence[str]]]) -> str:
    """One curve for all data sets of each collection of runs, beside a curve each, on every axis.

    collections: the scores of each, and the names of its data sets in the order of the errors.
    """
    rows = []
    for name, (table, datasets) in collections.items():
        joined = joint.compare_axes(score_table.check(table))
        for axis in (None, *(axis for axis in AXES if axis not in joined.refusals)):
            one = joined.of(axis)
            assert one.left_out is not None
            errors = [
                f"{100 * one.left_out[dataset]:.2f}" + "*" * bool((one.beyond or {}).get(dataset))
                for dataset in datasets
            ]
            row = [name, "no curve" if axis is None else AXIS_NAMES[axis], f"{one.loglik:.1f}", f"{one.aic:.1f}"]
            each = None if axis is None else joined.of(axis, each=True)
            row += [", ".join(errors), *(["", ""] if each is None else [f"{each.loglik:.1f}", f"{each.aic:.1f}"])]
            rows.append(row)
    head = ["runs", "axis", "one curve: log-likelihood", "AIC", "error on each data set, left out, in points"]
    return markdown([*head, "a curve each: log-likelihood", "AIC"], rows)


def no_effect() -> str:
    """Is PLW's effect as good as none?"""
    rows = []
    for answer in analysis().answers:
        equivalence = answer.equivalence
        assert equivalence is not None
        assert equivalence.smallest_margin is not None
        assert equivalence.detectable is not None
        pair = f"{equivalence.largest_difference:.4f}, PLW {equivalence.pair[0]:g} to {equivalence.pair[1]:g}"
        rows.append(
            [
                answer.dataset,
                pair,
                p_value(equivalence.p or 0),
                f"{equivalence.smallest_margin:.4f}",
                f"{equivalence.detectable:.4f}",
            ]
        )
    head = ["data set", "largest difference", f"p of all within ±{MARGIN}", "smallest margin passed", "detectable"]
    return markdown(head, rows)


def claimed() -> str:
    """The study's claims that its scores can judge, by both questions."""
    rows: dict[tuple[str, str], list[str]] = {}
    for one in claims.judge(scores(), ratios=evidence.printed_ratios()):
        if not one.question:
            continue
        row = rows.setdefault((one.claim, one.dataset), [one.says, one.source, one.dataset, "", ""])
        row[3 + list(claims.QUESTIONS).index(one.question)] = f"**{one.verdict}**: {one.found}"
    head = ["claim", "source", "data", "these tasks", "others like them"]
    return markdown(head, list(rows.values()))


def wit_models() -> str:
    """WIT's data sets by the models, with PLWs up to 5 and up to 1."""
    rows = []
    for most in (5.0, 1.0):
        for dataset in WIT_SETS:
            fits = {model: wit_fitted(dataset, model, most) for model in ("crossed", "lmm-slopes", "lmm")}
            lead = fits["crossed"]
            where = [best(fit.optimum_plw, fit.delta_interval) for fit in (lead, fits["lmm"])]
            rows.append([dataset, f"{lead.runs}, PLW to {most:g}", *(p_value(fit.joint_p) for fit in fits.values())])
            rows[-1] += where
    head = ["data set", "runs by model", "p, `crossed`", "p, `lmm-slopes`", "p, `lmm`", "best PLW, `crossed` (delta)"]
    return markdown([*head, "best PLW, `lmm` (delta)"], rows)


def wit_points() -> str:
    """Where each of WIT's 15 grids is highest within 0..1."""
    points = {(point.dataset, point.model): point for point in evidence_points() if point.study == evidence.WIT}
    rows = []
    for model in sorted({model for _, model in points}):
        points_of_model = [points[dataset, model] for dataset in WIT_SETS]
        places = [
            f"{point.plw:.2g} ({span(*point.interval)})" if point.is_located else "anywhere"
            for point in points_of_model
        ]
        rows.append(
            [
                model,
                *(
                    f"{place}, p = {p_value(point.p or 0)}"
                    for place, point in zip(places, points_of_model, strict=True)
                ),
            ]
        )
    return markdown(["model", *WIT_SETS], rows)


def wit_between() -> str:
    """Direct tests between WIT's data sets, PLWs up to 5."""
    return _between(wit(5.0), WIT_SETS)


def ratios() -> str:
    """What the published evidence says of generation ratios."""
    rows = []
    for ratio in RATIOS:
        advice = advise.advise(ratio, evidence_points())
        assert advice.plw is not None
        rows.append([f"{ratio:g}", f"{advice.plw:.2g}", span(*advice.mean_interval), span(*advice.interval)])
    return markdown(["generation ratio", "best PLW, on average", "95 %", "95 %, one more data set and model"], rows)


def singles() -> str:
    """Single runs in print that have figures."""
    rows = []
    for runs in sorted(advise.advise(1.0, evidence_points()).single_runs, key=lambda runs: runs.ratio or math.inf):
        if runs.gain is not None and runs.scores is not None and runs.ratio is not None:
            scores = [f"{100 * score:.1f}" for score in runs.scores]
            difference = f"{100 * runs.gain:+.1f}"
            if runs.reach is not None:
                ends = (100 * (runs.gain + sign * runs.reach) for sign in (-1, 1))
                difference += " ({:+.1f} to {:+.1f})".format(*ends)
            rows.append([runs.dataset, f"{runs.ratio:.3g}", runs.task, *scores, difference])
    return markdown(["data set", "generation ratio", "score", "PLW 0", "PLW 1", "difference, points (95 %)"], rows)


def slopes() -> str:
    """Each study's slope, and all together, with Tulu-v2's ratio as guessed and elsewhere."""
    rows = []
    for guess in (1.0, 2.0, 4.0):
        points = [replace(p, ratio=guess) if p.ratio_is == "guessed" else p for p in evidence_points()]
        advice = advise.advise(1.0, points)
        assert advice.line is not None
        by_study = {
            slope.study: f"{slope.slope:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})" for slope in advice.slopes
        }
        value, reach = advice.line.slope
        together = f"{value:+.2f} ({value - reach:+.2f} to {value + reach:+.2f})"
        rows.append([f"{guess:g}", by_study[evidence.STUDY], by_study[evidence.WIT], together])
    return markdown(["Tulu-v2's ratio", "the study", "WIT", "all together"], rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        table3,
        by_model,
        by_method,
        by_task,
        by_scale,
        between,
        by_axis,
        no_effect,
        claimed,
        wit_models,
        wit_points,
        wit_between,
        ratios,
        singles,
        slopes,
    )
}


def headlines() -> dict[str, str]:
    """The numbers of the page's prose, as it spells them, by what they are."""
    crossed, lmm, beta = (fitted(SHORT, model) for model in ("crossed", "lmm", "beta"))
    whole = grid(scores()[scores()["dataset"] == SHORT], SHORT)
    w = crossed.vertex_wp or 0.0
    rise = np.array([w, w**2]) @ whole.contrasts  # from PLW 0 to the peak
    curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
    gain, _, _, p_gain = map(float, curves.t_test(rise))
    datasets, between_models = advise.by_dataset(evidence_points())
    of_wit = [dataset for dataset in datasets if dataset.study == evidence.WIT]
    rank = fitting.stats.spearmanr([dataset.ratio for dataset in of_wit], [dataset.w for dataset in of_wit]).statistic
    by_share = score_table.in_prompt_odds(scores())
    in_share = {axis: p_value(compared(by_share, DATASETS, axis).tests[-1].p) for axis in ("w_share", "share")}
    printed = pd.read_csv(evidence.TABLES / "wit_correlations.csv").set_index("characteristic")["spearman"]
    return {
        "task-t": f"p = {p_value(fitted(SHORT, 'task-t').joint_p)} over tasks",
        "crossed": f"p = {p_value(crossed.joint_p)} with the runs' luck counted",
        "lmm": f"`lmm` gives p = {p_value(lmm.joint_p)}",
        "beta": f"`beta` p = {p_value(beta.joint_p)}",
        "slopes": f"`lmm-slopes` p = {p_value(fitted(SHORT, 'lmm-slopes').joint_p)}",
        "optimum": f"PLW {lmm.optimum_plw:.3f}",
        "gain": f"{100 * gain:.1f} points above it (p = {p_value(p_gain)} over tasks, by `crossed`)",
        "correlation, in print": f"prints a rank correlation of {printed['avg generation ratio']:+.1f}",
        "correlation, here": f"it is {rank:+.1f}",
        "between, in the share": f"p = {in_share['w_share']} if the curves are in `w_share`, {in_share['share']} in",
        "between models": f"SD {math.sqrt(between_models):.2f}",
    }


# ------------------------------------------------------------------------------------------------- figures


def draw_tasks() -> bytes:
    """Each task's curve and their mean, a panel per data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    w = np.linspace(0, 1, 101)
    rows = np.column_stack([w - w.mean(), w**2 - (w**2).mean()])  # about each curve's own mean
    colours = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#999999", "#6b4c9a"]
    table = scores()
    for axes, dataset in zip(panels, DATASETS, strict=True):
        whole = grid(table[table["dataset"] == dataset], dataset)
        curves = over_tasks.fit(whole.scores, whole.x, whole.contrasts, runs_differ=True)
        for colour, task in zip(colours, task_curves.fit_task_curves(whole), strict=True):
            b = [task.coefficients[term] for term in CURVE_TERMS]
            axes.plot(w, rows @ b, color=colour, linewidth=1.4, label=task.task)
        mean, error, freedom, _ = curves.t_test(rows @ whole.contrasts)
        reach = fitting.stats.t.ppf(0.975, freedom) * error
        axes.fill_between(w, mean - reach, mean + reach, color="black", alpha=0.15, linewidth=0, label="mean, 95 %")
        axes.plot(w, mean, color="black", linewidth=2.4)
        axes.set_title(f"{dataset}: p = {p_value(fitted(dataset, 'crossed').joint_p)}", loc="left", fontsize=11)
        axes.set_xticks(
            [plw**EXPONENT for plw in evidence_figure.TICKS], [f"{plw:g}" for plw in evidence_figure.TICKS], fontsize=8
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_xlabel("PLW")
    panels[0].set_ylabel("fitted score less its task's mean")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def draw_evidence() -> bytes:
    """The figure of `python -m entrypoints.advise --ratio 1`."""
    return evidence_figure.draw(advise.advise(1.0, evidence_points()))


FIGURES: dict[str, Callable[[], bytes]] = {"study_tasks.png": draw_tasks, "advice.png": draw_evidence}


def marked(name: str, table: str) -> str:
    """A table between the marks by which the page's own is found."""
    return f"<!-- {name} -->\n{table}\n<!-- end -->"


@click.command()
@click.option("--write", type=click.Path(path_type=Path), help="Folder of study.md, whose tables and figures are made.")
def main(write: Path | None) -> None:
    """Print the page's numbers."""
    tables = {name: make() for name, make in TABLES.items()}
    for name, table in tables.items():
        print(f"{name}: {(TABLES[name].__doc__ or '').strip()}\n\n{table}\n")
    for name, headline in headlines().items():
        print(f"{name}: {headline}")
    if write is not None:
        page = (write / "study.md").read_text()
        for name, table in tables.items():
            before, mark, after = page.partition(f"<!-- {name} -->\n")
            _, end, after = after.partition("<!-- end -->")
            if not (mark and end):
                raise ValueError(f"{write}/study.md has no place for the table {name}")
            page = before + marked(name, table) + after
        (write / "study.md").write_text(page)
        for name, draw in FIGURES.items():
            (write / name).write_bytes(draw())


if __name__ == "__main__":
    main()
