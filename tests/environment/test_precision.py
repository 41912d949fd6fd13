"""Which arithmetic `--precision` comes to."""

from __future__ import annotations

import pytest
import torch

from plw_mlflow.environment import precision
from plw_mlflow.errors import UserError


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_is_bfloat16_where_it_is_fast_but_never_for_the_toy_model(is_fast, monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: is_fast)
    assert precision.resolve("auto", "owner/model") == ("bfloat16" if is_fast else "float32")
    assert precision.resolve("auto", "toy") == "float32"


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_is_asked_for_is_used_on_a_cpu(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    assert precision.resolve(asked, "toy") == asked


def test_a_gpu_without_bfloat16_refuses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(UserError, match="Old GPU"):
        precision.resolve("bfloat16", "owner/model")
    assert precision.resolve("auto", "owner/model") == "float32"


@pytest.mark.parametrize(
    ("flags", "expected"), [("fma avx512_bf16", True), ("amx_bf16 amx_tile", True), ("fma avx2", False)]
)
def test_a_cpu_is_fast_at_bfloat16_by_its_instructions(flags, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"processor: 0\nflags\t: fpu {flags} sse\n")
    monkeypatch.setattr(precision, "CPU_FLAGS", listed)
    assert precision.has_fast_bfloat16() == expected
