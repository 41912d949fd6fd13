"""Imports point one way: from what runs a study down to the ground, and never back."""

import ast
import subprocess
import sys

from tests.stores import ROOT

ROOMS = (
    *("entrypoints", "command_line", "sweep", "cell", "tracking", "advice", "evaluation", "training", "models"),
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


def test_preparing_data_imports_no_statistics():
    code = "import sys, plw_mlflow.data.prepare; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    roots = {module.split(".")[0] for module in modules.split()}
    assert "plw_mlflow.data.prepare" in modules.split()
    assert roots.isdisjoint({"scipy", "statsmodels", "mlflow", "torch", "lm_eval"})
    assert not [module for module in modules.split() if module.startswith("plw_mlflow.analysis")]
