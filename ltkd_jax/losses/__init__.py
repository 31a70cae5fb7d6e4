"""Per-example losses for distillation under long tails: pure functions `[B, C] -> [B]`.

Shapes: B examples, C classes, G groups. Every loss is computed in log space, in float32 (float64 for float64
input), is finite with finite gradients for logits up to 1e30 (float32 ends at 3e38), sends no gradient into the
teacher, contains its τ² factor, and is not reduced. `where` (bool, broadcastable to `[..., C]`) marks the classes
that exist; `example_mask` (bool `[B]`) the examples that are not padding. Temperature and weights may be traced.

Labels out of range raise a ValueError where they are concrete and give NaN where they are traced; so does a label
that `where` excludes, always.

>>> import jax.numpy as jnp
>>> from ltkd_jax import groups, losses
>>> g = groups.ClassGroups.from_counts([500, 300, 100, 50, 20, 10])
>>> student, teacher = jnp.zeros((2, 6)), jnp.eye(2, 6) * 4.0
>>> losses.ltkd(student, teacher, g, alpha=1.0, beta=1.0, temperature=2.0).shape
(2,)
"""

from ltkd_jax.losses.classification import (
    balanced_softmax,
    cross_entropy,
    logit_adjusted,
)
from ltkd_jax.losses.distillation import (
    bkd,
    dive,
    dkd,
    effective_number_weights,
    kd,
    wsl,
)
from ltkd_jax.losses.ltkd import (
    GroupKL,
    group_kl,
    ltkd,
    rebalance,
    rebalanced_inter_group,
    uniform_intra_group,
)
from ltkd_jax.losses.reviewkd import hierarchical_context

__all__ = [
    "GroupKL",
    "balanced_softmax",
    "bkd",
    "cross_entropy",
    "dive",
    "dkd",
    "effective_number_weights",
    "group_kl",
    "hierarchical_context",
    "kd",
    "logit_adjusted",
    "ltkd",
    "rebalance",
    "rebalanced_inter_group",
    "uniform_intra_group",
    "wsl",
]
