"""Batch normalisation with a closed-form derivative and a one-pass variance."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax.typing import DTypeLike

# PyTorch's. Flax weighs the old statistics by the momentum, PyTorch (0.1) the new ones.
MOMENTUM = 0.9
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Normalises each channel by its mean and variance.

        y = scale · (x − mean) / √(var + 1e-5) + bias

    In training, mean and variance are the batch's, and the running statistics become
    0.9 · old + 0.1 · new. In evaluation, the running statistics are used.

    Variables and results are those of `flax.linen.BatchNorm` with momentum 0.9, up to
    rounding. It differs in what it costs:

    - Mean and variance take one pass over x, not two. A shift by one of the batch's
      pixels keeps the variance E[(x − shift)²] − E[x − shift]² from cancelling. In
      bfloat16 there is no shift: the float32 sums lose less by cancellation than x has
      lost by rounding.
    - The derivative is written in closed form: one pass for the two sums over the
      batch, which are also the gradients of scale and bias, and one pass for the rest.
    - With `axis_name` there is one collective forward and one backward.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training
    by Reducing Internal Covariate Shift", ICML 2015.

    Attributes:
      dtype: of the result; None is the widest of x and the parameters. Statistics are
        in float32 or wider.
      axis_name: the device axis over which the batch is split, under `pmap` or
        `shard_map`; each device has as many examples. None on one device and under
        `jit`, where arrays are global.

    >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0]])
    >>> layer = BatchNorm()
    >>> variables = layer.init(jax.random.key(0), x, train=False)
    >>> y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    >>> y.round(3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    >>> updates["batch_stats"]["mean"]
    Array([0.2, 1. ], dtype=float32)
    """

    dtype: DTypeLike | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns y, of the shape of x.

        Args:
          x: float `[..., C]`.
          train: whether to take the batch's statistics and to update the running ones,
            for which the collection "batch_stats" must be mutable.
        """
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, shape, jnp.float32
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if not train:
            mean, var = running_mean.value, running_var.value
            return _normalize(x, mean, var, scale, bias, dtype)

        # `init` runs outside of `pmap`, and keeps the initial statistics.
        is_initializing = self.is_initializing()
        axis_name = None if is_initializing else self.axis_name
        y, mean, var = _normalize_by_batch(x, scale, bias, dtype, axis_name)
        if not is_initializing:
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        return y


def fold(
    conv: Mapping[str, jax.Array],
    norm: Mapping[str, jax.Array],
    stats: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns the parameters of a convolution that replaces one with batch norm.

    In evaluation, batch norm of y is a · y + bias − a · mean, a = scale / √(var + ε).
    This is linear in y, so a multiplies the kernel and the bias of the convolution.

    Args:
      conv: parameters of the convolution: kernel `[..., C]`, and bias `[C]` if any.
      norm: scale and bias of batch norm, `[C]`.
      stats: its running statistics, mean and var, `[C]`.

    Returns:
      Its kernel `[..., C]` and bias `[C]`.

    >>> conv = {"kernel": jnp.ones((1, 1, 1, 2))}
    >>> norm = {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 5.0])}
    >>> stats = {"mean": jnp.array([3.0, 0.0]), "var": jnp.array([1.0, 4.0]) - EPSILON}
    >>> folded = fold(conv, norm, stats)
    >>> folded["kernel"].ravel(), folded["bias"]
    (Array([1., 1.], dtype=float32), Array([-3.,  5.], dtype=float32))
    """
    slope = norm["scale"] * jax.lax.rsqrt(stats["var"] + EPSILON)
    kernel = conv["kernel"]
    bias = norm["bias"] + (conv.get("bias", 0) - stats["mean"]) * slope
    return {"kernel": kernel * _expand(slope, kernel), "bias": bias}


