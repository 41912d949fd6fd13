"""The toy laboratory: a small world, instruction sets and benchmarks about it, and a base model that has read of it."""

from pathlib import Path

TOY_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "toy"  # of the base model and its tokenizer
