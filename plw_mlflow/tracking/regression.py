"""Regression: an analysis' fit, registered as the model plw-regression (`regression_model.py`)."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from plw_mlflow.environment import provenance
from plw_mlflow.tracking.connection import without_notes

PACKAGE = Path(__file__).resolve().parents[1]
MODEL = "tracking/regression_model.py"
IMPORTED = ("transforms.py", "errors.py")  # by the model, and by what it imports


def log_regression(fit: Path) -> None:
    """Register a fit.json as a version of plw-regression, in the current run.

    The model consists of numbers in JSON and of the code that reads them. Nothing is pickled.
    """
    answers = json.loads(fit.read_text())["answers"]
    rows = [(answer["dataset"], 0.1, None) for answer in answers]
    rows += [(answer["dataset"], 0.1, task["task"]) for answer in answers for task in answer["by_task"][:1]]
    inputs = [ColSpec("string", "dataset"), ColSpec("double", "plw"), ColSpec("string", "task", required=False)]
    outputs = [ColSpec("double", name) for name in ("score", "low", "high", "optimum_plw")]
    with tempfile.TemporaryDirectory() as folder, _importable_from(folder):  # MLflow runs the model's file right away
        model, code = _copy_code(Path(folder))
        versions = provenance.fingerprint()
        logged = mlflow.pyfunc.log_model(
            name="regression",
            python_model=str(model),
            artifacts={"fit": str(fit)},
            code_paths=[str(code)],
            pip_requirements=[f"{name}=={versions[name]}" for name in ("mlflow", "numpy", "scipy", "pandas")],
            signature=ModelSignature(Schema([*inputs]), Schema([*outputs])),
            input_example=pd.DataFrame(rows, columns=["dataset", "plw", "task"]),
        )
    with without_notes():
        mlflow.register_model(logged.model_uri, "plw-regression")


@contextmanager
def _importable_from(folder: str) -> Iterator[None]:
    """Within the block, Python finds packages in a folder, too."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _copy_code(folder: Path) -> tuple[Path, Path]:
    """Copy the model's file, and the modules that it imports as a package, into `folder`. Returns both places.

    The package is called plw_mlflow_DIGEST after what is in it. Python imports a name once in a process, so under its
    own name the copy would hide this package from whoever imports it later, or this package would hide the copy.
    """
    texts = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in (MODEL, *IMPORTED)}
    name = f"plw_mlflow_{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"
    code = folder / name
    code.mkdir()
    model = folder / Path(MODEL).name
    for file, text in texts.items():
        copy = model if file == MODEL else code / file
        copy.write_text(text.replace("from plw_mlflow.", f"from {name}."), encoding="utf-8")
    return model, code
