"""ltkd_jax: distil a balanced student from a biased, long-tailed teacher.

Submodules are loaded on first use: `import ltkd_jax.losses` needs jax, chex and optax
only.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltkd_jax import (
        bias,
        bilevel,
        data,
        groups,
        inference,
        losses,
        methods,
        metrics,
        models,
        training,
    )

__version__ = "0.2.0"
__all__ = [
    "bias",
    "bilevel",
    "data",
    "groups",
    "inference",
    "losses",
    "methods",
    "metrics",
    "models",
    "training",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Hidden from type checkers: with a `__getattr__` they accept any attribute.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
