"""Audits a model's bias towards groups of classes, from its logits."""
