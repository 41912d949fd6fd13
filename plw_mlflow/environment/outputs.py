"""Outputs: what commands write into the folder that `--output` names, and what they may replace there.

A list in that folder (LIST) says which files commands have written, with the digest of each. Only those are replaced,
and only while they are as they were written. A file of the user's, a link, or a file that the command reads is never
replaced; the command stops with an error, before its work if the name is known by then. While a command runs, no other
one writes into its folder.

Files are first written under temporary names. These are opened exclusively, and so never through a link. When all files
are complete, they get their own names together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from plw_mlflow.environment import disk
from plw_mlflow.errors import RunError, UserError, first_line

LARGE_BYTES = 1 << 26  # a larger file is known by its size and time, as it takes long to hash gigabytes of weights
MODEL, ADAPTER = "model", "adapter"  # folders of a trained model (export.py)
QUESTIONS = "questions.parquet"  # every question's scores, beside scores.csv
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet's formulas begin
LIST, LOCK = ".plw_mlflow.json", ".plw_mlflow.lock"
UNFINISHED = ".plw_mlflow-"  # with which the names of unfinished files and folders begin
EARLIER = re.compile(rf"{re.escape(UNFINISHED)}earlier-(.+)-[0-9a-f]{{8}}")  # of a folder that is to be replaced


@contextmanager
def reserve(folder: Path | None, names: Iterable[str], inputs: Iterable[Path]) -> Iterator[None]:
    """Reserve an output folder for this process, after a check that it may write these names there.

    folder: is made if it does not exist; nothing is done for None. names: of the files and folders to be written.
    inputs: the files and folders that the command reads.

    Raises UserError where another process has reserved the folder, where a name is taken by something that no command
    has written, and where a name is that of an input or of a folder that holds one.
    """
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = f"another command writes into {folder} at this moment; wait for it, or give another --output"
            stack.enter_context(disk.held(folder / LOCK, taken))
        except OSError as error:
            raise UserError(f"output {folder} cannot be written to: {error.strerror}") from None
        _remove_unfinished(folder)
        names = list(names)
        check(folder, names)
        for path in inputs:
            for name in names:
                if path.resolve().is_relative_to((folder / name).resolve()):
                    what = "it" if path.resolve() == (folder / name).resolve() else folder / name
                    raise UserError(
                        f"{path} is read by this command, which would replace {what}; give another --output"
                    )
        yield


def check(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError where one of these names in a folder is taken by something that no command has written."""
    listed = _listed(folder)["files"]
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            if not any(listed_name.startswith(f"{name}/") for listed_name in listed):
                raise UserError(_not_ours(path))
            for below in sorted(path.rglob("*")):
                _check_replaceable(below, folder, listed)
        elif os.path.lexists(path):
            _check_replaceable(path, folder, listed)


def _check_replaceable(path: Path, folder: Path, listed: Mapping[str, list[str]]) -> None:
    """Raise UserError for a link, and for a file that no command has written or that was changed since."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, which is not written through; remove it, or give another --output")
    if path.is_dir():
        return
    digests = listed.get(path.relative_to(folder).as_posix())
    if digests is None:
        raise UserError(_not_ours(path))
    if _digest(path) not in digests:
        raise UserError(f"{path} has been changed since it was written; move it, or give another --output")


def write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into an output folder, all or none of them, in place of earlier ones; returns their paths.

    Raises UserError where one would replace something that no command has written, and RunError where the disk fails.
    """
    _make(folder)
    check(folder, contents)
    unfinished = {name: _unfinished_path(folder, name) for name in contents}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    try:
        _list(folder, {}, unfinished=[path.name for path in unfinished.values()])
        for name, path in unfinished.items():
            _create(path, contents[name])
        _list(folder, digests, keep_earlier=True)  # if this is killed here, both contents are known as a command's
        for name, path in unfinished.items():
            os.replace(path, folder / name)
        _list(folder, digests)
    except OSError as error:
        raise RunError(f"output {folder} cannot be written to: {error.strerror}") from None
    finally:
        _remove_unfinished(folder)
    return [folder / name for name in contents]


