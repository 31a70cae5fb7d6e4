"""The forms of kd, dkd and LTKD that accelerators use, run on CPU.

The reference is the form for CPU, which the other tests compare with extended
precision.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from ltkd_jax import losses
from ltkd_jax.groups import ClassGroups

B = 5
C = 24
TEMPERATURE = 3.0
# "several" differ in size and are mixed, "many" are more than are summed by masks.
ASSIGNMENTS = {
    "one": np.zeros(C, int),
    "equal": np.arange(C) % 4,
    "several": np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [3, 8, 13])),
    "many": np.random.default_rng(0).permutation([*range(20), 0, 0, 0, 5]),
}


@pytest.fixture
def choose_platform(monkeypatch):
    """Returns a function that makes the losses choose as on a platform."""

    def choose(platform):
        def platform_dependent(*args, default, **branches):
            return branches.get(platform, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)

    return choose


def draw(scale, dtype=np.float64, masked=False):
    """Returns arguments of `evaluate`; the first example has equal logits."""
    rng = np.random.default_rng(1)
    student, teacher, direction = rng.normal(size=(3, B, C)).astype(np.float32)
    teacher[0] = student[0]
    labels = rng.integers(0, C, B)
    where = rng.random((B, C)) < 0.6
    where[1] = False
    where[np.arange(B), labels] = True  # the only class of example 1
    return (
        (scale * student).astype(dtype),
        (scale * teacher).astype(dtype),
        dtype(TEMPERATURE),
        labels,
        where if masked else None,
        direction.astype(dtype),
    )


def evaluator(groups, *, traced_temperature):
    """Returns a jitted function: the losses, and derivatives of a weighted sum."""

    @jax.jit
    def evaluate(student, teacher, temperature, labels, where, direction):
        def values(student, temperature):
            tau = temperature if traced_temperature else TEMPERATURE
            options = dict(temperature=tau, where=where)
            split = losses.group_kl(student, teacher, groups, **options)
            return {
                "kd": losses.kd(student, teacher, **options),
                "dkd": losses.dkd(student, teacher, labels, **options),
                "ltkd": losses.ltkd(student, teacher, groups, beta=1.3, **options),
                "inter": split.inter,
                "intra": split.intra.sum(-1),
            }

        def total(student, temperature):
            # Different weights, so that no derivatives of two losses cancel.
            stacked = jnp.stack(list(values(student, temperature).values()))
            weights = np.arange(1.0, stacked.size + 1).reshape(stacked.shape)
            return jnp.vdot(weights, stacked)

        gradient = jax.grad(total, argnums=(0, 1) if traced_temperature else 0)
        at = (student, temperature)
        change = (direction, jnp.ones_like(temperature))
        _, forward = jax.jvp(total, at, change)
        reverse, second = jax.jvp(gradient, at, change)
        return values(*at) | {"forward": forward, "reverse": reverse, "second": second}

    return evaluate


def assert_equal(actual, expected, message):
    """Compares relative to the largest number of each array, or to 1."""
    for name in expected:
        for x, y in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name])):
            scale = max(1, np.abs(y).max())
            np.testing.assert_allclose(
                x / scale, y / scale, rtol=0, atol=1e-11, err_msg=f"{name} {message}"
            )


@pytest.mark.parametrize(
    "platform, grouping, masked, traced_temperature",
    [
        ("cuda", "several", True, False),
        ("cuda", "equal", False, True),
        ("cuda", "many", True, False),
        ("tpu", "several", False, False),
    ],
)
def test_equal_to_cpu(platform, grouping, masked, traced_temperature, choose_platform):
    groups = ClassGroups.from_assignment(ASSIGNMENTS[grouping])
    on_cpu = evaluator(groups, traced_temperature=traced_temperature)
    expected = {}
    with jax.enable_x64(True):
        for scale in (1.0, 30.0, 1e4, 1e30):
            expected[scale] = on_cpu(*draw(scale, masked=masked))
        choose_platform(platform)
        evaluate = evaluator(groups, traced_temperature=traced_temperature)
        for scale in expected:
            actual = evaluate(*draw(scale, masked=masked))
            for name in ("kd", "dkd", "inter", "intra"):
                assert actual[name][0] == 0, name
            assert_equal(actual, expected[scale], f"at scale {scale}")


def loss_fn(grouping, temperature=TEMPERATURE):
    """Returns a function of student and teacher that sums kd and ltkd, `[B]`."""
    groups = ClassGroups.from_assignment(ASSIGNMENTS[grouping])

    def loss(student, teacher):
        soft = losses.kd(student, teacher, temperature=temperature)
        return soft + losses.ltkd(student, teacher, groups, temperature=temperature)

    return loss


@pytest.mark.parametrize("grouping", ["several", "many"])
def test_precisions_and_vmap(grouping, choose_platform):
    choose_platform("cuda")
    loss = loss_fn(grouping)
    student, teacher, *_ = draw(3.0)
    with jax.enable_x64(True):
        expected = jax.jit(loss)(student, teacher)
        assert expected.dtype == jnp.float64
    single = jnp.asarray([student, teacher], jnp.float32)
    actual = jax.jit(loss)(*single)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-5)
    low = single.astype(jnp.bfloat16)
    actual = jax.jit(loss)(*low)
    assert actual.dtype == jnp.float32
    single = low.astype(jnp.float32)
    np.testing.assert_array_equal(actual, jax.jit(loss)(*single))
    pairs = jnp.stack([single, single[::-1]])
    expected = [loss(*pair) for pair in pairs]
    for axis in (0, 2):
        mapped = jax.vmap(loss, in_axes=axis)
        student, teacher = jnp.moveaxis(pairs, 0, axis + 1)
        actual = jax.jit(mapped)(student, teacher)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_certain_teacher(size, choose_platform):
    """The scale of the teacher's logits costs the student's no precision."""
    choose_platform("cuda")
    student = np.random.default_rng(2).normal(size=(B, C)).astype(np.float32)
    labels = np.arange(B) * 4
    teacher = jnp.asarray(size * np.eye(C, dtype=np.float32)[labels])
    cross_entropy = losses.cross_entropy(student / TEMPERATURE, labels)
    expected = TEMPERATURE**2 * cross_entropy
    actual = jax.jit(losses.kd)(student, teacher, temperature=TEMPERATURE)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    constant = jax.jit(lambda z, t: losses.kd(z, t, temperature=TEMPERATURE))
    np.testing.assert_allclose(constant(student, teacher), expected, rtol=1e-5)


def equations(jaxpr):
    """Yields every equation, with those inside of calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_what_a_gpu_compiles(choose_platform):
    """Each of these once cost a pass over all logits, or did not compile."""
    choose_platform("cuda")
    logits = jnp.zeros((B, C))

    def program(grouping, temperature):
        def total(student, temperature):
            return loss_fn(grouping, temperature)(student, logits).sum()

        gradient = jax.value_and_grad(total)
        if temperature is None:
            return jax.make_jaxpr(gradient)(logits, TEMPERATURE)
        return jax.make_jaxpr(lambda z: gradient(z, temperature))(logits)

    for grouping in ("several", "equal", "many"):
        for temperature, most in ((TEMPERATURE, 5), (None, 3)):
            widths = set()
            for equation in equations(program(grouping, temperature).jaxpr):
                name = equation.primitive.name
                if name == "reduce":
                    # Six accumulators exceed the shared memory under some `vmap`.
                    widths.add(len(equation.outvars))
                if name == "gather":
                    # XLA writes the result of an index with two axes to memory.
                    assert equation.invars[1].aval.ndim == 2  # with the one of tuples
                if grouping == "many":
                    sizes = [variable.aval.size for variable in equation.outvars]
                    assert max(sizes) < B * 20 * C, name  # no [B, G, C]
            assert max(widths) == most


