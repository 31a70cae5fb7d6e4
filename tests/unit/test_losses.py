"""The contract of the losses: one body over the whole family, the identities between its members, many devices."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import truth
from helpers.truth import BATCHED, FAMILY, B, C, draw
from jax.sharding import NamedSharding, PartitionSpec

from ltkd_jax import losses
from ltkd_jax.groups import ClassGroups


def family(keep=lambda loss: True):
    return pytest.mark.parametrize("loss", [loss for loss in FAMILY.values() if keep(loss)], ids=lambda loss: loss.name)


every_loss = family()
batch_losses = family(lambda loss: loss.batch)
label_losses = family(lambda loss: "labels" in loss.args)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def jitted(name):
    return jax.jit(lambda x: FAMILY[name].call(losses, x))


def by_student(loss, x):
    """The sum of the losses as a function of the student's logits."""
    return lambda student: loss.call(losses, x._replace(student=student)).sum()


def map_batched(function, *inputs):
    """Applies `function` to the fields that have a batch axis; the first input's others stay."""
    return truth.Inputs(*(f[0] if axis is None else function(*f) for axis, *f in zip(BATCHED, *inputs)))


# --- One body for the whole family --------------------------------------------------------------


@every_loss
def test_contract(loss):
    x = draw("random", masking="examples")
    out = loss.call(losses, x)
    assert out.shape == (B,) and out.dtype == jnp.float32
    assert np.isfinite(out).all() and (np.asarray(out) >= -1e-5).all()
    close(jitted(loss.name)(x), out, err_msg="jit, all of it traced, groups included")

    # Lower precision: the loss of the same values in float32.
    low = {f: jnp.asarray(getattr(x, f), jnp.bfloat16) for f in ("student", "teacher")}
    out_low = jitted(loss.name)(x._replace(**low))
    assert out_low.dtype == jnp.float32
    close(out_low, jitted(loss.name)(x._replace(**{f: a.astype(jnp.float32) for f, a in low.items()})), rtol=1e-6)

    # A matmul's precision would depend on a global setting.
    assert "dot_general" not in str(jax.make_jaxpr(lambda x: loss.call(losses, x))(x))


@every_loss
def test_vmap(loss):
    inputs = [draw("random", masking="examples", seed=seed) for seed in (1, 2)]
    mapped = jax.jit(jax.vmap(lambda x: loss.call(losses, x), in_axes=(BATCHED,)))
    out = mapped(map_batched(lambda *a: np.stack(a), *inputs))
    for got, x in zip(out, inputs, strict=True):
        close(got, jitted(loss.name)(x))


@every_loss
def test_forward_mode_is_reverse_mode(loss):
    x = draw("random", masking="examples")
    v = np.random.default_rng(1).normal(size=(B, C)).astype(np.float32)
    gradient, tangent = jax.jit(
        lambda z, v: (jax.grad(by_student(loss, x))(z), jax.jvp(by_student(loss, x), (z,), (v,))[1])
    )(x.student, v)
    close(tangent, np.vdot(gradient, v), rtol=1e-4)


@every_loss
def test_gradient_of_the_gradient(loss):
    """Against central differences of the gradient, ties included; finite at the extremes."""
    v, step = np.random.default_rng(1).normal(size=(B, C)), 1e-5

    @jax.jit
    def second(x):
        def slope(z):
            gradient = jax.grad(by_student(loss, x))(z)
            return jnp.sum(gradient * v), gradient

        return jax.grad(slope, has_aux=True)(x.student)

    with jax.enable_x64(True):
        for case in ("random", "tied", "one_hot", "wide", "uniform_1e4"):
            x = draw(case, masking="examples", dtype=np.float64)
            actual = second(x)[0]
            assert np.isfinite(actual).all(), case
            if case in ("random", "tied", "one_hot") and not loss.held:  # a held factor moves in the differences
                up, down = (second(x._replace(student=x.student + s * v))[1] for s in (step, -step))
                close(actual, (up - down) / (2 * step), rtol=1e-6, atol=1e-7, err_msg=case)


