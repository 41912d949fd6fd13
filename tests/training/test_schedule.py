"""Is the schedule, to the bit, the one of transformers that it stands for?"""

import torch
from transformers import get_cosine_schedule_with_warmup

from plw_mlflow.training.schedule import cosine_with_warmup

TOTALS = (1, 2, 3, 7, 10, 33, 100, 150, 1000, 1625, 4876)


def test_every_step_has_the_share_of_transformers_to_the_bit():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    compared = 0
    for total in TOTALS:
        for warmup in {0, 1, total // 33, total // 10, total // 3, total - 1, total}:
            expected = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
            for step in range(total + 2):
                assert cosine_with_warmup(step, warmup, total) == expected(step), (step, warmup, total)
                compared += 1
    assert compared > 40_000
