"""Problems of the bilevel step for tests, and comparisons of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from helpers.small_net import SmallNet
from ltkd_jax import bilevel, groups, methods, models
from ltkd_jax.training import bilevel_steps, steps
from ltkd_jax.training import state as states

CLASSES = 5
BATCH = 8
COUNTS = np.array([50, 30, 12, 6, 3])


class Mlp(nn.Module):
    """A smooth net without batch norm: finite differences meet no kink."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(CLASSES)(nn.tanh(nn.Dense(6)(images.reshape(len(images), -1))))


def draw_batch(seed, *leading_axes, shape=(4, 4, 1), classes=CLASSES, batch_size=BATCH):
    """Returns random batches; the teacher's logits are far from uniform."""
    rng = np.random.default_rng(seed)
    axes = (*leading_axes, batch_size)
    images = rng.normal(size=(*axes, *shape))
    labels = rng.integers(0, classes, axes)
    teacher_logits = 2 * rng.normal(size=(*axes, classes))
    return steps.Batch(
        jnp.asarray(images, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        steps.TeacherOutputs(jnp.asarray(teacher_logits, jnp.float32)),
    )


def create_problem(
    net, method, *, lookahead=1, shape=(4, 4, 1), classes=CLASSES, outer="mix", seed=0
):
    """Returns a problem and the arguments of its step, in float32.

    The arguments are the parameters of student and weight net, batches and an outer
    batch.
    """
    if net == "mlp":
        model = Mlp()
    elif net == "batch norm":
        model = SmallNet()
    else:
        model = models.create(net, classes)
    counts = COUNTS if classes == CLASSES else np.arange(classes, 0, -1)
    class_groups = groups.ClassGroups.from_counts(counts)
    objective = methods.create(method, counts, class_groups)
    num_terms = len(objective.terms)
    weighting = bilevel_steps.LearnedWeighting(
        net=models.WeightNet(num_terms, hidden=(8,)),
        features_fn=methods.features(objective, ("student_ce", "teacher_ce")),
        num_features=2,
        outer_loss_fn=methods.outer_loss(objective, outer),
        scales=(1.0,) * num_terms,
        optimizer=optax.adam(1e-2),
        update_every=1,
        groups=class_groups,
    )

    @jax.jit
    def create_state():
        state = states.create(model, optax.sgd(0.1), num_terms, shape, seed)
        return weighting.init_weight_net(state, seed)

    state = create_state()
    problem = bilevel_steps.make_problem(
        state.batch_stats, model=model, objective=objective, weighting=weighting
    )
    # A new weight net is nearly constant. The slopes of a larger one are wrong under a
    # wrong formula.
    meta_params = jax.tree.map(lambda x: 3 * x, state.meta.params)
    sizes = dict(shape=shape, classes=classes)
    batches = draw_batch(seed, lookahead, **sizes)
    outer_batch = draw_batch(seed + 1000, **sizes)
    return problem, state.params, meta_params, batches, outer_batch


def fast_hypergradient(
    problem, params, meta_params, batches, outer_batch, learning_rate
):
    """Returns the outer loss and the hypergradient that `bilevel.step` accumulates."""
    optimizer = optax.sgd(1.0)
    result = bilevel.step(
        problem,
        params,
        bilevel.init(meta_params, optimizer),
        batches,
        outer_batch,
        learning_rate,
        optimizer=optimizer,
        update_every=9,
        update_weight_net=False,
    )
    return result.outer_loss, result.meta.grad_sum


def relative_error(actual, expected):
    """Returns the relative error of a gradient as a vector."""
    actual = to_vector(actual)
    expected = to_vector(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def to_vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def finite_difference_error(
    problem,
    params,
    meta_params,
    batches,
    outer_batch,
    learning_rate,
    gradient,
    step=1e-4,
):
    """Returns the largest relative error of ⟨gradient, direction⟩.

    The reference is fourth-order central differences, in three random directions.
    """

    @jax.jit
    def outer_loss(meta_params):
        return bilevel.lookahead(
            problem,
            params,
            meta_params,
            batches,
            outer_batch,
            learning_rate,
            unroll=True,
        )

    errors = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape)), meta_params
        )

        def outer_loss_at(t, direction=direction):
            moved = jax.tree.map(lambda m, d: m + t * d, meta_params, direction)
            return outer_loss(moved)

        near = outer_loss_at(step) - outer_loss_at(-step)
        far = outer_loss_at(2 * step) - outer_loss_at(-2 * step)
        expected = (8 * near - far) / (12 * step)
        actual = sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient, direction))))
        errors.append(abs(expected - actual) / abs(actual))
    return max(errors)