@pytest.mark.parametrize("grouping", ["thirds", "each"])
def test_one_matrix_of_groups_is_a_mask_for_each_example(grouping):
    """On CPU the former is products and a loop, the latter masked reductions, as on other devices."""
    loss = FAMILY["ltkd"]
    v = np.random.default_rng(1).normal(size=(B, C))

    @jax.jit
    def all_of_it(x):
        value, tangent = jax.jvp(by_student(loss, x), (x.student,), (v.astype(x.student.dtype),))
        gradient, second = jax.jvp(jax.grad(by_student(loss, x)), (x.student,), (v.astype(x.student.dtype),))
        by_temperature = jax.grad(lambda t: loss.call(losses, x._replace(temperature=t)).sum())(x.temperature)
        return value, tangent, gradient, second, by_temperature

    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        with jax.enable_x64(dtype is np.float64):
            for case in ("random", "tied", "wide", "underflow", "uniform_1e4"):
                masked = draw(case, grouping=grouping, dtype=dtype)
                pairs = zip(all_of_it(masked._replace(where=None)), all_of_it(masked))
                for actual, expected in pairs:
                    scale = max(1.0, np.abs(expected).max())
                    assert np.isfinite(actual).all(), case
                    np.testing.assert_allclose(actual / scale, expected / scale, atol=tolerance, rtol=0, err_msg=case)


@family(lambda loss: loss.teacher)
def test_no_gradient_into_the_teacher(loss):
    x = draw("random", masking="examples")

    def by_teacher(z):
        return loss.call(losses, x._replace(teacher=z)).sum()

    assert (jax.jit(jax.grad(by_teacher))(x.teacher) == 0).all()
    assert jax.jit(lambda z: jax.jvp(by_teacher, (z,), (z,))[1])(x.teacher) == 0


@family(lambda loss: not loss.batch)
def test_any_leading_shape(loss):
    x = draw("random", masking="examples")
    flat = jitted(loss.name)(x)
    square = jitted(loss.name)(map_batched(lambda a: a.reshape((2, 3) + a.shape[1:]), x))
    assert square.shape == (2, 3)
    close(square.ravel(), flat)
    single = jitted(loss.name)(map_batched(lambda a: a[4], x))
    assert single.shape == ()
    close(single, flat[4])


@every_loss
def test_where_broadcasts(loss):
    x = draw("random")
    close(jitted(loss.name)(x._replace(where=None)), jitted(loss.name)(x), err_msg="None is all")
    x = draw("random", masking="classes")
    close(jitted(loss.name)(x._replace(where=x.where[0])), jitted(loss.name)(x))


@every_loss
@pytest.mark.parametrize("grouping", ["thirds", "lone"])
def test_masked_classes_are_as_good_as_absent(loss, grouping):
    x = draw("random", masking="classes", grouping=grouping)
    keep = x.where[0]
    left = np.asarray(x.groups.assignment)[keep]
    absent = x._replace(
        student=x.student[:, keep],
        teacher=x.teacher[:, keep],
        labels=(np.cumsum(keep) - 1)[x.labels].astype(np.int32),
        where=x.where[:, keep],
        counts=x.counts[keep],
        weights=x.weights[keep],
        # A group without classes is gone: the 'lone' one is.
        groups=ClassGroups.from_assignment(np.unique(left, return_inverse=True)[1]),
    )
    expected = jitted(loss.name)(absent)
    close(jitted(loss.name)(x), expected)
    noise = np.where(keep, 0, np.array([1e4, -1e4])[np.arange(C) % 2]).astype(np.float32)
    close(jitted(loss.name)(x._replace(student=x.student + noise, teacher=x.teacher - noise)), expected)


@batch_losses
def test_masked_examples_are_as_good_as_absent(loss):
    x = draw("random", masking="examples")
    keep = x.example_mask
    out = jitted(loss.name)(x)
    assert (out[~keep] == 0).all() and out[keep].any()
    close(out[keep], jitted(loss.name)(map_batched(lambda a: a[keep], x)))
    close(jitted(loss.name)(draw("random")._replace(example_mask=None)), jitted(loss.name)(draw("random")))
    assert not np.allclose(out[keep], jitted(loss.name)(x._replace(example_mask=np.ones(B, bool)))[keep])


