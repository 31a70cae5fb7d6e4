"""Input checks, and softmax and KL in log space, for all losses.

A `where` of shape `[..., C]` marks the classes that exist. Logits and log probabilities
of the others are 0, not −∞, so that no gradient becomes 0 · ∞ = NaN.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

Scalar = jax.Array | float  # may be traced
AxisName = str | tuple[str, ...] | None


def as_float(x: ArrayLike) -> jax.Array:
    """Returns `x` in float32, or in float64 where it already is.

    Losses and statistics of bfloat16 logits are computed in float32, too.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"logits must be real, got {x.dtype}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_logits(logits: jax.Array) -> None:
    """Raises a ValueError unless the logits are `[..., C]` with C > 0."""
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., C] with C > 0, got shape {logits.shape}"
        )


def check_scalar(value: Scalar, name: str) -> None:
    """Raises a ValueError unless the value is a single number.

    An array of several would broadcast with the losses `[B]`.
    """
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"{name} is of shape {jnp.shape(value)}: give one number, without axes"
        )


def check_temperature(temperature: Scalar) -> None:
    """Raises a ValueError unless the temperature is a positive, finite number.

    Of a traced one only the shape is known.
    """
    check_scalar(temperature, "temperature")
    if isinstance(temperature, jax.core.Tracer):
        return
    if not 0 < float(temperature) < np.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")


def check_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: Scalar,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns student and teacher logits as floats of one shape `[..., C]`.

    They are 0 for classes that do not exist. The teacher's carry no gradient.
    """
    student = as_float(student_logits)
    teacher = jax.lax.stop_gradient(as_float(teacher_logits))
    chex.assert_equal_shape(
        (student, teacher),
        custom_message="student_logits and teacher_logits must both be [..., C]",
    )
    check_logits(student)
    check_temperature(temperature)
    if where is not None:
        student = jnp.where(class_mask(where, student), student, 0)
        teacher = jnp.where(class_mask(where, teacher), teacher, 0)
    return student, teacher


def scale_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: Scalar,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (z − max z) / τ for the logits of student and teacher; see `check_pair`.

    The maximum is subtracted before the division, see `subtract_max`.
    """
    student, teacher = check_pair(student_logits, teacher_logits, temperature, where)
    scaled_student = subtract_max(student, where) / temperature
    scaled_teacher = subtract_max(teacher, where) / temperature
    return scaled_student, scaled_teacher


def class_vector(values: npt.ArrayLike, logits: jax.Array, name: str) -> jax.Array:
    """Returns a vector `[C]` of positive numbers in the precision and rank of `logits`.

    Raises:
      ValueError: a concrete number that is not positive and finite.
    """
    if not isinstance(values, jax.core.Tracer):
        concrete = np.asarray(values, np.float64)
        valid = (concrete > 0) & np.isfinite(concrete)
        if not valid.all():
            invalid_classes = np.flatnonzero(~valid)[:5].tolist()
            raise ValueError(
                f"{name} must be positive and finite; classes {invalid_classes} are "
                "not: leave them out"
            )
    values = jnp.asarray(values, logits.dtype)
    chex.assert_shape(
        values,
        logits.shape[-1:],
        custom_message=f"{name} must hold one number a class, [C]",
    )
    # With explicit leading axes it broadcasts under jax_numpy_rank_promotion="raise".
    return values.reshape((1,) * (logits.ndim - 1) + (-1,))


def label_mask(labels: ArrayLike, logits: jax.Array) -> jax.Array:
    """Returns a bool `[..., C]` that is true at each example's label.

    Raises:
      TypeError: labels that are not integers.
      ValueError: concrete labels outside `[0, C)`. A traced one is true nowhere.
    """
    num_classes = logits.shape[-1]
    # In NumPy: under `jit`, JAX traces operations on concrete operands, too.
    concrete = None if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}{labels.shape}")
    chex.assert_shape(
        labels,
        logits.shape[:-1],
        custom_message="labels must be [...] where logits are [..., C]",
    )
    if concrete is not None and ((concrete < 0) | (concrete >= num_classes)).any():
        low = concrete.min()
        high = concrete.max()
        raise ValueError(
            f"labels from {low} to {high} are outside [0, C) with C = {num_classes}"
        )
    classes = jnp.arange(num_classes).reshape((1,) * labels.ndim + (-1,))
    return labels[..., None] == classes


def class_mask(where: ArrayLike | None, logits: jax.Array) -> jax.Array:
    """Returns `where` as a bool of the logits' shape; all true for None."""
    where = jnp.asarray(True if where is None else where)
    if where.dtype != bool:
        raise TypeError(f"where must be bool, got {where.dtype}{where.shape}")
    # `broadcast_to` would name neither the argument nor both shapes.
    sizes = zip(where.shape[::-1], logits.shape[::-1])
    fits = all(where_size in (1, size) for where_size, size in sizes)
    if where.ndim > logits.ndim or not fits:
        raise ValueError(
            f"where has shape {where.shape}, which does not broadcast to {logits.shape}"
        )
    return jnp.broadcast_to(where, logits.shape)


def subtract_max(logits: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """Returns the logits minus the largest that exists, 0 where no class exists.

    This leaves the softmax unchanged. It is done before anything is added to the logits
    or divides them, so that a large common offset costs no precision: the difference of
    two nearby floats is exact, but rounding z/τ loses digits in proportion to |z|.
    """
    exists = class_mask(where, logits)
    # The result is differentiated as if the maximum were constant: its derivative
    # would cancel in every softmax.
    maximum = jax.lax.stop_gradient(
        jnp.max(logits, axis=-1, keepdims=True, where=exists, initial=-jnp.inf)
    )
    # Where no class exists the maximum is −∞, and z − (−∞) would be ∞.
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0)
    return jnp.where(exists, logits - maximum, 0)


def log_softmax(logits: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """Returns log softmax over the classes that exist.

    It is 0, without gradient, for the others.
    """
    exists = class_mask(where, logits)
    shifted = subtract_max(logits, where)
    sum_exp = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True, where=exists)
    # The sum is at least 1, or 0 where no class exists.
    log_sum_exp = jnp.log(jnp.where(sum_exp > 0, sum_exp, 1))
    return jnp.where(exists, shifted - log_sum_exp, 0)


def cross_entropy(
    logits: jax.Array, labels: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """Computes −log softmax(z)_y; NaN where the label is no existing class."""
    at_label = label_mask(labels, logits) & class_mask(where, logits)
    loss = -jnp.sum(log_softmax(logits, where), axis=-1, where=at_label)
    return jnp.where(at_label.any(axis=-1), loss, jnp.nan)


def kl(log_p: jax.Array, log_q: jax.Array, where: ArrayLike | None = None) -> jax.Array:
    """Computes KL(p ‖ q) = Σ p (log p − log q) over the last axis, from finite logs."""
    # Where p underflows to 0 the term is 0 · finite, as it should be.
    return jnp.sum(
        jnp.exp(log_p) * (log_p - log_q), axis=-1, where=class_mask(where, log_p)
    )
