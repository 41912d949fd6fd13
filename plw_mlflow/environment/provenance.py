"""Provenance: which code runs here, and whether it is the code that MLflow's record of the run names.

`mlflow run` records the commit of the project's folder, but in Docker the image's code runs. Nobody could trace a
number back to its code if the image had been built before the last change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from plw_mlflow.environment import container
from plw_mlflow.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CODE = ("conda.yaml", "entrypoints", "image/entrypoint.py", "paper", "plw_mlflow")
NO_CODE = ("paper/claims.json",)  # it follows every page of ours, and decides nothing that is logged
# Those that decide what a cell's model and its scores are.
CODE_OF_CELLS = (
    *(f"plw_mlflow/{room}" for room in ("assets/toy", "data", "evaluation", "models", "toy", "training")),
    *(f"plw_mlflow/{file}" for file in ("cell.py", "config/presets.py", "seeding.py")),
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "mlflow", "numpy", "scipy", "pandas")


def commit() -> str | None:
    """The commit of the running code, with "-dirty" where files were changed since; None where it is not known."""
    if _is_image_code():
        return os.environ.get("PLW_GIT_COMMIT") or None
    with suppress(OSError):  # git is not installed
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
        if head:
            return head + ("-dirty" if changes else "")
    return None


def fingerprint() -> dict[str, str]:
    """What the numbers of a run may depend on beside its config and code: versions, processor, threads, processes."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {name: metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "device": device,
        "devices": str(max(1, torch.cuda.device_count())),
        "threads": str(torch.get_num_threads()),
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _processor() -> str:
    """What the processor is called, as its instructions decide in which order numbers are added up."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_digest(root: Path, parts: Sequence[str] = CODE) -> str:
    """SHA-256 of the names and contents of all files below a project's folder that decide what runs.

    parts: the files and folders that count.
    """
    digest = hashlib.sha256()
    for name, sha256 in code_files(root, parts).items():
        digest.update(f"{name}\0".encode())
        digest.update(bytes.fromhex(sha256))
    return digest.hexdigest()


def code_files(root: Path, parts: Sequence[str] = CODE) -> dict[str, str]:
    """The SHA-256 of each file below a project's folder that decides what runs, by its name there."""
    by_name = {}
    for part in parts:
        files = [root / part] if (root / part).is_file() else sorted((root / part).rglob("*"))
        for file in files:
            name = file.relative_to(root).as_posix()
            if name in NO_CODE or "__pycache__" in file.parts or file.name.startswith("."):
                continue
            if file.is_file():
                by_name[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return by_name


def check_image(recorded: str | None) -> None:
    """Raise UserError where the image's code is not the code that MLflow's record of the run names.

    recorded: the commit that MLflow has recorded for the run; None where it recorded none, so that nothing can differ.

    Where `mlflow run` has mounted the project's folder, its files are compared with the image's, so that uncommitted
    changes count and a change of documentation does not. Elsewhere the commits are compared.
    """
    if not _is_image_code():
        return
    folder = os.environ.get("PLW_FOLDER")
    image, way_out = container.image(), "build it again (make image), or run its code with --allow-stale-image true"
    if folder and (Path(folder) / "plw_mlflow").is_dir():
        if code_digest(Path(folder)) != code_digest(ROOT):
            raise UserError(
                f"image {image} (commit {commit() or 'unknown'}) was built from other code than {folder} holds now; "
                f"{way_out}"
            )
    elif recorded and recorded != commit():
        raise UserError(
            f"image {image} was built from commit {commit() or 'unknown'}, but MLflow records {recorded} for this "
            f"run; {way_out}"
        )


def _is_image_code() -> bool:
    """Whether the running code is the image's own; `mlflow run --build-image` puts the folder's code over it."""
    return container.image() is not None and ROOT == container.IMAGE_ROOT
