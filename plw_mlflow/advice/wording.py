"""Advice in words: what to do, how sure that is and why, and the evidence as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from plw_mlflow.advice.advise import WHOLE, Advice, Line, Slope
from plw_mlflow.advice.evidence import OWN, STUDY, WIT, EvidencePoint, to_plw
from plw_mlflow.advice.single_runs import SingleRuns
from plw_mlflow.analysis.statistics.optimum import LEVEL

WIDE = 0.5  # width of an interval of w_p from which on it is called wide
IN_PRINT = (
    "In print the two large studies disagree in sign: the study saw an effect of PLW on the data set with short "
    "completions and none on those with long ones; WIT found its best prompt weight to rise with the generation ratio "
    "(rank correlation 0.5, over three data sets)."
)
LONG_GENERATION = (
    "No table has tasks of long generation alone. The study's fourth version says, without scores, that AlpacaEval and "
    "PandaLM rise up to PLW 1 on short completions."
)


def sentences(advice: Advice) -> list[str]:
    """The advice in words: first what to do, then how sure that is and why."""
    low, high = advice.interval
    if advice.w is None:
        lines = ["There is no evidence of a best PLW: any PLW from 0 to 1 will do; 0 is fine."]
    elif not advice.is_located:
        lines = [
            "The evidence does not tell which PLW is best for such a data set: any PLW from 0 to 1 may be.",
            f"The middle of what is known is {advice.plw:.2g}, which is worth little.",
        ]
    else:
        lines = [f"Suggested PLW {advice.plw:.2g}, 95 % interval {low:.2g} to {high:.2g}."]
        if advice.width >= WHOLE:
            lines.append("The interval is the whole range: this is a guess to start from, and only runs would tell.")
        else:
            wide = "That is a wide interval, which rules out little; " if advice.width > WIDE else ""
            lines.append(f"{wide}PLW 0 lies {'within' if low == 0 else 'outside'} it.")
        lines.append(_share_words(advice, low, high))
    lines += [*_own_words(advice), *_nearest_words(advice)]
    if advice.line is not None:
        lines += _line_words(advice, advice.line)
    lines += _slope_words(advice.slopes)
    studies = {point.study for point in advice.points}
    if {STUDY, WIT} <= studies:
        lines.append(IN_PRINT)
    if advice.task_types:
        of_types = f"on {' and '.join(advice.task_types)} tasks"
        lines.append(
            f"The evidence is {of_types} where a table tells tasks apart"
            + ("; WIT's averages of five benchmarks do not." if WIT in studies else ".")
        )
        if "long-generation" in advice.task_types:
            lines.append(LONG_GENERATION)
    curves = Counter((point.study, point.dataset) for point in advice.points)
    flat = Counter((point.study, point.dataset) for point in advice.points if not point.is_located)
    if flat:
        listed = ", ".join(f"{dataset} ({n} of {curves[study, dataset]})" for (study, dataset), n in flat.items())
        lines.append(f"No evidence are curves that could be flat, or highest anywhere: of {listed}.")
    lines += _single_words(advice)
    guessed = sorted({point.dataset for point in advice.points if point.ratio_is == "guessed"})
    if guessed:
        lines.append(f"Nobody has printed the generation ratio of {', '.join(guessed)}, which is guessed.")
    return lines


def _own_words(advice: Advice) -> list[str]:
    own = advice.own
    if own is None:
        return []
    if not own.is_located:
        if own.has_too_few_runs:
            return [f"Your own runs on {own.dataset} are too few to tell; what is suggested rests on other data."]
        assert own.p is not None
        seen = "an effect of PLW, but not which is best" if own.p < LEVEL else "no clear effect of PLW"
        return [f"Your own runs on {own.dataset} show {seen} (p = {own.p:.2g}); what is suggested rests on other data."]
    return [f"Your own runs on {own.dataset} put it at {_best(own)} and have {advice.own_share:.0%} of the weight."]


def _nearest_words(advice: Advice) -> list[str]:
    """Of the data sets of others, the one whose ratio is nearest to that asked."""
    others = [point for point in advice.points if point.study != OWN]
    if not others:
        return []
    nearest = min(others, key=lambda point: abs(math.log(point.ratio / advice.ratio)))
    curves = [point for point in others if (point.study, point.dataset) == (nearest.study, nearest.dataset)]
    places = [f"{_best(point)} by {point.what}{_p(point)}" for point in curves if point.is_located]
    if flat := len(curves) - len(places):
        places.append(f"anywhere by {flat} curve{'s' * (flat > 1)}" + (_p(curves[0]) if len(curves) == 1 else ""))
    return [f"The nearest in ratio is {_named(nearest)} ({nearest.ratio:.2g}); best PLW: {'; '.join(places)}."]


def _named(point: EvidencePoint) -> str:
    return f"{point.dataset} of {point.study}"


def _p(point: EvidencePoint) -> str:
    if point.p is None:
        return ""
    if point.has_too_few_runs:
        return " (too few runs to tell)"
    alone = ", of these tasks alone" if point.fit in ("lmm", "ols-task") else ""
    return f" (p = {point.p:.2g} for no effect by {point.fit}{alone})"


def _best(point: EvidencePoint) -> str:
    low, high = point.interval
    return f"{point.plw:.2g} ({low:.2g} to {high:.2g})"


def _share_words(advice: Advice, low: float, high: float) -> str:
    """What the suggestion means on data of this ratio."""
    assert advice.plw is not None
    shares = [plw / (plw + advice.ratio) for plw in (advice.plw, low, high)]
    return "It gives prompts {:.0%} of the loss weight on such data, and its interval {:.0%} to {:.0%}.".format(*shares)


def _single_words(advice: Advice) -> list[str]:
    """Of the single runs with figures, those whose data set is nearest in ratio."""
    known = [runs for runs in advice.single_runs if runs.reach is not None and runs.ratio is not None]
    if not known:
        return []
    nearest = min(known, key=lambda runs: abs(math.log((runs.ratio or 1) / advice.ratio)))
    return [
        f"Single runs in print have no weight here, as they have one seed. The nearest in ratio ({nearest.ratio:.2g}) "
        f"is of {nearest.study}, on {nearest.dataset}: {_gain(nearest)}."
    ]


def _gain(runs: SingleRuns) -> str:
    if runs.gain is None or runs.plws is None:
        return runs.says
    told = f"PLW {runs.plws[1]:g} less PLW {runs.plws[0]:g} is {100 * runs.gain:+.1f} points"
    if runs.reach is not None:
        told += f" ({100 * (runs.gain - runs.reach):+.1f} to {100 * (runs.gain + runs.reach):+.1f})"
    return f"{told} on {runs.task}"


def _line_words(advice: Advice, line: Line) -> list[str]:
    (w, reach), (low, high) = line.next_one(advice.ratio), advice.mean_interval
    ratios = [dataset.ratio for dataset in line.datasets]
    lines = [
        f"By {len(ratios)} other data sets, the best PLW at ratio {advice.ratio:.3g} is {to_plw(w):.2g} on average "
        f"({low:.2g} to {high:.2g}); for one more data set and model it may be {to_plw(w - reach):.2g} to "
        f"{to_plw(w + reach):.2g}, as the best w_p differs by {math.sqrt(line.tau2_models):.2f} (SD) between models "
        f"and types of task on one data set and by {math.sqrt(line.pooled.tau2):.2f} between data sets of one ratio."
    ]
    if not min(ratios) <= advice.ratio <= max(ratios):
        lines.append(f"That is beyond the ratios there is evidence for, {min(ratios):.2g} to {max(ratios):.2g}.")
    slope, reach = line.slope
    lines.append(
        f"All together, w_p of the best PLW moves by {_span(slope, slope - reach, slope + reach)} for a tenfold ratio"
        + ("." if abs(slope) > reach else ", which could be either way or none.")
    )
    w, reach = line.by_share(advice.ratio)
    lines.append(
        "If one share of the prompts in the loss weight were best on all data, the same data sets would put the best "
        f"PLW at {to_plw(w):.2g} here ({to_plw(w - reach):.2g} to {to_plw(w + reach):.2g}). "
        "They do not show that one is."
    )
    return lines


def _slope_words(slopes: Sequence[Slope]) -> list[str]:
    if not slopes:
        return []
    listed = "; ".join(
        f"{slope.study} {_span(slope.slope, slope.low, slope.high)} from {slope.datasets} data sets" for slope in slopes
    )
    rising, falling = [slope for slope in slopes if slope.slope > 0], [slope for slope in slopes if slope.slope < 0]
    line = f"Study by study, for a tenfold ratio: {listed}."
    if not any(slope.low > 0 or slope.high < 0 for slope in slopes):
        line += " Not one is sure of its sign."
    if rising and falling:
        is_sure = any(slope.low > 0 for slope in rising) and any(slope.high < 0 for slope in falling)
        names = [" and ".join(slope.study for slope in side) for side in (rising, falling)]
        line = (
            f"By their points the studies disagree in sign{'' if is_sure else ', though not surely'}: the best PLW "
            f"rises with the generation ratio by {names[0]} and falls by {names[1]}. {line}"
        )
    return [line]


def _span(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def text(advice: Advice) -> str:
    """The advice as the terminal shows it: the words, then the evidence."""
    name = f" ({advice.dataset})" if advice.dataset else ""
    lines = [f"Data set of generation ratio {advice.ratio:.3g}{name}", "", *sentences(advice), ""]
    columns = [("ratio", 8), ("best PLW (95 %)", 24), ("p", 8), ("data set of study: model, scores", 0)]
    lines.append("  ".join(f"{title:{width}}" for title, width in columns).rstrip())
    for point in sorted(advice.points, key=lambda point: point.ratio):
        best = _best(point) if point.is_located else "anywhere"
        p = "" if point.p is None else "few runs" if point.has_too_few_runs else f"{point.p:.2g}"
        mark = "~" if point.ratio_is == "guessed" else ""
        shown = [f"{mark}{point.ratio:.3g}", best, p, f"{_named(point)}: {point.what}"]
        lines.append("  ".join(f"{part:{width}}" for part, (_, width) in zip(shown, columns, strict=True)).rstrip())
    lines.append("p is of no effect of PLW at all, where runs are not too few to tell; ~ is a guess.")
    if advice.single_runs:
        lines += ["", "Single runs in print, without weight (95 % of the questions alone, not of seeds):"]
    for runs in sorted(advice.single_runs, key=lambda runs: runs.ratio or math.inf):
        ratio = "?" if runs.ratio is None else f"{runs.ratio:.3g}"
        lines.append(f"{ratio:8}  {runs.dataset} of {runs.study}: {_gain(runs)}")
    lines += dict.fromkeys(f"{runs.study}: {runs.caveat} ({runs.source})." for runs in advice.single_runs)
    return "\n".join(lines)
