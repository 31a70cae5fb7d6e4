"""One small model of every kind on numbers: training, evaluation, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import SMALL_MODELS

from ltkd_jax import models


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_on_numbers(name):
    model, images = models.create(name, 10), jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    labels = jax.nn.one_hot(jnp.arange(8), 10)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1, impl="rbg"), images)

    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -(labels * jax.nn.log_softmax(logits)).sum(), (logits, updates)

    (_, (logits, updates)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert jnp.isfinite(logits).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all(), path
        # Every layer has a part in the loss; only a bias before batch norm has none.
        assert path[-1].key == "bias" or jnp.abs(leaf).max() > 0, path
    before = {"batch_stats": variables["batch_stats"]}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), updates, before))

    evaluate, running = jax.jit(functools.partial(model.apply, train=False)), variables | updates
    assert jnp.isfinite(evaluate(running, images)).all()
    assert not np.allclose(evaluate(running, images), logits, atol=1e-2)
    assert jnp.isfinite(evaluate(running, jax.image.resize(images, (8, 64, 64, 3), "linear"))).all()

    half = models.create(name, 10, precision="bfloat16")
    rounded, _ = jax.jit(functools.partial(half.apply, train=True, mutable=["batch_stats"]))(variables, images)
    # At the start, on few images, batch norm enlarges the rounding of each layer.
    assert 0.8 < np.corrcoef(rounded.ravel(), logits.ravel())[0, 1] < 1
