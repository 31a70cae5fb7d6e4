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
    assert_close,
    double,
    optimizer,
    parameters,
    preprocess,
    table,
    teacher_variables,
    train,
)

from ltkd_jax import methods, models
from ltkd_jax.data import augment
from ltkd_jax.data import sampling as plans
from ltkd_jax.training import state as states
from ltkd_jax.training import steps, teacher_table
from ltkd_jax.training.parallel import Parallel


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        teacher = jax.device_get(double(teacher_variables()))
        one = Parallel("jit", jax.devices()[:1])
        return train("ltkd", one, teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher), teacher


def test_many_steps_in_one_call_are_the_same_steps(one_device):
    expected, teacher = one_device
    with jax.enable_x64(True):
        parallel = Parallel("jit", jax.devices()[:1])
        got = train("ltkd", parallel, teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher, per_call=10)
    assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)


def test_the_table_is_the_teacher_in_the_step(one_device):
    expected, teacher = one_device
    with jax.enable_x64(True):
        looked_up = table(teacher)
        parallel = Parallel("jit", jax.devices()[:1])
        got = train("ltkd", parallel, teacher_fn=steps.table_teacher, teacher=looked_up)
    assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)


def test_a_table_of_another_teacher_is_noticed(one_device):
    """The comparison above can fail: one logit changed by 1e-3 shows."""
    expected, teacher = one_device
    with jax.enable_x64(True):
        looked_up = table(teacher)
        looked_up[:, :, 0] += 1e-3
        got = train("ltkd", Parallel("jit", jax.devices()[:1]), teacher_fn=steps.table_teacher, teacher=looked_up)
    with pytest.raises(AssertionError):
        assert_close(parameters(got), parameters(expected), rtol=1e-9, atol=1e-9)


def test_looked_up_logits_are_the_teachers():
    """A convolutional teacher, 1,000 random views, to 1e-5."""
    views = augment.Views(pad=4, flip=True)
    images = np.random.default_rng(1).integers(0, 256, (12, 16, 16, 3), np.uint8)
    model = models.create("resnet8", CLASSES)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    fetch = functools.partial(
        steps.fetch,
        views=views,
        preprocess=lambda x: augment.normalize(x, (0.5,) * 3, (0.25,) * 3),
        teacher_fn=steps.network_teacher(model),
    )
    data = steps.TrainData(jnp.asarray(images), jnp.zeros(12, jnp.int32), variables)
    logits = jax.jit(lambda rows: fetch(data, rows).teacher_logits)
    out = np.full((12, views.num, CLASSES), np.nan, np.float32)
    done = []
    teacher_table.build(logits, out, batch_size=250, on_batch=done.append)
    assert done[-1] == 12 * views.num and np.isfinite(out).all()
    rng = np.random.default_rng(2)
    index, view = rng.integers(0, 12, 1000), rng.integers(0, views.num, 1000)
    for start in range(0, 1000, 250):
        rows = plans.Plan(jnp.asarray(index[start : start + 250]), jnp.asarray(view[start : start + 250]))
        direct = logits(rows)
        looked_up = steps.table_teacher(jnp.asarray(out), rows, None).logits
        np.testing.assert_allclose(looked_up, direct, rtol=1e-5, atol=1e-5)
    assert np.ptp(out, axis=1).max() > 0.01  # the views differ, so a wrong view would show


def test_the_table_pays_by_its_rule():
    assert teacher_table.pays(162, epochs=240, runs=1) and teacher_table.pays(162, epochs=60, runs=3)
    assert not teacher_table.pays(162, epochs=60, runs=2)
    pairs = [(i, v) for _, plan in teacher_table.batches(5, 3, 4) for i, v in zip(plan.index, plan.view)]
    assert pairs[:15] == [(i, v) for i in range(5) for v in range(3)] and pairs[15:] == [(4, 2)]


