"""The contract of the losses: one body over the whole family, the identities between its members, many devices."""

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
    assert_close,
    by_student,
    close,
    evaluate,
    evaluated,
    select,
    values,
)
from helpers.truth import BATCHED, FAMILY, B, C, draw
from jax.sharding import NamedSharding, PartitionSpec

from ltkd_jax import losses
from ltkd_jax.groups import ClassGroups

BATCH_LOSSES = select(lambda loss: loss.batch)
EXAMPLE_LOSSES = select(lambda loss: not loss.batch)
LABEL_LOSSES = select(lambda loss: "labels" in loss.args)
TEACHER_LOSSES = select(lambda loss: loss.teacher)


def map_batched(function, *inputs):
    """Applies `function` to the fields that have a batch axis; the first input's others stay."""
    return truth.Inputs(
        *(f[0] if axis is None else function(*f) for axis, *f in zip(BATCHED, *inputs))
    )


# --- One body for the whole family --------------------------------------------------------------


def test_contract():
    x = draw("random", masking="examples")
    eager = values(x)
    assert all(out.shape == (B,) and out.dtype == jnp.float32 for out in eager.values())
    assert_close(evaluated(x), eager)  # jit, all of it traced, groups included
    # A matmul's precision would depend on a global setting.
    assert "dot_general" not in str(jax.make_jaxpr(values)(x))


def test_bfloat16():
    """The loss of the same values in float32."""
    x = draw("random", masking="examples")
    low = x._replace(
        student=jnp.asarray(x.student, jnp.bfloat16),
        teacher=jnp.asarray(x.teacher, jnp.bfloat16),
    )
    out = jax.jit(values)(low)
    assert all(value.dtype == jnp.float32 for value in out.values())
    same = x._replace(
        student=low.student.astype(jnp.float32), teacher=low.teacher.astype(jnp.float32)
    )
    assert_close(out, evaluated(same), rtol=1e-6)


def test_vmap():
    inputs = [draw("random", masking="examples", seed=seed) for seed in (1, 2)]
    mapped = jax.jit(jax.vmap(values, in_axes=(BATCHED,)))(
        map_batched(lambda *a: np.stack(a), *inputs)
    )
    for number, x in enumerate(inputs):
        assert_close({name: out[number] for name, out in mapped.items()}, evaluated(x))


def test_forward_mode():
    x = draw("random", masking="examples")
    direction = np.random.default_rng(1).normal(size=(B, C)).astype(np.float32)

    @jax.jit
    def tangents(z, v):
        return {
            name: jax.jvp(by_student(loss, x), (z,), (v,))[1]
            for name, loss in FAMILY.items()
        }

    expected = {
        name: np.vdot(gradient, direction)
        for name, (_, gradient) in evaluate(x).items()
    }
    assert_close(tangents(x.student, direction), expected, rtol=1e-4)


def test_second_derivative():
    """Against central differences of the gradient, ties included; finite at the extremes."""
    direction, step = np.random.default_rng(1).normal(size=(B, C)), 1e-5

    @jax.jit
    def second(x):
        def one(loss):
            return jax.grad(
                lambda z: jnp.sum(jax.grad(by_student(loss, x))(z) * direction)
            )(x.student)

        return {name: one(loss) for name, loss in FAMILY.items()}

    with jax.enable_x64(True):
        for case in ("random", "tied", "one_hot", "wide", "uniform_1e4"):
            x = draw(case, masking="examples", dtype=np.float64)
            actual = second(x)
            up, down = (
                evaluate(x._replace(student=x.student + s * direction))
                for s in (step, -step)
            )
            for name, loss in FAMILY.items():
                assert np.isfinite(actual[name]).all(), (name, case)
                # A held factor moves in the differences.
                if case in ("random", "tied", "one_hot") and not loss.held:
                    expected = (up[name][1] - down[name][1]) / (2 * step)
                    close(
                        actual[name],
                        expected,
                        rtol=1e-6,
                        atol=1e-7,
                        err_msg=f"{name} {case}",
                    )


