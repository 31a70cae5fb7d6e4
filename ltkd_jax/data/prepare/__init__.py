"""Prepares a data set once: archives or folders to a TFDS directory."""
