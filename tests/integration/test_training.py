"""The step: against NumPy, many in one call, with the teacher in the step and in its table."""

import functools

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
    assert_close(
        parameters(state), parameters(on_one_device("ltkd", 20)), rtol=1e-9, atol=1e-9
    )


def test_many_steps_in_one_call():
    with jax.enable_x64(True):
        state = Training("ltkd").run(20, steps_per_call=10)
    assert_as_on_one_device(state)


def test_table_is_the_teacher_in_the_step():
    """And the comparison can fail: one logit changed by 1e-3 shows."""
    with jax.enable_x64(True):
        logits = table(teacher_variables(in_double=True))
        training = Training("ltkd", table=True)
        assert_as_on_one_device(training.run(20, tables=(logits, None)))
        logits[:, :, 0] += 1e-3
        other = training.run(20, tables=(logits, None))
    with pytest.raises(AssertionError):
        assert_as_on_one_device(other)


def test_table_of_a_convolutional_teacher():
    """1,000 random views, to 1e-5."""
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), np.uint8)
    num_views = COLOUR["views"].num
    model = models.create("resnet8", CLASSES)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    data = steps.TrainData(jnp.asarray(images), jnp.zeros(6, jnp.int32), variables)
    make_batch = functools.partial(
        steps.make_batch, teacher_fn=steps.network_teacher(model), **COLOUR
    )
    logits_fn = jax.jit(lambda indices: make_batch(data, indices).teacher.logits)
    out = np.full((6, num_views, CLASSES), np.nan, np.float32)
    done = []
    teacher_table.build(logits_fn, out, batch_size=250, on_batch=done.append)
    assert done[-1] == 6 * num_views and np.isfinite(out).all()
    rng = np.random.default_rng(2)
    index, view = rng.integers(0, 6, (4, 250)), rng.integers(0, num_views, (4, 250))
    for i in range(4):
        indices = sampling.BatchIndices(jnp.asarray(index[i]), jnp.asarray(view[i]))
        looked_up = steps.table_teacher(jnp.asarray(out), indices, None).logits
        np.testing.assert_allclose(looked_up, logits_fn(indices), rtol=1e-5, atol=1e-5)
    assert (
        np.ptp(out, axis=1).max() > 0.01
    )  # the views differ, so a wrong view would show


def test_table_batches():
    batches = teacher_table.batches(5, 3, 4)
    pairs = [
        (i, v) for _, indices in batches for i, v in zip(indices.index, indices.view)
    ]
    assert pairs[:15] == [(i, v) for i in range(5) for v in range(3)] and pairs[
        15:
    ] == [(4, 2)]


def flops(teacher_fn, teacher):
    """Returns the compiler's count for a step of KD on CIFAR-100."""
    objective, model = (
        methods.create("kd", np.ones(100)),
        models.create("resnet8x4", 100),
    )
    state = jax.eval_shape(
        lambda: states.create(model, optimizer(), len(objective.terms), (32, 32, 3), 0)
    )
    images, labels = (
        jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1000,), jnp.int32),
    )
    indices = sampling.BatchIndices(*[jax.ShapeDtypeStruct((64,), jnp.int32)] * 2)

    def step(state, data, indices):
        batch = steps.make_batch(data, indices, teacher_fn=teacher_fn, **COLOUR)
        return steps.train_step(
            state, batch, model=model, objective=objective, optimizer=optimizer()
        )

    lowered = jax.jit(step).lower(
        state, steps.TrainData(images, labels, teacher), indices
    )
    return lowered.cost_analysis()["flops"]


def test_table_takes_the_teacher_out_of_the_step():
    """ResNet32x4 → ResNet8x4: with the table at most 0.36 of the FLOPs."""
    teacher = models.create("resnet32x4", 100)
    variables = jax.eval_shape(
        lambda: teacher.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    looked_up = flops(
        steps.table_teacher, jax.ShapeDtypeStruct((1000, 162, 100), jnp.float32)
    )
    assert looked_up / flops(steps.network_teacher(teacher), variables) <= 0.36


def test_sgd_is_pytorchs():
    """Against a loop in NumPy, in float64: buffer = m · buffer + (g + wd · p); p −= lr · buffer."""
    with jax.enable_x64(True):
        target = np.random.default_rng(0).normal(size=7)
        schedule = states.step_schedule(
            0.1, total_steps=10, milestones=(0.3, 0.6), decay=0.1
        )
        sgd = states.sgd(schedule, momentum=0.9, weight_decay=0.01)
        params = jnp.zeros(7)
        opt_state = sgd.init(params)
        p, buffer = np.zeros(7), np.zeros(7)
        for step in range(10):
            updates, opt_state = sgd.update(params - target, opt_state, params)
            params = optax.apply_updates(params, updates)
            buffer = 0.9 * buffer + (p - target + 0.01 * p)
            p = p - 0.1 * 0.1 ** ((step >= 3) + (step >= 6)) * buffer
        # optax keeps its schedule in float32
        np.testing.assert_allclose(params, p, rtol=1e-6)


def test_schedule_with_equal_milestones():
    schedule = states.step_schedule(
        1.0, total_steps=4, milestones=(0.5, 0.51), decay=0.1
    )
    assert float(schedule(1)) == 1.0 and float(schedule(2)) == pytest.approx(0.01)


def test_first_step_that_is_not_finite():
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
    good = steps.Batch(
        preprocess(jnp.asarray(IMAGES[:BATCH])), jnp.asarray(LABELS[:BATCH])
    )
    bad = good._replace(images=good.images.at[0, 0, 0, 0].set(jnp.nan))
    for batch in (good, good, bad, good):
        state = step(state, batch)
    assert state.sums.bad_terms.tolist() == [True]
    assert (
        int(state.sums.bad_step) == 2
        and int(state.sums.steps) == 4
        and not np.isfinite(state.sums.terms).any()
    )


def test_parallel_bad_input():
    with pytest.raises(ValueError, match="batch_size=20 .* 8 devices"):
        Parallel("jit").local_positions(20)
    with pytest.raises(ValueError, match="parallel='ddp'"):
        Parallel("ddp")
