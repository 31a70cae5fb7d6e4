"""Data: long-tailed splits, image sources, preparation of TFDS directories, and on-device augmentation.

Nothing is imported here, so that `ltkd_jax.data.longtail` needs NumPy only and TFDS is loaded by the one
function that reads it (`ltkd_jax.data.datasets.load`).
"""
