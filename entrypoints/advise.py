"""Suggest a PLW for a data set, and say how sure that is:  python -m entrypoints.advise --ratio 0.08"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command
from plw_mlflow.config import AdviseConfig, split_list

if TYPE_CHECKING:
    from plw_mlflow.advice.evidence import EvidencePoint
    from plw_mlflow.tracking import Run


@command(AdviseConfig)
def main(config: AdviseConfig) -> None:
    from plw_mlflow import tracking
    from plw_mlflow.advice import advise, evidence, exports, wording

    task_types = advise.check_types(split_list(config.task_types or ""))
    with (
        tracking.open_run(config, f"advise {config.dataset or config.ratio}", experiment=tracking.LOOKING) as run,
        tempfile.TemporaryDirectory() as scratch,
    ):
        ratio, dataset = config.ratio, config.dataset_names()
        if ratio is None:
            ratio, dataset = _measure_ratio(config, run)
        points = evidence.published(task_types)
        if config.scores is not None or config.experiment is not None:
            points += _own_points(config, dict.fromkeys(dataset, ratio), task_types)
        advice = advise.advise(ratio, points, dataset=dataset, task_types=task_types)
        run.log_files(exports.write(advice, config.output or Path(scratch)))
        print(wording.text(advice))
        run.describe("\n\n".join(wording.sentences(advice)))
        print(f"\nrun {run.id}\n{run.address()}")


def _measure_ratio(config: AdviseConfig, run: Run) -> tuple[float, tuple[str, ...]]:
    """The generation ratio of the data set asked about, and the names that a score table may have for it."""
    from plw_mlflow import tracking
    from plw_mlflow.advice import advise
    from plw_mlflow.data import prepare
    from plw_mlflow.models import pretrained

    prepared = prepare.run(str(config.dataset), pretrained.load_tokenizer(config.model, config.tokenizer), config)
    tracking.log_data(run, prepared)
    name, *others = config.dataset_names()
    contents = "+".join(source.sha256[:8] for source in prepared.sources)
    # The last is its name in a score table that has two files of one name.
    return advise.measured_ratio(prepared.profile), (name, *others, f"{name} ({contents})")


def _own_points(config: AdviseConfig, measured: dict[str, float], task_types: tuple[str, ...]) -> list[EvidencePoint]:
    """The evidence of the person's own scores; measured: generation ratios by data set."""
    from plw_mlflow import tracking
    from plw_mlflow.advice import evidence
    from plw_mlflow.analysis import score_table

    if config.scores is not None:
        table = score_table.read_scores(config.scores)
    else:
        table = score_table.fittable(tracking.score_table(experiment=config.experiment, where=config.where))
        measured = {**tracking.generation_ratios(str(config.experiment), config.where), **measured}
    for line in score_table.remarks(table):
        print(line)
    return evidence.own(table, config.scale, config.given_ratios(), measured, task_types)


if __name__ == "__main__":
    main()
