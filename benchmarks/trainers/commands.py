"""How each trainer is started: by its own command, with the options that its documentation has for instructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"

Start = Callable[[dict[str, Any]], list[str] | str]  # the program of a case and its arguments, or why there is none


@dataclass(frozen=True)
class Trainer:
    """A trainer, the environment that it needs and how it is started."""

    name: str
    environment: str
    start: Start
    imports: tuple[str, ...] = ()  # what takes long to import, and is imported once for all steps
    variables: dict[str, str] = field(default_factory=dict)


def by_python(name: str, has_plw: bool, case: dict[str, Any]) -> list[str] | str:
    if case["plw"] and not has_plw:
        return "no weights between 0 and 1"
    return [str(HERE / "by_python.py"), name, f"{case['folder']}/case.json"]


PACKAGES = {
    "trl": [[TORCH, "transformers==5.23.0", "trl==1.16.0"]],
}
TRAINERS = (
    Trainer("PLWTrainer", "ours", partial(by_python, "PLWTrainer", True), ("plw_mlflow.integrations.trainer",)),
    Trainer("transformers", "ours", partial(by_python, "transformers", False), ("transformers.trainer",)),
    Trainer("TRL", "trl", partial(by_python, "trl", False), ("trl.trainer.sft_trainer", "datasets")),
)
