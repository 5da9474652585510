"""What is a layer worth: ablations of one batch, divergence, ranking and its uncertainty, choice of layers."""
