"""The contract of the losses, identities between them, and batches over devices."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import truth
from helpers.loss_family import (
    assert_allclose,
    assert_close,
    evaluate,
    evaluate_values,
    select,
    total_of_student,
    values,
)
from helpers.truth import BATCH_AXES, FAMILY, B, C, draw
from jax.sharding import NamedSharding, PartitionSpec

from ltkd_jax import losses
from ltkd_jax.groups import ClassGroups

BATCH_LOSSES = select(lambda loss: loss.uses_batch)
EXAMPLE_LOSSES = select(lambda loss: not loss.uses_batch)
LABEL_LOSSES = select(lambda loss: "labels" in loss.args)
TEACHER_LOSSES = select(lambda loss: loss.needs_teacher)


def map_batched(function, *inputs):
    """Applies `function` to the fields with a batch axis; others are the first's."""
    fields = []
    for axis, *columns in zip(BATCH_AXES, *inputs):
        fields.append(columns[0] if axis is None else function(*columns))
    return truth.Inputs(*fields)


# --- One test for the whole family ---


def test_contract():
    x = draw("random", masking="examples")
    eager = values(x)
    for loss in eager.values():
        assert loss.shape == (B,) and loss.dtype == jnp.float32
    assert_close(evaluate_values(x), eager)  # jit, with everything traced
    # The precision of other products would depend on a global setting.
    program = str(jax.make_jaxpr(values)(x))
    highest = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert program.count(" dot_general[") == program.count(highest) > 0


def test_bfloat16():
    """The loss is that of the same numbers in float32."""
    x = draw("random", masking="examples")
    low = x._replace(
        student=jnp.asarray(x.student, jnp.bfloat16),
        teacher=jnp.asarray(x.teacher, jnp.bfloat16),
    )
    actual = jax.jit(values)(low)
    assert all(loss.dtype == jnp.float32 for loss in actual.values())
    high = x._replace(
        student=low.student.astype(jnp.float32), teacher=low.teacher.astype(jnp.float32)
    )
    assert_close(actual, evaluate_values(high), rtol=1e-6)


def test_vmap():
    inputs = [draw("random", masking="examples", seed=seed) for seed in (1, 2)]
    stacked = map_batched(lambda *fields: np.stack(fields), *inputs)
    mapped = jax.jit(jax.vmap(values, in_axes=(BATCH_AXES,)))(stacked)
    for i, x in enumerate(inputs):
        actual = {name: loss[i] for name, loss in mapped.items()}
        assert_close(actual, evaluate_values(x))


def test_forward_mode():
    x = draw("random", masking="examples")
    direction = np.random.default_rng(1).normal(size=(B, C)).astype(np.float32)

    @jax.jit
    def tangents(z, v):
        result = {}
        for name, loss in FAMILY.items():
            _, result[name] = jax.jvp(total_of_student(loss, x), (z,), (v,))
        return result

    expected = {}
    for name, (_, gradient) in evaluate(x).items():
        expected[name] = np.vdot(gradient, direction)
    assert_close(tangents(x.student, direction), expected, rtol=1e-4)


def test_second_derivative():
    """Against central differences of the gradient, at ties too; finite at extremes."""
    direction = np.random.default_rng(1).normal(size=(B, C))
    step = 1e-5

    @jax.jit
    def second_derivatives(x):
        def evaluate_one(loss):
            gradient_fn = jax.grad(total_of_student(loss, x))
            return jax.grad(lambda z: jnp.sum(gradient_fn(z) * direction))(x.student)

        return {name: evaluate_one(loss) for name, loss in FAMILY.items()}

    with jax.enable_x64(True):
        for case in ("random", "tied", "one_hot", "wide", "uniform_1e4"):
            x = draw(case, masking="examples", dtype=np.float64)
            actual = second_derivatives(x)
            up = evaluate(x._replace(student=x.student + step * direction))
            down = evaluate(x._replace(student=x.student - step * direction))
            for name, loss in FAMILY.items():
                assert np.isfinite(actual[name]).all(), (name, case)
                is_smooth = case in ("random", "tied", "one_hot")
                # The differences would move a factor that is constant by definition.
                if is_smooth and not loss.has_constant_factor:
                    expected = (up[name][1] - down[name][1]) / (2 * step)
                    assert_allclose(
                        actual[name],
                        expected,
                        rtol=1e-6,
                        atol=1e-7,
                        err_msg=f"{name} {case}",
                    )


