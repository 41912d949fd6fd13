"""Imports point one way: from what runs a study down to the ground, and never back."""

import ast
import os
import subprocess
import sys

import pytest

from plw_mlflow.config import CONFIGS
from tests.stores import ROOT

ROOMS = (
    *(
        "entrypoints",
        "command_line",
        "sweep",
        "verification",
        "cell",
        "tracking",
        "advice",
        "evaluation",
        "integrations",
        "training",
        "models",
    ),
    *("analysis", "statistics", "data", "config", "toy", "environment"),
    *("drawing", "transforms", "study", "seeding", "errors", "__version__"),
)
# Rooms that stand one above the other without knowing each other.
STRANGERS = {("models", "data"), ("evaluation", "training"), ("analysis", "data")}


def room(module):
    parts = module.split(".")
    return parts[0] if parts[0] == "entrypoints" else [*parts, ""][1]


def imports():
    """The pairs of rooms (importing, imported) of every import in the package and the entry points."""
    for file in [*ROOT.glob("plw_mlflow/**/*.py"), *ROOT.glob("entrypoints/*.py")]:
        here = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "plw_mlflow":
                yield from ((here, alias.name, file) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plw_mlflow."):
                yield here, room(node.module), file
            elif isinstance(node, ast.Import):
                yield from ((here, room(a.name), file) for a in node.names if a.name.startswith("plw_mlflow."))


def test_imports_point_downwards():
    pairs = [pair for pair in imports() if pair[0] != pair[1]]
    assert len(pairs) > 100
    wrong = [
        f"{file.relative_to(ROOT)} imports {imported}"
        for importing, imported, file in pairs
        if ROOMS.index(importing) >= ROOMS.index(imported)
    ]
    assert wrong == []
    assert {(importing, imported) for importing, imported, _ in pairs}.isdisjoint(STRANGERS)
    assert "integrations" not in {imported for _, imported, _ in pairs}  # which are for people's own programs


HEAVY = {"torch", "transformers", "mlflow", "peft", "pandas", "scipy", "matplotlib", "lm_eval", "datasets"}
TRAIN_AND_LOG = """
from pathlib import Path
import mlflow
from plw_mlflow import cell
from plw_mlflow.config import TrainConfig
from plw_mlflow.data import batches
from plw_mlflow.models import adapters
config = TrainConfig(max_records=20, epochs=1, batch_examples=32, checkpoint_dir=Path(FOLDER), cache_dir=Path(FOLDER))
tokenizer, prepared = cell._prepare(config)
model, _ = cell._load_model(config, prepared, tokenizer)
trained = cell.train.run(config, prepared, model, config.checkpoint_dir)
assert trained.steps == 1
adapters.merge(trained.model, config.checkpoint_dir)
mlflow.set_tracking_uri(f"sqlite:///{FOLDER}/mlflow.db")
with cell.tracking.open_run(config, "cell") as run:
    cell.tracking.log_model(run, trained.model, tokenizer, config)
"""


def modules_after(code, folder=ROOT):
    """The modules that are imported when a program that runs in a folder ends, with its exit status."""
    code = f"import atexit, sys; atexit.register(lambda: print('modules', *sys.modules)); {code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    (modules,) = [line for line in printed.stdout.splitlines() if line.startswith("modules ")]
    return set(modules.split()[1:]), printed.returncode


def test_preparing_data_imports_no_statistics():
    modules, _ = modules_after("import plw_mlflow.data.prepare")
    assert "plw_mlflow.data.prepare" in modules
    assert {module.split(".")[0] for module in modules}.isdisjoint(
        {"scipy", "statsmodels", "mlflow", "torch", "lm_eval"}
    )
    assert not [module for module in modules if module.startswith("plw_mlflow.analysis")]


def test_integrations_need_no_tracking_no_benchmark_and_no_command_line():
    """Nor `datasets`, though transformers' own Trainer imports it where it is installed."""
    code = (
        "import plw_mlflow.integrations; assert not {'datasets', 'transformers.trainer'} & sys.modules.keys(); "
        "from plw_mlflow.integrations import PLWTrainer"
    )
    modules, ended = modules_after(code)
    assert ended == 0
    assert "plw_mlflow.integrations.trainer" in modules
    assert {module.split(".")[0] for module in modules}.isdisjoint({"mlflow", "lm_eval", "click", "matplotlib"})


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--no-such-option"], 2)])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_help_and_faults_import_nothing_heavy(name, arguments, status):
    """Which is why they come at once; benchmarks/startup.py measures how soon."""
    code = f"sys.argv = {['', *arguments]}; import runpy; runpy.run_module('entrypoints.{name}', run_name='__main__')"
    modules, ended = modules_after(code)
    assert ended == status
    assert "plw_mlflow.command_line.cli" in modules
    assert {module.split(".")[0] for module in modules}.isdisjoint(HEAVY)


def test_training_and_logging_a_whole_model_imports_no_libraries_of_other_methods(tmp_path):
    """PEFT imports bitsandbytes, which imports torch's compiler: 2 to 3 processor seconds in all."""
    modules, ended = modules_after(f"FOLDER = {str(tmp_path)!r}; exec({TRAIN_AND_LOG!r})", tmp_path)
    assert ended == 0
    assert {"plw_mlflow.training.trainer", "mlflow.transformers", "transformers.models.llama.modeling_llama"} <= modules
    assert modules.isdisjoint({"peft", "bitsandbytes", "torch._inductor.compile_fx", "matplotlib", "lm_eval"})
