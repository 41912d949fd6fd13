"""Score a cell's checkpoint, or any model:  python -m entrypoints.evaluate --run-id RUN"""

from plw_mlflow.cli import command
from plw_mlflow.config import EvaluateConfig


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    from plw_mlflow import evaluate, models, tracking

    if config.run_id is None:
        model = str(config.model)
        with tracking.open_run(config, f"evaluate {model}") as run:
            tasks = evaluate.load_tasks(config)
            evaluation = evaluate.run(models.load(model), models.load_tokenizer(model), tasks, config, config.seed)
            rows = evaluate.table(evaluation, {"model": model, "dataset": "", "plw": "", "seed": config.seed})
            run.log_scores(evaluation, rows)
    else:
        tracking.note_wrapper(config.run_id)
        with tracking.open_run(config, "", run_id=config.run_id) as run:
            cell = run.cell()
            tasks = evaluate.load_tasks(config)
            evaluation = evaluate.run(*run.load_checkpoint(), tasks, config, config.seed)
            rows = evaluate.table(evaluation, cell)
            run.log_scores(evaluation, rows)
    evaluate.write(rows, config.output)
    print(evaluate.table_text(evaluation))
    print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
