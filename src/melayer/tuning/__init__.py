"""Training with the mask in the forward pass."""
