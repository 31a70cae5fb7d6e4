"""Batch norm against Flax's, and against autodiff of the textbook formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from ltkd_jax.models.batch_norm import BatchNorm

C = 3
AXIS = "devices"


def flax_layer(train):
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
    )


def draw(*shape, seed=0, mean=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(mean, 2, (*shape, C)), dtype)


def draw_variables(dtype=np.float64):
    params = {"scale": draw(seed=1, dtype=dtype), "bias": draw(seed=2, dtype=dtype)}
    stats = {"mean": draw(seed=3, dtype=dtype), "var": draw(seed=4, dtype=dtype) ** 2}
    return {"params": params, "batch_stats": stats}


def normalize(variables, x, axis_name=None):
    """Returns y and the new running statistics of a batch."""
    layer = BatchNorm(axis_name=axis_name)
    y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def textbook(variables, x):
    """Returns the same as `normalize`, by the formula in the docstring."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    params, old = variables["params"], variables["batch_stats"]
    scale, bias = (params[key].reshape(mean.shape) for key in ("scale", "bias"))
    y = scale * (x - mean) / jnp.sqrt(var + 1e-5) + bias
    new = {"mean": mean.reshape(C), "var": var.reshape(C)}
    return y, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, old, new)


def assert_close(tree, expected, rtol=1e-12):
    """Checks leaves, relative to the largest value of each."""

    def check(leaf, expected_leaf):
        atol = rtol * np.abs(expected_leaf).max()
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=atol)

    jax.tree.map(check, tree, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [True, False])
def test_equals_flax(train, dtype):
    x = jnp.asarray(draw(4, 5, 5), dtype)
    key = jax.random.key(0)
    # `init` runs outside of `pmap`, where there is no axis.
    initial = BatchNorm(dtype=dtype, axis_name=AXIS).init(key, x, train=train)
    flax = flax_layer(train).copy(dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, initial, flax.init(key, x))
    assert jax.tree.map(jnp.dtype, initial) == jax.tree.map(
        lambda _: np.float32, initial
    )

    variables = draw_variables(np.float32)
    y, updates = BatchNorm(dtype=dtype).apply(
        variables, x, train=train, mutable=["batch_stats"]
    )
    expected_y, expected_updates = flax.apply(variables, x, mutable=["batch_stats"])
    assert y.dtype == expected_y.dtype == dtype
    # In evaluation both compute the same; in training Flax takes two passes.
    tolerance = 0
    if train:
        tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
    assert_close(y.astype(np.float32), expected_y.astype(np.float32), tolerance)
    assert_close(updates, expected_updates, 1e-6)


def gradient(function, args):
    return jax.grad(function, (0, 1))(*args)


def tangent(function, args):
    return jax.jvp(function, args, directions(args))[1]


def forward_over_reverse(function, args):
    return jax.jvp(jax.grad(function, (0, 1)), args, directions(args))[1]


def reverse_over_reverse(function, args):
    def slope(*args):
        return dot(gradient(function, args), directions(args))

    return gradient(slope, args)


def vmap_of_gradient(function, args):
    variables, x = args
    batch = jnp.stack([x, 2 * x + 1])
    return jax.vmap(jax.grad(function, (0, 1)), (None, 0))(variables, batch)


def directions(args):
    return jax.tree.map(lambda a: jnp.cos(a) + 0.5, args)


def dot(tree, other):
    products = jax.tree.map(lambda a, b: (a * b).sum(), tree, other)
    return sum(jax.tree.leaves(products))


@pytest.mark.parametrize(
    "derive",
    [
        gradient,
        tangent,
        forward_over_reverse,
        reverse_over_reverse,
        vmap_of_gradient,
    ],
)
def test_derivatives(derive):
    @functools.partial(jax.jit, static_argnums=0)
    def derivative(function, *args):
        def scalar(*args):
            # Depends on y and on the new statistics, nonlinearly.
            outputs = function(*args)
            return dot(outputs, jax.tree.map(jnp.sin, outputs))

        return function(*args), derive(scalar, args)

    with jax.enable_x64(True):
        args = draw_variables(), draw(4, 3, 2)
        assert_close(derivative(normalize, *args), derivative(textbook, *args))


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradient_in_low_precision(dtype, rtol):
    @functools.partial(jax.jit, static_argnums=0)
    def params_and_x_gradient(function, variables, x):
        def loss(params, x):
            y, _ = function(variables | {"params": params}, x)
            return (y**3).mean()

        return jax.grad(loss, (0, 1))(variables["params"], x)

    x = jnp.asarray(draw(8, 6, 6, mean=20), dtype)
    variables = draw_variables(np.float32)
    actual = params_and_x_gradient(normalize, variables, x)
    assert actual[1].dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (variables, x))
        expected = params_and_x_gradient(textbook, *wide)
    assert_close(jax.tree.map(np.float64, actual), expected, rtol)