def _normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns y, of the shape of x, by mean, variance, scale and bias `[C]`."""
    slope = jax.lax.rsqrt(var + EPSILON) * scale
    y = (x - _expand(mean, x)) * _expand(slope, x) + _expand(bias, x)
    return y.astype(dtype)


# A JVP, not a VJP, so that forward mode and second derivatives work.
@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _normalize_by_batch(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dtype: DTypeLike,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (y, mean, var); y has the shape of x, the others are `[C]`."""
    mean, var = _batch_statistics(x, axis_name)
    return _normalize(x, mean, var, scale, bias, dtype), mean, var


@_normalize_by_batch.defjvp
def _differentiate(
    dtype: DTypeLike,
    axis_name: str | None,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[
    tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]
]:
    """Returns (y, mean, var) and their tangents.

    With x̂ = (x − mean) / √(var + ε) and a = scale / √(var + ε),

        dy = a · dx + (dbias − a · E[dx]) + x̂ · (dscale − a · E[x̂ dx]).

    The transposes of the brackets are Σ ȳ and Σ x̂ ȳ, the gradients of bias and scale.
    With `a` outside of them there would be two more sums over the batch.
    """
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, mean, var = _normalize_by_batch(x, scale, bias, dtype, axis_name)
    dx = dx.astype(mean.dtype)
    inverse_std = jax.lax.rsqrt(var + EPSILON)
    normalized = (x - _expand(mean, x)) * _expand(inverse_std, x)
    mean_dx = _batch_mean(dx)
    mean_product = _batch_mean(normalized * dx)
    if axis_name is not None:
        # Stacked, for a single collective here and in the transpose.
        means = jnp.stack([mean_dx, mean_product])
        mean_dx, mean_product = jax.lax.pmean(means, axis_name)
    slope = scale * inverse_std
    dy = (
        _expand(slope, x) * dx
        + _expand(dbias - slope * mean_dx, x)
        + _expand(dscale - slope * mean_product, x) * normalized
    )
    dvar = 2 * mean_product / inverse_std
    return (y, mean, var), (dy.astype(y.dtype), mean_dx, dvar)


def _batch_statistics(
    x: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance `[C]` over the batch, in float32 or wider."""
    shift = _variance_shift(x)
    shifted = x - _expand(shift, x)
    shifted_mean = _batch_mean(shifted)
    mean = shift + shifted_mean
    # Rounding can make the difference negative.
    var = jnp.maximum(_batch_mean(shifted**2) - shifted_mean**2, 0)
    if axis_name is not None:
        # Each device has a shift of its own, so the variance of the devices' means is
        # added. Stacked, for a single collective.
        statistics = _gather(jnp.stack([mean, var]), axis_name)
        mean, mean_var = statistics.mean(0)
        var = mean_var + statistics[:, 0].var(0)
    return mean, var


def _variance_shift(x: jax.Array) -> jax.Array:
    """Returns a value `[C]` near the mean, in float32 or wider; 0 in bfloat16."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype == jnp.bfloat16:
        return jnp.zeros(x.shape[-1:], dtype)
    # Padding makes values at a border unlike the others.
    # A slice, not an index: sizes may be symbolic, as in an export.
    start = [size // 2 for size in x.shape[:-1]]
    end = [position + 1 for position in start]
    middle = jax.lax.slice(x, (*start, 0), (*end, x.shape[-1]))
    return middle.reshape(-1).astype(dtype)


def _batch_mean(x: jax.Array) -> jax.Array:
    """Returns the mean `[C]` over all axes but the last."""
    return jnp.mean(x, tuple(range(x.ndim - 1)))


def _gather(x: jax.Array, axis_name: str) -> jax.Array:
    """Returns the arrays of all devices, along a new first axis.

    It is a sum, since `shard_map` takes the result of `all_gather` to differ between
    the devices.
    """
    devices = jnp.arange(jax.lax.axis_size(axis_name))
    is_here = jnp.expand_dims(
        devices == jax.lax.axis_index(axis_name), tuple(range(1, x.ndim + 1))
    )
    return jax.lax.psum(jnp.where(is_here, x[None], 0), axis_name)


def _expand(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `[C]` with leading axes of size 1, to be broadcast against x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
