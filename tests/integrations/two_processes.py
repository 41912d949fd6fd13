"""Takes steps by other trainers with our loss, and saves their gradients: a program for torchrun.

Its arguments are a file for the gradients, and which of `steps.GRADIENTS` takes the steps. One step trains adapters.
"""

import sys

import torch
import torch.distributed as dist

from benchmarks import exactness
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
    if dist.get_rank() == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
