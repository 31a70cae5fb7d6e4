"""The training step with learned loss weights, its batches, its sums and its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_net import (
    BATCH,
    CASES,
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
    expected = parameters(on_one_device("one virtual step", STEPS))
    assert_close(parameters(state), expected, rtol=1e-9, atol=1e-9)


def test_train_steps_many_per_call():
    """Inside a compiled loop, the device decides when the weight net is updated."""
    with jax.enable_x64(True):
        state = Training(**CASES["one virtual step"]).run(STEPS, steps_per_call=10)
    assert_as_on_one_device(state)


def test_tables_equal_teacher_in_step():
    """Tables of the training images and of the outer set."""
    with jax.enable_x64(True):
        teacher = teacher_variables(in_double=True)
        train = table(teacher)
        outer = table(teacher, OUTER_IMAGES, OUTER_LABELS)
        training = Training(**CASES["one virtual step"], table=True)
        assert_as_on_one_device(training.run(STEPS, tables=(train, outer)))
        other_outer = outer + 1e-3 * np.arange(CLASSES)
        other_state = training.run(STEPS, tables=(train, other_outer))
    # The comparison can fail.
    with pytest.raises(AssertionError):
        assert_as_on_one_device(other_state)


def test_lookahead_indices_across_epochs():
    options = dict(num_examples=N, batch_size=BATCH, num_views=9)
    windows = np.concatenate(
        [
            sampling.lookahead_indices(3, epoch, lookahead=5, **options).index
            for epoch in range(3)
        ]
    )
    assert windows.shape == (3 * STEPS_PER_EPOCH, BATCH, 5)
    batches = np.concatenate(
        [sampling.epoch_indices(3, epoch, **options).index for epoch in range(5)]
    )
    for step, window in enumerate(windows):
        np.testing.assert_array_equal(window.T, batches[step : step + 5])


def test_outer_indices():
    """Each image is once in ceil(M / B) batches; the epochs are the outer set's own."""
    options = dict(batch_size=BATCH, num_views=9)
    outer = sampling.step_indices(
        sampling.outer_seed(3), 0, num_steps=9, num_examples=NUM_OUTER, **options
    ).index
    per_epoch = sampling.steps_per_epoch(NUM_OUTER, BATCH)
    for start in range(0, len(outer) - per_epoch + 1, per_epoch):
        epoch = np.ravel(outer[start : start + per_epoch])
        assert set(epoch) == set(range(NUM_OUTER))
    train = sampling.epoch_indices(3, 0, num_examples=N, **options).index
    assert not np.array_equal(outer[:2], train[:2] % NUM_OUTER)


def test_learned_sums_by_group():
    learned = on_one_device("one virtual step", STEPS).sums.learned
    # The sums are of the last epoch only.
    assert learned.examples.sum() == (STEPS % STEPS_PER_EPOCH) * BATCH
    mean_weights = learned.weights / learned.examples[:, None]
    scales = np.array([[1.0, 0.5, 2.0]])
    assert mean_weights.shape == (3, 3)
    assert (mean_weights > 0).all()
    assert (mean_weights < scales).all()
    assert learned.features.shape == (3, 2)
    assert (learned.features > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=np.array([0, 1, 1])), "class 2 .1 of 3 classes"),
        (dict(keys=np.array(["a", "t1", "c"])), "'t1' and 0 more"),
    ],
)
def test_bad_outer_set(change, message):
    arguments = dict(
        labels=np.arange(3),
        keys=np.array(["a", "b", "c"]),
        train_keys=np.array(["t1", "t2"]),
        num_classes=3,
    )
    longtail.check_outer(**arguments)
    with pytest.raises(ValueError, match=message):
        longtail.check_outer(**{**arguments, **change})


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


def test_features_and_outer_loss():
    """They are terms of the method, and plain cross-entropy for the balanced set."""
    objective = methods.create("ltkd_bs", COUNTS, GROUPS)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, BATCH, CLASSES)).astype(np.float32)
    predictions = methods.Predictions(student, teacher, jnp.arange(BATCH) % CLASSES)
    terms = objective(predictions)
    features_fn = methods.features(
        objective, ("inter", "student_ce", "balanced_softmax")
    )
    features = features_fn(predictions)
    np.testing.assert_allclose(features[:, 0], terms[:, 1])
    np.testing.assert_allclose(features[:, 2], terms[:, 0])
    hard = methods.outer_loss(objective, "hard")(predictions)
    soft = methods.outer_loss(objective, "soft")(predictions)
    mix = methods.outer_loss(objective, "mix")(predictions)
    np.testing.assert_allclose(hard, features[:, 1])
    np.testing.assert_allclose(soft, terms[:, 1] + terms[:, 2], rtol=1e-6)
    np.testing.assert_allclose(mix, hard + soft, rtol=1e-6)
    with pytest.raises(ValueError, match="'harder' must be one of hard, soft, mix"):
        methods.outer_loss(objective, "harder")
    with pytest.raises(ValueError, match="none of the terms ce distils"):
        methods.outer_loss(methods.create("ce", COUNTS), "mix")


def test_weight_net_formula():
    with jax.enable_x64(True):
        net = models.WeightNet(num_terms=3, hidden=(7, 5))
        features = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
        params = double(net.init(jax.random.key(0), features))["params"]

        def layer(name, x):
            weights = params[name]
            bias = np.asarray(weights["bias"])
            return x @ np.asarray(weights["kernel"]) + bias[None, :]

        hidden = np.tanh(layer("hidden1", np.asarray(features)))
        hidden = np.tanh(layer("hidden2", hidden))
        expected = 1 / (1 + np.exp(-layer("weights", hidden)))
        weights = net.apply({"params": params}, features)
        np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_wrong_number_of_scales():
    learned = weighting(methods.create("ltkd", COUNTS, GROUPS))
    with pytest.raises(ValueError, match="each of the 3 terms"):
        dataclasses.replace(learned, scales=(1.0,))
