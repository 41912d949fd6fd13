"""Do two processes, each with its own micro-batches, take the steps of one?"""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tests.integrations import steps
from tests.stores import ROOT

pytestmark = pytest.mark.slow
NEEDED = {"Trainer": "transformers", "SFTTrainer": "trl"}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of each trainer that is installed and each case."""
    file = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    names = [name for name, package in NEEDED.items() if importlib.util.find_spec(package)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, "-m", "tests.integrations.two_processes", str(file), *names], cwd=ROOT, check=True)
    return torch.load(file)


@pytest.mark.parametrize("name", NEEDED)
def test_their_gradients_are_the_oracles(name, gradients):
    found = {case: gradient for (trainer, case), gradient in gradients.items() if trainer == name}
    if not found:
        pytest.skip(f"needs {NEEDED[name]}, which make test-slow installs to output/trl")
    assert found.keys() == set(steps.CASES)
    for (plw, divisor, accumulation, packing), gradient in found.items():
        assert steps.difference(gradient, steps.oracle(plw, divisor)) < 1e-6, (plw, divisor, accumulation, packing)
