"""Origin: which code and which process runs here, and whether that is what MLflow's record of the run will say.

`mlflow run` records the commit of the project's folder, but in Docker the image's code runs. Nobody could trace a
number made by an image that was built before the last change.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from plw_mlflow.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
IMAGE_ROOT = Path("/plw_mlflow")  # Dockerfile's WORKDIR
CODE = ("conda.yaml", "entrypoints", "image/entrypoint.py", "paper", "plw_mlflow")
PARENT_SPEAKS = "PLW_PARENT_SPEAKS"  # in the environment of a sweep's cell


def says_interrupts() -> bool:
    """Whether this is the one process of a command that says of an interrupt which all of them have heard."""
    return is_first_process() and PARENT_SPEAKS not in os.environ


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def image() -> str | None:
    """The name of the image this runs in, None outside."""
    return os.environ.get("PLW_IMAGE") or None


def commit() -> str | None:
    """The commit of the running code, with "-dirty" where it was changed since; None where nobody knows."""
    if image() and ROOT == IMAGE_ROOT:
        return os.environ.get("PLW_GIT_COMMIT") or None
    with suppress(OSError):  # no git here
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
        if found:
            return found + ("-dirty" if changed else "")
    return None


def check_image(recorded: str | None) -> None:
    """Raise UserError where the image's code is not the code that MLflow's record of the run names.

    recorded: the commit MLflow recorded for the run; None where it recorded none, and there is nothing to be wrong.

    Where `mlflow run` has mounted the project's folder, its files are compared with the image's, so that uncommitted
    changes count and a change of documentation does not; else the commits are.
    """
    if image() is None or ROOT != IMAGE_ROOT:  # with mlflow run --build-image, the folder's own code runs
        return
    folder = os.environ.get("PLW_FOLDER")
    if folder and (Path(folder) / "plw_mlflow").is_dir():
        if code_digest(Path(folder)) != code_digest(ROOT):
            raise UserError(
                f"image {image()} (commit {commit() or 'unknown'}) was built from other code than {folder} holds now; "
                f"build it again (make image), or run its code all the same with --allow-stale-image true"
            )
    elif recorded and recorded != commit():
        raise UserError(
            f"image {image()} was built from commit {commit() or 'unknown'}, but MLflow records {recorded} for this "
            f"run; build it again (make image), or run its code all the same with --allow-stale-image true"
        )


def code_digest(root: Path) -> str:
    """SHA-256 of the names and contents of all files that decide what runs."""
    found = hashlib.sha256()
    for part in CODE:
        files = [root / part] if (root / part).is_file() else sorted((root / part).rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                found.update(f"{file.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def check_mounted(store: str, artifacts: str) -> None:
    """Raise UserError where artifacts would be written into the container itself, and be lost with it.

    store: the tracking URI. artifacts: where the experiment keeps its runs' files and its models; a path or a URI.
    """
    place = artifacts.removeprefix("file://")
    if image() is None or not place.startswith("/") or _in_container(store.removeprefix("sqlite:///")):
        return
    if _in_container(place):
        folder = Path(place).parent.parent if Path(place).parent.name == "mlruns" else Path(place)
        raise UserError(
            f"the store keeps its files in {place}, which is not mounted in the container; start mlflow in the "
            f"project's folder, or mount it with -A v={folder}:{folder}"
        )


def mount_points() -> list[Path]:
    """Everything that is mounted here."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    # Blanks and the like in paths are octal there, as \\040.
    return [Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4])) for line in lines]


def _in_container(path: str) -> bool:
    """Whether a path lies in the container's own, passing file system: on no mount but that of its root."""
    mounted = [point for point in mount_points() if point != Path("/")]
    return path.startswith("/") and not any(Path(path).resolve().is_relative_to(point) for point in mounted)