@pytest.mark.parametrize("grouping", ["thirds", "each"])
def test_groups_with_and_without_a_mask(grouping):
    """A mask in which all classes exist changes nothing."""
    ltkd = FAMILY["ltkd"]
    direction = np.random.default_rng(1).normal(size=(B, C))

    @jax.jit
    def derivatives(x):
        total = total_of_student(ltkd, x)
        tangents = (direction.astype(x.student.dtype),)
        value, tangent = jax.jvp(total, (x.student,), tangents)
        gradient, second = jax.jvp(jax.grad(total), (x.student,), tangents)

        def total_of_temperature(temperature):
            return ltkd.call(losses, x._replace(temperature=temperature)).sum()

        temperature_gradient = jax.grad(total_of_temperature)(x.temperature)
        return value, tangent, gradient, second, temperature_gradient

    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        with jax.enable_x64(dtype is np.float64):
            for case in ("random", "tied", "wide", "underflow", "uniform_1e4"):
                x = draw(case, grouping=grouping, dtype=dtype)
                actual_values = derivatives(x._replace(where=None))
                for actual, expected in zip(actual_values, derivatives(x)):
                    scale = max(1.0, np.abs(expected).max())
                    assert np.isfinite(actual).all(), case
                    np.testing.assert_allclose(
                        actual / scale,
                        expected / scale,
                        atol=tolerance,
                        rtol=0,
                        err_msg=case,
                    )


def test_no_gradient_into_the_teacher():
    x = draw("random", masking="examples")

    @jax.jit
    def derivatives(teacher):
        def evaluate_one(loss):
            def total(teacher):
                return loss.call(losses, x._replace(teacher=teacher)).sum()

            _, tangent = jax.jvp(total, (teacher,), (teacher,))
            return jax.grad(total)(teacher), tangent

        return {name: evaluate_one(loss) for name, loss in TEACHER_LOSSES.items()}

    for name, (gradient, tangent) in derivatives(x.teacher).items():
        assert (gradient == 0).all() and tangent == 0, name


def test_any_leading_shape():
    x = draw("random", masking="examples")
    flat = evaluate_values(x)
    example_values = jax.jit(functools.partial(values, family=EXAMPLE_LOSSES))
    square = example_values(map_batched(lambda a: a.reshape((2, 3) + a.shape[1:]), x))
    single = example_values(map_batched(lambda a: a[4], x))
    for name in EXAMPLE_LOSSES:
        assert square[name].shape == (2, 3) and single[name].shape == (), name
        assert_allclose(square[name].ravel(), flat[name], err_msg=name)
        assert_allclose(single[name], flat[name][4], err_msg=name)


def test_batch_dependence():
    """They enter the batch statistics, unless they are masked."""
    x = draw("random", masking="examples")
    kept = x.example_mask
    masked = evaluate_values(x)
    unmasked = evaluate_values(x._replace(example_mask=np.ones(B, bool)))
    for name in BATCH_LOSSES:
        assert masked[name][kept].any(), name
        assert not np.allclose(masked[name][kept], unmasked[name][kept]), name


def test_masks_none_and_broadcast():
    x = draw("random")
    unmasked = jax.jit(values)(x._replace(where=None, example_mask=None))
    assert_close(unmasked, evaluate_values(x))
    x = draw("random", masking="classes")
    broadcast = jax.jit(values)(x._replace(where=x.where[0]))
    assert_close(broadcast, evaluate_values(x))


