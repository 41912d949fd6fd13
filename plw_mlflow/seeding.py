"""Seeding: every random choice has a generator of its own, seeded from the run's one seed and the name of the choice.

So adding a choice, or making one more often, changes no other. What a step draws depends on the seed and the step, and
not on how often the run was interrupted.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the choice called `names`, e.g. derive(1234, "order", epoch)."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the choice called `names`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_global(seed: int, *names: str | int) -> None:
    """Seed torch's own generators, for choices inside models (dropout, new weights) that take no other."""
    torch.manual_seed(derive(seed, *names))
