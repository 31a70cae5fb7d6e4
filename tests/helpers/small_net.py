"""A data set, a net and its training: 20 steps on eight devices take seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ltkd_jax import groups, methods, models
from ltkd_jax.data import augment, sampling
from ltkd_jax.models.batch_norm import BatchNorm
from ltkd_jax.training import bilevel_steps, steps, teacher_table
from ltkd_jax.training import state as states
from ltkd_jax.training.parallel import Parallel

N = 40
CLASSES = 5
BATCH = 16
SHAPE = (6, 6, 1)
STEPS_PER_EPOCH = sampling.steps_per_epoch(N, BATCH)
VIEWS = augment.Views(pad=1, flip=True)
COUNTS = np.array([16, 10, 7, 4, 3])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
LABELS = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)
NUM_OUTER = 20
OUTER_IMAGES = np.random.default_rng(1).integers(0, 256, (NUM_OUTER, *SHAPE), np.uint8)
OUTER_LABELS = np.tile(np.arange(CLASSES), NUM_OUTER // CLASSES).astype(np.int32)
LEARNING_RATE = 0.05

# The terms of LTKD have batch statistics, which are taken over all devices. KD compiles
# faster, which matters for three virtual steps.
CASES = {
    "ce": dict(method="ce"),
    "ltkd": dict(method="ltkd"),
    # An outer batch may be smaller: here it is one image for each device.
    "one virtual step": dict(method="ltkd", lookahead=1, outer_batch=8),
    "three virtual steps": dict(method="kd", lookahead=3),
}


class SmallNet(nn.Module):
    """A net with batch norm and without convolutions, which XLA compiles fast."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(12)(images.reshape(len(images), -1))
        x = BatchNorm(axis_name=self.axis_name)(x, train=train)
        return nn.Dense(CLASSES)(nn.relu(x))


def preprocess(images):
    return augment.normalize(images, (0.5,), (0.25,))


def double(tree):
    """Returns the tree with its floats in float64, in which Flax then computes."""

    def convert(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float64) if is_float else x

    return jax.tree.map(convert, tree)


