"""Score a cell's checkpoint, or any model:  python -m entrypoints.evaluate --run-id RUN"""

import shutil

from plw_mlflow.cli import command
from plw_mlflow.config import EvaluateConfig


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    from plw_mlflow import evaluate, models, tracking
    from plw_mlflow.config import digest

    unfinished = config.checkpoint_dir / digest({"run": config.run_id, "of": config.model, "at": config.endpoint})
    with tracking.open_run(config, f"evaluate {config.model}", run_id=config.run_id) as run:
        tasks = evaluate.load_tasks(config)  # an unknown one is to be found before a large model is read
        cell = {"model": config.model, "dataset": "", "plw": "", "seed": config.seed}
        if config.endpoint is not None:
            from plw_mlflow.endpoint import Endpoint

            endpoint = Endpoint(config.endpoint, str(config.model), config.tokenizer, unfinished)
            evaluation = evaluate.score(endpoint, tasks, config, config.seed)
        else:
            if config.model is None:
                cell = run.cell()
                model, tokenizer = run.load_checkpoint()
            elif config.model.startswith("models:/"):
                model, tokenizer = tracking.load_registered(config.model)
            else:
                model, tokenizer = models.load_for_scoring(config.model)
            evaluation = evaluate.run(model, tokenizer, tasks, config, config.seed, unfinished)
        rows = evaluate.table(evaluation, cell)
        run.log_scores(evaluation, rows)
        shutil.rmtree(unfinished)
    evaluate.write(rows, config.output)
    print(evaluate.table_text(evaluation))
    print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
