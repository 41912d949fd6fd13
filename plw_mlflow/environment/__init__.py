"""The machine: which code runs there, where and as what, and what is written on its disk."""