def optimizer():
    return states.sgd(LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


@functools.cache
def teacher_variables(in_double=False):
    """Returns the teacher's variables, on the host."""
    variables = SmallNet().init(jax.random.key(9), jnp.zeros((1, *SHAPE)), train=False)
    return jax.device_get(double(variables) if in_double else variables)


def table(variables, images=IMAGES, labels=LABELS):
    """Returns the table of a teacher's logits for all views of the images."""
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    logits = np.zeros((len(images), VIEWS.num, CLASSES), dtype)
    data = steps.TrainData(jnp.asarray(images), jnp.asarray(labels), variables)
    teacher_fn = steps.network_teacher(SmallNet())

    @jax.jit
    def logits_fn(indices):
        batch = steps.make_batch(
            data, indices, views=VIEWS, preprocess=preprocess, teacher_fn=teacher_fn
        )
        return batch.teacher.logits

    teacher_table.build(logits_fn, logits, batch_size=64)
    return logits


def weighting(objective):
    """Returns learned weights, with an update of the weight net every second step."""
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
    """Trains `SmallNet`, in float64 where that is enabled.

    Args:
      method: whose terms are the loss.
      parallel: one device by default.
      lookahead: K, the virtual steps by which the weights of the terms are learned; 0
        leaves them static.
      outer_batch: the size of an outer batch.
      table: whether the teacher is looked up, instead of evaluated in the step.
    """

    def __init__(
        self, method, parallel=None, *, lookahead=0, outer_batch=BATCH, table=False
    ):
        self.parallel = parallel or Parallel("jit", jax.devices()[:1])
        self._lookahead = lookahead
        self._outer_batch = outer_batch
        self._objective = methods.create(method, COUNTS, GROUPS)
        self._weighting = weighting(self._objective) if lookahead else None
        teacher_fn = steps.table_teacher if table else steps.network_teacher(SmallNet())
        self._make_batch = functools.partial(
            steps.make_batch, views=VIEWS, preprocess=preprocess, teacher_fn=teacher_fn
        )
        self._compiled = functools.cache(self._compile)

    def init(self):
        """Returns the state before the first step."""
        num_terms = len(self._objective.terms)
        state = states.create(SmallNet(), optimizer(), num_terms, SHAPE, 0)
        if self._weighting:
            state = self._weighting.init_weight_net(state, 0)
        return double(state) if jax.config.jax_enable_x64 else state

    def run(self, num_steps, *, steps_per_call=1, start=None, tables=None):
        """Returns the state after `num_steps` steps, on the host.

        Args:
          num_steps: of the whole training, those of `start` included.
          steps_per_call: of the compiled function.
          start: a state to resume from.
          tables: the teacher's logits for the training images and for the outer set,
            where it is looked up.
        """
        first_step = int(start.step) if start else 0
        state = self.parallel.replicate(start or self.init())
        data = self._data(tables)
        inputs = self._inputs(num_steps)
        for step in range(first_step, num_steps, steps_per_call):
            stop = min(step + steps_per_call, num_steps)
            call_steps = slice(step, stop)
            call_inputs = jax.tree.map(lambda x, s=call_steps: x[s], inputs)
            update_weight_net = None
            if self._weighting and steps_per_call == 1:
                update_weight_net = stop % self._weighting.update_every == 0
            train_steps = self._compiled(update_weight_net)
            state = train_steps(state, data, self.parallel.shard(call_inputs, 1))
            # On CPU devices, collectives of several calls in flight can starve each
            # other of threads.
            jax.block_until_ready(state)
        return jax.device_get(self.parallel.unreplicate(state))

    def _data(self, tables):
        if tables is None:
            teacher = teacher_variables(jax.config.jax_enable_x64)
            outer_teacher = teacher
        else:
            teacher, outer_teacher = tables
        outer = None
        if self._weighting:
            outer = steps.TrainData(OUTER_IMAGES, OUTER_LABELS, outer_teacher)
        return self.parallel.replicate(steps.TrainData(IMAGES, LABELS, teacher, outer))

    def _step_fn(self, update_weight_net):
        options = dict(
            model=SmallNet(self.parallel.axis_name),
            objective=self._objective,
            optimizer=optimizer(),
            axis_name=self.parallel.axis_name,
        )

        def static_step(state, data, inputs):
            batch = self._make_batch(data, inputs.train)
            return steps.train_step(state, batch, **options)

        def bilevel_step(state, data, inputs):
            batches = []
            for j in range(self._lookahead):
                indices = jax.tree.map(lambda x, j=j: x[:, j], inputs.train)
                batches.append(self._make_batch(data, indices))
            return bilevel_steps.bilevel_step(
                state,
                jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches),
                self._make_batch(data.outer, inputs.outer),
                weighting=self._weighting,
                schedule=lambda step: LEARNING_RATE,
                update_weight_net=update_weight_net,
                **options,
            )

        return bilevel_step if self._weighting else static_step

    def _compile(self, update_weight_net):
        train_steps = functools.partial(
            steps.train_steps,
            step_fn=self._step_fn(update_weight_net),
            steps_per_epoch=STEPS_PER_EPOCH,
        )
        return self.parallel.compile(train_steps, batch_axis=1, donate_argnums=(0,))

    def _inputs(self, num_steps):
        """Returns the inputs of all steps, as far as they belong to this process."""
        outer = None
        if self._lookahead:
            epoch_indices = functools.partial(
                sampling.lookahead_indices, lookahead=self._lookahead
            )
            outer_seed = sampling.outer_seed(0)
            outer = sampling.step_indices(
                outer_seed,
                0,
                num_steps=num_steps,
                num_examples=NUM_OUTER,
                batch_size=self._outer_batch,
                num_views=VIEWS.num,
            )
            outer = self._local(outer, self._outer_batch)
        else:
            epoch_indices = sampling.epoch_indices
        epoch_indices = jax.jit(
            functools.partial(
                epoch_indices, num_examples=N, batch_size=BATCH, num_views=VIEWS.num
            )
        )
        num_epochs = -(-num_steps // STEPS_PER_EPOCH)
        epochs = [epoch_indices(0, epoch) for epoch in range(num_epochs)]
        train = jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[:num_steps], *epochs
        )
        return steps.StepInputs(self._local(train, BATCH), outer=outer)

    def _local(self, indices, batch_size):
        """Returns this process's part of batches `[S, B, …]`."""
        positions = self.parallel.local_positions(batch_size)
        return jax.tree.map(lambda x: np.asarray(x)[:, positions], indices)


@functools.cache
def on_one_device(case, num_steps, in_double=True):
    """Returns the state of a case, by one step a call, with the teacher in the step."""
    with jax.enable_x64(in_double):
        return Training(**CASES[case]).run(num_steps)


def assert_eight_devices_are_one(case, mode):
    """Checks that 20 steps in float64 are the same on eight devices as on one.

    That includes batch norm, group rebalancing, virtual and outer gradients.
    """
    expected = on_one_device(case, 20)
    with jax.enable_x64(True):
        state = Training(parallel=Parallel(mode), **CASES[case]).run(20)
    assert_close(parameters(state), parameters(expected), rtol=1e-9, atol=1e-9)
    assert_close(state.sums, expected.sums, rtol=1e-6)
    assert state.step == 20


def assert_same_first_gradients(case, mode):
    """Checks the first gradients in float32, to 1e-5 of the largest.

    The student's is in its momentum, the weight net's in its sum of gradients.
    """
    state = Training(parallel=Parallel(mode), **CASES[case]).run(1)
    expected = on_one_device(case, 1, in_double=False)
    assert_close_to_largest(state.opt_state, expected.opt_state)
    if expected.meta:
        assert_close_to_largest(state.meta.grad_sum, expected.meta.grad_sum)


def assert_close_to_largest(tree, expected):
    """Checks the float32 leaves, to 1e-5 of the largest absolute value in the tree."""
    pairs = [
        (leaf, expected_leaf)
        for leaf, expected_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(expected))
        if leaf.dtype == np.float32
    ]
    largest = max(np.abs(expected_leaf).max() for _, expected_leaf in pairs)
    assert largest > 1e-3
    for leaf, expected_leaf in pairs:
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-5 * largest)


def parameters(state):
    return state.params, state.batch_stats, state.opt_state, state.meta


def assert_close(tree, expected, **tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance), tree, expected
    )
