"""Per-example losses for distillation on long-tailed data: pure `[B, C] -> [B]`.

Shapes: B examples, C classes, G groups. Every loss

- is computed in log space, in float32 (float64 for float64 input);
- is finite, with finite gradients, for logits up to 1e30 (float32 ends at 3e38);
- sends no gradient into the teacher;
- contains its factor τ² (`group_kl` does not), and is not averaged over the batch.

`ltkd` and `rebalanced_inter_group` return one loss per example, too, but the target of
their inter-group part depends on the batch, see `rebalance`. With gradient accumulation
each part of the batch is rebalanced by itself. In a batch of one example, such as under
`vmap` over examples, every group has the same target mass. A batch should be large
enough to contain several images of the rarest group, or the sums be given:
`teacher_mass` makes the target of an example independent of its batch.

`where` (bool, broadcastable to `[..., C]`) marks the classes that exist; `example_mask`
(bool `[B]`) marks the examples that are not padding. Logits that are masked count
nowhere, whatever they are, and get the gradient 0. Temperatures and weights are single
numbers, and may be traced. The rebalanced target carries no gradient, not even to τ.

Logits must be finite where they are not masked. With one that marks a missing class,
such as −inf or `finfo.min`, a loss may be infinite or NaN, at the latest when τ < 1
lets it overflow: mark the class by `where` instead. Fill padded inputs of the network
with finite numbers: in its backward pass the gradient 0 of their logits times NaN is
NaN.

Labels outside `[0, C)` raise a ValueError if they are concrete; traced ones make the
loss NaN, and so does any label that `where` excludes.

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
