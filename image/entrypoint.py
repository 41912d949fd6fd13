"""The image's entry point: become the owner of what is mounted, print image and device, and run the command.

`mlflow run` mounts the project's folder at its own path (MLproject), and the default store's file at STORE. The command
runs in the project's folder, so that relative paths mean the same inside and outside the container. It runs as the
owner of the mounted store or folder, so that the files it leaves belong to that user. If neither is mounted, root
becomes the image's own user. Needs the standard library alone.
"""

import os
import pwd
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from plw_mlflow.environment.container import IMAGE_ROOT, mount_points

STORE = Path("/mlflow/tmp/mlruns")  # where mlflow run mounts the file of the default SQLite store
AWS = Path("/.aws")  # where mlflow run mounts the keys of an S3-style store
USER = "plw"  # the image's own user (Dockerfile)


def main(command: list[str]) -> None:
    folder = Path(os.environ["PLW_FOLDER"]) if Path(os.environ.get("PLW_FOLDER", "nowhere")).is_dir() else None
    mounted = mount_points()
    code = f"commit {os.environ.get('PLW_GIT_COMMIT') or 'unknown'}"
    if Path("plw_mlflow").is_dir():
        if Path.cwd() != IMAGE_ROOT:
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
    stop_being_root(next((path for path in (STORE, folder) if path is not None and path.exists()), None), mounted)
    say(f"device: {device()}")
    if AWS.is_dir():
        os.environ.setdefault("AWS_SHARED_CREDENTIALS_FILE", str(AWS / "credentials"))
        os.environ.setdefault("AWS_CONFIG_FILE", str(AWS / "config"))
    os.environ.setdefault("USER", USER)  # the user need not have a name here, but some libraries ask for one
    try:
        os.execvp(command[0], command)
    except OSError as error:
        say(f"error: {command[0]} cannot be run: {error.strerror}")
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def same_file(path: Path, other: Path) -> bool:
    """Whether two paths are of one file, which may be mounted at both."""
    return path.is_file() and other.is_file() and path.samefile(other)


def stop_being_root(owned: Path | None, mounted: list[Path]) -> None:
    """Go on as the owner of a mounted path, or as the image's own user where none is mounted.

    A process that does not run as root stays as it is, and so does root where the mounted path belongs to root.
    """
    if os.getuid() != 0:
        return
    if owned is None:
        user = pwd.getpwnam(USER)
        uid, gid = user.pw_uid, user.pw_gid
    else:
        uid, gid = owned.stat().st_uid, owned.stat().st_gid
    if uid == 0:
        say(f"runs as root, since {owned} belongs to root")
        return
    artifacts = next((path for path in mounted if path.match(f"{os.environ.get('MLFLOW_RUN_ID')}/artifacts")), None)
    if artifacts is not None:
        hand_over(artifacts, uid, gid)
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except PermissionError:
        say(f"error: root may not become {uid} here; start the container with --user {uid}:{gid}")
        sys.exit(1)


def hand_over(artifacts: Path, uid: int, gid: int) -> None:
    """Give the run's artifact folder, and the folders above it, to a user, if Docker has just made them as root.

    A folder that holds anything else existed before and keeps its owner.
    """
    folder, expected_entries = artifacts, 0  # the run's own is empty, each above it holds the one below
    while folder.stat().st_uid == 0 and len(list(folder.iterdir())) == expected_entries:
        os.chown(folder, uid, gid)
        folder, expected_entries = folder.parent, 1


def device() -> str:
    """The GPUs and their driver, or that there is none."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True)
        if answer.returncode == 0:
            useless = ", but this image's torch has no CUDA (make image)" if version("torch").endswith("+cpu") else ""
            return "; ".join(f"{line} (driver)" for line in answer.stdout.strip().splitlines()) + useless
    return "CPU alone; no GPU was handed in (docker run --gpus all, mlflow run -A gpus=all)"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
