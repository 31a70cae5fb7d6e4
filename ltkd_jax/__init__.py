"""ltkd_jax: distil a balanced student from a biased, long-tailed teacher.

Submodules load on first use, so `import ltkd_jax.losses` needs jax, chex and optax only.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["bilevel", "data", "groups", "losses", "metrics", "models", "objectives", "training"]


def __getattr__(name):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