def test_no_exchange_of_logits(choose_platform):
    """Examples on several devices: only their losses and the masses are summed."""
    choose_platform("cuda")
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(auto,))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    logits = jax.ShapeDtypeStruct((16, C), jnp.float32, sharding=sharding)
    for grouping in ("several", "many"):
        loss = loss_fn(grouping)
        gradient = jax.value_and_grad(lambda z, t, loss=loss: loss(z, t).mean())
        program = jax.jit(gradient).lower(logits, logits).compile().as_text()
        assert "all-reduce" in program
        for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", program):
            assert np.prod([int(size) for size in shape.split(",")]) < logits.size


@pytest.mark.parametrize("grouping", ["several", "many"])
def test_explicit_sharding(grouping):
    """Shardings are part of the types by default, and all forms return the same."""
    mesh = jax.make_mesh((8,), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    loss = loss_fn(grouping)
    gradient = jax.value_and_grad(lambda z, t: loss(z, t).mean())
    with jax.set_mesh(mesh):
        # Only the types are checked: under `jit` all forms are traced.
        logits = jax.ShapeDtypeStruct((16, C), jnp.float32, sharding=sharding)
        _, by_student = jax.eval_shape(gradient, logits, logits)
    assert by_student.sharding.spec == PartitionSpec("devices", None)