@pytest.mark.parametrize("grouping", ["thirds", "lone"])
def test_masked_logits(grouping):
    x = draw("random", masking="classes", grouping=grouping)
    alternating = np.array([1e4, -1e4])[np.arange(C) % 2]
    noise = np.where(x.where, 0, alternating).astype(np.float32)
    noisy = x._replace(student=x.student + noise, teacher=x.teacher - noise)
    assert_close(evaluate_values(noisy), evaluate_values(x))


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["ltkd", "rebalanced_inter_group"])
def test_masked_examples(name, padding):
    """Padding counts nowhere, whatever it holds: values, gradients, second ones."""
    rng = np.random.default_rng(3)
    student_logits, teacher_logits = 3 * rng.normal(size=(2, B, C))
    groups = ClassGroups.from_counts(np.arange(C, 0, -1))
    mask = np.arange(B) % 3 > 0
    loss = functools.partial(getattr(losses, name), groups=groups)
    padded_teacher = np.where(mask[:, None], teacher_logits, padding)
    student = jnp.asarray(np.where(mask[:, None], student_logits, padding))

    def padded(student):
        values = loss(student, padded_teacher, example_mask=mask)
        return values.sum(), values

    def without_padding(student):
        values = loss(student, teacher_logits[mask])
        return values.sum(), values

    expected_gradient, expected = jax.grad(without_padding, has_aux=True)(
        jnp.asarray(student_logits[mask])
    )
    gradient, values = jax.grad(padded, has_aux=True)(student)
    np.testing.assert_allclose(values[mask], expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[mask], expected_gradient, rtol=1e-5, atol=1e-6)
    assert not np.any(values[~mask])
    assert not np.any(gradient[~mask])

    def gradient_fn(student):
        return jax.grad(padded, has_aux=True)(student)[0]

    _, second = jax.jvp(gradient_fn, (student,), (jnp.ones_like(student),))
    assert np.isfinite(second).all()
    assert not np.any(second[~mask])


