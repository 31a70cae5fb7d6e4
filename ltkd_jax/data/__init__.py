"""Long-tailed draws, image data sets, their preparation, and on-device augmentation.

This package imports no submodule, so that `ltkd_jax.data.longtail` needs NumPy only,
and TFDS is imported only when a data set of its directories is opened.
"""
