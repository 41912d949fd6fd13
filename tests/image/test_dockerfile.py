"""How the image is built and whom it runs as, as far as that shows without a Docker engine (test_image.py)."""

import os
import pwd
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from image import entrypoint, hashes
from tests.stores import ROOT

CONDA = (ROOT / "conda.yaml").read_text()
TOOLS = {
    "ruff",
    "mypy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "moto",
    "types-PyYAML",
    "scipy-stubs",
    "pandas-stubs",
}


def test_the_image_installs_everything_but_what_tests_it():
    (everything,) = (part["pip"] for part in yaml.safe_load(CONDA)["dependencies"] if isinstance(part, dict))
    assert {line.partition("==")[0] for line in set(everything) - set(hashes.listed(CONDA))} == TOOLS
    assert set(hashes.listed(CONDA)) < set(everything)


def test_the_lists_of_hashes_fit_conda_yaml():
    assert hashes.faults(CONDA, hashes.LISTS) == []  # else: make hashes


def test_every_line_of_the_lists_has_a_hash_and_no_address():
    for file in hashes.LISTS.glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert len(hashes.read(file)) == len(lines) > 0
        assert "://" not in file.read_text()


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("PyYAML==6.0.3", "PyYAML==6.0.4", "pyyaml is 6.0.3 in packages.txt, not 6.0.4"),
        ("      - PyYAML==6.0.3\n", "", "pyyaml is 6.0.3 in packages.txt, not left out"),
        ("      - PyYAML==", "      - new==1\n      - PyYAML==", "new is missing in packages.txt, not 1"),
    ],
)
def test_a_change_of_conda_yaml_makes_the_lists_stale(before, after, fault):
    assert hashes.faults(CONDA.replace(before, after), hashes.LISTS) == [fault]


def test_both_builds_of_torch_are_of_the_version_in_conda_yaml(tmp_path):
    shutil.copytree(hashes.LISTS, tmp_path, dirs_exist_ok=True)
    (version,) = re.findall(r"- torch==(\S+)", CONDA)
    found = hashes.faults(CONDA.replace(f"torch=={version}", "torch==99.0"), tmp_path)
    assert found == [
        f"torch is {version} in cuda.txt, not 99.0",
        f"torch is {version}+cpu in cpu.txt, not 99.0+cpu",
    ]
    (tmp_path / "cpu.txt").unlink()
    assert hashes.faults(CONDA, tmp_path) == [f"torch is missing in cpu.txt, not {version}+cpu"]


def test_make_hashes_asks_pip_for_each_build_of_torch_and_sorts_what_it_finds(monkeypatch, tmp_path):
    asked = []

    def resolve(requirements, *options):
        asked.append((requirements, options))
        if options:
            return {"torch": "torch==2.13.0+cpu --hash=sha256:" + "c" * 64}
        names = [hashes.normalized(re.split("=+", line)[0]) for line in requirements]
        return {name: f"{name}==1 --hash=sha256:{'a' * 64}" for name in [*reversed(names), "triton"]}

    monkeypatch.setattr(hashes, "resolve", resolve)
    monkeypatch.setattr(hashes, "LISTS", tmp_path / "new")
    hashes.write("http://index.example.com/cpu")
    (version,) = re.findall(r"- torch==(\S+)", CONDA)
    assert f"torch==={version}" in asked[0][0]  # which the build without CUDA does not satisfy
    assert asked[1] == ([f"torch=={version}+cpu"], ("--no-deps", "--extra-index-url", "http://index.example.com/cpu"))
    assert list(hashes.read(tmp_path / "new" / "cuda.txt")) == ["torch", "triton"]
    assert list(hashes.read(tmp_path / "new" / "cpu.txt")) == ["torch"]
    assert len(hashes.read(tmp_path / "new" / "packages.txt")) == len(hashes.listed(CONDA)) - 1
    lines = (tmp_path / "new" / "packages.txt").read_text().splitlines()[1:]
    assert lines == sorted(lines)


def test_the_build_refuses_lists_that_do_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hashes, "LISTS", tmp_path)
    assert hashes.main(["check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: image/requirements/ does not fit conda.yaml, so run make hashes: absl-py is missing")
    assert line.endswith(" more")
    assert "hashes.py check" in (ROOT / "Dockerfile").read_text()


def docker_arguments(tmp_path, digests, *given):
    """What `make image` hands to `docker build`, with a docker that knows the base by an id and by these digests."""
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *RepoDigests*) echo '{digests}' ;;\n"
        "  *.Id*) echo sha256:1d ;;\n"
        '  build*) printf "%s\\n" "$@" > "$0.built" ;;\n'
        "esac\n"
    )
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MAKEFLAGS": ""}
    make = ["make", "--no-print-directory", "-C", str(ROOT), *given]
    subprocess.run(make, env=environment, check=True, capture_output=True)
    arguments = (tmp_path / "docker.built").read_text().splitlines()
    values = [value for flag, value in pairwise(arguments) if flag == "--build-arg"]
    return dict(value.split("=", 1) for value in values)


def test_the_image_is_built_on_the_base_whose_digest_its_label_says(tmp_path):
    built = docker_arguments(tmp_path, "python@sha256:ba5e", "image")
    assert (built["BASE"], built["BASE_DIGEST"]) == ("python@sha256:ba5e", "sha256:ba5e")
    assert "TORCH" not in built


def test_a_base_that_no_registry_has_is_known_by_its_id(tmp_path):
    built = docker_arguments(tmp_path, "", "image-cpu", "BASE=mine:1")
    assert (built["BASE"], built["BASE_DIGEST"]) == ("mine:1", "sha256:1d")
    assert built["TORCH"] == "cpu"


@pytest.fixture
def become(monkeypatch):
    """Whom the entry point goes on as, started as `uid`; everything it would ask the kernel for is written down."""

    def run(owned, uid=0, allowed=True):
        done = {}

        def change(name):
            def to(value):
                if not allowed:
                    raise PermissionError
                done[name] = value

            return to

        monkeypatch.setattr(os, "getuid", lambda: uid)
        for name in ("setgroups", "setgid", "setuid"):
            monkeypatch.setattr(os, name, change(name))
        monkeypatch.setattr(pwd, "getpwnam", {"plw": SimpleNamespace(pw_uid=10001, pw_gid=10002)}.__getitem__)
        entrypoint.stop_being_root(owned, [])
        return done

    return run


MOUNTED = SimpleNamespace(stat=lambda: SimpleNamespace(st_uid=1000, st_gid=1001))


def test_root_without_a_mount_becomes_the_images_own_user(become):
    assert become(None) == {"setgroups": [], "setgid": 10002, "setuid": 10001}


def test_root_becomes_the_owner_of_what_is_mounted(become):
    assert become(MOUNTED) == {"setgroups": [], "setgid": 1001, "setuid": 1000}


def test_root_stays_root_only_for_what_is_roots(become, capsys):
    assert become(Path("/proc")) == {}
    assert capsys.readouterr().err == "runs as root, since /proc belongs to root\n"


def test_whoever_is_not_root_goes_on_as_they_are(become):
    assert become(None, uid=4321) == become(MOUNTED, uid=4321) == {}


def test_root_that_may_not_change_does_not_go_on(become, capsys):
    with pytest.raises(SystemExit):
        become(None, allowed=False)
    assert "start the container with --user 10001:10002" in capsys.readouterr().err
