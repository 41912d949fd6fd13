"""Score a cell's checkpoint, or any model:  python -m entrypoints.evaluate --run-id RUN"""

from plw_mlflow.cli import command
from plw_mlflow.config import EvaluateConfig


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    from plw_mlflow import evaluate, models, tracking

    with tracking.open_run(config, f"evaluate {config.model}", run_id=config.run_id) as run:
        tasks = evaluate.load_tasks(config)  # an unknown one is to be found before a large model is read
        if config.model is None:
            cell = run.cell()
            model, tokenizer = run.load_checkpoint()
        else:
            cell = {"model": config.model, "dataset": "", "plw": "", "seed": config.seed}
            model, tokenizer = models.load(config.model), models.load_tokenizer(config.model)
        evaluation = evaluate.run(model, tokenizer, tasks, config, config.seed)
        rows = evaluate.table(evaluation, cell)
        run.log_scores(evaluation, rows)
    evaluate.write(rows, config.output)
    print(evaluate.table_text(evaluation))
    print(f"\nrun {run.id}\n{run.address()}")


if __name__ == "__main__":
    main()
