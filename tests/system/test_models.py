"""One small model of every kind on numbers: training, evaluation, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import SMALL_MODELS

from ltkd_jax import models


def initial_variables(model, images):
    """Returns variables as those of `init`, which takes longer to compile than all the rest."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            fan_out = np.prod(leaf.shape[:-2]) * leaf.shape[-1]
            return rng.normal(0, (2 / fan_out) ** 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_on_numbers(name):
    model = models.create(name, 10)
    images = np.random.default_rng(1).normal(size=(8, 32, 32, 3)).astype(np.float32)
    labels = jax.nn.one_hot(jnp.arange(8), 10)
    variables = initial_variables(model, images)

    def loss(params):
        logits, updates = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return -(labels * jax.nn.log_softmax(logits)).sum(), (logits, updates)

    (_, (logits, updates)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    assert jnp.isfinite(logits).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all(), path
        # Every layer has a part in the loss; only a bias before batch norm has none.
        assert path[-1].key == "bias" or jnp.abs(leaf).max() > 0, path
    before = {"batch_stats": variables["batch_stats"]}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), updates, before))

    evaluate = jax.jit(functools.partial(model.apply, train=False))
    running = variables | updates
    assert jnp.isfinite(evaluate(running, images)).all()
    assert not np.allclose(evaluate(running, images), logits, atol=1e-2)
    assert jnp.isfinite(
        evaluate(running, jax.image.resize(images, (8, 64, 64, 3), "linear"))
    ).all()

    half = models.create(name, 10, precision="bfloat16")
    rounded, _ = jax.jit(
        functools.partial(half.apply, train=True, mutable=["batch_stats"])
    )(variables, images)
    # At the start, on few images, batch norm enlarges the rounding of each layer.
    assert 0.8 < np.corrcoef(rounded.ravel(), logits.ravel())[0, 1] < 1
