"""The step with learned weights: many in one call, by table and by network, its batches, its sums, its bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_net import (
    BATCH,
    CLASSES,
    COUNTS,
    GROUPS,
    NUM_OUTER,
    OUTER_IMAGES,
    OUTER_LABELS,
    STEPS_PER_EPOCH,
    N,
    Training,
    assert_close,
    double,
    on_one_device,
    parameters,
    table,
    teacher_variables,
    weighting,
)

from ltkd_jax import methods, models
from ltkd_jax.data import longtail, sampling

STEPS = 20


def assert_as_on_one_device(state):
    assert_close(
        parameters(state),
        parameters(on_one_device("one virtual step", STEPS)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_many_steps_in_one_call():
    """Whether the weight net is updated is then decided on the device, inside a compiled loop."""
    with jax.enable_x64(True):
        state = Training("ltkd", lookahead=1).run(STEPS, steps_per_call=10)
    assert_as_on_one_device(state)


def test_tables_are_the_teacher_in_the_step():
    """Of the training images and of the outer set; and the comparison can fail."""
    with jax.enable_x64(True):
        teacher = teacher_variables(in_double=True)
        train, outer = table(teacher), table(teacher, OUTER_IMAGES, OUTER_LABELS)
        training = Training("ltkd", lookahead=1, table=True)
        assert_as_on_one_device(training.run(STEPS, tables=(train, outer)))
        other = training.run(STEPS, tables=(train, outer + 1e-3 * np.arange(CLASSES)))
    with pytest.raises(AssertionError):
        assert_as_on_one_device(other)


def test_lookahead_over_the_end_of_an_epoch():
    options = dict(num_examples=N, batch_size=BATCH, num_views=9)
    windows = [
        sampling.lookahead_indices(3, epoch, lookahead=5, **options).index
        for epoch in range(3)
    ]
    windows = np.concatenate(windows)
    assert windows.shape == (3 * STEPS_PER_EPOCH, BATCH, 5)
    batches = np.concatenate(
        [sampling.epoch_indices(3, epoch, **options).index for epoch in range(5)]
    )
    for step, window in enumerate(windows):
        np.testing.assert_array_equal(window.T, batches[step : step + 5])


def test_outer_batches_are_a_sequence_of_their_own():
    """Every image is in each ceil(M / B) of them; their epochs do not end with the training set's."""
    options = dict(batch_size=BATCH, num_views=9)
    outer = sampling.step_indices(
        sampling.outer_seed(3), 0, num_steps=9, num_examples=NUM_OUTER, **options
    ).index
    per_epoch = sampling.steps_per_epoch(NUM_OUTER, BATCH)
    for start in range(0, len(outer) - per_epoch + 1, per_epoch):
        assert set(np.ravel(outer[start : start + per_epoch])) == set(range(NUM_OUTER))
    train = sampling.epoch_indices(3, 0, num_examples=N, **options).index
    assert not np.array_equal(outer[:2], train[:2] % NUM_OUTER)


def test_learned_weights_are_summed_by_group():
    learned = on_one_device("one virtual step", STEPS).sums.learned
    assert (
        learned.examples.sum() == (STEPS % STEPS_PER_EPOCH) * BATCH
    )  # of the last epoch
    mean = learned.weights / learned.examples[:, None]
    assert (
        mean.shape == (3, 3)
        and ((mean > 0) & (mean < np.array([[1.0, 0.5, 2.0]]))).all()
    )  # below the scales
    assert learned.features.shape == (3, 2) and (learned.features > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=np.array([0, 1, 1])), "class 2 .1 of 3 classes"),
        (dict(keys=np.array(["a", "t1", "c"])), "'t1' and 0 more"),
        (dict(batch_size=4), "3 images, .* batch of 4: raise data.outer_per_class"),
    ],
)
def test_bad_outer_set(change, message):
    good = dict(labels=np.arange(3), keys=np.array(["a", "b", "c"]), train_keys=np.array(["t1", "t2"]),
                num_classes=3, batch_size=3)  # fmt: skip
    longtail.check_outer(**good)
    with pytest.raises(ValueError, match=message):
        longtail.check_outer(**{**good, **change})


@pytest.mark.parametrize(
    "method, names, message",
    [
        (
            "ce",
            ("student_ce", "teacher_ce"),
            "'teacher_ce': .* student_ce, ce .there is no teacher",
        ),
        ("kd", ("inter",), "'inter': .* student_ce, teacher_ce, ce, kd"),
        ("kd", (), "at least one of"),
        ("kd", ("ce", "ce"), "each once"),
        ("kd", "ce", "features 'ce': give a tuple"),
    ],
)
def test_bad_features(method, names, message):
    with pytest.raises(ValueError, match=message):
        methods.features(methods.create(method, COUNTS), names)


def test_features_and_outer_losses_are_the_terms():
    objective = methods.create("ltkd_bs", COUNTS, GROUPS)
    student, teacher = (
        np.random.default_rng(0).normal(size=(2, BATCH, CLASSES)).astype(np.float32)
    )
    predictions = methods.Predictions(student, teacher, jnp.arange(BATCH) % CLASSES)
    terms = objective(predictions)
    features = methods.features(objective, ("inter", "student_ce", "balanced_softmax"))(
        predictions
    )
    np.testing.assert_allclose(features[:, 0], terms[:, 1])
    np.testing.assert_allclose(features[:, 2], terms[:, 0])
    hard, soft, mix = (
        methods.outer_loss(objective, kind)(predictions)
        for kind in ("hard", "soft", "mix")
    )
    np.testing.assert_allclose(
        hard, features[:, 1]
    )  # plain cross-entropy, on a balanced set
    np.testing.assert_allclose(soft, terms[:, 1] + terms[:, 2], rtol=1e-6)
    np.testing.assert_allclose(mix, hard + soft, rtol=1e-6)
    with pytest.raises(ValueError, match="'harder' must be one of hard, soft, mix"):
        methods.outer_loss(objective, "harder")
    with pytest.raises(ValueError, match="none of the terms ce distils"):
        methods.outer_loss(methods.create("ce", COUNTS), "mix")


def test_weight_net_is_the_formula():
    with jax.enable_x64(True):
        net = models.WeightNet(num_terms=3, hidden=(7, 5))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
        params = double(net.init(jax.random.key(0), x))["params"]
        expected = np.asarray(x)
        for name in ("hidden1", "hidden2", "weights"):
            expected = (
                expected @ np.asarray(params[name]["kernel"])
                + np.asarray(params[name]["bias"])[None, :]
            )
            expected = (
                np.tanh(expected) if name != "weights" else 1 / (1 + np.exp(-expected))
            )
        np.testing.assert_allclose(
            net.apply({"params": params}, x), expected, rtol=1e-12
        )


def test_scales_of_another_number_than_terms():
    with pytest.raises(ValueError, match="each of the 3 terms"):
        dataclasses.replace(
            weighting(methods.create("ltkd", COUNTS, GROUPS)), scales=(1.0,)
        )
