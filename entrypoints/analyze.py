"""Fit score against prompt loss weight:  python -m entrypoints.analyze --scores FILE.csv --output DIR"""

import sys
import tempfile
from pathlib import Path

from plw_mlflow.cli import command
from plw_mlflow.config import AnalyzeConfig


@command(AnalyzeConfig)
def main(config: AnalyzeConfig) -> None:
    from plw_mlflow import analyze, planning, report, tracking

    assumed = None if config.assume is None else planning.assume(config.assume, config.width)
    with tracking.open_run(config, "analyze") as run, tempfile.TemporaryDirectory() as scratch:
        folder = config.output or Path(scratch)
        if assumed is None:
            if config.scores is not None:
                table = analyze.read_scores(config.scores)
            else:
                table, thin = analyze.fittable(tracking.score_table(sweep=config.run_id, experiment=config.experiment))
                if thin:
                    print(f"left out, with fewer than {analyze.MIN_PLWS} PLWs: {', '.join(thin)}")
            fits = analyze.analyze(table, config.scale)
            command = " ".join(["python", "-m", "entrypoints.analyze", *sys.argv[1:]])
            run.log_files(report.write(fits, table, folder, command))
            run.log_regression(folder / "fit.json")
            print(analyze.table_text(fits))
            asked = planning.ask(
                analyze.grids(table, config.scale), width=config.width if config.power else None, next_plws=config.next
            )
        else:
            asked = assumed
        run.log_files(asked.write(folder))
        if text := asked.text():
            print(f"\n{text}")
        print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