def write_folders(folder: Path, builders: Mapping[str, Callable[[Path], Any] | None]) -> None:
    """Write folders into an output folder, in place of earlier ones. Each is complete as soon as it has its name.

    builders: by name, a function that fills an empty folder; None for a folder that is only to be removed.

    Raises UserError where one would replace something that no command has written, and RunError where the disk fails.
    """
    _make(folder)
    check(folder, builders)
    unfinished = {name: _unfinished_path(folder, name) for name, build in builders.items() if build is not None}
    earlier = {name: _unfinished_path(folder, f"earlier-{name}") for name in builders if (folder / name).exists()}
    try:
        _list(folder, {}, unfinished=[path.name for path in (*unfinished.values(), *earlier.values())])
        for name, path in unfinished.items():
            path.mkdir()
            mode = path.stat().st_mode & 0o777
            if (build := builders[name]) is not None:
                build(path)
            _share(path, mode)
        digests = {
            f"{name}/{file.relative_to(path).as_posix()}": _digest(file)
            for name, path in unfinished.items()
            for file in path.rglob("*")
            if file.is_file()
        }
        _list(folder, digests, keep_earlier=True)
        check(folder, builders)  # again, as building takes its time
        for name, path in earlier.items():
            os.replace(folder / name, path)
        for name, path in unfinished.items():
            os.replace(path, folder / name)
        _list(folder, digests, forget=tuple(builders))
        for path in earlier.values():
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise RunError(f"output {folder} cannot be written to: {error.strerror or error}") from None
    finally:
        _remove_unfinished(folder)


def _share(folder: Path, mode: int) -> None:
    """Let others read a folder and what is in it as far as the mode of a new folder lets them.

    What a library has written as a temporary file or folder first can be read by its owner alone.
    """
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def table(frame: Any) -> bytes:
    """A pandas data frame as CSV, in which no text is a formula for a spreadsheet."""
    texts = frame.select_dtypes(exclude="number").columns
    safe = frame.assign(**{column: frame[column].map(no_formula) for column in texts})
    return str(safe.to_csv(index=False, lineterminator="\n")).encode()


def no_formula(value: Any) -> Any:
    """A value of a table, with an apostrophe before it where a spreadsheet would run it as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output {folder} cannot be made: {error.strerror}") from None


def _unfinished_path(folder: Path, name: str) -> Path:
    """A path that nothing has yet, for a file or folder that is being written."""
    return folder / f"{UNFINISHED}{name.replace('/', '-')}-{secrets.token_hex(4)}"


def _create(path: Path, content: bytes) -> None:
    """Write a new file. Raises FileExistsError where the path is taken, even by a dangling link."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
        file.write(content)


def _digest(path: Path) -> str:
    """What identifies a file's content: its SHA-256, or a large file's size and time of change."""
    if (status := path.stat()).st_size > LARGE_BYTES:
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> dict[str, Any]:
    """The list in an output folder: files with the digests that they may have, and names of what is unfinished."""
    path = folder / LIST
    if not os.path.lexists(path):
        return {"files": {}, "unfinished": []}
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError("it is no regular file")
            listed = json.load(file)
        files, unfinished = listed["files"], listed["unfinished"]
        if not (isinstance(unfinished, list) and all(isinstance(digests, list) for digests in files.values())):
            raise UserError("it lists no digests")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}, which lists what may be replaced in that folder, cannot be read ({first_line(error)}); give "
            "another --output"
        ) from None
    return {"files": files, "unfinished": unfinished}


def _list(
    folder: Path,
    digests: Mapping[str, str],
    *,
    keep_earlier: bool = False,
    forget: tuple[str, ...] = (),
    unfinished: Iterable[str] = (),
) -> None:
    """Put files into a folder's list.

    keep_earlier: whether the digests that they had before stay beside the new ones. forget: folders of which all files
    are taken off the list. unfinished: further names of what is being written.
    """
    listed = _listed(folder)
    forgotten = tuple(f"{name}/" for name in forget)
    files = {name: earlier for name, earlier in listed["files"].items() if not name.startswith(forgotten)}
    for name, digest in digests.items():
        files[name] = [*(listed["files"].get(name, []) if keep_earlier else []), digest]
    _replace_list(folder, {"files": files, "unfinished": sorted({*listed["unfinished"], *unfinished})})


def _replace_list(folder: Path, listed: dict[str, Any]) -> None:
    path = _unfinished_path(folder, "list")
    _create(path, (json.dumps(listed, indent=1) + "\n").encode())
    os.replace(path, folder / LIST)


def _remove_unfinished(folder: Path) -> None:
    """Remove what this process, or an earlier one that was killed, has not finished; put earlier folders back."""
    listed = _listed(folder)
    paths = [folder / str(name) for name in listed["unfinished"]] + list(folder.glob(f"{UNFINISHED}list-*"))
    for path in paths:
        if path.parent != folder or not path.name.startswith(UNFINISHED):
            continue  # a name that somebody else has put into the list
        if path.is_dir() and not path.is_symlink():
            earlier = EARLIER.fullmatch(path.name)
            if earlier and not os.path.lexists(folder / earlier[1]):  # what was to replace it was not finished
                os.replace(path, folder / earlier[1])
                continue
        with suppress(OSError):
            disk.remove(path)
    if listed["unfinished"]:
        with suppress(OSError):  # on a full disk, names of what is gone stay listed
            _replace_list(folder, listed | {"unfinished": []})


def _not_ours(path: Path) -> str:
    return (
        f"{path} is there, and was not written by plw_mlflow (or by a version that did not list what it wrote); "
        "move it, or give another --output"
    )
