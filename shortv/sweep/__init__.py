"""What a layer is worth: ablations of one batch, divergence, ranking, uncertainty, choice of layers."""
