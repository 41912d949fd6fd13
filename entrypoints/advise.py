"""Suggest a PLW for a data set, and say how sure that is:  python -m entrypoints.advise --ratio 0.08"""

import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from plw_mlflow.command_line.cli import command
from plw_mlflow.config import AdviseConfig, names


@command(AdviseConfig)
def main(config: AdviseConfig) -> None:
    from plw_mlflow import tracking
    from plw_mlflow.advice import advise, evidence
    from plw_mlflow.analysis import analyze

    types = advise.check_types(names(config.task_types or ""))
    with tracking.open_run(config, "advise") as run, tempfile.TemporaryDirectory() as scratch:
        ratio, asked = config.ratio, config.dataset_names()
        if ratio is None:
            from plw_mlflow.data import prepare
            from plw_mlflow.models import pretrained

            prepared = prepare.run(
                str(config.dataset), pretrained.load_tokenizer(config.model, config.tokenizer), config
            )
            tracking.log_data(run, prepared.sources, prepared.profile)
            ratio = advise.measured_ratio(prepared.profile)
            contents = "+".join(source.sha256[:8] for source in prepared.sources)
            asked = (*asked, f"{asked[0]} ({contents})")  # as a score table has it that has two files of one name
        points = evidence.published(types)
        if config.scores is not None or config.experiment is not None:
            measured = dict.fromkeys(asked, ratio)
            if config.scores is not None:
                table = analyze.read_scores(config.scores)
            else:
                scored = tracking.score_table(experiment=config.experiment, where=config.where)
                table, thin = analyze.fittable(scored)
                if thin:
                    print(f"left out, with fewer than {analyze.MIN_PLWS} PLWs: {', '.join(thin)}")
                for one in table.attrs.get("left_out", []):
                    print(f"left out: {one}")
                for one in table.attrs.get("notes", []):
                    print(f"note: {one}")
                measured = {**tracking.generation_ratios(str(config.experiment), config.where), **measured}
            points += evidence.own(table, config.scale, config.given_ratios(), measured, types)
        advice = advise.advise(ratio, points, dataset=asked, task_types=types)
        run.log_files(advise.write(advice, config.output or Path(scratch)))
        print(advise.text(advice))
        print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
