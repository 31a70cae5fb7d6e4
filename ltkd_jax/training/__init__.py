"""Training: state, training steps, device parallelism, logit table, checkpoints."""
