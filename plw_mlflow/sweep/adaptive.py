"""Adaptive: which cells of a grid are worth running, so that few of them say where the optimum is.

Of each data set, one cell at each of 4 PLWs is run first. After that, each round fits the scores as the report does,
and chooses the cells that narrow the interval of the optimum most: at a PLW not tried yet, or at one already tried with
the next of the listed seeds. Where no parabola describes the scores, the cells farthest from those tried are chosen,
after those of the other data sets. Where several models or methods are listed, a choice is of a cell of each. A data
set ends where its interval is as narrow as wanted, or where nothing is left to be chosen. Every cell that is begun is
run to its end and counts: a cell that was given up because of low early scores would bend the curve.

What is decided follows from the scores of the cells that were chosen before, and from nothing else. It is written into
the sweep's run (decisions.json) before it is carried out, and stands from then on: for the processes that work on the
sweep at the same time, for a second call after a crash, and for one with another width or budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from plw_mlflow import tracking
from plw_mlflow.analysis import analyze
from plw_mlflow.analysis.statistics import lack_of_fit
from plw_mlflow.analysis.statistics.design import Grid
from plw_mlflow.analysis.statistics.fitting import Fit
from plw_mlflow.analysis.statistics.next_plws import NoOptimumError, propose
from plw_mlflow.config import SweepConfig, data_name
from plw_mlflow.errors import UserError
from plw_mlflow.sweep.account import Account
from plw_mlflow.sweep.grid import Cell
from plw_mlflow.tracking import Sweep
from plw_mlflow.transforms import make_transform

MOST_FAILED = 3  # rounds of a data set one after the other in which no cell is finished
FIRST = 4  # PLWs of the first round: one more than a parabola has coefficients
FILE = "decisions.json"


@dataclass(frozen=True)
class Choice:
    """Which PLWs to run next, or none, and why."""

    plws: list[float]  # a run at each; one that occurs again is run with another seed
    why: str
    model: str | None = None  # the statistical model that leads, and its interval's width in PLW, before the choice
    width: float | None = None
    expected_width: float | None = None  # after it, if the curve stays as it is estimated
    error: float | None = None  # expected standard error of the optimum on w_p, before the choice and after it
    expected_error: float | None = None


@dataclass(frozen=True)
class Decision:
    """A choice for a data set in a round of a sweep."""

    round: int
    dataset: str
    choice: Choice
    seeds: list[int]  # of the choice's PLWs

    def line(self) -> str:
        """As the terminal shows it."""
        runs = ", ".join(f"{plw:g} (seed {seed})" for plw, seed in zip(self.choice.plws, self.seeds, strict=True))
        what = f"PLW {runs}" if runs else "no more cells"
        return f"round {self.round}, {self.dataset}: {what}, because {self.choice.why}"

    def short(self) -> str:
        """As the sweep's description shows it."""
        if not self.choice.plws:
            return self.line()
        width = "" if self.choice.width is None else f"; before, the interval was {self.choice.width:.3g} wide"
        return f"round {self.round}, {self.dataset}: PLW {', '.join(f'{plw:g}' for plw in self.choice.plws)}{width}"


def first_plws(plws: Sequence[float]) -> list[float]:
    """FIRST of these PLWs, as equally spaced on w_p as they allow, with both ends."""
    transform = make_transform("w_p", plws)
    free = {plw: float(transform(plw)) for plw in sorted(plws)}
    chosen = []
    for place in np.linspace(min(free.values()), max(free.values()), FIRST):
        chosen.append(min(free, key=lambda plw: abs(free[plw] - place)))
        del free[chosen[-1]]
    return sorted(chosen)


def choose(grid: Grid, left: Mapping[float, int], number: int, wanted: float) -> Choice:
    """The next PLWs of a data set, at most so many.

    left: how many runs can still be chosen at each PLW. wanted: width of the optimum's 95 % interval, in PLW.
    """
    left = {plw: times for plw, times in left.items() if times > 0}
    tried, number = list(grid.runs["plw"]), min(number, sum(left.values()))
    try:
        fit = analyze.lead_fit(grid)
    except ValueError as error:
        return _fill(tried, left, number, f"the scores cannot be fitted ({error})")
    if found := lack_of_fit.misfits([grid]):
        return replace(_fill(tried, left, number, found[grid.dataset].why()), model=fit.model)
    width, known = interval(fit, grid)
    if width <= wanted and not fit.has_too_few_runs:
        return Choice([], f"{known}; {wanted:g} was wanted", fit.model, width)
    if number == 0:
        return Choice([], f"every cell of the grid has been chosen; {known}", fit.model, width)
    try:
        proposal = propose(grid, number, left)
    except NoOptimumError as error:
        if fit.has_too_few_runs:
            return _fill(tried, left, number, f"{known}; {error}, but {fit.runs} runs are too few to rule it out")
        return Choice([], str(error), fit.model, width)
    except ValueError as error:
        return _fill(tried, left, number, f"{known}; which PLWs are best cannot be said ({error})")
    return Choice(
        proposal.plws,
        f"{known}; of the cells left, these lower the expected standard error of the optimum on w_p the most: from "
        f"{proposal.error_now:.3g} to {proposal.error_then:.3g}, and the width to {proposal.width_then:.3g} if the "
        "curve stays as it is",
        fit.model,
        width,
        proposal.width_then,
        proposal.error_now,
        proposal.error_then,
    )