@every_loss
def test_shift_invariance(loss):
    """Numbers that float32 holds exactly with and without the offset, so that the losses must agree."""
    x = draw("random", masking="examples")
    x = x._replace(**{f: np.round(getattr(x, f) * 64) / 64 for f in ("student", "teacher")})
    offset = np.array([-4096, -64, 0, 1, 64, 4096], np.float32)[:, None]
    shifted = x._replace(student=x.student + offset, teacher=x.teacher - 2 * offset)
    close(jitted(loss.name)(shifted), jitted(loss.name)(x), rtol=2e-6, atol=2e-6)


@every_loss
@pytest.mark.parametrize("case", [*truth.CASES, *truth.EXTREME])
def test_nonnegative_and_zero_at_equality(loss, case):
    for masking in truth.MASKINGS:
        x = draw(case, masking=masking)
        assert (np.asarray(jitted(loss.name)(x)) >= -2e-5 * loss.terms).all()
        if loss.is_kl:
            np.testing.assert_array_equal(jitted(loss.name)(x._replace(student=x.teacher)), np.zeros(B))


@family(lambda loss: loss.options)
def test_traced_options(loss):
    x = draw("random")
    traced = jax.jit(lambda options: dataclasses.replace(loss, options=options).call(losses, x))(loss.options)
    close(traced, jitted(loss.name)(x))


@pytest.mark.parametrize("name", sorted({loss.function or loss.name for loss in FAMILY.values()} | {"rebalance"}))
def test_signature(name):
    """The names, order, kinds and defaults of the contract, which the truth has too; the rest is optional."""
    expected = dict(inspect.signature(getattr(truth, name)).parameters)
    expected.pop("held_logits", None)
    actual = inspect.signature(getattr(losses, name)).parameters
    actual = {key: parameter.replace(annotation=parameter.empty) for key, parameter in actual.items()}
    if name in ("rebalance", "rebalanced_inter_group", "ltkd"):
        assert actual.pop("axis_name").default is None
    assert actual == expected


# --- Identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", truth.GROUPINGS)
@pytest.mark.parametrize("masking", truth.MASKINGS)
@pytest.mark.parametrize("case", ["random", "underflow", "wide"])
def test_split_is_the_whole(grouping, masking, case):
    x = draw(case, grouping=grouping, masking=masking, temperature=2.0)
    inter, intra, log_mass = jitted_split(x)
    assert intra.shape == log_mass.shape == (B, x.groups.num_groups)
    exists = np.stack([x.where[:, np.asarray(x.groups.assignment) == g].any(-1) for g in range(x.groups.num_groups)], 1)
    np.testing.assert_array_equal(np.isneginf(log_mass), ~exists)
    assert (intra[~exists] == 0).all()
    close(np.exp(log_mass).sum(-1), 1)
    close(4 * (inter + (np.exp(log_mass) * intra).sum(-1)), jitted("kd")(x))
    close(4 * intra.sum(-1), jitted("uniform_intra_group")(x))
    if grouping == "one":
        assert (np.asarray(inter) == 0).all()
    if grouping == "each":
        assert (np.asarray(intra) == 0).all()


@jax.jit
def jitted_split(x):
    return losses.group_kl(x.student, x.teacher, x.groups, temperature=x.temperature, where=x.where)


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
    intra = jnp.where(x.example_mask, losses.uniform_intra_group(z, t, x.groups, **soft), 0)
    return {
        "ltkd is the sum of its parts": (
            losses.ltkd(z, t, x.groups, alpha=0.25, beta=3.0, **batch),
            0.25 * inter + 3 * intra,
        ),
        "TCKD + (1 - p_y) NCKD is KD": (tckd + (1 - jnp.exp(-hard_teacher)) * nckd, kd),
        "the teacher's own power": (losses.dive(z, t, power=1.0, **soft), kd),
        "power 0: a uniform teacher": (losses.dive(z, t, power=0.0, **soft), losses.kd(z, 0 * t, **soft)),
        "equal weights": (losses.bkd(z, t, jnp.full(C, 3.0), **soft), kd),
        "tau 1": (
            losses.logit_adjusted(z, y, n, tau=1.0, where=x.where),
            losses.balanced_softmax(z, y, n, where=x.where),
        ),
        "tau 0": (losses.logit_adjusted(z, y, n, tau=0.0, where=x.where), cross_entropy),
        "equal counts": (losses.balanced_softmax(z, y, jnp.full(C, 7), where=x.where), cross_entropy),
    }


