"""Fit score against prompt loss weight:  python -m entrypoints.analyze --scores FILE.csv --output DIR"""

import sys
import tempfile
from pathlib import Path

from plw_mlflow.cli import command
from plw_mlflow.config import AnalyzeConfig, names


@command(AnalyzeConfig)
def main(config: AnalyzeConfig) -> None:
    from plw_mlflow import analyze, report, tracking

    with tracking.open_run(config, "analyze") as run, tempfile.TemporaryDirectory() as scratch:
        if config.scores is not None:
            table = analyze.read_scores(config.scores)
        else:
            table, thin = analyze.fittable(tracking.score_table(sweep=config.run_id, experiment=config.experiment))
            if thin:
                print(f"left out, with fewer than {analyze.MIN_PLWS} PLWs: {', '.join(thin)}")
        found = analyze.analyze(
            table,
            config.scale,
            transform=config.transform,
            margin=config.margin,
            by=tuple(names(config.by or "")),
            draws=config.bootstrap,
        )
        command = " ".join(["python", "-m", "entrypoints.analyze", *sys.argv[1:]])
        folder = config.output or Path(scratch)
        run.log_files(report.write(found, table, folder, command))
        run.log_regression(folder / "fit.json")
        print(analyze.table_text(found))
        print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