def test_shift_invariance():
    """float32 represents these logits exactly with and without the offset."""
    x = draw("random", masking="examples")
    x = x._replace(
        student=np.round(x.student * 64) / 64, teacher=np.round(x.teacher * 64) / 64
    )
    offset = np.array([-4096, -64, 0, 1, 64, 4096], np.float32)[:, None]
    shifted = x._replace(student=x.student + offset, teacher=x.teacher - 2 * offset)
    assert_close(evaluate_values(shifted), evaluate_values(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_nonnegative_and_zero_at_equality(case):
    for masking in truth.MASKINGS:
        x = draw(case, masking=masking)
        at_equality = evaluate_values(x._replace(student=x.teacher))
        for name, actual in evaluate_values(x).items():
            loss = FAMILY[name]
            message = (name, masking)
            assert (np.asarray(actual) >= -2e-5 * loss.weight).all(), message
            if loss.is_kl:
                assert (at_equality[name] == 0).all(), message


def test_traced_options():
    x = draw("random")
    options = {name: loss.options for name, loss in FAMILY.items() if loss.options}

    @jax.jit
    def traced_values(options):
        family = {}
        for name, traced in options.items():
            family[name] = dataclasses.replace(FAMILY[name], options=traced)
        return values(x, family)

    assert_close(traced_values(options), evaluate_values(x))


FUNCTIONS = {loss.function or loss.name for loss in FAMILY.values()} | {"rebalance"}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_signature(name):
    """Names, order, kinds and defaults are those of the reference."""
    expected = dict(inspect.signature(getattr(truth, name)).parameters)
    expected.pop("factor_logits", None)
    actual = {}
    for key, parameter in inspect.signature(getattr(losses, name)).parameters.items():
        actual[key] = parameter.replace(annotation=parameter.empty)
    if name in ("rebalance", "rebalanced_inter_group", "ltkd"):
        assert actual.pop("axis_name").default is None
    assert actual == expected


# --- Identities ---


@jax.jit
def split(x):
    return losses.group_kl(
        x.student, x.teacher, x.groups, temperature=x.temperature, where=x.where
    )


@pytest.mark.parametrize("grouping", truth.GROUPINGS)
def test_split_sums_to_kd(grouping):
    cases = ("random", "underflow", "wide")
    for masking, case in itertools.product(truth.MASKINGS, cases):
        x = draw(case, grouping=grouping, masking=masking, temperature=2.0)
        inter, intra, log_mass = split(x)
        num_groups = x.groups.num_groups
        assert intra.shape == log_mass.shape == (B, num_groups)
        assignment = np.asarray(x.groups.assignment)
        exists = np.zeros((B, num_groups), bool)
        for group in range(num_groups):
            exists[:, group] = x.where[:, assignment == group].any(-1)
        np.testing.assert_array_equal(np.isneginf(log_mass), ~exists)
        assert (intra[~exists] == 0).all()
        mass = np.exp(log_mass)
        assert_allclose(mass.sum(-1), 1)
        expected = evaluate_values(x)
        assert_allclose(4 * (inter + (mass * intra).sum(-1)), expected["kd"])
        assert_allclose(4 * intra.sum(-1), expected["uniform_intra_group"])
        if grouping == "one":
            assert (np.asarray(inter) == 0).all()
        if grouping == "each":
            assert (np.asarray(intra) == 0).all()


@jax.jit
def identities(x):
    """Returns pairs that must be equal, by a description."""
    z = x.student
    t = x.teacher
    y = x.labels
    n = x.counts
    soft = dict(temperature=2.0, where=x.where)
    batch = dict(example_mask=x.example_mask, **soft)
    kd = losses.kd(z, t, **soft)
    cross_entropy = losses.cross_entropy(z, y, where=x.where)
    teacher_loss = losses.cross_entropy(t / 2, y, where=x.where)
    tckd = losses.dkd(z, t, y, alpha=1, beta=0, **soft)
    nckd = losses.dkd(z, t, y, alpha=0, beta=1, **soft)
    inter = losses.rebalanced_inter_group(z, t, x.groups, **batch)
    intra = losses.uniform_intra_group(z, t, x.groups, **soft)
    intra = jnp.where(x.example_mask, intra, 0)
    return {
        "ltkd is the sum of its parts": (
            losses.ltkd(z, t, x.groups, alpha=0.25, beta=3.0, **batch),
            0.25 * inter + 3 * intra,
        ),
        "TCKD + (1 - p_y) NCKD is KD": (tckd + (1 - jnp.exp(-teacher_loss)) * nckd, kd),
        "power 1: the teacher itself": (losses.dive(z, t, power=1.0, **soft), kd),
        "power 0: a uniform teacher": (
            losses.dive(z, t, power=0.0, **soft),
            losses.kd(z, 0 * t, **soft),
        ),
        "equal weights": (losses.bkd(z, t, jnp.full(C, 3.0), **soft), kd),
        "tau 1": (
            losses.logit_adjusted(z, y, n, tau=1.0, where=x.where),
            losses.balanced_softmax(z, y, n, where=x.where),
        ),
        "tau 0": (
            losses.logit_adjusted(z, y, n, tau=0.0, where=x.where),
            cross_entropy,
        ),
        "equal counts": (
            losses.balanced_softmax(z, y, jnp.full(C, 7), where=x.where),
            cross_entropy,
        ),
    }


@pytest.mark.parametrize("masking", truth.MASKINGS)
def test_identities(masking):
    pairs = identities(draw("random", masking=masking))
    for description, (left, right) in pairs.items():
        assert_allclose(left, right, err_msg=description)


# --- Rebalancing ---

rebalance = jax.jit(losses.rebalance)


def batch_with_sums(sums, size=64):
    """Returns random group masses `[size, G]`: rows sum to 1, columns to `sums`."""
    mass = np.random.default_rng(0).dirichlet(np.ones(len(sums)), size)
    for _ in range(200):
        mass *= np.asarray(sums) / mass.sum(0)
        mass /= mass.sum(1, keepdims=True)
    return mass


def test_rebalance_of_the_published_batch():
    """Batch sums 27.88 / 19.28 / 16.83 of 64: c_G p_G has equal batch sums."""
    published = np.array([27.88, 19.28, 16.83])
    sums = published * 64 / 63.99
    mass = batch_with_sums(sums)
    rebalanced = np.exp(rebalance(np.log(mass)))
    assert_allclose(rebalanced.sum(-1), 1)
    scaled = mass * (64 / 3) / sums
    assert_allclose(rebalanced, scaled / scaled.sum(-1, keepdims=True), rtol=1e-4)
    # From the result alone: before the renormalisation each group was scaled by one
    # number for the whole batch ...
    ratios = rebalanced / mass
    ratios /= ratios[:, :1]
    assert_allclose(ratios, np.broadcast_to(ratios[0], ratios.shape), rtol=1e-4)
    assert_allclose(ratios[0], 27.88 / published, rtol=1e-4)
    # ... and then the groups' sums were equal.
    scaled_sums = (ratios * mass).sum(0)
    assert_allclose(scaled_sums, scaled_sums[0] * np.ones(3), rtol=1e-4)


def test_rebalance_in_closed_form():
    one_example = batch_with_sums([1.0, 4.0, 3.0], 8)[:1]
    rebalanced = np.exp(rebalance(np.log(one_example)))
    assert_allclose(rebalanced, np.full((1, 3), 1 / 3))
    balanced = batch_with_sums([2.0, 2.0, 2.0], 6)
    assert_allclose(np.exp(rebalance(np.log(balanced))), balanced, rtol=1e-4)
    # Two examples share an underflowing group as e : 1, however small its mass is.
    log_mass = np.array([[0.0, -1000.0], [0.0, -1001.0]], np.float32)
    share = np.array([np.e, 1]) / (np.e + 1)
    rebalanced = np.exp(rebalance(log_mass))
    assert_allclose(rebalanced[:, 1], share / (share + 0.5))


def test_rebalance_of_masked_classes():
    """A log mass of −inf marks a group that does not exist, without `where`, too."""
    x = draw("random", grouping="lone", masking="classes")
    log_mass = split(x).teacher_log_mass
    rebalanced = rebalance(log_mass)
    assert np.isneginf(rebalanced[:, 1]).all()
    assert_allclose(rebalanced[:, [0, 2]], rebalance(log_mass[:, [0, 2]]))


def ltkd_of_mass(x, teacher_mass, module=losses):
    loss = dataclasses.replace(FAMILY["ltkd"], options={"teacher_mass": teacher_mass})
    return loss.call(module, x)


@pytest.mark.parametrize("grouping", ["thirds", "lone"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
def test_given_mass(grouping, dtype):
    """Against the reference; masses as small as 1e-300, and the gradient at 1e-30."""
    mass = np.array([1.0, 1e-300, 1e-8])
    traced_mass = np.array([1.0, 1e-30, 1e-8], np.float32)

    def total(student, x, teacher_mass):
        return ltkd_of_mass(x._replace(student=student), teacher_mass).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 2)))
    with jax.enable_x64(dtype == np.float64):
        constant_mass = jax.jit(lambda x: ltkd_of_mass(x, mass))
        for case in ("random", "underflow", "one_hot", "uniform_1e4", "offset_1e4"):
            x = draw(case, grouping=grouping, masking="examples")
            x = x._replace(
                student=jnp.asarray(x.student, dtype),
                teacher=jnp.asarray(x.teacher, dtype),
            )
            expected = ltkd_of_mass(x, mass, module=truth)
            tolerance = 1e-3 if case in truth.EXTREME else 1e-5
            assert_allclose(
                constant_mass(x), expected, rtol=tolerance, atol=1e-4, err_msg=case
            )
            of_student, of_mass = gradients(x.student, x, traced_mass)
            assert np.isfinite(np.asarray(of_student, np.float32)).all()
            assert not of_mass.any()


def test_given_mass_of_the_whole_batch():
    """Each example by itself has the loss and the gradient that it has in the batch."""

    @jax.jit
    def evaluate_batch(x, mass):
        def total(student):
            value = ltkd_of_mass(x._replace(student=student), mass)
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(x.student)
        return value, gradient

    @functools.partial(jax.vmap, in_axes=(BATCH_AXES, None))
    def evaluate_alone(x, mass):
        return evaluate_batch(map_batched(lambda a: a[None], x), mass)

    x = draw("random")
    mass = jnp.exp(split(x).teacher_log_mass).sum(axis=0)
    value, gradient = evaluate_batch(x, None)
    for sums in (mass, 7 * mass / B):
        value_alone, gradient_alone = evaluate_alone(x, sums)
        assert_allclose(value_alone[:, 0], value)
        assert_allclose(gradient_alone[:, 0], gradient)
    # By its own sums, a batch of one has a uniform target.
    assert not np.allclose(evaluate_alone(x, None)[0][:, 0], value, rtol=1e-2)


@pytest.mark.parametrize("mass", [[1.0, 0.0, 2.0], [1, -1, 1], [1, np.nan, 1], [1, 2]])
def test_given_mass_of_wrong_values(mass):
    with pytest.raises((AssertionError, ValueError), match="teacher_mass"):
        ltkd_of_mass(draw("random"), mass)


# --- Eight devices ---


@functools.cache
def batch_of_16():
    """Returns a batch for 8 devices, the fourth of which has padding only."""
    inputs = []
    for seed in range(3):
        inputs.append(draw("random", masking="examples", grouping="lone", seed=seed))
    x = map_batched(lambda *fields: np.concatenate(fields)[:16].copy(), *inputs)
    x.example_mask[6:8] = False
    return x


def batch_losses_and_gradients(x, **options):
    """Returns for each loss with batch statistics `[B, 1 + C]`: values, gradients."""

    def evaluate_one(loss):
        def total(student):
            value = loss.call(losses, x._replace(student=student), **options)
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(x.student)
        return jnp.concatenate([value[:, None], gradient], 1)

    return {name: evaluate_one(loss) for name, loss in BATCH_LOSSES.items()}


def evaluate_on_devices(x, api):
    """Returns `batch_losses_and_gradients`, computed on eight devices."""
    axis_name = "devices"
    on_devices = functools.partial(batch_losses_and_gradients, axis_name=axis_name)
    if api == "pmap":
        shards = map_batched(lambda a: a.reshape((8, 2) + a.shape[1:]), x)
        return jax.pmap(on_devices, axis_name, in_axes=(BATCH_AXES,))(shards)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), (axis_name,), axis_types=(auto,))
    sharded = PartitionSpec(axis_name)
    replicated = PartitionSpec()
    specs = [replicated if axis is None else sharded for axis in BATCH_AXES]
    specs = truth.Inputs(*specs)
    if api == "shard_map":
        mapped = jax.shard_map(
            on_devices, mesh=mesh, in_specs=(specs,), out_specs=sharded, check_vma=False
        )
        return jax.jit(mapped)(x)
    # jit: one global array, so no axis name.
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return jax.jit(batch_losses_and_gradients, in_shardings=(shardings,))(x)


