"""From batches to a trained model: the loss, the loop, several processes, checkpoints."""
