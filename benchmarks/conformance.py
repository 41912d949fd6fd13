"""What do trainers train on?  python -m benchmarks.conformance --json FILE

Each trainer takes one step of full fine-tuning on a random tiny LLaMA in float32 and a dozen short records, started
by its own command or class, in an environment of its own. The weight that each token really had in the step is found
from the step's gradient by a float64 oracle (benchmarks/trainers/oracle.py), which knows nothing of the trainer. For
each step are shown the sum of these weights, which is 1 where the loss is a mean; the smallest and the largest weight
of a token that is trained on, over their mean, which are both 1 where all tokens count alike; and the residual, what of
the gradient no weights of tokens explain.

Environments are made by --install NAME, which downloads their packages.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.trainers import cases, commands, material, oracle
from benchmarks.trainers.names import as_transformers
from benchmarks.trainers.probe import SECONDS

HERE = Path(__file__).parent
PADDING = material.SPECIAL.index(material.PAD)
EXPLAINED = 1e-4  # a residual above it is no error of float32
SHOWN = 4  # texts of a step
TRAINED = 1e-3  # a token counts as trained on if its weight is so much of the largest


NAMES = [trainer.name for trainer in commands.TRAINERS]
CASES = list(dict.fromkeys(case.name for case in [*cases.CASES, *itertools.chain(*cases.VARIANTS.values())]))


def cases_of(trainer: Any) -> list[cases.Case]:
    """The steps that a trainer is asked to take."""
    return [*cases.CASES, *cases.VARIANTS.get(trainer.name, [])]


def environment(places: Path, name: str) -> Path:
    """The Python of a trainer's environment; ours is the one that runs this."""
    return Path(sys.executable) if name == "ours" else places / name / "bin" / "python"


def take_steps(trainer: Any, chosen: Sequence[Any], places: Path, scratch: Path) -> Iterator[tuple[Any, Any]]:
    """Have a trainer take the steps of cases, and read from each gradient what it did."""
    alone: list[tuple[cases.Case, dict[str, Any]]] = []
    spread: list[tuple[cases.Case, dict[str, Any]]] = []
    for case in chosen:
        folder = scratch / trainer.name.replace(" ", "-") / folder_name(case)
        shutil.rmtree(folder, ignore_errors=True)
        program = trainer.start(cases.write(case, folder))
        if not environment(places, trainer.environment).exists():
            yield case, {"not_run": f"no environment in {places}; make it by --install {trainer.environment}"}
        elif isinstance(program, str):
            yield case, {"not_run": program}
        else:
            (alone if case.processes == 1 else spread).append((case, {"folder": str(folder), "program": program}))
    for group in [alone, *([one] for one in spread)]:
        if group:
            run_probe(trainer, [step for _, step in group], group[0][0].processes, places, scratch)
        for case, step in group:
            folder = Path(step["folder"])
            known = rows_seen(folder.parent / folder_name(cases.WHOLE)) if case.packing else []
            if len(list(folder.glob("rank*.pt"))) < case.processes:
                yield case, {"failed": last_error(folder)}
            elif case.packing and not known:
                yield case, {"failed": f"its texts have not been seen alone, as in the case {cases.WHOLE.name!r}"}
            else:
                try:
                    yield case, judge(folder, [row.tokens for row in known])
                except ValueError as error:
                    yield case, {"failed": str(error)}


def folder_name(case: cases.Case) -> str:
    """The folder in which a case's step is taken, in that of its trainer."""
    return re.sub("[^0-9a-z.]+", "-", case.name.lower())


def rows_seen(folder: Path) -> list[oracle.Row]:
    """The rows of tokens, without padding, with which all processes have called the model in a step."""
    ranks = [torch.load(file, weights_only=False) for file in sorted(folder.glob("rank*.pt"))]
    return [row for rank in ranks for batch in rank["micro_batches"] for row in oracle.rows_of(batch, PADDING)]