@pytest.mark.parametrize("api", ["pmap", "shard_map", "jit"])
def test_eight_devices_equal_one(api):
    assert jax.device_count() == 8
    x = batch_of_16()
    expected = jax.jit(batch_losses_and_gradients)(x)
    actual = evaluate_on_devices(x, api)
    first_shard = jax.jit(functools.partial(values, family=BATCH_LOSSES))(
        map_batched(lambda a: a[:2], x)
    )
    for name, one_device in expected.items():
        assert_allclose(actual[name].reshape(one_device.shape), one_device)
        # The test would be void if the other devices' examples did not matter.
        assert not np.allclose(first_shard[name], one_device[:2, 0])


# --- Errors ---


WRONG_ARGUMENTS = [
    ("teacher_logits", "teacher", {"teacher": np.zeros((B, C - 1))}),
    ("teacher_logits", "teacher", {"teacher": np.zeros((1, C))}),
    ("labels", "labels", {"labels": np.zeros((B, 1), np.int32)}),
    ("labels", "labels", {"labels": np.zeros(B - 1, np.int32)}),
    ("class_counts", "counts", {"counts": np.ones(C - 1)}),
    ("class_weights", "weights", {"weights": np.ones((C, 1))}),
    ("where", "student", {"where": np.ones((B, C - 1), bool)}),
    ("example_mask", "batch", {"example_mask": np.ones(B - 1, bool)}),
    ("groups", "groups", {"groups": ClassGroups.from_assignment([0, 1, 2] * 3)}),
    ("class_counts", "counts", {"counts": np.arange(C)}),
    ("class_weights", "weights", {"weights": -np.ones(C)}),
]


