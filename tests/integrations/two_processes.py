"""Takes steps by other trainers with our loss, and saves their gradients: a program for torchrun.

Its arguments are a file for the gradients, and the trainers, of `steps.GRADIENTS`.
"""

import itertools
import sys

import torch
import torch.distributed as dist

from benchmarks import exactness
from tests.integrations import steps


def main(file, *names):
    torch.set_num_threads(1)
    found = {}
    for name, key in itertools.product(names, steps.CASES):
        plw, divisor, accumulation, packing = key
        one = steps.case(accumulation, packing, divisor, exactness.SPREADS[1])
        found[name, key] = steps.GRADIENTS[name](one, plw, steps.model(), steps.prepared().training)
    if dist.get_rank() == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
