"""The models: published parameter counts, shapes, initialisation, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import models

# Trainable parameters with 100 classes and 3 channels, as in the common CIFAR distillation zoo.
PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
}
# Multiply-adds of one 32×32 image, in millions.
MULTIPLY_ADDS = {"resnet20": 40.8, "resnet32": 69.1, "resnet8x4": 177.1, "resnet32x4": 1083.0}


def shapes(name, image=(32, 32, 3), **options):
    model = models.create(name, 100, **options)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image)), train=False))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    _, variables = shapes(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


def multiply_adds(equation):
    """Multiply-adds of a jaxpr's equation, borders counted like the inside, as the zoo counts them."""
    if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
        return 0
    out, weights = equation.outvars[0].aval.shape, equation.invars[1].aval.shape  # [h, w, in, out] or [in, out]
    return np.prod(out) * np.prod(weights[:-1])


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_the_published_ones(name):
    model, variables = shapes(name)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, image)
    assert sum(map(multiply_adds, jaxpr.eqns)) / 1e6 == pytest.approx(MULTIPLY_ADDS[name], abs=0.1)


@pytest.mark.parametrize("name", sorted(models.REGISTRY))
@pytest.mark.parametrize("image", [(32, 32, 3), (28, 28, 1), (8, 8, 1)])
def test_any_image_size_and_channel_count(name, image):
    model, variables = shapes(name, image)
    batch = jax.ShapeDtypeStruct((5, *image), jnp.float32)
    logits, updates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, batch
    )
    assert logits.shape == (5, 100)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_initialisation_is_kaiming_fan_out():
    model = models.create("resnet8x4", 100)
    params = model.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)), train=False)["params"]
    kernel = params["stage3_block1_conv2"]["kernel"]  # [3, 3, 256, 256]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    strided = params["stage2_block1_conv1"]["kernel"]  # [3, 3, 64, 128]: fan-out is 9 · 128
    assert float(strided.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    bound = 256**-0.5
    for leaf in jax.tree.leaves(params["classifier"]):
        assert float(jnp.abs(leaf).max()) <= bound and float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("precision", models.PRECISIONS)
def test_parameters_statistics_and_logits_stay_float32(precision):
    model = models.create("resnet8", 10, precision=precision)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = model.init(jax.random.key(1), images, train=False)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    for leaf in jax.tree.leaves((variables, updates, logits)):
        assert leaf.dtype == jnp.float32
    exact = models.create("resnet8", 10).apply(variables, images, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(logits, exact, atol=0.2 if precision == "bfloat16" else 1e-5)
    if precision == "bfloat16":
        assert not np.array_equal(logits, exact)


def test_batch_norm_uses_the_batch_in_training_and_its_running_statistics_in_evaluation():
    model = models.create("resnet8", 10)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1)) * 3 + 1
    variables = model.init(jax.random.key(1), images, train=False)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    conv = jax.lax.conv_general_dilated(
        images,
        variables["params"]["stem"]["kernel"],
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    running = updates["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet8x5", 10), "did you mean 'resnet8x4'"),
        (("resnet8", 0), "num_classes=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(*arguments)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision='float16' must be one of"):
        models.create("resnet8", 10, precision="float16")
