"""Audits the bias of a model among classes, from its logits."""
