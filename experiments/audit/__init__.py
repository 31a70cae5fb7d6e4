"""The bias audit of a model, from its logits."""
