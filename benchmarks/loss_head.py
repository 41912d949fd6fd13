"""The loss head beside its bare matrix products and beside full logits:  python -m benchmarks.loss_head --json FILE

Seconds of forward and backward are medians of repeats in which ours and its peers take turns, as shared machines change
speed. The bare products are those that no loss can do without: logits, gradient of the hidden states and, where it
trains, of the head, over the rows whose weight is not 0, all rows at once. "In place" they are written into arrays made
beforehand, which saves touching new memory for the first time, as ours does. Full logits are what most trainers take:
all logits at once, then torch's cross-entropy per token, weighted.

Memory is by how much a fresh process grew beyond inputs and gradients. A test asserts what torch allocates
(tests/training/test_loss.py); this adds what its matrix library takes.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from torch import nn

from plw_mlflow.training import loss

PROMPT_SHARE = 0.7  # of the tokens
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One loss head, and its sizes."""

    plw: float
    head: str  # "frozen" or "trained"
    softcap: float | None
    rows: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.head} head, plw {self.plw:g}" + (", soft-capped" if self.softcap else "")


@dataclass(frozen=True)
class Row:
    """One figure of ours beside a peer's."""

    case: str
    metric: str  # less is better
    ours: float
    peer: str
    peer_value: float

    @property
    def ratio(self) -> float:
        """Above 1 when ours is better."""
        return self.peer_value / self.ours


class Bench:
    """The inputs of a case, and what is measured on them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        trains = case.head == "trained"
        self.hidden = torch.randn(case.rows, case.width, requires_grad=True)
        self.head = torch.randn(case.vocabulary, case.width).mul_(case.width**-0.5).requires_grad_(trains)
        self.targets = torch.randint(case.vocabulary, (case.rows,))
        self.weights = torch.where(torch.rand(case.rows) < PROMPT_SHARE, case.plw, 1.0)
        self.gradient_bytes = self.hidden.nbytes + trains * self.head.nbytes

    def ours(self) -> None:
        total, _ = loss.weighted_nll(
            self.hidden, self.head, None, self.targets, self.weights, softcap=self.case.softcap
        )
        (total / self.weights.sum()).backward()

    def full_logits(self) -> None:
        logits = (self.hidden @ self.head.T).float()
        if self.case.softcap:
            logits = torch.tanh(logits / self.case.softcap) * self.case.softcap
        total = nn.functional.cross_entropy(logits, self.targets, reduction="none") @ self.weights
        (total / self.weights.sum()).backward()

    def bare_products(self) -> Callable[[], None]:
        hidden, head = self.hidden.detach()[self.weights != 0], self.head.detach()

        def run() -> None:
            logits = hidden @ head.T
            _ = logits @ head
            if self.head.requires_grad:
                _ = logits.T @ hidden

        return run

    def bare_products_in_place(self) -> Callable[[], None]:
        hidden, head = self.hidden.detach()[self.weights != 0], self.head.detach()
        logits = torch.zeros(len(hidden), len(head))
        grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)

        def run() -> None:
            torch.mm(hidden, head.T, out=logits)
            torch.mm(logits, head, out=grad_hidden)
            if self.head.requires_grad:
                torch.mm(logits.T, hidden, out=grad_head)

        return run


def seconds(case: Case, repeats: int) -> dict[str, float]:
    """Median seconds of ours and of each peer, taking turns."""
    bench = Bench(case)
    contestants = {
        "ours": bench.ours,
        "bare products": bench.bare_products(),
        "bare products, in place": bench.bare_products_in_place(),
        "full logits": bench.full_logits,
    }
    taken: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(repeats):
        for who, run in contestants.items():
            bench.hidden.grad = bench.head.grad = None
            started = time.perf_counter()
            run()
            taken[who].append(time.perf_counter() - started)
    return {who: statistics.median(times) for who, times in taken.items()}


def memory(who: str, case: Case) -> float:
    """MiB by which this process, a fresh one, grows beyond inputs and gradients."""
    bench = Bench(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    getattr(bench, who)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - bench.gradient_bytes) / MIB


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--rows", default=4096, show_default=True)
@click.option("--width", default=1024, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(file: Path, rows: int, width: int, vocabulary: int, repeats: int) -> None:
    results: list[Row] = []

    def report(*row: str | float) -> None:
        results.append(Row(*row))  # type: ignore[arg-type]
        last = results[-1]
        print(f"{last.case:<37}{last.metric:<19}{last.ours:>8.2f}  {last.peer:<25}{last.peer_value:>8.2f}", end="")
        print(f"  ratio {last.ratio:.2f}", flush=True)

    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for head in ("frozen", "trained"):
            microseconds_per_row = {}
            for plw, softcap in ((0.0, None), (0.242, None), (0.242, 30.0)):
                case = Case(plw, head, softcap, rows, width, vocabulary)
                taken = processes.submit(seconds, case, repeats).result()
                ours = taken.pop("ours")
                for peer, value in taken.items():
                    report(str(case), "seconds", ours, peer, value)
                grown = processes.submit(memory, "ours", case).result()
                report(str(case), "MiB", grown, "budget", loss.BUDGET_BYTES / MIB)
                report(str(case), "MiB", grown, "full logits", processes.submit(memory, "full_logits", case).result())
                if softcap is None:
                    microseconds_per_row[plw] = ours * 1e6 / (rows if plw else int((Bench(case).weights != 0).sum()))
            report(
                f"{head} head, plw 0",
                "microseconds a row",
                microseconds_per_row[0.0],
                "plw 0.242",
                microseconds_per_row[0.242],
            )
    file.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