def interval(fit: Fit, grid: Grid) -> tuple[float, str]:
    """The width of the optimum's 95 % interval in PLW, and what is known of the optimum, in words.

    Where the scores do not locate the optimum, the width is that of the range.
    """
    by = f"by {fit.model} on {fit.runs} runs" + f" (too few to be sure: {fit.fewest_runs})" * fit.has_too_few_runs
    if not fit.has_interior_optimum or fit.optimum_set_is_unbounded or not fit.optimum_set:
        low, high = grid.transform.back(grid.transform.ends)
        return float(high - low), f"the optimum is not located {by}"
    low, high = fit.optimum_set[0][0], fit.optimum_set[-1][1]
    return high - low, f"the optimum's 95 % interval {by} is PLW {low:.3g} to {high:.3g}, {high - low:.3g} wide"


def _fill(tried: Sequence[float], left: Mapping[float, int], number: int, reason: str) -> Choice:
    """At most so many PLWs of those left, one after the other the farthest from those tried."""
    transform, times, chosen = make_transform("w_p", tried), dict(left), list[float]()
    for _ in range(min(number, sum(left.values()))):
        there = transform([*tried, *chosen])
        apart = {plw: float(np.abs(there - transform(plw)).min()) for plw, count in times.items() if count > 0}
        chosen.append(max(apart, key=lambda plw: (apart[plw], times[plw])))
        times[chosen[-1]] -= 1
    if not chosen:
        return Choice([], f"every cell of the grid has been chosen; {reason}")
    return Choice(chosen, f"{reason}; these are the farthest on w_p from those tried")


