"""Schedule: the learning rate of each optimiser step, as a share of the highest one."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """The share at a step, counted from 0: it rises evenly over `warmup` steps, then falls to 0 as half a cosine does.

    Equal to the bit to `transformers.get_cosine_schedule_with_warmup`, whose import takes 2 to 3 processor seconds, as
    it also imports PEFT, bitsandbytes and torch's compiler.
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