def run_probe(trainer: Any, steps: list[dict[str, Any]], processes: int, places: Path, scratch: Path) -> None:
    """Run the programs of steps under a probe, in the trainer's environment."""
    file = Path(steps[0]["folder"]) / "steps.json"
    file.write_text(json.dumps({"imports": trainer.imports if processes == 1 else [], "steps": steps}))
    command = [str(HERE / "trainers/probe.py"), str(file)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "hub"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(HERE.parent) if trainer.environment == "ours" else "",
    }
    # Steps that are forked have an output of their own.
    with (Path(steps[0]["folder"]) / ("imports.txt" if processes == 1 else "output.txt")).open("w") as output:
        limit = ["timeout", "--kill-after=10", str(SECONDS)] if processes > 1 else []  # a fork has its own
        ended = subprocess.run(
            [*limit, str(environment(places, trainer.environment)), *command],
            cwd=scratch,
            env=os.environ | variables | trainer.variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if processes > 1 and ended.returncode in (124, 137):
            output.write(f"\nTimeoutError: killed after {SECONDS} s\n")


def last_error(folder: Path) -> str:
    """What a step that failed printed last of errors, or at all."""
    lines: list[str] = []
    for name in ("imports.txt", "output.txt"):
        if (folder / name).exists():
            lines += [line.strip() for line in (folder / name).read_text(errors="replace").splitlines()]
    said = [line for line in lines if line] or ["nothing was printed"]
    # torchrun ends with errors of its own.
    errors = [line for line in said if re.search(r"\w+(Error|Exception): ", line) and "torch.distributed" not in line]
    return (errors or said)[-1]


@functools.cache
def the_oracle() -> oracle.Oracle:
    """The oracle of the model that all cases have."""
    return oracle.Oracle(material.model().double())


def judge(folder: Path, known: Sequence[oracle.Tokens]) -> dict[str, Any]:
    """The weights of tokens in the step that was taken in a folder, and what follows from them.

    known: the texts of the same records in steps without packing.
    """
    step = torch.load(folder / "rank0.pt", weights_only=False)
    gradient = as_transformers(step["gradient"])
    others = [torch.load(file, weights_only=False)["gradient"] for file in sorted(folder.glob("rank*.pt"))[1:]]
    if any(not torch.equal(other[name], values) for other in others for name, values in step["gradient"].items()):
        return {"failed": "each process has a gradient of its own"}
    if not (rows := rows_seen(folder)):
        return {"failed": "the model was not called with rows of tokens before the step"}
    texts = [part for row in rows for part in oracle.cut(row.tokens, known)]
    found = the_oracle().weights(gradient, texts)
    told = {
        "texts": len(texts),
        "rows": len(rows),
        "residual": found.residual,
        # Where rows are packed: what is left if their texts attended to each other.
        "residual_as_one": the_oracle().residual_as_one(gradient, rows) if len(rows) < len(texts) else None,
        "condition": found.condition,
        "versions": step["versions"],
    }
    return told if found.residual > EXPLAINED else told | described(found, texts, folder / "model")


def described(found: oracle.Weights, texts: Sequence[oracle.Tokens], tokenizer_folder: Path) -> dict[str, Any]:
    """The weights of the tokens of a step in a few numbers, and which tokens have any."""
    positions = [found.by_position(text) for text in texts]
    weights = [weight for row in positions for weight in row]
    least = TRAINED * max(map(abs, weights))
    trained = [weight for weight in weights if abs(weight) > least]
    mean = sum(trained) / len(trained)
    # Of a beginning that several texts share, only the sum of its weights is known.
    alone = [value for prefix, value in found.of_tokens.items() if found.counts[prefix] == 1 and abs(value) > least]
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    shown = [
        show(tokenizer.convert_ids_to_tokens(text), [abs(weight) > least for weight in row])
        for text, row in zip(texts, positions, strict=True)
    ]
    return {
        "tokens": len(weights),
        "trained": len(trained),
        "sum": sum(weights),
        "smallest": min(alone) / mean,
        "largest": max(alone) / mean,
        "shown": sorted(shown)[:SHOWN],
    }


def show(tokens: list[str], are_trained: list[bool]) -> str:
    """A text with what is trained on in brackets. are_trained: of all tokens but the first."""
    words = ""
    inside = False
    for token, is_trained in zip(tokens, [False, *are_trained], strict=True):
        words += ("⟦" if is_trained and not inside else "⟧" if inside and not is_trained else "") + token
        inside = is_trained
    return (words + ("⟧" if inside else "")).replace("Ġ", " ").replace("Ċ", "⏎")


def install(name: str, places: Path) -> None:
    """Make the environment of a trainer."""
    venv.create(places / name, with_pip=True)
    for arguments in commands.PACKAGES[name]:
        subprocess.run([str(environment(places, name)), "-m", "pip", "install", *arguments], check=True)
    for module in commands.EMPTY_MODULES.get(name, ()):
        (folder,) = (places / name).glob("lib/python*/site-packages")
        (folder / f"{module}.py").touch()


@click.command(help=__doc__)
@click.option(
    "--json", "file", type=click.Path(path_type=Path), help="Where to write what was found, beside what it has."
)
@click.option("--trainer", "trainers", multiple=True, type=click.Choice(NAMES), help="Take this one (none: all).")
@click.option("--case", "chosen", multiple=True, type=click.Choice(CASES), help="Take this step (none: all).")
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    default="output/trainers",
    show_default=True,
    help="Folder of them.",
)
@click.option(
    "--install", "installed", multiple=True, type=click.Choice([*commands.PACKAGES]), help="Make it, and end."
)
@click.option("--scratch", type=click.Path(path_type=Path), default="output/conformance", show_default=True)
def main(
    file: Path | None,
    trainers: tuple[str, ...],
    chosen: tuple[str, ...],
    environments: Path,
    installed: tuple[str, ...],
    scratch: Path,
) -> None:
    logging.disable_progress_bar()
    places, scratch = environments.absolute(), scratch.absolute()
    for name in installed:
        install(name, places)
    if installed:
        return
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else {}
    for trainer in commands.TRAINERS:
        if trainers and trainer.name not in trainers:
            continue
        wanted = [case for case in cases_of(trainer) if not chosen or case.name in chosen]
        for case, found in take_steps(trainer, wanted, places, scratch):
            results.setdefault(trainer.name, {})[case.name] = found
            print(f"{trainer.name:<16} {case.name:<34} {line(found)}", flush=True)
            if file:
                file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def line(found: dict[str, Any]) -> str:
    """What was found of a step, in a line."""
    if "residual" not in found:
        return next(f"{name}: {why}" for name, why in found.items())
    if "sum" not in found:
        return f"no weights explain it: residual {found['residual']:.0e}, as one text {found['residual_as_one']}"
    return (
        f"{found['trained']:>4} of {found['tokens']:<4} sum {found['sum']:.5f}  {found['smallest']:.4f} to "
        f"{found['largest']:.4f}  residual {found['residual']:.0e}"
    )


if __name__ == "__main__":
    main()
