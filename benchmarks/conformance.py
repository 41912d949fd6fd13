"""What do trainers train on?  python -m benchmarks.conformance --json FILE

Each trainer takes one step of full fine-tuning on a random tiny LLaMA in float32 and a dozen short records, started
by its own command or class, in an environment of its own. The weight that each token really had in the step is found
from the step's gradient by a float64 oracle (benchmarks/trainers/oracle.py), which knows nothing of the trainer. For
each step are shown the sum of these weights, which is 1 where the loss is a mean; the smallest and the largest weight
of a token that is trained on, over their mean, which are both 1 where all tokens count alike; and the residual, what of
the gradient no weights of tokens explain.

Environments are made by --install NAMES, which downloads their packages.
"""

from __future__ import annotations

import functools
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

from benchmarks.trainers import cases, commands, material, oracle
from benchmarks.trainers.names import as_transformers

HERE = Path(__file__).parent
PADDING = material.SPECIAL.index(material.PAD)
EXPLAINED = 1e-4  # a residual above it is no error of float32
TRAINED = 1e-3  # a token counts as trained on if its weight is so much of the largest


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
        if isinstance(program, str):
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
                yield case, judge(folder, [row.tokens for row in known])


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
        subprocess.run(
            [str(environment(places, trainer.environment)), *command],
            cwd=scratch,
            env=os.environ | variables | trainer.variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )


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
    rows = rows_seen(folder)
    texts = [part for row in rows for part in oracle.cut(row.tokens, known)]
    found = the_oracle().weights(gradient, texts)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    positions = [found.by_position(text) for text in texts]
    weights = [weight for row in positions for weight in row]
    largest = max(map(abs, weights))
    trained = [weight for weight in weights if abs(weight) > TRAINED * largest]
    mean = sum(trained) / len(trained)
    shown = [show(tokenizer.convert_ids_to_tokens(text), row, mean) for text, row in zip(texts, positions, strict=True)]
    return {
        "texts": len(texts),
        "rows": len(rows),
        "tokens": len(weights),
        "trained": len(trained),
        "sum": sum(weights),
        "smallest": min(trained) / mean,
        "largest": max(trained) / mean,
        "residual": found.residual,
        # Where rows are packed: what is left if their texts attended to each other.
        "residual_as_one": the_oracle().residual_as_one(gradient, rows) if len(rows) < len(texts) else None,
        "condition": found.condition,
        "shown": sorted(shown),
        "versions": step["versions"],
    }


def show(tokens: list[str], weights: list[float], mean: float) -> str:
    """A text with what is trained on in brackets."""
    words = ""
    inside = False
    for token, weight in zip(tokens, [0.0, *weights], strict=True):
        is_trained = abs(weight) > TRAINED * mean
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
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write what was found.")
@click.option("--trainers", default="", help="Names, separated by semicolons (empty: all).")
@click.option("--cases", "names", default="", help="Names, separated by semicolons (empty: all).")
@click.option(
    "--environments",
    type=click.Path(path_type=Path),
    default="output/trainers",
    show_default=True,
    help="Folder of them.",
)
@click.option("--install", "installed", default="", help="Make these environments, separated by commas, and end.")
@click.option("--scratch", type=click.Path(path_type=Path), default="output/conformance", show_default=True)
def main(file: Path | None, trainers: str, names: str, environments: Path, installed: str, scratch: Path) -> None:
    places, scratch = environments.absolute(), scratch.absolute()
    for name in filter(None, installed.split(",")):
        install(name, places)
    if installed:
        return
    results: dict[str, dict[str, Any]] = {}
    if file and file.exists():
        results = json.loads(file.read_text())
    for trainer in commands.TRAINERS:
        if trainers and trainer.name not in trainers.split(";"):
            continue
        every = [*cases.CASES, *cases.VARIANTS.get(trainer.name, [])]
        chosen = [case for case in every if not names or case.name in names.split(";")]
        for case, found in take_steps(trainer, chosen, places, scratch):
            results.setdefault(trainer.name, {})[case.name] = found
            print(f"{trainer.name:<14} {case.name:<24} {line(found)}", flush=True)
            if file:
                file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def line(found: dict[str, Any]) -> str:
    """What was found of a step, in a line."""
    if "sum" not in found:
        return next(f"{name}: {why}" for name, why in found.items())
    if found["residual"] > EXPLAINED:
        return f"no weights explain it: residual {found['residual']:.0e}, as one text {found['residual_as_one']}"
    return (
        f"{found['trained']:>4} of {found['tokens']:<4} sum {found['sum']:.5f}  {found['smallest']:.4f} to "
        f"{found['largest']:.4f}  residual {found['residual']:.0e}"
    )


if __name__ == "__main__":
    main()
