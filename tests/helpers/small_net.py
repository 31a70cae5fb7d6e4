"""A set, a net, an optimizer and their training, so small that twenty steps on eight devices take seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltkd_jax import groups, methods, models
from ltkd_jax.data import augment
from ltkd_jax.data import sampling as plans
from ltkd_jax.training import bilevel_steps, steps, teacher_table
from ltkd_jax.training import state as states

N, CLASSES, BATCH, SHAPE = 40, 5, 16, (6, 6, 1)
VIEWS = augment.Views(pad=1, flip=True)
COUNTS = np.array([16, 10, 7, 4, 3])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
LABELS = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)
META = 20
META_IMAGES = np.random.default_rng(1).integers(0, 256, (META, *SHAPE), np.uint8)
META_LABELS = np.tile(np.arange(CLASSES), META // CLASSES).astype(np.int32)


class SmallNet(nn.Module):
    """A batch-norm net without convolutions, which XLA compiles in no time."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(12)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(CLASSES)(nn.relu(x))


def preprocess(images):
    return augment.normalize(images, (0.5,), (0.25,))


def double(tree):
    """The floats of a tree in float64, which flax then computes in."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def optimizer(schedule=0.05):
    return states.sgd(schedule, momentum=0.9, weight_decay=5e-4)


def teacher_variables():
    return SmallNet().init(jax.random.key(9), jnp.zeros((1, *SHAPE)), train=False)


def table(variables, images=IMAGES, labels=LABELS):
    out = np.zeros((len(images), VIEWS.num, CLASSES), np.float64 if jax.config.jax_enable_x64 else np.float32)
    fetch = functools.partial(
        steps.fetch, views=VIEWS, preprocess=preprocess, teacher_fn=steps.network_teacher(SmallNet())
    )
    data = steps.TrainData(jnp.asarray(images), jnp.asarray(labels), variables)
    logits = jax.jit(lambda rows: fetch(data, rows).teacher_logits)
    teacher_table.build(logits, out, batch_size=64)
    return out


def weighting(objective, every=2, features=("student_ce", "teacher_ce"), outer="mix"):
    return bilevel_steps.Weighting(
        net=models.WeightNet(len(objective.terms), hidden=(8,)),
        features=methods.features(objective, features),
        num_features=len(features),
        outer_loss=methods.outer_loss(objective, outer),
        scales=(1.0, 0.5, 2.0)[: len(objective.terms)],
        optimizer=states.adam(1e-2, weight_decay=1e-4),
        every=every,
        groups=GROUPS,
    )


def train(
    method, parallel, num_steps=20, *, ahead=0, teacher_fn=steps.no_teacher, teacher=None, meta_teacher=None,
    per_call=1, start=None, batch=BATCH,
):  # fmt: skip
    """The state after some steps of `SmallNet`, in float64 where that is enabled; of a `start` the steps that remain.

    With `ahead`, its weights are learned through so many virtual steps.
    """
    objective = methods.create(method, COUNTS, GROUPS)
    learned = weighting(objective) if ahead else None
    spe = plans.steps_per_epoch(N, batch)
    fetch = functools.partial(steps.fetch, views=VIEWS, preprocess=preprocess, teacher_fn=teacher_fn)
    axis_name = parallel.axis_name
    step = dict(model=SmallNet(axis_name), objective=objective, optimizer=optimizer(), axis_name=axis_name)

    @functools.lru_cache
    def chunk(changes):
        if not learned:
            fetch_fn, step_fn = fetch, functools.partial(steps.train_step, **step)
        else:
            fetch_fn = functools.partial(bilevel_steps.fetch, fetch_fn=fetch, fetch_meta_fn=fetch)
            how = dict(weighting=learned, schedule=lambda step: 0.05, changes=changes)
            step_fn = functools.partial(bilevel_steps.bilevel_step, **how, **step)
        whole = functools.partial(steps.train_chunk, steps_per_epoch=spe, fetch_fn=fetch_fn, step_fn=step_fn)
        return parallel.compile(whole, batch_axis=1, donate=(0,))

    state = states.create(SmallNet(), optimizer(), len(objective.terms), SHAPE, 0)
    state = learned.add_to(state, 0) if learned else state
    state = double(state) if jax.config.jax_enable_x64 else state
    state = parallel.replicate(state if start is None else start)
    data = steps.TrainData(IMAGES, LABELS, teacher)
    sizes = dict(batch_size=batch, num_views=VIEWS.num)
    if learned:
        meta = steps.TrainData(META_IMAGES, META_LABELS, teacher if meta_teacher is None else meta_teacher)
        data = bilevel_steps.BilevelData(data, meta)
        plan = functools.partial(bilevel_steps.rows, ahead=ahead, num_train=N, num_meta=META, **sizes)
    else:
        plan = functools.partial(plans.epoch_plan, num_examples=N, **sizes)
    data = parallel.replicate(data)
    rows = [jax.tree.map(np.asarray, jax.jit(plan)(0, epoch)) for epoch in range(-(-num_steps // spe))]
    rows = jax.tree.map(lambda *parts: np.concatenate(parts)[:, parallel.places(batch)], *rows)
    for first in range(0 if start is None else int(start.step), num_steps, per_call):
        part = jax.tree.map(lambda x: x[first : min(first + per_call, num_steps)], rows)  # noqa: B023
        changes = (first + 1) % learned.every == 0 if learned and per_call == 1 else None
        state = chunk(changes)(state, data, parallel.shard(part, 1))
    return jax.device_get(parallel.first(state))


def parameters(state):
    return state.params, state.batch_stats, state.opt_state, state.meta


def assert_close(got, want, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, want)
