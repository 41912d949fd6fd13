"""Takes steps by other trainers with our loss, and saves their gradients: a program for torchrun.

Its arguments are a file for the gradients, and which of `steps.GRADIENTS` takes the steps. One step trains adapters.
"""

import sys
import tempfile

import torch
import torch.distributed as dist

from benchmarks import exactness
from plw_mlflow.integrations import PLWTrainer
from tests.integrations import steps


def main(file, trainer):
    torch.set_num_threads(1)
    found = {}
    for plw, divisor, accumulation, packing in steps.CASES:
        one = steps.case(accumulation, packing, divisor, exactness.SPREADS[1])
        gradient = steps.GRADIENTS[trainer](one, plw, steps.model(), steps.prepared().training)
        found[plw, divisor, accumulation, packing] = gradient
    one = steps.case(4, True, "weights", exactness.SPREADS[1])
    found["lora"] = steps.GRADIENTS[trainer](one, 0.242, steps.lora(steps.model()), steps.prepared().training)
    rows = steps.rows(steps.prepared(6).training)
    with tempfile.TemporaryDirectory() as folder:
        arguments = steps.arguments(folder, per_device_eval_batch_size=1)
        evaluated = PLWTrainer(steps.model(), arguments, train_dataset=rows, eval_dataset=rows, plw=0.1).evaluate()
    found["eval_loss"] = evaluated["eval_loss"]
    if dist.get_rank() == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
