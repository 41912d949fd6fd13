"""The image's packages by SHA-256, so that its build installs these files and no others:  make hashes

conda.yaml says which versions; image/requirements/ adds the hash of each package's file, for pip's --require-hashes:
packages.txt, and torch with CUDA (cuda.txt) or without (cpu.txt). The files are those that pip chooses where this
runs, so it must run on what the image is for: Linux, Python 3.11, x86-64 for the lists that are in the repository.
Needs the standard library and pip alone, since the image's build checks with it that the lists fit conda.yaml.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "image" / "requirements"


def listed(conda: str) -> list[str]:
    """The requirements of conda.yaml's text that the image installs: all but what checks and tests the package."""
    without_tools = re.sub(r"# what checks and tests it.*(?=# what those need)", "", conda, flags=re.DOTALL)
    return re.findall(r"^ *- (\S+==\S+)$", without_tools, re.MULTILINE)


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub("[-_.]+", "-", name).lower()


def faults(conda: str, lists: Path) -> list[str]:
    """Where the lists in a folder do not fit conda.yaml's text: a phrase for each package, and none if they do."""
    versions = {normalized(name): version for name, _, version in (line.partition("==") for line in listed(conda))}
    torch = versions.pop("torch")
    wanted = {"packages.txt": versions, "cuda.txt": {"torch": torch}, "cpu.txt": {"torch": f"{torch}+cpu"}}
    phrases = []
    for file, versions in wanted.items():
        in_list = read(lists / file)
        # cuda.txt also has the libraries that torch needs.
        names = versions.keys() | in_list.keys() if file == "packages.txt" else versions.keys()
        for name in sorted(names):
            if versions.get(name) != in_list.get(name):
                version, right = in_list.get(name, "missing"), versions.get(name, "left out")
                phrases.append(f"{name} is {version} in {file}, not {right}")
    return phrases


def read(file: Path) -> dict[str, str]:
    """The version of each package in a list; none for a list that is not there."""
    text = file.read_text() if file.exists() else ""
    lines = re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    return {normalized(name): version for name, version in lines}


def resolve(requirements: list[str], *options: str) -> dict[str, str]:
    """What pip would install here, as a line with its hash for each package's name; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    pip += ["--find-links", str(ROOT / "image" / "wheels")]
    done = subprocess.run([*pip, *options, *requirements], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(done.returncode)  # pip has said why
    lines = {}
    for package in json.loads(done.stdout)["install"]:
        name, version = normalized(package["metadata"]["name"]), package["metadata"]["version"]
        lines[name] = f"{name}=={version} --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}"
    return lines


def write(cpu_index: str) -> None:
    """Write the lists again. cpu_index: the package index that has torch's builds without CUDA; "" for none more."""
    requirements = listed((ROOT / "conda.yaml").read_text())
    (torch,) = (line for line in requirements if line.startswith("torch=="))
    names = {normalized(line.partition("==")[0]) for line in requirements} - {"torch"}
    # Three equals signs, since 2.13.0+cpu would satisfy two.
    lines = resolve([line.replace("==", "===") if line == torch else line for line in requirements])
    more = ["--extra-index-url", cpu_index] if cpu_index else []
    lists = {
        "packages.txt": [line for name, line in lines.items() if name in names],
        "cuda.txt": [line for name, line in lines.items() if name not in names],
        "cpu.txt": list(resolve([f"{torch}+cpu"], "--no-deps", *more).values()),
    }
    LISTS.mkdir(exist_ok=True)
    for file, of in lists.items():
        (LISTS / file).write_text("".join(f"{line}\n" for line in ["# Written by make hashes.", *sorted(of)]))


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        if phrases := faults((ROOT / "conda.yaml").read_text(), LISTS):
            first = "; ".join(phrases[:3]) + (f"; and {len(phrases) - 3} more" if len(phrases) > 3 else "")
            print(f"error: image/requirements/ does not fit conda.yaml, so run make hashes: {first}", file=sys.stderr)
        return 2 if phrases else 0
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        print("error: make hashes needs Python 3.11 on Linux, as pip chooses files for where it runs", file=sys.stderr)
        return 2
    write(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