@pytest.mark.parametrize("grouping", ["thirds", "each"])
def test_groups_of_all_or_of_each_example(grouping):
    """On CPU the former is products and a loop, the latter masked reductions, as on other devices."""
    loss = FAMILY["ltkd"]
    v = np.random.default_rng(1).normal(size=(B, C))

    @jax.jit
    def all_of_it(x):
        value, tangent = jax.jvp(
            by_student(loss, x), (x.student,), (v.astype(x.student.dtype),)
        )
        gradient, second = jax.jvp(
            jax.grad(by_student(loss, x)), (x.student,), (v.astype(x.student.dtype),)
        )
        by_temperature = jax.grad(
            lambda t: loss.call(losses, x._replace(temperature=t)).sum()
        )(x.temperature)
        return value, tangent, gradient, second, by_temperature

    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        with jax.enable_x64(dtype is np.float64):
            for case in ("random", "tied", "wide", "underflow", "uniform_1e4"):
                masked = draw(case, grouping=grouping, dtype=dtype)
                pairs = zip(all_of_it(masked._replace(where=None)), all_of_it(masked))
                for actual, expected in pairs:
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
        def one(loss):
            total = lambda z: loss.call(losses, x._replace(teacher=z)).sum()
            return jax.grad(total)(teacher), jax.jvp(total, (teacher,), (teacher,))[1]

        return {name: one(loss) for name, loss in TEACHER_LOSSES.items()}

    for name, (gradient, tangent) in derivatives(x.teacher).items():
        assert (gradient == 0).all() and tangent == 0, name


def test_any_leading_shape():
    x = draw("random", masking="examples")
    flat = evaluated(x)
    by_example = jax.jit(functools.partial(values, family=EXAMPLE_LOSSES))
    square = by_example(map_batched(lambda a: a.reshape((2, 3) + a.shape[1:]), x))
    single = by_example(map_batched(lambda a: a[4], x))
    for name in EXAMPLE_LOSSES:
        assert square[name].shape == (2, 3) and single[name].shape == (), name
        close(square[name].ravel(), flat[name], err_msg=name)
        close(single[name], flat[name][4], err_msg=name)


def test_other_examples_matter():
    """Through the batch's statistics, unless they are masked."""
    x = draw("random", masking="examples")
    keep = x.example_mask
    masked, unmasked = (
        evaluated(x),
        evaluated(x._replace(example_mask=np.ones(B, bool))),
    )
    for name in BATCH_LOSSES:
        assert masked[name][keep].any() and not np.allclose(
            masked[name][keep], unmasked[name][keep]
        ), name


def test_masks_none_and_broadcast():
    x = draw("random")
    assert_close(
        jax.jit(values)(x._replace(where=None, example_mask=None)), evaluated(x)
    )
    x = draw("random", masking="classes")
    assert_close(jax.jit(values)(x._replace(where=x.where[0])), evaluated(x))


@pytest.mark.parametrize("grouping", ["thirds", "lone"])
def test_masked_logits_do_not_matter(grouping):
    x = draw("random", masking="classes", grouping=grouping)
    noise = np.where(x.where, 0, np.array([1e4, -1e4])[np.arange(C) % 2]).astype(
        np.float32
    )
    assert_close(
        evaluated(x._replace(student=x.student + noise, teacher=x.teacher - noise)),
        evaluated(x),
    )