@pytest.mark.parametrize("ratio", [0, 1, 10, 100, 1e3, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variance(dtype, ratio):
    exact_x = draw(16, 16, 16, mean=2 * ratio)
    x = jnp.asarray(exact_x, dtype)
    zeros = {"mean": np.zeros(C, np.float32), "var": np.zeros(C, np.float32)}
    variables = draw_variables(np.float32) | {"batch_stats": zeros}
    _, stats = normalize(variables, x)
    axes = (0, 1, 2)
    expected = np.float64(x).var(axes)
    error = np.abs(np.float64(stats["var"]) / 0.1 - expected)
    tolerance = 2e-6 * expected
    if dtype == "bfloat16":
        # A fraction of what rounding x to bfloat16 has changed.
        tolerance += 0.3 * np.abs(expected - exact_x.var(axes)) * (ratio >= 10)
    assert (error <= tolerance).all()
    assert_close(stats["mean"] / 0.1, np.float64(x).mean(axes), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_channels(dtype):
    # Rounding makes E[x²] − E[x]² of some of these constants negative.
    constants = jnp.linspace(100, 110, 50).astype(dtype)
    x = jnp.broadcast_to(constants, (7, 50))
    layer = BatchNorm()
    variables = layer.init(jax.random.key(0), x, train=True)

    def square(x):
        y, _ = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        return (y.astype(jnp.float32) ** 2).mean()

    value, gradient = jax.value_and_grad(square)(x)
    assert value < 1e-5
    assert jnp.isfinite(gradient).all()


def device_gradients(variables, x, axis_name=None):
    """Returns the outputs, and the gradients of a loss that is a mean over examples.

    The gradient with respect to x is of the mean over the device's examples.
    """

    def loss(params, x):
        y, stats = normalize(variables | {"params": params}, x, axis_name)
        return (jnp.sin(y) * y).mean(), (y, stats)

    params = variables["params"]
    gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    by_params, by_x = gradients
    if axis_name is not None:
        by_params = jax.lax.pmean(by_params, axis_name)
    return (y, by_x), (stats, by_params)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-12), ("float32", 3e-6)])
@pytest.mark.parametrize("api", ["pmap", "shard_map", "jit"])
def test_eight_devices_equal_one(api, dtype, rtol):
    with jax.enable_x64(dtype == "float64"):
        # Devices have different means, which differ by more than the deviations.
        x = draw(16, 4, mean=100, dtype=dtype)
        x += np.arange(16, dtype=dtype).reshape(16, 1, 1)
        variables = draw_variables(dtype)
        (y, by_x), replicated = jax.jit(device_gradients)(variables, x)
        on_device = functools.partial(device_gradients, variables, axis_name=AXIS)
        mesh = jax.make_mesh((8,), (AXIS,), (jax.sharding.AxisType.Auto,))
        if api == "pmap":
            sharded, copies = jax.pmap(on_device, AXIS)(x.reshape(8, 2, 4, C))
            actual = jax.tree.map(lambda copies: copies[3], copies)
        elif api == "shard_map":
            batch, whole = PartitionSpec(AXIS), PartitionSpec()
            sharded, actual = jax.jit(
                jax.shard_map(
                    on_device,
                    mesh=mesh,
                    in_specs=batch,
                    out_specs=((batch, batch), whole),
                    check_vma=False,
                )
            )(x)
        else:
            sharding = NamedSharding(mesh, PartitionSpec(AXIS))
            global_x = jax.device_put(x, sharding)
            sharded, actual = jax.jit(device_gradients)(variables, global_x)
        assert_close(actual, replicated, rtol)
        actual_y, actual_by_x = (np.reshape(leaf, x.shape) for leaf in sharded)
        assert_close(actual_y, y, rtol)
        # A device averages over an eighth of the examples.
        share = 1 if api == "jit" else 1 / 8
        assert_close(share * actual_by_x, by_x, 10 * rtol)


def test_shard_map_that_checks_replication():
    """By default `shard_map` must see that the statistics are those of all devices."""
    x = draw(16, 4, mean=100, dtype=np.float32)
    variables = draw_variables(np.float32)

    def gradients(x, axis_name=None):
        def loss(params, x):
            y, stats = normalize(variables | {"params": params}, x, axis_name)
            loss = (jnp.sin(y) * y).mean()
            return (jax.lax.pmean(loss, axis_name) if axis_name else loss), stats

        grad = jax.grad(loss, (0, 1), has_aux=True)
        (by_params, by_x), stats = grad(variables["params"], x)
        return by_x, (by_params, stats)

    mesh = jax.make_mesh((8,), (AXIS,), (jax.sharding.AxisType.Auto,))
    batch, whole = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(gradients, axis_name=AXIS),
        mesh=mesh,
        in_specs=batch,
        out_specs=(batch, whole),
    )
    assert_close(jax.jit(mapped)(x), jax.jit(gradients)(x), 3e-5)


def test_export_for_any_batch_size():
    """A training step may be exported: a symbolic size is not an index of an array."""
    variables = draw_variables(np.float32)
    (size,) = export.symbolic_shape("size")
    shape = jax.ShapeDtypeStruct((size, 4, C), np.float32)
    exported = export.export(jax.jit(functools.partial(normalize, variables)))(shape)
    x = draw(5, 4, dtype=np.float32)
    assert_close(exported.call(x), normalize(variables, x), 1e-6)


def test_one_collective_forward_and_one_backward():
    def count(function, *args):
        jaxpr = str(jax.make_jaxpr(function, axis_env=[(AXIS, 8)])(*args))
        return [jaxpr.count(name) for name in ("all_gather[", "psum[", "psum_inv")]

    variables, x = draw_variables(np.float32), draw(4, dtype=np.float32)
    forward = functools.partial(normalize, axis_name=AXIS)
    assert sum(count(forward, variables, x)) == 1

    def backward(variables, x):
        outputs, vjp = jax.vjp(forward, variables, x)
        return vjp(outputs)

    assert sum(count(backward, variables, x)) == 2
