"""Prompt loss weight: fine-tune at any value of it, score the result, and learn whether it matters."""

__version__ = "0.1.0"
