"""Random choices: each has a generator of its own, named, and seeded from the run's one seed.

So adding a choice, or making one more often, changes no other; and what a step draws depends on the seed
and the step alone, never on how often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "mlflow", "numpy", "scipy", "pandas")


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


def fingerprint() -> dict[str, str]:
    """What the numbers of a run may depend on beside its config: versions, processor, threads."""
    found = {name: metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return found | {
        "python": platform.python_version(),
        "device": device,
        "devices": str(max(1, torch.cuda.device_count())),
        "threads": str(torch.get_num_threads()),
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }
