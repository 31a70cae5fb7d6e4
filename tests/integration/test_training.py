"""The training step: optimizer, several steps a call, the teacher and its table."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.small_net import (
    BATCH,
    CLASSES,
    COUNTS,
    IMAGES,
    LABELS,
    SHAPE,
    SmallNet,
    Training,
    assert_close,
    on_one_device,
    optimizer,
    parameters,
    preprocess,
    table,
    teacher_variables,
)

from ltkd_jax import methods, models
from ltkd_jax.data import augment, sampling
from ltkd_jax.training import state as states
from ltkd_jax.training import steps, teacher_table
from ltkd_jax.training.parallel import Parallel

COLOUR = dict(
    views=augment.Views(4, True),
    preprocess=lambda x: augment.normalize(x, (0.5,) * 3, (0.25,) * 3),
)


def assert_as_on_one_device(state):
    expected = parameters(on_one_device("ltkd", 20))
    assert_close(parameters(state), expected, rtol=1e-9, atol=1e-9)


def test_train_steps_many_per_call():
    with jax.enable_x64(True):
        state = Training("ltkd").run(20, steps_per_call=10)
    assert_as_on_one_device(state)


def test_table_equals_teacher_in_step():
    with jax.enable_x64(True):
        logits = table(teacher_variables(in_double=True))
        training = Training("ltkd", table=True)
        assert_as_on_one_device(training.run(20, tables=(logits, None)))
        logits[:, :, 0] += 1e-3
        other_state = training.run(20, tables=(logits, None))
    # The comparison can fail: a change of one logit shows.
    with pytest.raises(AssertionError):
        assert_as_on_one_device(other_state)


def test_table_of_convolutional_teacher():
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), np.uint8)
    num_views = COLOUR["views"].num
    model = models.create("resnet8", CLASSES)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    data = steps.TrainData(jnp.asarray(images), jnp.zeros(6, jnp.int32), variables)
    make_batch = functools.partial(
        steps.make_batch, teacher_fn=steps.network_teacher(model), **COLOUR
    )
    logits_fn = jax.jit(lambda indices: make_batch(data, indices).teacher.logits)
    logits = np.full((6, num_views, CLASSES), np.nan, np.float32)
    num_done = []
    teacher_table.build(logits_fn, logits, batch_size=250, on_batch=num_done.append)
    assert num_done[-1] == 6 * num_views
    assert np.isfinite(logits).all()

    rng = np.random.default_rng(2)
    index = rng.integers(0, 6, (4, 250))
    view = rng.integers(0, num_views, (4, 250))
    for i in range(4):
        indices = sampling.BatchIndices(jnp.asarray(index[i]), jnp.asarray(view[i]))
        outputs = steps.table_teacher(jnp.asarray(logits), indices, None)
        np.testing.assert_allclose(
            outputs.logits, logits_fn(indices), rtol=1e-5, atol=1e-5
        )
    # The views differ, so a wrong view would show.
    assert np.ptp(logits, axis=1).max() > 0.01


def test_table_batches():
    pairs = []
    for _, indices in teacher_table.batches(5, 3, 4):
        pairs += zip(indices.index.tolist(), indices.view.tolist())
    assert pairs[:15] == list(itertools.product(range(5), range(3)))
    assert pairs[15:] == [(4, 2)]


def count_flops(teacher_fn, teacher):
    """Returns the compiler's count for a step of KD on CIFAR-100."""
    objective = methods.create("kd", np.ones(100))
    model = models.create("resnet8x4", 100)
    num_terms = len(objective.terms)
    state = jax.eval_shape(
        lambda: states.create(model, optimizer(), num_terms, (32, 32, 3), 0)
    )
    images = jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((1000,), jnp.int32)
    data = steps.TrainData(images, labels, teacher)
    indices = sampling.BatchIndices(
        index=jax.ShapeDtypeStruct((64,), jnp.int32),
        view=jax.ShapeDtypeStruct((64,), jnp.int32),
    )

    @jax.jit
    def step(state, data, indices):
        batch = steps.make_batch(data, indices, teacher_fn=teacher_fn, **COLOUR)
        return steps.train_step(
            state, batch, model=model, objective=objective, optimizer=optimizer()
        )

    return step.lower(state, data, indices).cost_analysis()["flops"]


def test_table_saves_flops():
    """ResNet32x4 → ResNet8x4: with the table at most 0.36 of the FLOPs."""
    teacher = models.create("resnet32x4", 100)
    variables = jax.eval_shape(
        lambda: teacher.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    logits = jax.ShapeDtypeStruct((1000, 162, 100), jnp.float32)
    with_table = count_flops(steps.table_teacher, logits)
    with_network = count_flops(steps.network_teacher(teacher), variables)
    assert with_table / with_network <= 0.36


def test_sgd_as_in_pytorch():
    """Against a loop in NumPy, in float64."""
    with jax.enable_x64(True):
        target = np.random.default_rng(0).normal(size=7)
        schedule = states.step_schedule(
            0.1, total_steps=10, milestones=(0.3, 0.6), decay=0.1
        )
        sgd = states.sgd(schedule, momentum=0.9, weight_decay=0.01)
        params = jnp.zeros(7)
        opt_state = sgd.init(params)
        expected = np.zeros(7)
        buffer = np.zeros(7)
        for step in range(10):
            updates, opt_state = sgd.update(params - target, opt_state, params)
            params = optax.apply_updates(params, updates)
            # PyTorch's rule; the weight decay is in the gradient.
            buffer = 0.9 * buffer + (expected - target + 0.01 * expected)
            num_decays = (step >= 3) + (step >= 6)
            expected = expected - 0.1 * 0.1**num_decays * buffer
        # optax keeps its schedule in float32.
        np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_step_schedule_equal_milestones():
    schedule = states.step_schedule(
        1.0, total_steps=4, milestones=(0.5, 0.51), decay=0.1
    )
    assert float(schedule(1)) == 1.0
    assert float(schedule(2)) == pytest.approx(0.01)


def test_step_schedule_warmup():
    schedule = states.step_schedule(
        1.0, total_steps=8, milestones=(0.5,), decay=0.1, warmup_steps=4
    )
    rates = [float(schedule(step)) for step in range(8)]
    expected = [0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_first_nonfinite_step():
    objective = methods.create("ce", COUNTS)
    state = states.create(SmallNet(), optimizer(), 1, SHAPE, 0)
    step = jax.jit(
        functools.partial(
            steps.train_step,
            model=SmallNet(),
            objective=objective,
            optimizer=optimizer(),
        )
    )
    images = preprocess(jnp.asarray(IMAGES[:BATCH]))
    good = steps.Batch(images, jnp.asarray(LABELS[:BATCH]))
    bad = good._replace(images=images.at[0, 0, 0, 0].set(jnp.nan))
    for batch in (good, good, bad, good):
        state = step(state, batch)
    assert state.sums.bad_terms.tolist() == [True]
    assert int(state.sums.bad_step) == 2
    assert int(state.sums.steps) == 4
    assert not np.isfinite(state.sums.terms).any()


def test_parallel_bad_input():
    with pytest.raises(ValueError, match="batch_size=20 .* 8 devices"):
        Parallel("jit").local_positions(20)
    with pytest.raises(ValueError, match="parallel='ddp'"):
        Parallel("ddp")
