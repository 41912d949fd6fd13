"""The image's entry point: become the person whose store is mounted, say what is here, and run the command.

`mlflow run` mounts the project's folder at its own path (MLproject) and the default store's file at STORE. Work goes
on in that folder, so that relative paths mean inside what they mean outside, and as its owner, so that the files left
there are theirs. Standard library alone: it runs before anything else, and only replaces itself.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

STORE = Path("/mlflow/tmp/mlruns")  # where mlflow run mounts the file of the default SQLite store
IMAGE_ROOT = "/plw_mlflow"
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/run")


def main(command: list[str]) -> None:
    folder = Path(os.environ["PLW_FOLDER"]) if Path(os.environ.get("PLW_FOLDER", "nowhere")).is_dir() else None
    mounted = mount_points()
    code = f"commit {os.environ.get('PLW_GIT_COMMIT') or 'unknown'}"
    if Path("plw_mlflow").is_dir():
        if os.getcwd() != IMAGE_ROOT:
            code = f"code of {os.getcwd()}"
        os.environ["PYTHONPATH"] = os.getcwd()  # the image's code, or what mlflow run --build-image has put over it
        os.environ["PYTHONSAFEPATH"] = "1"  # and not what lies in the folder under the same names
        os.chdir(folder or Path.home())  # where whoever this becomes may write
    if folder is not None:
        os.environ.setdefault("XDG_CACHE_HOME", str(folder / ".cache"))  # models from the hub outlive the container
    store = next((file for place in mounted for file in place.glob("*.db") if same_file(file, STORE)), None)
    if store is not None:
        # The file by its own path: SQLite's journal then lies beside it, and a killed container leaves no half of one.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
    if "MLFLOW_TRACKING_URI" not in os.environ:
        say("warning: MLFLOW_TRACKING_URI is not set: what is logged goes with this container")
    say(f"image {os.environ['PLW_IMAGE']}, {code}")
    say(f"device: {device()}")
    become_owner(next((path for path in (STORE, folder) if path is not None and path.exists()), None), mounted)
    os.environ.setdefault("USER", "plw")  # the user need not have a name here, but some libraries ask for one
    try:
        os.execvp(command[0], command)
    except OSError as error:
        say(f"error: {command[0]} cannot be run: {error.strerror}")
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def mount_points() -> list[Path]:
    """Folders and files of the host that are mounted here, in the order they were mounted."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # Blanks in paths are octal there, as \\040.
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return [Path(point) for point in points if point != "/" and not point.startswith(SYSTEM)]


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths are one file, through whatever mounts."""
    return other.exists() and one.samefile(other)


def become_owner(of: Path | None, mounted: list[Path]) -> None:
    """Go on as the owner of a mounted path; whoever is not root already goes on as they are."""
    if os.getuid() != 0:
        return
    if of is None:
        say("runs as root: no store and no folder is mounted whose owner it could become")
        return
    uid, gid = of.stat().st_uid, of.stat().st_gid
    if uid == 0:
        say(f"runs as root, since {of} belongs to root")
        return
    artifacts = next((path for path in mounted if path.match(f"{os.environ.get('MLFLOW_RUN_ID')}/artifacts")), None)
    if artifacts is not None:
        hand_over(artifacts, uid, gid)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def hand_over(path: Path, uid: int, gid: int) -> None:
    """Give the owner what Docker made as root on the host to mount it: the run's artifact folder and those above it."""
    while path.stat().st_uid == 0 and not any(entry.is_file() for entry in path.iterdir()):
        os.chown(path, uid, gid)
        path = path.parent


def device() -> str:
    """The GPUs and their driver, or that there is none."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True)
        if found.returncode == 0:
            return "; ".join(f"{line} (driver)" for line in found.stdout.strip().splitlines())
    return "CPU alone; no GPU was handed in (docker run --gpus all, mlflow run -A gpus=all)"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
