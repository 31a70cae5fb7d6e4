"""The step with learned weights: many in one call, by table and by network, its rows, its sums, its bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_net import (
    BATCH,
    CLASSES,
    COUNTS,
    GROUPS,
    META,
    META_IMAGES,
    META_LABELS,
    VIEWS,
    N,
    SmallNet,
    assert_close,
    double,
    parameters,
    table,
    teacher_variables,
    train,
    weighting,
)

from ltkd_jax import bilevel, methods, models
from ltkd_jax.data import longtail
from ltkd_jax.data import sampling as plans
from ltkd_jax.training import bilevel_steps, steps
from ltkd_jax.training.parallel import Parallel

STEPS = 20


@pytest.fixture(scope="module")
def one_device():
    """What a single device computes, and the teacher in it."""
    with jax.enable_x64(True):
        teacher = jax.device_get(double(teacher_variables()))
        one = Parallel("jit", jax.devices()[:1])
        return train("ltkd", one, ahead=1, teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher), teacher


def test_the_outer_gradient_must_be_averaged_before_the_product(one_device, monkeypatch):
    """Averaged after it only, as every hypergradient is, the same comparison fails."""
    expected, teacher = one_device

    def local(problem, params, outer_batch):
        loss, gradient = jax.value_and_grad(problem.outer_fn)(params, outer_batch)
        return jax.lax.pmean(loss, problem.axis_name), gradient

    monkeypatch.setattr(bilevel, "_outer_gradient", local)
    with jax.enable_x64(True):
        got = train("ltkd", Parallel("pmap"), ahead=1, teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher)
    with pytest.raises(AssertionError):
        assert_close(got.meta.params, expected.meta.params, rtol=1e-3, atol=1e-3)


def test_many_steps_in_one_call_are_the_same_steps(one_device):
    """Where the change of the weight net is decided on the device, inside a compiled loop."""
    expected, teacher = one_device
    with jax.enable_x64(True):
        one = Parallel("jit", jax.devices()[:1])
        network = steps.network_teacher(SmallNet())
        got = train("ltkd", one, ahead=1, teacher_fn=network, teacher=teacher, per_call=10)
    assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)


def test_the_tables_are_the_teacher_in_the_step(one_device):
    """Of the training images and of the meta images."""
    expected, teacher = one_device
    with jax.enable_x64(True):
        tables = table(teacher), table(teacher, META_IMAGES, META_LABELS)
        one = Parallel("jit", jax.devices()[:1])
        got = train("ltkd", one, ahead=1, teacher_fn=steps.table_teacher, teacher=tables[0], meta_teacher=tables[1])
        assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)
        off = train(
            "ltkd",
            one,
            ahead=1,
            teacher_fn=steps.table_teacher,
            teacher=tables[0],
            meta_teacher=tables[1] + 1e-3 * np.arange(CLASSES),
        )
    with pytest.raises(AssertionError):
        assert_close(parameters(off), parameters(expected), rtol=1e-9, atol=1e-9)


def test_rows_look_ahead_over_the_end_of_an_epoch():
    sizes = dict(num_train=N, num_meta=META, batch_size=BATCH, num_views=VIEWS.num)
    spe = plans.steps_per_epoch(N, BATCH)
    epoch_rows = jax.jit(functools.partial(bilevel_steps.rows, ahead=5, **sizes))
    rows = [epoch_rows(3, epoch) for epoch in range(3)]
    train_rows, meta_rows = (np.concatenate([getattr(r, part).index for r in rows]) for part in ("train", "meta"))
    assert train_rows.shape == (3 * spe, BATCH, 5) and meta_rows.shape == (3 * spe, BATCH)
    stream = np.concatenate(
        [plans.epoch_plan(3, e, num_examples=N, batch_size=BATCH, num_views=9).index for e in range(5)]
    )
    for step in range(3 * spe):
        np.testing.assert_array_equal(train_rows[step].T, stream[step : step + 5])
    # Every meta image is seen in each ceil(M / B) batches of its own stream, which runs on over the epochs.
    per_epoch = plans.steps_per_epoch(META, BATCH)
    for start in range(0, len(meta_rows) - per_epoch + 1, per_epoch):
        assert set(meta_rows[start : start + per_epoch].ravel()) == set(range(META))
    assert not np.array_equal(meta_rows[:2] % META, train_rows[:2, :, 0] % META)


def test_what_was_learned_is_summed_by_group(one_device):
    expected, _ = one_device
    learned = expected.sums.learned
    last_epoch = STEPS % plans.steps_per_epoch(N, BATCH) or plans.steps_per_epoch(N, BATCH)
    assert learned.examples.sum() == last_epoch * BATCH
    mean = learned.weights / learned.examples[:, None]
    assert mean.shape == (3, 3) and ((mean > 0) & (mean < np.array([[1.0, 0.5, 2.0]]))).all()  # below the scales
    assert learned.features.shape == (3, 2) and (learned.features > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=np.array([0, 1, 1])), "no image of class 2 .1 of 3 classes"),
        (dict(keys=np.array(["a", "t1", "c"])), "overlaps the training set: 't1' and 0 more"),
        (dict(batch_size=4), "3 images, fewer than a batch of 4: raise data.meta_per_class"),
    ],
)
def test_a_bad_meta_set(change, message):
    good = dict(labels=np.arange(3), keys=np.array(["a", "b", "c"]), train_keys=np.array(["t1", "t2"]),
                num_classes=3, batch_size=3)  # fmt: skip
    longtail.check_meta(**good)
    with pytest.raises(ValueError, match=message):
        longtail.check_meta(**{**good, **change})


@pytest.mark.parametrize(
    "method, names, message",
    [
        (
            "ce",
            ("student_ce", "teacher_ce"),
            "feature 'teacher_ce': these terms have student_ce, ce .there is no teacher",
        ),
        ("kd", ("inter",), "feature 'inter': these terms have student_ce, teacher_ce, ce, kd"),
        ("kd", (), "at least one of"),
        ("kd", ("ce", "ce"), "each once"),
        ("kd", "ce", "features 'ce': give a tuple"),
    ],
)
def test_features_that_an_objective_does_not_have(method, names, message):
    with pytest.raises(ValueError, match=message):
        methods.features(methods.create(method, COUNTS), names)


def test_features_and_outer_losses_are_the_terms():
    objective = methods.create("ltkd_bs", COUNTS, GROUPS)
    rng = np.random.default_rng(0)
    z, t = (jnp.asarray(rng.normal(size=(BATCH, CLASSES)), jnp.float32) for _ in range(2))
    predictions = methods.Predictions(z, t, jnp.arange(BATCH) % CLASSES)
    terms = objective(predictions)
    features = methods.features(objective, ("inter", "student_ce", "balanced_softmax"))(predictions)
    np.testing.assert_allclose(features[:, 0], terms[:, 1])
    np.testing.assert_allclose(features[:, 2], terms[:, 0])
    hard, soft, mix = (methods.outer_loss(objective, kind)(predictions) for kind in ("hard", "soft", "mix"))
    np.testing.assert_allclose(hard, features[:, 1])  # plain cross-entropy, on a balanced set
    np.testing.assert_allclose(soft, terms[:, 1] + terms[:, 2], rtol=1e-6)
    np.testing.assert_allclose(mix, hard + soft, rtol=1e-6)
    with pytest.raises(ValueError, match="'harder' must be one of hard, soft, mix"):
        methods.outer_loss(objective, "harder")
    with pytest.raises(ValueError, match="none of the terms ce distils"):
        methods.outer_loss(methods.create("ce", COUNTS), "mix")


def test_the_weight_net_in_float64_is_the_formula():
    with jax.enable_x64(True):
        net = models.WeightNet(num_terms=3, hidden=(7, 5))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
        params = double(net.init(jax.random.key(0), x))["params"]
        want = np.asarray(x)
        for name in ("hidden1", "hidden2"):
            want = np.tanh(want @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])[None, :])
        want = want @ np.asarray(params["weights"]["kernel"]) + np.asarray(params["weights"]["bias"])[None, :]
        np.testing.assert_allclose(net.apply({"params": params}, x), 1 / (1 + np.exp(-want)), rtol=1e-12)


def test_scales_of_another_number_than_terms():
    objective = methods.create("ltkd", COUNTS, GROUPS)
    with pytest.raises(ValueError, match="one for each of the 3 terms"):
        dataclasses.replace(weighting(objective), scales=(1.0,))