def flops(method, student, teacher_fn, teacher):
    objective = methods.create(method, np.ones(100), warmup_steps=0)
    model, tx = models.create(student, 100), optimizer()
    state = jax.eval_shape(lambda: states.create(model, tx, len(objective.terms), (32, 32, 3), 0))
    data = steps.TrainData(
        jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.uint8), jax.ShapeDtypeStruct((1000,), jnp.int32), teacher
    )
    rows = plans.Plan(*[jax.ShapeDtypeStruct((1, 64), jnp.int32)] * 2)
    step = functools.partial(steps.train_step, model=model, objective=objective, optimizer=tx)
    fetch = functools.partial(
        steps.fetch,
        views=augment.Views(4, True),
        preprocess=lambda x: augment.normalize(x, (0.5,) * 3, (0.25,) * 3),
        teacher_fn=teacher_fn,
    )
    chunk = functools.partial(steps.train_chunk, steps_per_epoch=10, fetch_fn=fetch, step_fn=step)
    return jax.jit(chunk).lower(state, data, rows).cost_analysis()["flops"]


def test_the_table_takes_the_teacher_out_of_the_step():
    """ResNet32x4 → ResNet8x4: with the table at most 0.36 of the FLOPs, by the compiler's count."""
    teacher = models.create("resnet32x4", 100)
    variables = jax.eval_shape(lambda: teacher.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    looked_up = flops("kd", "resnet8x4", steps.table_teacher, jax.ShapeDtypeStruct((1000, 162, 100), jnp.float32))
    in_step = flops("kd", "resnet8x4", steps.network_teacher(teacher), variables)
    assert looked_up / in_step <= 0.36


def test_a_step_is_sgd_with_momentum_and_l2_as_pytorch_has_it():
    """Against a loop in NumPy, in float64: buffer = m · buffer + (g + wd · p); p −= lr · buffer."""
    with jax.enable_x64(True):
        target = np.random.default_rng(0).normal(size=7)
        schedule = states.step_schedule(0.1, total_steps=10, milestones=(0.3, 0.6), decay=0.1)
        tx = states.sgd(schedule, momentum=0.9, weight_decay=0.01)
        params = jnp.zeros(7)
        opt_state = tx.init(params)
        p, buffer = np.zeros(7), np.zeros(7)
        for step in range(10):
            updates, opt_state = tx.update(params - target, opt_state, params)
            params = optax.apply_updates(params, updates)
            buffer = 0.9 * buffer + (p - target + 0.01 * p)
            p = p - 0.1 * 0.1 ** ((step >= 3) + (step >= 6)) * buffer
        # optax keeps its schedule in float32
        np.testing.assert_allclose(params, p, rtol=1e-6)


def test_equal_milestones_both_count():
    schedule = states.step_schedule(1.0, total_steps=4, milestones=(0.5, 0.51), decay=0.1)
    assert float(schedule(1)) == 1.0 and float(schedule(2)) == pytest.approx(0.01)


def test_the_first_step_that_is_not_finite_is_remembered():
    objective = methods.create("ce", COUNTS)
    model, tx = SmallNet(), optimizer()
    state = states.create(model, tx, 1, SHAPE, 0)
    step = jax.jit(functools.partial(steps.train_step, model=model, objective=objective, optimizer=tx))
    good = steps.Batch(preprocess(jnp.asarray(IMAGES[:BATCH])), jnp.asarray(LABELS[:BATCH]), None)
    bad = good._replace(images=good.images.at[0, 0, 0, 0].set(jnp.nan))
    for batch in (good, good, bad, good):
        state = step(state, batch)
    assert state.sums.bad_terms.tolist() == [True]
    assert int(state.sums.bad_step) == 2 and int(state.sums.steps) == 4 and not np.isfinite(state.sums.terms).any()


def test_places_of_a_batch_that_the_devices_do_not_divide():
    with pytest.raises(ValueError, match="batch_size=20 must be a multiple of the 8 devices"):
        Parallel("jit").places(20)


def test_unknown_mode():
    with pytest.raises(ValueError, match="parallel='ddp' must be one of jit, pmap"):
        Parallel("ddp")