def takes(loss, field):
    return loss.uses_batch if field == "batch" else field in loss.args.split()


@pytest.mark.parametrize("name, field, change", WRONG_ARGUMENTS)
def test_error_messages(name, field, change):
    x = draw("random")._replace(**change)
    for loss in FAMILY.values():
        if takes(loss, field):
            with pytest.raises((AssertionError, ValueError), match=name):
                loss.call(losses, x)


@pytest.mark.parametrize("label", [-1, C, -C - 1])
def test_labels_out_of_range(label):
    x = draw("random")
    labels = x.labels.copy()
    labels[3] = label
    for loss in LABEL_LOSSES.values():
        for concrete in (labels, jnp.asarray(labels)):
            with pytest.raises(ValueError, match="labels"):
                loss.call(losses, x._replace(labels=concrete))
    traced = evaluate_values(x._replace(labels=labels))
    for name in LABEL_LOSSES:
        np.testing.assert_array_equal(np.isnan(traced[name]), np.arange(B) == 3)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_labels_of_another_type(dtype):
    x = draw("random")
    x = x._replace(labels=x.labels.astype(dtype))
    for loss in LABEL_LOSSES.values():
        with pytest.raises(TypeError, match="labels must be integers, got "):
            loss.call(losses, x)
        with pytest.raises(TypeError, match="labels must be integers, got "):
            jax.jit(loss.call, static_argnums=0)(losses, x)


