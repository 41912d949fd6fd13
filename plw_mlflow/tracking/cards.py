"""Cards: what a registered model is, in Markdown, on its page and on that of the logged model.

A card is written from what the run of the cell holds, when the model is registered and again whenever it is scored. It
has lists in place of tables, whose columns MLflow sets without space between.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from mlflow.entities import Run as Entity
from mlflow.entities.model_registry import ModelVersion

from plw_mlflow.errors import without_passwords
from plw_mlflow.models import licences
from plw_mlflow.tracking.cells import cell_columns, parameters
from plw_mlflow.tracking.connection import get_run, suppressing_missing
from plw_mlflow.tracking.run import DESCRIBED, Run, is_ours, listed, text_digest

CHARACTERS = 5000  # of a description; databases keep no more
MOST_STEPS = 5  # in the list of losses
CAVEAT_CHARACTERS = 400  # which may speak of every benchmark
# The options that decide most of a recipe, in the order in which a card has them.
RECIPE = (
    *("preset", "template", "max_tokens", "epochs", "batch_examples", "learning_rate", "warmup_ratio", "weight_decay"),
    *("template_weight", "loss_divisor", "divisor_scope", "label_smoothing", "base_penalty", "dropout"),
)
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
LOSSES = {
    "train/loss": "training loss",
    "eval/prompt_loss": "validation loss of prompts",
    "eval/completion_loss": "validation loss of completions",
}


def write(run: Run, scores: pd.DataFrame) -> None:
    """Write the cards of the models that a run has registered; nothing where there is none, or no longer one.

    scores: the run's score table, which may be empty.
    """
    found = get_run(run.id)
    for tag in ("plw.model_version", "plw.merged_version"):
        name, _, number = found.data.tags.get(tag, "").rpartition("/")
        if not name:
            continue
        with suppressing_missing():
            _write(run, run.client.get_model_version(name, number), scores)


def _write(run: Run, version: ModelVersion, scores: pd.DataFrame) -> None:
    """Write the card of a version, where no person has described it."""
    client, name = run.client, version.name
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, description=_of_all_versions(version))
    if not is_ours(version.description, version.tags):
        return
    text = card(run, version, scores)
    client.set_model_version_tag(name, version.version, DESCRIBED, text_digest(text))
    client.update_model_version(name, version.version, description=text)
    if version.source and version.source.startswith("models:/m-"):
        client.set_logged_model_tags(version.source.removeprefix("models:/"), {"mlflow.note.content": text})


def card(run: Run, version: ModelVersion, scores: pd.DataFrame) -> str:
    """The card of a version that a run has registered."""
    found, tags = get_run(run.id), version.tags
    params = parameters(found)
    sources = _profile(run).get("sources", [])
    columns = cell_columns(params)
    link = f"#/experiments/{found.info.experiment_id}/runs/{run.id}"
    is_adapter = tags.get("plw.form") == "adapter"
    base = found.data.tags.get("plw.base_model", "")
    base_licence = tags.get("plw.base_licence") or "not known"
    about = [
        ("base", f"{_code(columns['model'])} ({_digest(base)}); licence: {base_licence}"),
        *(("data", _source(source)) for source in sources),
        ("form", "adapter, which needs its base" if is_adapter else f"whole model in {_precision(found)}"),
        (
            "run",
            f"[{_plain(str(found.info.run_name))}]({link}), of the code {found.data.tags.get('plw.git_commit', '')}",
        ),
    ]
    before = [
        f"# {_plain(columns['model'])} on {_plain(columns['dataset'])} at PLW {columns['plw']:g}",
        f"Fine-tuned by method {params['method']} with seed {columns['seed']}. In the loss, a prompt token has "
        f"{columns['plw']:g} times the weight of a completion token.",
        "\n".join(f"- {what}: {text}" for what, text in about),
        *_warnings(tags, sources),
        "## Scores",
    ]
    after = [
        *_of_all_scores(scores, found),
        "## Recipe",
        ", ".join(f"{name.replace('_', '-')} {_code(value)}" for name, value in _recipe(params)),
        *_losses(run, found.data.metrics, link),
        "## How to load it",
        _loading(version, is_adapter),
        "## Intended use",
        _use(params),
    ]
    room = CHARACTERS - len("\n\n".join(filter(None, [*before, *after]))) - len("\n\n")
    parts = [*before, listed(_scores(scores), room), *after]
    text = without_passwords("\n\n".join(filter(None, parts)))
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 2] + " …"


def _warnings(tags: Mapping[str, str], sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the licences forbid, and which of them nobody here knows."""
    by_name = {"the base": tags.get("plw.base_licence", "")}
    by_name |= {_plain(str(source["name"])): str(source["licence"]) for source in sources}
    forbid = [f"{name} ({licence})" for name, licence in by_name.items() if licences.is_noncommercial(licence)]
    unknown = [name for name, licence in by_name.items() if not licence]
    lines = [f"**Not for commercial use**: the licence of {' and of '.join(forbid)} forbids it."] if forbid else []
    if unknown:
        lines.append(f"The licence of {' and of '.join(unknown)} is not known here; look it up before use.")
    return lines


