"""The config: validation, identity, and the frozen specification of a run."""
