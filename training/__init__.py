"""What a run needs around model and data: configuration, plan, loop, optimiser, checkpoints, metrics."""
