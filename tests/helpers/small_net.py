"""A data set, a net and their training, so small that twenty steps on eight devices take seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltkd_jax import groups, methods, models
from ltkd_jax.data import augment, sampling
from ltkd_jax.training import bilevel_steps, steps, teacher_table
from ltkd_jax.training import state as states
from ltkd_jax.training.parallel import Parallel

N, CLASSES, BATCH, SHAPE = 40, 5, 16, (6, 6, 1)
STEPS_PER_EPOCH = sampling.steps_per_epoch(N, BATCH)
VIEWS = augment.Views(pad=1, flip=True)
COUNTS = np.array([16, 10, 7, 4, 3])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
LABELS = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)
NUM_OUTER = 20
OUTER_IMAGES = np.random.default_rng(1).integers(0, 256, (NUM_OUTER, *SHAPE), np.uint8)
OUTER_LABELS = np.tile(np.arange(CLASSES), NUM_OUTER // CLASSES).astype(np.int32)
RATE = 0.05


class SmallNet(nn.Module):
    """A batch-norm net without convolutions, which XLA compiles in no time."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(12)(images.reshape(len(images), -1))
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, axis_name=self.axis_name
        )(x)
        return nn.Dense(CLASSES)(nn.relu(x))


def preprocess(images):
    return augment.normalize(images, (0.5,), (0.25,))


def double(tree):
    """Returns the tree with its floats in float64, which flax then computes in."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )


def optimizer():
    return states.sgd(RATE, momentum=0.9, weight_decay=5e-4)


@functools.cache
def teacher_variables(in_double=False):
    """Returns the teacher's variables, on the host."""
    variables = SmallNet().init(jax.random.key(9), jnp.zeros((1, *SHAPE)), train=False)
    return jax.device_get(double(variables) if in_double else variables)


def table(variables, images=IMAGES, labels=LABELS):
    """Returns the table of a teacher's logits for all views of these images."""
    out = np.zeros(
        (len(images), VIEWS.num, CLASSES),
        np.float64 if jax.config.jax_enable_x64 else np.float32,
    )
    data = steps.TrainData(jnp.asarray(images), jnp.asarray(labels), variables)
    teacher_fn = steps.network_teacher(SmallNet())

    @jax.jit
    def logits_fn(indices):
        batch = steps.make_batch(
            data, indices, views=VIEWS, preprocess=preprocess, teacher_fn=teacher_fn
        )
        return batch.teacher.logits

    teacher_table.build(logits_fn, out, batch_size=64)
    return out


def weighting(objective):
    """Returns a weight net that is updated in every second step."""
    features = ("student_ce", "teacher_ce")
    return bilevel_steps.LearnedWeighting(
        net=models.WeightNet(len(objective.terms), hidden=(8,)),
        features_fn=methods.features(objective, features),
        num_features=len(features),
        outer_loss_fn=methods.outer_loss(objective, "mix"),
        scales=(1.0, 0.5, 2.0)[: len(objective.terms)],
        optimizer=states.adam(1e-2, weight_decay=1e-4),
        update_every=2,
        groups=GROUPS,
    )


