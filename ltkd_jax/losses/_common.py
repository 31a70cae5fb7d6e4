"""What the losses share: input checks, and softmax in log space over the classes that exist."""

# So that help() shows ArrayLike, not all that it stands for
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

Scalar = jax.Array | float  # it may be traced
AxisName = str | tuple[str, ...] | None


def as_float(x: ArrayLike) -> jax.Array:
    """`x` in float32, or float64 where it already is that: statistics and losses are never kept in bfloat16."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"logits must be real, got {x.dtype}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: Scalar,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Both logits as floats, checked, 0 for what does not exist; the teacher's carry no gradient."""
    student, teacher = (
        as_float(student_logits),
        jax.lax.stop_gradient(as_float(teacher_logits)),
    )
    chex.assert_equal_shape(
        (student, teacher),
        custom_message="student_logits and teacher_logits must both be [..., C]",
    )
    check_logits(student)
    check_temperature(temperature)
    if where is not None:
        student, teacher = (
            jnp.where(class_mask(where, x), x, 0) for x in (student, teacher)
        )
    return student, teacher


def logit_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: Scalar,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `pair`, from the top and divided by τ."""
    student, teacher = pair(student_logits, teacher_logits, temperature, where)
    return from_top(student, where) / temperature, from_top(
        teacher, where
    ) / temperature


def check_logits(logits: jax.Array) -> None:
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., C] with C > 0, got shape {logits.shape}"
        )


def check_temperature(temperature: Scalar) -> None:
    if (
        not isinstance(temperature, jax.core.Tracer)
        and not (np.asarray(temperature) > 0).all()
    ):
        raise ValueError(f"temperature={temperature} must be positive")


def class_vector(values: npt.ArrayLike, logits: jax.Array, name: str) -> jax.Array:
    """A `[C]` vector of positive numbers, checked where it is concrete, in the logits' precision and rank."""
    if not isinstance(values, jax.core.Tracer):
        concrete = np.asarray(values, np.float64)
        good = (concrete > 0) & np.isfinite(concrete)
        if not good.all():
            bad = np.flatnonzero(~good)[:5].tolist()
            raise ValueError(
                f"{name} must be positive and finite; classes {bad} are not: leave them out"
            )
    values = jnp.asarray(values, logits.dtype)
    chex.assert_shape(
        values,
        logits.shape[-1:],
        custom_message=f"{name} must hold one number a class, [C]",
    )
    return values.reshape((1,) * (logits.ndim - 1) + (-1,))


def is_label(labels: ArrayLike, logits: jax.Array) -> jax.Array:
    """Bool `[..., C]`: true at each example's label."""
    num_classes = logits.shape[-1]
    # In NumPy: under `jit` an operation of JAX is traced also where its operands are concrete.
    concrete = None if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int)
    chex.assert_shape(
        labels,
        logits.shape[:-1],
        custom_message="labels must be [...] where logits are [..., C]",
    )
    if concrete is not None and ((concrete < 0) | (concrete >= num_classes)).any():
        low, high = concrete.min(), concrete.max()
        raise ValueError(
            f"labels from {low} to {high} are outside [0, C) with C = {num_classes}"
        )
    return labels[..., None] == jnp.arange(num_classes).reshape(
        (1,) * labels.ndim + (-1,)
    )


def class_mask(where: ArrayLike | None, logits: jax.Array) -> jax.Array:
    """`where` as bool of the shape of the logits; all true for None."""
    where = jnp.asarray(True if where is None else where)
    chex.assert_type(where, bool)
    if len(where.shape) > logits.ndim or any(
        w not in (1, n) for w, n in zip(where.shape[::-1], logits.shape[::-1])
    ):
        raise ValueError(
            f"where has shape {where.shape}, which does not broadcast to {logits.shape}"
        )
    return jnp.broadcast_to(where, logits.shape)


def from_top(logits: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """Logits less the largest one that exists, 0 elsewhere. No softmax sees it.

    It comes before anything is added to the logits or divides them: a large common offset then costs no precision.
    """
    exists = class_mask(where, logits)
    top = jax.lax.stop_gradient(
        jnp.max(logits, axis=-1, keepdims=True, where=exists, initial=-jnp.inf)
    )
    return jnp.where(exists, logits - jnp.where(jnp.isfinite(top), top, 0), 0)


def log_softmax(logits: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """log softmax over the classes of `where`; elsewhere 0, with no gradient."""
    exists = class_mask(where, logits)
    shifted = from_top(logits, where)
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True, where=exists)
    return jnp.where(exists, shifted - jnp.log(jnp.where(total > 0, total, 1)), 0)


def cross_entropy(
    logits: jax.Array, labels: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """−log softmax(logits) at the label, NaN where the label is no existing class."""
    at_label = is_label(labels, logits) & class_mask(where, logits)
    loss = -jnp.sum(log_softmax(logits, where), axis=-1, where=at_label)
    return jnp.where(at_label.any(axis=-1), loss, jnp.nan)


def kl(log_p: jax.Array, log_q: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """Σ p (log p − log q) over the last axis, from logs; 0 · log 0 is 0 since all logs are finite."""
    return jnp.sum(
        jnp.exp(log_p) * (log_p - log_q), axis=-1, where=class_mask(where, log_p)
    )
