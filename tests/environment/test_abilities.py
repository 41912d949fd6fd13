"""Is what this machine cannot do known from its drivers, packages and compilers, and said in one line?"""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from plw_mlflow.environment import abilities
from plw_mlflow.errors import UserError


def test_qlora_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(abilities, "has_gpu", lambda: False)
    with pytest.raises(
        UserError, match="qlora holds the base model in 4 bits on an NVIDIA GPU, and this machine has none"
    ):
        abilities.check_method("qlora")
    monkeypatch.setattr(abilities, "has_gpu", lambda: True)
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        abilities.check_method("qlora")
    abilities.check_method("lora")


def test_an_optimizer_is_refused_where_its_package_is_missing(monkeypatch):
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="adamw8bit needs the package bitsandbytes"):
        abilities.check_optimizer("adamw8bit")
    abilities.check_optimizer("adamw")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(abilities, "has_gpu", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler; install g"):
        abilities.check_compilers()
    monkeypatch.setattr(abilities, "has_gpu", lambda: True)
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile needs the package triton"):
        abilities.check_compilers()


@pytest.mark.parametrize("is_available", [True, False])
def test_a_driver_alone_is_no_gpu(monkeypatch, tmp_path, is_available):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert abilities.has_gpu() is is_available
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: cannot open")))
    monkeypatch.setattr(abilities, "AMD_DRIVER", tmp_path)
    assert abilities.has_gpu() is is_available
    monkeypatch.setattr(abilities, "AMD_DRIVER", tmp_path / "none")
    assert not abilities.has_gpu()
