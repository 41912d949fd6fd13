"""Score a cell's checkpoint, or any model:  python -m entrypoints.evaluate --run-id RUN"""

import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command
from plw_mlflow.config import EvaluateConfig


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    from plw_mlflow import cell, tracking
    from plw_mlflow.config import digest
    from plw_mlflow.evaluation import evaluate, scores, task_sets
    from plw_mlflow.evaluation.tasks import load_tasks
    from plw_mlflow.models import pretrained
    from plw_mlflow.training import checkpoints

    unfinished = config.checkpoint_dir / digest({"run": config.run_id, "of": config.model, "at": config.endpoint})
    name = f"evaluate {config.model}"
    with checkpoints.reserve(unfinished), tracking.open_run(config, name, run_id=config.run_id) as run:
        tasks = load_tasks(config)  # an unknown one is to be found before a large model is read
        row = {"model": config.model, "dataset": "", "plw": "", "seed": ""}
        if config.endpoint is not None:
            from plw_mlflow.evaluation.endpoint import Endpoint

            names = config.tokenizer, unfinished, config.endpoint_key_env
            endpoint = Endpoint(config.endpoint, str(config.model), *names)
            wrapping = cell.wrapping_of_run(config, run, endpoint.tokenizer)
            evaluation = evaluate.score(endpoint, tasks, config, config.fewshot_seed, wrapping)
        else:
            if config.model is None:
                row = run.cell()
                model, tokenizer = tracking.load_model(run)
            elif config.model.startswith("models:/"):
                model, tokenizer = tracking.load_registered(config.model)
            else:
                model, tokenizer = pretrained.load_for_scoring(config.model, config.base)
            wrapping = cell.wrapping_of_run(config, run, tokenizer)
            evaluation = evaluate.run(model, tokenizer, tasks, config, config.fewshot_seed, unfinished, wrapping)
        rows = scores.table(evaluation, row)
        scored = [score.key for score in evaluation.primary]
        tracking.log_scores(run, evaluation, rows, task_sets.whole(scored) if config.run_id else scored)
        shutil.rmtree(unfinished, ignore_errors=True)
        scores.write(rows, config.output)
        print(scores.text(evaluation))
        if config.run_id is not None:
            cell.measure_again(config, run, model, tokenizer)
    print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
