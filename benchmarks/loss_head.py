"""The loss head beside full logits:  python -m benchmarks.loss_head --json FILE

Each case runs in a process of its own, ours and the peer in turn, so that peak memory is each one's own. The peer is
what most trainers do: all logits at once, then torch's cross-entropy per token, weighted.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from plw_mlflow.loss import weighted_nll

PROMPT_SHARE = 0.7  # of the tokens
CASES = [(plw, head) for head in ("frozen", "trained") for plw in (0.0, 0.242, 1.0)]


@dataclass(frozen=True)
class Row:
    """One figure of ours beside the peer's."""

    case: str
    metric: str  # the less the better
    ours: float
    peer: str
    peer_value: float

    @property
    def ratio(self) -> float:
        """Above 1 when ours is better."""
        return self.peer_value / self.ours


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The peer's loss, summed."""
    return nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none") @ weights


def measure(
    who: str, plw: float, head_kind: str, rows: int, width: int, vocabulary: int, repeats: int
) -> dict[str, float]:
    """Median seconds of forward and backward, and how far the peak memory rose above what the inputs take (MiB)."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.randn(vocabulary, width).mul_(width**-0.5).requires_grad_(head_kind == "trained")
    targets = torch.randint(vocabulary, (rows,))
    weights = torch.where(torch.rand(rows) < PROMPT_SHARE, plw, 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        hidden.grad = head.grad = None
        started = time.perf_counter()
        if who == "ours":
            loss = weighted_nll(hidden, head, None, targets, weights)[0]
        else:
            loss = full_logits(hidden, head, targets, weights)
        (loss / weights.sum()).backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "MiB": (peak - before) / 1024}


@click.command(help=__doc__)
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Where to write the rows.")
@click.option("--rows", default=4096, show_default=True)
@click.option("--width", default=1024, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(file: Path, rows: int, width: int, vocabulary: int, repeats: int) -> None:
    found = []
    print(f"{'case':<24}{'metric':<9}{'ours':>10}{'peer':>10}")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for plw, head in CASES:
            sizes = (plw, head, rows, width, vocabulary, repeats)
            ours, peer = (processes.submit(measure, who, *sizes).result() for who in ("ours", "peer"))
            for metric in ours:
                row = Row(f"plw {plw:g}, {head} head", metric, ours[metric], "full logits", peer[metric])
                found.append(asdict(row) | {"ratio": row.ratio})
                print(f"{row.case:<24}{metric:<9}{row.ours:>10.2f}{row.peer_value:>10.2f}   ratio {row.ratio:.2f}")
    file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
