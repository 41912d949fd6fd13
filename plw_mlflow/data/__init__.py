"""From a file of instructions to batches of weighted tokens."""
