"""Look at a data set before training on it:  python -m entrypoints.prepare --dataset toy-long"""

from plw_mlflow.cli import command
from plw_mlflow.config import PrepareConfig


@command(PrepareConfig)
def main(config: PrepareConfig) -> None:
    from plw_mlflow import models, prepare, tracking

    with tracking.open_run(config, f"prepare {config.dataset}") as run:
        prepared = prepare.run(config.dataset, models.load_tokenizer(config.model, config.tokenizer), config)
        run.log_data(prepared.source, prepared.profile)
        prepare.write(prepared, config.output)
        print(prepare.profile_text(prepared.profile))


if __name__ == "__main__":
    main()