@pytest.mark.parametrize("masking", truth.MASKINGS)
def test_identities(masking):
    for what, (left, right) in identities(draw("random", masking=masking)).items():
        close(left, right, err_msg=what)


def test_cross_entropy_of_known_numbers():
    close(losses.cross_entropy(np.log([[0.2, 0.5, 0.3]]), np.array([1])), [np.log(2)])
    close(losses.balanced_softmax(np.zeros((1, 2)), np.array([1]), [3, 1]), [np.log(4)])


# --- Rebalancing --------------------------------------------------------------------------------


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
    rebalanced = np.exp(losses.rebalance(np.log(mass)))
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
    close(np.exp(losses.rebalance(np.log(mass[:1]))), np.full((1, 3), 1 / 3), err_msg="one example")
    even = batch_with_sums([2.0, 2.0, 2.0], 6)
    close(np.exp(losses.rebalance(np.log(even))), even, rtol=1e-4, err_msg="nothing to do")
    # An underflowing group: its two examples share it as e : 1, whatever its size.
    log_mass = np.array([[0.0, -1000.0], [0.0, -1001.0]], np.float32)
    share = np.array([np.e, 1]) / (np.e + 1)
    close(np.exp(losses.rebalance(log_mass))[:, 1], share / (share + 0.5))


def test_rebalance_takes_the_split_of_masked_classes():
    """A group that does not exist has a log mass of -inf, also where `where` is not given."""
    x = draw("random", grouping="lone", masking="classes")
    log_mass = jitted_split(x).teacher_log_mass
    out = losses.rebalance(log_mass)
    assert np.isneginf(out[:, 1]).all()
    close(out[:, [0, 2]], losses.rebalance(log_mass[:, [0, 2]]))


# --- Eight devices ------------------------------------------------------------------------------


@functools.cache
def sixteen():
    """A batch of 16 over 8 devices, the fourth of which holds padding only."""
    parts = [draw("random", masking="examples", grouping="lone", seed=seed) for seed in range(3)]
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

    return {loss.name: one(loss) for loss in FAMILY.values() if loss.batch}


@pytest.mark.parametrize("how", ["pmap", "shard_map", "jit"])
def test_eight_devices_are_one(how):
    assert jax.device_count() == 8
    x = sixteen()
    expected = jax.jit(batch_losses_and_gradients)(x)
    on_devices = functools.partial(batch_losses_and_gradients, axis_name="devices")
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = truth.Inputs(*(PartitionSpec() if axis is None else PartitionSpec("devices") for axis in BATCHED))
    if how == "pmap":
        split = map_batched(lambda a: a.reshape((8, 2) + a.shape[1:]), x)
        actual = jax.pmap(on_devices, "devices", in_axes=(BATCHED,))(split)
    elif how == "shard_map":
        out_specs = PartitionSpec("devices")
        actual = jax.jit(jax.shard_map(on_devices, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False))(
            x
        )
    else:  # one global array: no axis name
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        actual = jax.jit(batch_losses_and_gradients, in_shardings=(shardings,))(x)
    for name, one_device in expected.items():
        close(actual[name].reshape(one_device.shape), one_device)
        alone = jitted(name)(map_batched(lambda a: a[:2], x))
        assert not np.allclose(alone, one_device[:2, 0]), "the other devices' examples must matter"