def test_shift_invariance():
    """Numbers that float32 holds exactly with and without the offset, so that the losses must agree."""
    x = draw("random", masking="examples")
    x = x._replace(
        student=np.round(x.student * 64) / 64, teacher=np.round(x.teacher * 64) / 64
    )
    offset = np.array([-4096, -64, 0, 1, 64, 4096], np.float32)[:, None]
    shifted = x._replace(student=x.student + offset, teacher=x.teacher - 2 * offset)
    assert_close(evaluated(shifted), evaluated(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_nonnegative_and_zero_at_equality(case):
    for masking in truth.MASKINGS:
        x = draw(case, masking=masking)
        at_equality = evaluated(x._replace(student=x.teacher))
        for name, out in evaluated(x).items():
            assert (np.asarray(out) >= -2e-5 * FAMILY[name].terms).all(), (
                name,
                masking,
            )
            assert not FAMILY[name].is_kl or (at_equality[name] == 0).all(), (
                name,
                masking,
            )


def test_traced_options():
    x = draw("random")
    options = {name: loss.options for name, loss in FAMILY.items() if loss.options}

    @jax.jit
    def traced(options):
        return values(
            x,
            {
                name: dataclasses.replace(FAMILY[name], options=options[name])
                for name in options
            },
        )

    assert_close(traced(options), evaluated(x))


@pytest.mark.parametrize(
    "name",
    sorted({loss.function or loss.name for loss in FAMILY.values()} | {"rebalance"}),
)
def test_signature(name):
    """The names, order, kinds and defaults of the contract, which the truth has too; the rest is optional."""
    expected = dict(inspect.signature(getattr(truth, name)).parameters)
    expected.pop("held_logits", None)
    actual = inspect.signature(getattr(losses, name)).parameters
    actual = {
        key: parameter.replace(annotation=parameter.empty)
        for key, parameter in actual.items()
    }
    if name in ("rebalance", "rebalanced_inter_group", "ltkd"):
        assert actual.pop("axis_name").default is None
    assert actual == expected


# --- Identities ---------------------------------------------------------------------------------


@jax.jit
def split(x):
    return losses.group_kl(
        x.student, x.teacher, x.groups, temperature=x.temperature, where=x.where
    )


@pytest.mark.parametrize("grouping", truth.GROUPINGS)
def test_split_is_the_whole(grouping):
    for masking, case in itertools.product(
        truth.MASKINGS, ("random", "underflow", "wide")
    ):
        x = draw(case, grouping=grouping, masking=masking, temperature=2.0)
        inter, intra, log_mass = split(x)
        assert intra.shape == log_mass.shape == (B, x.groups.num_groups)
        members = [
            np.asarray(x.groups.assignment) == group
            for group in range(x.groups.num_groups)
        ]
        exists = np.stack([x.where[:, member].any(-1) for member in members], 1)
        np.testing.assert_array_equal(np.isneginf(log_mass), ~exists)
        assert (intra[~exists] == 0).all()
        close(np.exp(log_mass).sum(-1), 1)
        whole = evaluated(x)
        close(4 * (inter + (np.exp(log_mass) * intra).sum(-1)), whole["kd"])
        close(4 * intra.sum(-1), whole["uniform_intra_group"])
        if grouping == "one":
            assert (np.asarray(inter) == 0).all()
        if grouping == "each":
            assert (np.asarray(intra) == 0).all()


@jax.jit
def identities(x):
    """Pairs that must be equal, by what they say."""
    z, t, y, n = x.student, x.teacher, x.labels, x.counts
    batch = dict(temperature=2.0, where=x.where, example_mask=x.example_mask)
    soft = dict(temperature=2.0, where=x.where)
    kd = losses.kd(z, t, **soft)
    cross_entropy = losses.cross_entropy(z, y, where=x.where)
    hard_teacher = losses.cross_entropy(t / 2, y, where=x.where)
    tckd, nckd = (losses.dkd(z, t, y, alpha=a, beta=1 - a, **soft) for a in (1, 0))
    inter = losses.rebalanced_inter_group(z, t, x.groups, **batch)
    intra = jnp.where(
        x.example_mask, losses.uniform_intra_group(z, t, x.groups, **soft), 0
    )
    return {
        "ltkd is the sum of its parts": (
            losses.ltkd(z, t, x.groups, alpha=0.25, beta=3.0, **batch),
            0.25 * inter + 3 * intra,
        ),
        "TCKD + (1 - p_y) NCKD is KD": (tckd + (1 - jnp.exp(-hard_teacher)) * nckd, kd),
        "the teacher's own power": (losses.dive(z, t, power=1.0, **soft), kd),
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
    for what, (left, right) in identities(draw("random", masking=masking)).items():
        close(left, right, err_msg=what)


# --- Rebalancing --------------------------------------------------------------------------------

rebalance = jax.jit(losses.rebalance)


def batch_with_sums(sums, size=64):
    """Random group masses `[size, G]` whose rows sum to 1 and whose columns sum to `sums`."""
    mass = np.random.default_rng(0).dirichlet(np.ones(len(sums)), size)
    for _ in range(200):
        mass *= np.asarray(sums) / mass.sum(0)
        mass /= mass.sum(1, keepdims=True)
    return mass


def test_rebalance_of_the_published_batch():
    """Batch sums 27.88 / 19.28 / 16.83 of 64: c_G = mean / sum, and c_G p_G has equal batch sums."""
    sums = np.array([27.88, 19.28, 16.83]) * 64 / 63.99
    mass = batch_with_sums(sums)
    rebalanced = np.exp(rebalance(np.log(mass)))
    close(rebalanced.sum(-1), 1)
    scaled = mass * (64 / 3) / sums
    close(rebalanced, scaled / scaled.sum(-1, keepdims=True), rtol=1e-4)
    # From the result alone: before the renormalisation each group was scaled by one number for the whole batch ...
    ratios = rebalanced / mass
    ratios /= ratios[:, :1]
    close(ratios, np.broadcast_to(ratios[0], ratios.shape), rtol=1e-4)
    close(ratios[0], 27.88 / np.array([27.88, 19.28, 16.83]), rtol=1e-4)
    # ... after which the groups' sums were equal.
    after = (ratios * mass).sum(0)
    close(after, after[0] * np.ones(3), rtol=1e-4)


def test_rebalance_in_closed_form():
    mass = batch_with_sums([1.0, 4.0, 3.0], 8)
    close(
        np.exp(rebalance(np.log(mass[:1]))),
        np.full((1, 3), 1 / 3),
        err_msg="one example",
    )
    even = batch_with_sums([2.0, 2.0, 2.0], 6)
    close(np.exp(rebalance(np.log(even))), even, rtol=1e-4, err_msg="nothing to do")
    # An underflowing group: its two examples share it as e : 1, whatever its size.
    log_mass = np.array([[0.0, -1000.0], [0.0, -1001.0]], np.float32)
    share = np.array([np.e, 1]) / (np.e + 1)
    close(np.exp(rebalance(log_mass))[:, 1], share / (share + 0.5))


def test_rebalance_takes_the_split_of_masked_classes():
    """A group that does not exist has a log mass of -inf, also where `where` is not given."""
    x = draw("random", grouping="lone", masking="classes")
    log_mass = split(x).teacher_log_mass
    out = rebalance(log_mass)
    assert np.isneginf(out[:, 1]).all()
    close(out[:, [0, 2]], rebalance(log_mass[:, [0, 2]]))


# --- Eight devices ------------------------------------------------------------------------------


@functools.cache
def sixteen():
    """A batch of 16 over 8 devices, the fourth of which holds padding only."""
    parts = [
        draw("random", masking="examples", grouping="lone", seed=seed)
        for seed in range(3)
    ]
    x = map_batched(lambda *a: np.concatenate(a)[:16].copy(), *parts)
    x.example_mask[6:8] = False
    return x


def batch_losses_and_gradients(x, **more):
    """For each loss with batch statistics [B, 1 + C]: the values and, beside them, the gradients."""

    def one(loss):
        def total(student):
            out = loss.call(losses, x._replace(student=student), **more)
            return out.sum(), out

        gradient, out = jax.grad(total, has_aux=True)(x.student)
        return jnp.concatenate([out[:, None], gradient], 1)

    return {name: one(loss) for name, loss in BATCH_LOSSES.items()}


@pytest.mark.parametrize("how", ["pmap", "shard_map", "jit"])
def test_eight_devices_are_one(how):
    assert jax.device_count() == 8
    x = sixteen()
    expected = jax.jit(batch_losses_and_gradients)(x)
    on_devices = functools.partial(batch_losses_and_gradients, axis_name="devices")
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = truth.Inputs(
        *(
            PartitionSpec() if axis is None else PartitionSpec("devices")
            for axis in BATCHED
        )
    )
    if how == "pmap":
        split = map_batched(lambda a: a.reshape((8, 2) + a.shape[1:]), x)
        actual = jax.pmap(on_devices, "devices", in_axes=(BATCHED,))(split)
    elif how == "shard_map":
        sharding = dict(
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec("devices"),
            check_vma=False,
        )
        actual = jax.jit(jax.shard_map(on_devices, **sharding))(x)
    else:  # one global array: no axis name
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        actual = jax.jit(batch_losses_and_gradients, in_shardings=(shardings,))(x)
    alone = jax.jit(functools.partial(values, family=BATCH_LOSSES))(
        map_batched(lambda a: a[:2], x)
    )
    for name, one_device in expected.items():
        close(actual[name].reshape(one_device.shape), one_device)
        assert not np.allclose(alone[name], one_device[:2, 0]), (
            "the other devices' examples must matter"
        )


# --- Errors -------------------------------------------------------------------------------------


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
    return loss.batch if field == "batch" else field in loss.args.split()


@pytest.mark.parametrize("name, field, change", WRONG_ARGUMENTS)
def test_errors_name_the_argument(name, field, change):
    for loss in FAMILY.values():
        if takes(loss, field):
            with pytest.raises((AssertionError, ValueError), match=name):
                loss.call(losses, draw("random")._replace(**change))


@pytest.mark.parametrize("label", [-1, C, -C - 1])
def test_labels_out_of_range(label):
    x = draw("random")
    labels = x.labels.copy()
    labels[3] = label
    for loss in LABEL_LOSSES.values():
        for concrete in (labels, jnp.asarray(labels)):
            with pytest.raises(ValueError, match="labels"):
                loss.call(losses, x._replace(labels=concrete))
    out = evaluated(x._replace(labels=labels))
    for name in LABEL_LOSSES:
        np.testing.assert_array_equal(np.isnan(out[name]), np.arange(B) == 3)


def test_labels_as_constants_of_a_jitted_function():
    x = draw("random")
    constants = x._replace(labels=jnp.asarray(x.labels))
    out = jax.jit(lambda z: values(constants._replace(student=z), LABEL_LOSSES))(
        x.student
    )
    assert_close(out, evaluated(x))


@pytest.mark.parametrize(
    "temperature",
    [-1, 0.0, np.float32(-1), np.float32(0), jnp.float32(-2), float("nan")],
)
def test_temperature_not_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        losses.kd(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=temperature)


def test_wrong_types_and_counts():
    zeros = jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="logits must be real"):
        losses.cross_entropy(zeros + 1j, jnp.array([0, 1]))
    with pytest.raises(AssertionError, match="bool"):
        losses.kd(zeros, zeros, where=jnp.full(3, 0.5))
    with pytest.raises(ValueError, match="positive and finite"):
        losses.balanced_softmax(zeros, jnp.array([0, 1]), [1.0, 2.0, float("inf")])
    for counts in ([3, 0], [3, -1]):
        with pytest.raises(ValueError, match="class_counts"):
            losses.effective_number_weights(counts)


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_finite_for_large_logits(size):
    student, teacher = jnp.array([[size, -size, 0.0]]), jnp.array([[-size, size, 0.0]])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda z: losses.kd(z, teacher).sum())
    )(student)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