def _scores(table: pd.DataFrame) -> list[str]:
    """A line for each score."""
    return [
        f"- {_code(str(row['task']))} {row['metric']}: **{row['score']:.4f}**"
        + ("" if pd.isna(row["stderr"]) else f" ± {row['stderr']:.4f}")
        + f" ({row['n']:,} questions, {row['num_fewshot']} examples before each)"
        for row in table.to_dict("records")
    ]


def _of_all_scores(table: pd.DataFrame, found: Entity) -> list[str]:
    """The mean of the scores, and what they may not be compared with."""
    if table.empty:
        return ["It has not been scored."]
    parts = []
    tags, metrics = found.data.tags, found.data.metrics
    keys = tags.get("plw.score_tasks", "").split(",")
    if "score" in metrics:
        parts.append(f"The mean of {len(keys)} benchmarks, on a scale from 0 to 1, is **{metrics['score']:.4f}**.")
    if caveat := tags.get("plw.score_caveat"):
        parts.append(f"It cannot be compared with published scores: {_cut(_plain(caveat))}.")
    return parts


def _cut(caveat: str) -> str:
    return textwrap.shorten(caveat, CAVEAT_CHARACTERS, placeholder=" …")


def _recipe(params: Mapping[str, str]) -> list[tuple[str, str]]:
    names = RECIPE if params["method"] == "full" else (*RECIPE, *OF_ADAPTERS)
    return [(name, params[name]) for name in names if params.get(name) not in (None, "")]


def _losses(run: Run, metrics: Mapping[str, float], link: str) -> list[str]:
    """The losses at some steps, the last among them, and where the curves are."""
    curves = {words: run.curves.values(name) for name, words in LOSSES.items() if name in metrics}
    if not curves:
        return []
    steps = sorted(set.intersection(*map(set, curves.values())))  # with an evaluation, where there is one
    if not steps:
        return []
    chosen = [steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]
    lines = [
        f"- step {step}: " + ", ".join(f"{words} {curve[step]:.4f}" for words, curve in curves.items())
        for step in dict.fromkeys(chosen)
    ]
    return ["\n".join(lines), f"The curves are among the [metrics of the run]({link}/model-metrics)."]


def _loading(version: ModelVersion, is_adapter: bool) -> str:
    uri = f"models:/{version.name}/{version.version}"
    lines = ["import mlflow", "", f'model = mlflow.pyfunc.load_model("{uri}")']
    lines.append('print(model.predict(model.input_example, params={"max_new_tokens": 64}))')
    elsewhere = ' A base that lies elsewhere now is named by `model_config={"base": "FOLDER"}`.' if is_adapter else ""
    return (
        "In the folder that holds `mlflow.db`, or with `MLFLOW_TRACKING_URI` set. The example is a list with one "
        + "prompt in the template of the training:\n\n"
        + "\n".join(["```python", *lines, "```"])
        + "\n\n`mlflow.transformers.load_model` gives the model and its tokenizer, and "
        + f"`mlflow models serve -m {uri} --env-manager local` serves it.{elsewhere} "
        + f"`python -m entrypoints.verify --run-id {version.run_id}` makes it again and compares."
    )


def _use(params: Mapping[str, str]) -> str:
    toy = (
        " The toy model knows nothing but an invented world, and is good for trying the method alone."
        if params["model"] == "toy"
        else ""
    )
    return (
        "Made to compare prompt loss weights on benchmarks. It expects prompts in the template of its training, "
        f"{_code(params.get('template', 'alpaca'))}, as the input example shows. Nobody has checked that what it "
        f"writes is true or harmless.{toy}"
    )


def _of_all_versions(version: ModelVersion) -> str:
    """The description of a registered model."""
    model, dataset = version.tags.get("plw.model", ""), version.tags.get("plw.dataset", "")
    return (
        f"{_code(model)} fine-tuned on {_code(dataset)}. Each version is one cell: one prompt loss weight (tag "
        "`plw.plw`), seed and method; its card says what it is and how it scores. The alias `best` is the version that "
        "scored highest in the sweep that its tags `plw.best_...` name. With one seed, being best is partly luck."
    )


def _source(source: Mapping[str, Any]) -> str:
    licence = source["licence"] or "not known"
    return (
        f"{_code(str(source['name']))} ({_digest(source['sha256'])}), {source['records']:,} records; licence: {licence}"
    )


def _precision(found: Entity) -> str:
    return str(found.data.tags.get("plw.save_precision", "float32"))


def _profile(run: Run) -> dict[str, Any]:
    if "profile.json" not in {item.path for item in run.client.list_artifacts(run.id)}:
        return {}
    profile: dict[str, Any] = json.loads(run.files(["profile.json"])["profile.json"])
    return profile


def _digest(digest: str) -> str:
    return digest if "@" in digest else f"SHA-256 {digest[:12]}"


def _code(text: str) -> str:
    """A text as code in Markdown, also within a table."""
    return f"`{_plain(text).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    """A text in one line that ends no cell of a table."""
    return " ".join(str(text).split()).replace("|", "/")
