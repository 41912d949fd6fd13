"""Look at a data set before training on it:  python -m entrypoints.prepare --dataset toy-long --show 3"""

import sys
from pathlib import Path

if not __package__:  # run as a file: packages are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from entrypoints import command
from plw_mlflow.config import PrepareConfig, data_name, limits, short_name


@command(PrepareConfig)
def main(config: PrepareConfig) -> None:
    from plw_mlflow import tracking
    from plw_mlflow.data import prepare, profile, show, weights
    from plw_mlflow.models import pretrained

    with tracking.open_run(
        config, f"prepare {data_name(config.dataset, config, short_name)}", experiment=tracking.LOOKING
    ) as run:
        tokenizer = pretrained.load_tokenizer(config.model, config.tokenizer)
        loss = weights.of_loss(config.plw, config)
        prepared = prepare.run(config.dataset, tokenizer, config, loss)
        tracking.log_data(run, prepared)
        prepare.write(prepared, config.output)
        for index in range(min(config.show or 0, len(prepared.training))):
            name, colour = prepared.training.id(index), show.has_colour(sys.stdout)
            print(show.show(prepared.training[index], tokenizer, loss, name=name, colour=colour))
        text = f"{profile.text(prepared.profile)}\n{profile.equals_text(prepared.predicted, loss)}"
        print(text)
        run.describe(f"```\n{text}\n```")
        profile.check_limits(prepared.profile, limits.parse(config.fail_if or ""))


if __name__ == "__main__":
    main()
