"""Fit score against prompt loss weight:  python -m entrypoints.analyze --scores FILE.csv --output DIR"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command
from plw_mlflow.config import AnalyzeConfig, split_list

if TYPE_CHECKING:
    from plw_mlflow.analysis.planning import Planning
    from plw_mlflow.analysis.questions import Compared
    from plw_mlflow.tracking import Run


@command(AnalyzeConfig)
def main(config: AnalyzeConfig) -> None:
    from plw_mlflow import tracking
    from plw_mlflow.analysis import planning

    assumed = None if config.assume is None else planning.assume(config.assume, config.width)
    with (
        tracking.open_run(config, f"analyze {config.subject()}", experiment=tracking.LOOKING) as run,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = config.output or Path(scratch)
        designs = assumed or _analyze(config, run, folder)
        run.log_files(designs.write(folder))
        if text := designs.text():
            print(f"\n{text}")
        print(f"\nrun {run.id}\n{run.address()}")


def _analyze(config: AnalyzeConfig, run: Run, folder: Path) -> Planning:
    from plw_mlflow import tracking
    from plw_mlflow.advice import evidence
    from plw_mlflow.analysis import analyze, claims, planning, report, score_table, wording
    from plw_mlflow.environment import outputs

    by = tuple(split_list(config.by or ""))
    compared = None if config.against is None else _compare(config, run, folder, by)
    if compared is not None and compared.plws < score_table.MIN_PLWS:
        print(f"\nno curve is fitted: that takes {score_table.MIN_PLWS} PLWs of a data set")
        return planning.Planning([], [], [])
    if config.scores is not None:
        table = score_table.read_scores(config.scores, by)
    else:
        scores = tracking.score_table(sweep=config.run_id, experiment=config.experiment, also=by, where=config.where)
        table = score_table.fittable(scores)
    for line in score_table.remarks(table):
        print(line)
    score_table.check_ratios(table, config.given_ratios())
    ratios = evidence.printed_ratios() | config.given_ratios()
    table = score_table.add_prompt_shares(table, ratios)
    analysis = analyze.analyze(
        table,
        config.scale,
        axis=config.axis,
        margin=config.margin,
        by=by,
        draws=config.bootstrap,
        refits=config.parametric,
    )
    command = shlex.join(["python", "-m", "entrypoints.analyze", *sys.argv[1:]])
    run.log_files(report.write(analysis, table, folder, command, compared))
    tracking.log_regression(folder / "fit.json")
    print(wording.table_text(analysis))
    run.describe(f"{wording.verdicts(analysis)}\n\n```sh\n{command}\n```")
    if config.claims:
        if config.scores is None:
            ratios |= tracking.generation_ratios(config.experiment, config.where, config.run_id) | config.given_ratios()
        judged = claims.judge(table, config.scale, by=by, ratios=ratios)
        print(f"\n{claims.text(judged)}")
        run.log_files(outputs.write(folder, {"claims.csv": outputs.table(claims.frame(judged))}))
    grids = analyze.grids(table, config.scale, config.axis, by)
    return planning.ask(grids, width=config.width if config.power else None, next_plws=config.next)


def _compare(config: AnalyzeConfig, run: Run, folder: Path, by: tuple[str, ...]) -> Compared:
    """Compare PLWs question by question, and print and log what comes out."""
    from plw_mlflow import tracking
    from plw_mlflow.analysis import questions
    from plw_mlflow.environment import outputs

    if config.scores is not None:
        asked = questions.read_beside(config.scores, by)
    else:
        asked = tracking.questions(
            sweep=config.run_id,
            experiment=config.experiment,
            also=by,
            where=config.where,
            columns=questions.COLUMNS,
        )
    compared = questions.compare(asked, *config.compared(), by)
    print(f"{questions.text(compared)}\n")
    run.log_files(outputs.write(folder, {"against.csv": outputs.table(questions.frame(compared))}))
    return compared


if __name__ == "__main__":
    main()