def test_rebalance_on_eight_devices():
    log_mass = np.log(batch_with_sums([9.0, 5.0, 2.0], 16)).astype(np.float32)
    example_mask = np.arange(16) % 5 > 0
    actual = jax.pmap(lambda m, e: losses.rebalance(m, example_mask=e, axis_name="d"), "d")(
        log_mass.reshape(8, 2, 3), example_mask.reshape(8, 2)
    )
    close(actual.reshape(16, 3), losses.rebalance(log_mass, example_mask=example_mask))


# --- Errors -------------------------------------------------------------------------------------


WRONG_SHAPES = [
    ("teacher_logits", "teacher", {"teacher": np.zeros((B, C - 1))}),
    ("teacher_logits", "teacher", {"teacher": np.zeros((1, C))}),
    ("labels", "labels", {"labels": np.zeros((B, 1), np.int32)}),
    ("labels", "labels", {"labels": np.zeros(B - 1, np.int32)}),
    ("class_counts", "counts", {"counts": np.ones(C - 1)}),
    ("class_weights", "weights", {"weights": np.ones((C, 1))}),
    ("where", "student", {"where": np.ones((B, C - 1), bool)}),
    ("example_mask", "batch", {"example_mask": np.ones(B - 1, bool)}),
    ("groups", "groups", {"groups": ClassGroups.from_assignment([0, 1, 2] * 3)}),
]
NOT_POSITIVE = [
    ("class_counts", "counts", {"counts": np.arange(C)}),
    ("class_weights", "weights", {"weights": -np.ones(C)}),
]


def takes(loss, field):
    return loss.batch if field == "batch" else field in loss.args.split()


@pytest.mark.parametrize(
    "loss, name, fields",
    [
        pytest.param(loss, name, fields, id=f"{loss.name}-{name}")
        for name, field, fields in WRONG_SHAPES + NOT_POSITIVE
        for loss in FAMILY.values()
        if takes(loss, field)
    ],
)
def test_errors_name_the_argument(loss, name, fields):
    with pytest.raises((AssertionError, ValueError), match=name):
        loss.call(losses, draw("random")._replace(**fields))


@label_losses
@pytest.mark.parametrize("label", [-1, C, -C - 1])
def test_labels_out_of_range(loss, label):
    x = draw("random")
    labels = x.labels.copy()
    labels[3] = label
    for concrete in (labels, jnp.asarray(labels)):
        with pytest.raises(ValueError, match="labels"):
            loss.call(losses, x._replace(labels=concrete))
    out = jitted(loss.name)(x._replace(labels=labels))
    np.testing.assert_array_equal(np.isnan(out), np.arange(B) == 3)


@label_losses
def test_labels_may_be_constants_of_a_jitted_function(loss):
    x = draw("random")
    x = x._replace(labels=jnp.asarray(x.labels))
    close(jax.jit(lambda z: loss.call(losses, x._replace(student=z)))(x.student), jitted(loss.name)(x))


@pytest.mark.parametrize("counts", [[3, 0], [3, -1]])
def test_effective_number_weights_refuses(counts):
    with pytest.raises(ValueError, match="class_counts"):
        losses.effective_number_weights(counts)


@pytest.mark.parametrize("temperature", [-1, 0.0, np.float32(-1), np.float32(0), jnp.float32(-2), float("nan")])
def test_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        losses.kd(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=temperature)


def test_what_is_no_logit_or_no_mask():
    zeros = jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="logits must be real"):
        losses.cross_entropy(zeros + 1j, jnp.array([0, 1]))
    with pytest.raises(AssertionError, match="bool"):
        losses.kd(zeros, zeros, where=jnp.full(3, 0.5))
    with pytest.raises(ValueError, match="positive and finite"):
        losses.balanced_softmax(zeros, jnp.array([0, 1]), [1.0, 2.0, float("inf")])


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_finite_for_large_logits(size):
    student, teacher = jnp.array([[size, -size, 0.0]]), jnp.array([[-size, size, 0.0]])
    value, gradient = jax.value_and_grad(lambda z: losses.kd(z, teacher).sum())(student)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
