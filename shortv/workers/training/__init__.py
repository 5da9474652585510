"""Training of learned parts on Ray Train: driver, loop, checkpoints and result folder."""
