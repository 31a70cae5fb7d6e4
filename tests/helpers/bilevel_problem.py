"""Problems of the bilevel step for tests, and how gradients are compared."""

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
    """No batch norm; smooth, so that finite differences have no kink to step over."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(CLASSES)(nn.tanh(nn.Dense(6)(images.reshape(len(images), -1))))


def draw(seed, *lead, shape=(4, 4, 1), classes=CLASSES, batch=BATCH):
    """Returns random batches with leading axes `lead`; the teacher's logits are far from uniform."""
    rng = np.random.default_rng(seed)
    return steps.Batch(
        jnp.asarray(rng.normal(size=(*lead, batch, *shape)), jnp.float32),
        jnp.asarray(rng.integers(0, classes, (*lead, batch)), jnp.int32),
        steps.TeacherOutputs(
            jnp.asarray(2 * rng.normal(size=(*lead, batch, classes)), jnp.float32)
        ),
    )


def setting(
    net, method, *, lookahead=1, shape=(4, 4, 1), classes=CLASSES, outer="mix", seed=0
):
    """Returns a problem, its student's and weight net's parameters, batches and an outer batch, in float32."""
    model = {"mlp": Mlp, "batch norm": SmallNet}.get(
        net, lambda: models.create(net, classes)
    )()
    counts = COUNTS if classes == CLASSES else np.arange(classes, 0, -1)
    by_rank = groups.ClassGroups.from_counts(counts)
    objective = methods.create(method, counts, by_rank)
    weighting = bilevel_steps.LearnedWeighting(
        net=models.WeightNet(len(objective.terms), hidden=(8,)),
        features_fn=methods.features(objective, ("student_ce", "teacher_ce")),
        num_features=2,
        outer_loss_fn=methods.outer_loss(objective, outer),
        scales=(1.0,) * len(objective.terms),
        optimizer=optax.adam(1e-2),
        update_every=1,
        groups=by_rank,
    )

    terms = len(objective.terms)
    state = jax.jit(
        lambda: weighting.init_weight_net(
            states.create(model, optax.sgd(0.1), terms, shape, seed), seed
        )
    )()
    problem = bilevel_steps.make_problem(
        state.batch_stats, model=model, objective=objective, weighting=weighting
    )
    # A fresh weight net is nearly constant; a larger one has slopes that a wrong formula gets wrong.
    meta_params = jax.tree.map(lambda x: 3 * x, state.meta.params)
    kind = dict(shape=shape, classes=classes)
    return (
        problem,
        state.params,
        meta_params,
        draw(seed, lookahead, **kind),
        draw(seed + 1000, **kind),
    )


def fast(problem, params, meta_params, batches, outer_batch, learning_rate):
    """Returns the outer loss and the hypergradient of the fast path: what it accumulates."""
    meta = bilevel.init(meta_params, optax.sgd(1.0))
    step = bilevel.step(
        problem,
        params,
        meta,
        batches,
        outer_batch,
        learning_rate,
        optimizer=optax.sgd(1.0),
        update_every=9,
        update_weight_net=False,
    )
    return step.outer_loss, step.meta.grad_sum


def difference(actual, expected):
    """Returns the relative error of a gradient as a vector."""
    actual, expected = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (actual, expected)
    )
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def finite_differences(
    problem,
    params,
    meta_params,
    batches,
    outer_batch,
    learning_rate,
    gradient,
    step=1e-4,
):
    """Returns the largest relative error of ⟨gradient, direction⟩ against fourth-order central differences."""
    value = jax.jit(
        lambda meta: bilevel.lookahead(
            problem, params, meta, batches, outer_batch, learning_rate, unroll=True
        )
    )
    errors = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape)), meta_params
        )
        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        )

        def at(t):
            return value(jax.tree.map(lambda m, d: m + t * d, meta_params, direction))

        central = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (
            12 * step
        )
        errors.append(abs(central - slope) / abs(slope))
    return max(errors)