class Chooser:
    """The choice of a sweep's cells, round by round."""

    def __init__(self, config: SweepConfig, cells: Sequence[Cell], sweep: Sweep) -> None:
        """cells: of the whole grid. The cells of the first round, and of all that were decided before, are chosen."""
        self._config, self._sweep = config, sweep
        self._curves = _by_dataset(cells)
        self.decisions: list[Decision] = []
        self.cells: list[Cell] = []  # that were chosen
        self._take_over_or(self._begin)

    def go_on(self, account: Account) -> list[Cell]:
        """Choose further cells by the scores of those chosen before; none where the sweep has ended."""
        account.adopt()  # so that the sweep's score table has the cells that another sweep has finished
        before = len(self.cells)
        self._take_over_or(lambda: self._decide(account))
        return self.cells[before:]

    def told(self) -> list[str]:
        """What was decided, in short, for the sweep's description in Markdown."""
        return [f"Chosen round by round, as {FILE} says:\n" + "\n".join(f"- {one.short()}" for one in self.decisions)]

    def _take_over_or(self, decide: Callable[[], list[Decision]]) -> None:
        """Follow what another process, or an earlier call, has decided beyond what is known here; or decide.

        The end of a data set is not followed, as width and budget may be others here.
        """
        with self._sweep.sole("decide"):
            known = sum(bool(decision.choice.plws) for decision in self.decisions)
            new = [decision for decision in _read(self._sweep) if decision.choice.plws][known:]
            if not new:
                new = decide()
                self._sweep.write_json(FILE, [asdict(decision) for decision in [*self.decisions, *new]])
        self.decisions = [*self.decisions, *new]
        for decision in new:
            print(decision.line(), flush=True)
            for plw, seed in zip(decision.choice.plws, decision.seeds, strict=True):
                self.cells = [*self.cells, *self._curves[decision.dataset][plw][seed]]

    def _begin(self) -> list[Decision]:
        """The first round."""
        decisions = []
        for dataset, points in self._curves.items():
            why = f"a sweep begins with {FIRST} PLWs, spread over w_p = PLW^0.30103"
            decisions.append(self._decision(dataset, Choice(first_plws(list(points)), why)))
        return decisions

    def _decide(self, account: Account) -> list[Decision]:
        """The next round: as many cells as run at the same time, but at least a choice for each data set."""
        finished = {cell.identity for cell in account.finished}
        ended = {decision.dataset for decision in self.decisions if not decision.choice.plws}
        names = [name for name in self._curves if name not in ended]
        number = max(1, self._config.jobs // max(1, sum(self._cost(name) for name in names)))
        choices = {name: self._choice(name, number, account, finished) for name in names}
        decisions, cost = [], len(self.cells)
        for name, choice in sorted(choices.items(), key=lambda item: -_breadth(item[1])):
            affordable = len(choice.plws)
            if self._config.budget is not None:
                affordable = min(affordable, (self._config.budget - cost) // self._cost(name))
            if choice.plws and not affordable:
                known = f", and the interval was {choice.width:.3g} wide" if choice.width is not None else ""
                choice = replace(
                    choice, plws=[], why=f"the budget is spent, {cost} of {self._config.budget} cells{known}"
                )
            choice = replace(choice, plws=choice.plws[:affordable])
            cost += len(choice.plws) * self._cost(name)
            decisions.append(self._decision(name, choice))
        return decisions

    def _choice(self, dataset: str, number: int, account: Account, finished: set[str]) -> Choice:
        """The choice for a data set by the scores of its cells that were chosen before and are finished."""
        points, chosen = self._curves[dataset], {cell.identity for cell in self.cells}
        done = [cell for cell in self.cells if _dataset(cell) == dataset and cell.identity in finished]
        lately = [decision for decision in self.decisions if decision.dataset == dataset][-MOST_FAILED:]
        tried = {
            cell.identity
            for decision in lately
            for plw, seed in zip(decision.choice.plws, decision.seeds, strict=True)
            for cell in points[plw][seed]
        }
        if not done:
            return Choice([], "all its cells have failed")
        if len(lately) == MOST_FAILED and not tried & finished:
            return Choice([], f"all cells of its last {MOST_FAILED} rounds have failed")
        left = {plw: sum(group[0].identity not in chosen for group in seeds.values()) for plw, seeds in points.items()}
        runs = {account.finished_attempt(cell).run_id for cell in done}
        also = self._config.by()
        try:
            table = tracking.patiently(
                "reading the scores", lambda: tracking.score_table(sweep=self._sweep.run.id, also=also, only=runs)
            )
            (grid,) = analyze.grids(table, by=also)
        except ValueError as error:
            return _fill([cell.config.plw for cell in done], left, number, f"the scores cannot be analysed ({error})")
        return choose(grid, left, number, self._config.width)

    def _decision(self, dataset: str, choice: Choice) -> Decision:
        """A choice with the next of the listed seeds at each of its PLWs."""
        chosen, seeds = {cell.identity for cell in self.cells}, []
        for plw in choice.plws:
            seed, group = next(
                (seed, group) for seed, group in self._curves[dataset][plw].items() if group[0].identity not in chosen
            )
            chosen |= {cell.identity for cell in group}
            seeds.append(seed)
        rounds = sum(decision.dataset == dataset for decision in self.decisions)
        return Decision(rounds + 1, dataset, choice, seeds)

    def _cost(self, dataset: str) -> int:
        """How many cells a choice takes: one of each model, method and so on."""
        return _cost(self._curves[dataset])


def _breadth(choice: Choice) -> float:
    """What data sets are served by, the broadest first: how much of the range their optimum may still be in.

    One whose scores cannot be fitted yet comes before all, and one that no parabola describes after all.
    """
    if choice.width is not None:
        return choice.width
    return math.inf if choice.model is None else 0.0


Points = Mapping[float, Mapping[int, list[Cell]]]  # the cells of a data set by PLW and seed, as they are listed


def foretell(config: SweepConfig, cells: Sequence[Cell]) -> str:
    """What an adaptive sweep of a grid will do, for whoever has not begun it yet."""
    plws = ", ".join(f"{plw:g}" for plw in first_plws(list(dict.fromkeys(cell.config.plw for cell in cells))))
    budget = "" if config.budget is None else f" or {config.budget} cells have been run"
    return (
        f"adaptive begins with {_first_round(cells)} of them, those of the first seed at PLW {plws}, and goes on until "
        f"the interval of each data set's best PLW is at most {config.width:g} wide{budget}"
    )


def check(config: SweepConfig, cells: Sequence[Cell]) -> None:
    """Raise UserError where the budget does not reach for the first round."""
    first = _first_round(cells)
    if config.budget is not None and config.budget < first:
        raise UserError(f"budget is {config.budget} cells, but the first round of adaptive takes {first}")


def _first_round(cells: Sequence[Cell]) -> int:
    """How many cells the first round takes."""
    return sum(FIRST * _cost(points) for points in _by_dataset(cells).values())


def _by_dataset(cells: Sequence[Cell]) -> dict[str, dict[float, dict[int, list[Cell]]]]:
    curves: dict[str, dict[float, dict[int, list[Cell]]]] = {}
    for cell in cells:
        points = curves.setdefault(_dataset(cell), {})
        points.setdefault(cell.config.plw, {}).setdefault(cell.config.seed, []).append(cell)
    return curves


def _dataset(cell: Cell) -> str:
    """The name of a cell's data."""
    return data_name(cell.config.dataset, cell.config)


def _cost(points: Points) -> int:
    return max(len(group) for seeds in points.values() for group in seeds.values())


def _read(sweep: Sweep) -> list[Decision]:
    """What was decided for a sweep, as its run has it."""
    return [Decision(**entry | {"choice": Choice(**entry["choice"])}) for entry in sweep.read_json(FILE) or []]
