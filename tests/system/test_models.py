"""One small model of every kind with real numbers: training, evaluation, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import SMALL_MODELS

from ltkd_jax import models


def initial_variables(model, images):
    """Returns variables distributed as those of `init`.

    `init` itself takes longer to compile than everything else in the test.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            fan_out = np.prod(leaf.shape[:-2]) * leaf.shape[-1]
            return rng.normal(0, (2 / fan_out) ** 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_every_layer_learns(gradient):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all(), path
        # Batch norm removes a bias before it, whose gradient is therefore zero.
        assert path[-1].key == "bias" or jnp.abs(leaf).max() > 0, path


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_training_and_evaluation(name):
    model = models.create(name, 10)
    images = np.random.default_rng(1).normal(size=(8, 32, 32, 3)).astype(np.float32)
    labels = jax.nn.one_hot(jnp.arange(8), 10)
    variables = initial_variables(model, images)

    def loss(params):
        logits, updates = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return -(labels * jax.nn.log_softmax(logits)).sum(), (logits, updates)

    grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (logits, updates)), gradient = grad_fn(variables["params"])
    assert jnp.isfinite(logits).all()
    assert_every_layer_learns(gradient)
    initial = {"batch_stats": variables["batch_stats"]}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), updates, initial))

    evaluate = jax.jit(functools.partial(model.apply, train=False))
    trained = variables | updates
    eval_logits = evaluate(trained, images)
    assert jnp.isfinite(eval_logits).all()
    # Evaluation normalizes by the running statistics, training by the batch's.
    assert not np.allclose(eval_logits, logits, atol=1e-2)
    # The models pool globally, and so accept images of another size.
    larger = jax.image.resize(images, (8, 64, 64, 3), "linear")
    assert jnp.isfinite(evaluate(trained, larger)).all()

    half = models.create(name, 10, precision="bfloat16")
    apply = functools.partial(half.apply, train=True, mutable=["batch_stats"])
    half_logits, _ = jax.jit(apply)(variables, images)
    # With few images, batch norm amplifies the rounding errors of each layer: only the
    # correlation is compared, and it must not be exact either.
    assert 0.8 < np.corrcoef(half_logits.ravel(), logits.ravel())[0, 1] < 1
