"""Run programs until their first optimiser step, and save what they trained on:  python probe.py STEPS.json

STEPS.json has a list of steps: the `folder` in which a program is run and where is saved what it did, and the `program`
itself, a file or -m and a module, with its arguments. A program runs as it would by itself. Just before the first step
of an optimiser, the gradient of each parameter is saved, with the rows of tokens that the model has been called with,
and the process ends. Nothing is asked of the trainer, and none of its labels or losses are looked at.

As importing a trainer takes most of the time, it is done once (`imports`), and each step then is a fork of this
process; a step of several processes, which torchrun starts with this program, is the only one in its file, and is not.

This file is run by the Python of each trainer's environment, and so imports torch alone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

INPUTS = ("input_ids", "position_ids", "attention_mask")
PACKAGES = ["torch", "transformers", "accelerate", "peft", "trl", "lightning"]
PACKAGES += ["litgpt", "llamafactory", "ms-swift", "axolotl", "torchtune", "unsloth"]
SECONDS = 300  # that a step may take


class Probe:
    """Sees the calls of all modules, and the first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.micro_batches: list[dict[str, Any]] = []
        self._depth = 0

    def start(self) -> None:
        """Begin to look."""
        register_optimizer_step_pre_hook(self._save)
        call = nn.Module.__call__

        def seen_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._see(args, kwargs)
            self._depth += 1
            try:
                return call(module, *args, **kwargs)
            finally:
                self._depth -= 1

        nn.Module.__call__ = seen_call  # type: ignore[method-assign]

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of the outermost call of a model that is to be trained."""
        if not torch.is_grad_enabled():
            return
        given = {"input_ids": args[0]} | kwargs if args else kwargs
        found = {name: given[name].detach().cpu() for name in INPUTS if isinstance(given.get(name), torch.Tensor)}
        tokens = found.get("input_ids")
        if tokens is not None and not tokens.is_floating_point() and tokens.dim() == 2:
            self.micro_batches.append(found)

    def _save(self, optimizer: Any, *_: Any) -> None:
        optimised = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        modules = [value for value in gc.get_objects() if isinstance(value, nn.Module)]
        # The model is the smallest of those that hold all that is optimised, as others wrap it.
        whole = [module for module in modules if optimised <= set(module.parameters())]
        model = min(whole, key=lambda module: sum(1 for _ in module.modules()))
        gradient = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
        found = {"micro_batches": self.micro_batches, "gradient": gradient, "versions": versions()}
        torch.save(found, self.folder / f"rank{os.environ.get('RANK', '0')}.pt")
        end(0)  # without what a trainer does at its end


def versions() -> dict[str, str]:
    """The versions of the packages that matter, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def end(status: int) -> None:
    """End the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(step: dict[str, Any]) -> None:
    """Run the program of a step, which ends the process."""
    folder, program = Path(step["folder"]), step["program"]
    os.chdir(folder)
    Probe(folder).start()
    is_module = program[0] == "-m"
    sys.argv = program[is_module:]
    sys.path.insert(0, os.getcwd() if is_module else str(Path(program[0]).parent))
    try:
        if is_module:
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
        print("The program ended without a step.")
    except BaseException:
        traceback.print_exc()
    end(1)


def fork(step: dict[str, Any]) -> None:
    """Run a step in a process of its own, and wait for it."""
    child = os.fork()
    if child == 0:
        output = os.open(f"{step['folder']}/output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run(step)
    latest = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > latest:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with Path(step["folder"], "output.txt").open("a") as file:
                file.write(f"\nTimeoutError: killed after {SECONDS} s\n")
            return
        time.sleep(0.1)


def main() -> None:
    """Run the steps of the command line."""
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    for name in given["imports"]:
        importlib.import_module(name)
    if "RANK" in os.environ:
        run(given["steps"][0])
    for step in given["steps"]:
        fork(step)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose names are not the trainers'
    main()
