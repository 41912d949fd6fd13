"""Do two processes, each with its own micro-batches, take the steps of one?"""

import subprocess
import sys

import pytest
import torch

from benchmarks import exactness
from plw_mlflow.integrations import PLWTrainer
from tests.integrations import steps
from tests.stores import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("trainer", "package"), [("Trainer", "transformers"), ("SFTTrainer", "trl")])
def test_their_gradients_are_the_oracles(trainer, package, tmp_path):
    pytest.importorskip(package, reason=f"needs {package}, which make test-slow installs to output/trl")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "tests.integrations.two_processes", str(tmp_path / "gradients.pt"), trainer]
    subprocess.run([*command, *program], cwd=ROOT, check=True)
    gradients = torch.load(tmp_path / "gradients.pt")
    one = steps.case(1, False, "weights")
    of_adapters = exactness.oracle(one, 0.242, steps.lora(steps.model()).double(), steps.prepared().training)
    assert steps.difference(gradients.pop("lora"), of_adapters) < 1e-6
    rows = steps.rows(steps.prepared(6).training)
    alone = PLWTrainer(steps.model(), steps.arguments(tmp_path), train_dataset=rows, eval_dataset=rows, plw=0.1)
    assert gradients.pop("eval_loss") == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)
    assert gradients.keys() == set(steps.CASES)
    for (plw, divisor, accumulation, packing), gradient in gradients.items():
        assert steps.difference(gradient, steps.oracle(plw, divisor)) < 1e-6, (plw, divisor, accumulation, packing)
