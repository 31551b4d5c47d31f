"""How it learns: loop, optimizers, checkpoints, metrics, progress."""
