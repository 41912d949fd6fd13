"""Container: whether this process runs in the project's Docker image, and what of the host is mounted there.

Needs the standard library alone, as the image's entry point imports it (image/entrypoint.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from plw_mlflow.errors import UserError

IMAGE_ROOT = Path("/plw_mlflow")  # Dockerfile's WORKDIR


def image() -> str | None:
    """The name of the image that this process runs in, None outside of one."""
    return os.environ.get("PLW_IMAGE") or None


def mount_points() -> list[Path]:
    """All paths at which something is mounted in this process's file system."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    # That file writes blanks and other special characters in paths as octal numbers, such as \040.
    return [Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])) for line in lines]


def check_mounted(store: str, artifacts: str) -> None:
    """Raise UserError where a tracking store's files would be written into the container itself and be lost with it.

    store: the tracking URI. artifacts: where the experiment keeps its runs' files and its models; a path or a URI.
    """
    folder = artifacts.removeprefix("file://")
    if image() is None or not folder.startswith("/") or _is_lost_with_container(store.removeprefix("sqlite:///")):
        return
    if _is_lost_with_container(folder):
        to_mount = Path(folder).parent.parent if Path(folder).parent.name == "mlruns" else Path(folder)
        raise UserError(
            f"the store keeps its files in {folder}, which is not mounted in the container; start mlflow in the "
            f"project's folder, or mount it with -A v={to_mount}:{to_mount}"
        )


def _is_lost_with_container(path: str) -> bool:
    """Whether a path lies in the container's own file system: below no mount point but the root."""
    mounted = [point for point in mount_points() if point != Path("/")]
    return path.startswith("/") and not any(Path(path).resolve().is_relative_to(point) for point in mounted)