def test_labels_as_constants_of_a_jitted_function():
    x = draw("random")
    constants = x._replace(labels=jnp.asarray(x.labels))

    @jax.jit
    def values_of_student(student):
        return values(constants._replace(student=student), LABEL_LOSSES)

    assert_close(values_of_student(x.student), evaluate_values(x))


@pytest.mark.parametrize(
    "temperature",
    [-1, 0.0, np.float32(0), jnp.float32(-2), float("nan"), float("inf")],
)
def test_temperature_not_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        losses.kd(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=temperature)


@pytest.mark.parametrize("shape", [(B, 1), (C,)])
def test_several_numbers_for_one(shape):
    """They would broadcast with `[B]`, and a mean of the result would hide it."""
    x = draw("random")
    several = jnp.ones(shape)
    with_several = x._replace(temperature=several)
    for loss in TEACHER_LOSSES.values():
        with pytest.raises(ValueError, match="temperature is of shape"):
            loss.call(losses, with_several)
        with pytest.raises(ValueError, match="temperature is of shape"):
            jax.jit(loss.call, static_argnums=0)(losses, with_several)
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"{name} is of shape"):
            losses.ltkd(x.student, x.teacher, x.groups, **{name: several})
        with pytest.raises(ValueError, match=f"{name} is of shape"):
            losses.dkd(x.student, x.teacher, x.labels, **{name: several})


def test_wrong_types_and_counts():
    zeros = jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="example_mask must be bool, got float32"):
        three_groups = ClassGroups.from_assignment([0, 1, 2])
        losses.ltkd(zeros, zeros, three_groups, example_mask=jnp.array([0.5, 1.0]))
    with pytest.raises(TypeError, match="logits must be real"):
        losses.cross_entropy(zeros + 1j, jnp.array([0, 1]))
    for where in (jnp.full(3, 0.5), jnp.ones(3, int)):
        with pytest.raises(TypeError, match="where must be bool, got .*(3,)"):
            losses.kd(zeros, zeros, where=where)
    with pytest.raises(TypeError, match="got list: make one by ClassGroups"):
        losses.ltkd(zeros, zeros, [0, 1, 2])
    with pytest.raises(ValueError, match="positive and finite"):
        losses.balanced_softmax(zeros, jnp.array([0, 1]), [1.0, 2.0, float("inf")])
    for counts in ([3, 0], [3, -1]):
        with pytest.raises(ValueError, match="class_counts"):
            losses.effective_number_weights(counts)


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_finite_for_large_logits(size):
    student = jnp.array([[size, -size, 0.0]])
    teacher = jnp.array([[-size, size, 0.0]])
    kd = jax.value_and_grad(lambda z: losses.kd(z, teacher).sum())
    value, gradient = jax.jit(kd)(student)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