class Training:
    """The training of `SmallNet`, with a teacher in the step unless it is looked up; float64 where that is enabled.

    Args:
      method: whose terms are the loss.
      parallel: one device by default.
      lookahead: virtual steps through which the terms' weights are learned; 0 leaves them static.
      table: whether the teacher is looked up.
    """

    def __init__(self, method, parallel=None, *, lookahead=0, table=False):
        self.parallel = parallel or Parallel("jit", jax.devices()[:1])
        self._lookahead = lookahead
        self._objective = methods.create(method, COUNTS, GROUPS)
        self._weighting = weighting(self._objective) if lookahead else None
        teacher_fn = steps.table_teacher if table else steps.network_teacher(SmallNet())
        self._make_batch = functools.partial(
            steps.make_batch, views=VIEWS, preprocess=preprocess, teacher_fn=teacher_fn
        )
        self._compiled = functools.cache(self._compile)

    def init(self):
        """Returns the state before the first step."""
        state = states.create(
            SmallNet(), optimizer(), len(self._objective.terms), SHAPE, 0
        )
        if self._weighting:
            state = self._weighting.init_weight_net(state, 0)
        return double(state) if jax.config.jax_enable_x64 else state

    def run(self, num_steps, *, steps_per_call=1, start=None, tables=None):
        """Returns the state after so many steps, on the host.

        Args:
          num_steps: counted from the first one, also where a `start` has taken some of them.
          steps_per_call: of the compiled function.
          start: a state to go on from.
          tables: the teacher's logits of the training images and of the outer set, where it is looked up.
        """
        first_step = int(start.step) if start else 0
        state = self.parallel.replicate(start or self.init())
        data = self._data(tables)
        inputs = self._inputs(num_steps)
        for step in range(first_step, num_steps, steps_per_call):
            stop = min(step + steps_per_call, num_steps)
            call_inputs = jax.tree.map(
                lambda x, part=slice(step, stop): x[part], inputs
            )
            update_weight_net = None
            if self._weighting and steps_per_call == 1:
                update_weight_net = stop % self._weighting.update_every == 0
            state = self._compiled(update_weight_net)(
                state, data, self.parallel.shard(call_inputs, 1)
            )
            jax.block_until_ready(
                state
            )  # collectives of several calls in flight can starve each other of threads
        return jax.device_get(self.parallel.unreplicate(state))

    def _data(self, tables):
        teacher, outer_teacher = (
            tables or [teacher_variables(jax.config.jax_enable_x64)] * 2
        )
        outer = (
            steps.TrainData(OUTER_IMAGES, OUTER_LABELS, outer_teacher)
            if self._weighting
            else None
        )
        return self.parallel.replicate(steps.TrainData(IMAGES, LABELS, teacher, outer))

    def _step_fn(self, update_weight_net):
        options = dict(
            model=SmallNet(self.parallel.axis_name),
            objective=self._objective,
            optimizer=optimizer(),
            axis_name=self.parallel.axis_name,
        )

        def static_step(state, data, inputs):
            return steps.train_step(
                state, self._make_batch(data, inputs.train), **options
            )

        def bilevel_step(state, data, inputs):
            windows = [
                jax.tree.map(lambda x, j=j: x[:, j], inputs.train)
                for j in range(self._lookahead)
            ]
            batches = [self._make_batch(data, indices) for indices in windows]
            return bilevel_steps.bilevel_step(
                state,
                jax.tree.map(lambda *parts: jnp.stack(parts), *batches),
                self._make_batch(data.outer, inputs.outer),
                weighting=self._weighting,
                schedule=lambda step: RATE,
                update_weight_net=update_weight_net,
                **options,
            )

        return bilevel_step if self._weighting else static_step

    def _compile(self, update_weight_net):
        step_fn = self._step_fn(update_weight_net)
        train_steps = functools.partial(
            steps.train_steps, step_fn=step_fn, steps_per_epoch=STEPS_PER_EPOCH
        )
        return self.parallel.compile(train_steps, batch_axis=1, donate_argnums=(0,))

    def _inputs(self, num_steps):
        """Returns this process's part of the steps' inputs."""
        options = dict(batch_size=BATCH, num_views=VIEWS.num)
        epochs = range(-(-num_steps // STEPS_PER_EPOCH))
        outer = None
        if self._lookahead:
            indices_of = functools.partial(
                sampling.lookahead_indices, lookahead=self._lookahead
            )
            outer_seed = sampling.outer_seed(0)
            outer = sampling.indices_from(
                outer_seed, 0, num_steps=num_steps, num_examples=NUM_OUTER, **options
            )
        else:
            indices_of = sampling.epoch_indices
        indices_of = jax.jit(functools.partial(indices_of, num_examples=N, **options))
        by_epoch = [indices_of(0, epoch) for epoch in epochs]
        train = jax.tree.map(
            lambda *parts: np.concatenate(parts)[:num_steps], *by_epoch
        )
        positions = self.parallel.local_positions(BATCH)
        return jax.tree.map(
            lambda x: np.asarray(x)[:, positions], steps.StepInputs(train, outer=outer)
        )


# LTKD's terms have batch statistics over all devices; KD's compile sooner, which matters for three virtual steps.
CASES = {
    "ce": dict(method="ce"),
    "ltkd": dict(method="ltkd"),
    "one virtual step": dict(method="ltkd", lookahead=1),
    "three virtual steps": dict(method="kd", lookahead=3),
}


@functools.cache
def on_one_device(case, num_steps, in_double=True):
    """Returns the state of a case after single steps with the teacher in them."""
    with jax.enable_x64(in_double):
        return Training(**CASES[case]).run(num_steps)


def assert_eight_devices_are_one(case, mode):
    """Checks batch norm, group rebalancing, virtual and outer gradients over the global batch, in float64."""
    expected = on_one_device(case, 20)
    with jax.enable_x64(True):
        state = Training(parallel=Parallel(mode), **CASES[case]).run(20)
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)
    assert_close(state.sums, expected.sums, rtol=1e-6)
    assert state.step == 20


def assert_same_first_gradients(case, mode):
    """Checks them in float32, to 1e-5 of the largest: of the student, in its momentum, and of the weight net."""
    states = (
        Training(parallel=Parallel(mode), **CASES[case]).run(1),
        on_one_device(case, 1, in_double=False),
    )
    gradients = [
        (state.opt_state, state.meta.grad_sum if state.meta else ()) for state in states
    ]
    for part, expected_part in zip(*gradients):
        leaves = zip(jax.tree.leaves(part), jax.tree.leaves(expected_part))
        floats = [(x, expected) for x, expected in leaves if x.dtype == np.float32]
        largest = max((np.abs(expected).max() for _, expected in floats), default=1.0)
        assert largest > 1e-3
        for x, expected in floats:
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * largest)


def parameters(state):
    return state.params, state.batch_stats, state.opt_state, state.meta


def assert_close(state, expected, **tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance), state, expected
    )
