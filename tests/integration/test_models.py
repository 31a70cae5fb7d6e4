"""The models: published parameter counts, shapes, features, initialisation, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import SMALL_MODELS

from ltkd_jax import models

# Published: trainable parameters with 100 classes and 3 channels, as in the common CIFAR distillation zoo, and millions
# of multiply-adds of one 32×32 image.
PUBLISHED = {
    "resnet20": (278_324, 40.8),
    "resnet32": (472_756, 69.1),
    "resnet56": (861_620, 125.8),
    "resnet110": (1_736_564, 253.2),
    "resnet8x4": (1_233_540, 177.1),
    "resnet32x4": (7_433_860, 1083.0),
    "wrn_16_2": (703_284, 101.1),
    "wrn_40_2": (2_255_156, 327.6),
    "vgg8": (3_965_028, 96.2),
    "vgg13": (9_462_180, 284.9),
    "mobilenetv2": (812_836, 6.5),
    "shufflenetv1": (949_258, 38.7),
    "shufflenetv2": (1_355_528, 44.5),
    "resnet18": (11_220_132, 555.5),
    "resnet50": (23_705_252, 1298.0),
    # torchvision's, less 900 of its 1000 classes.
    "resnet18_imagenet": (11_689_512 - 900 * 513, None),
    "resnet34_imagenet": (21_797_672 - 900 * 513, None),
    "resnet50_imagenet": (25_557_032 - 900 * 2049, None),
}
# Of a 32×32 image, by the beginning of the name; the first that fits. Sides and channels of the stages, and D.
FEATURES = {
    "resnet18_imagenet": ([(8, 64), (4, 128), (2, 256), (1, 512)], 512),
    "resnet34_imagenet": ([(8, 64), (4, 128), (2, 256), (1, 512)], 512),
    "resnet50_imagenet": ([(8, 256), (4, 512), (2, 1024), (1, 2048)], 2048),
    "resnet18": ([(32, 64), (16, 128), (8, 256), (4, 512)], 512),
    "resnet50": ([(32, 256), (16, 512), (8, 1024), (4, 2048)], 2048),
    "resnet8x4": ([(32, 64), (16, 128), (8, 256)], 256),
    "resnet32x4": ([(32, 64), (16, 128), (8, 256)], 256),
    "resnet": ([(32, 16), (16, 32), (8, 64)], 64),
    "wrn_16_1": ([(32, 16), (16, 32), (8, 64)], 64),
    "wrn_40_1": ([(32, 16), (16, 32), (8, 64)], 64),
    "wrn": ([(32, 32), (16, 64), (8, 128)], 128),
    "vgg": ([(16, 128), (8, 256), (4, 512), (4, 512)], 512),
    "mobilenetv2": ([(16, 12), (8, 16), (4, 48), (2, 160)], 1280),
    "shufflenetv1": ([(16, 240), (8, 480), (4, 960)], 960),
    "shufflenetv2": ([(16, 116), (8, 232), (4, 464)], 1024),
}


@functools.cache  # tracing a deep net takes as long as a second
def trace(name):
    """Returns the equations of `init` on a 32×32 image and the shapes of all that the model hands out."""
    model = models.create(name, 100)
    images = jnp.zeros((1, 32, 32, 3))
    return jax.make_jaxpr(
        lambda key: model.init_with_output(key, images, train=False, mutable=True),
        return_shape=True,
    )(jax.random.key(0))


def multiply_adds(equation):
    """Returns the multiply-adds of a jaxpr's equation, borders counted like the inside, as the zoo counts them."""
    if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
        return 0
    out, weights = (
        equation.outvars[0].aval.shape,
        equation.invars[1].aval.shape,
    )  # [h, w, in, out] or [in, out]
    return np.prod(out) * np.prod(weights[:-1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    jaxpr, (_, variables) = trace(name)
    parameters, millions = PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    if millions is not None:
        assert sum(map(multiply_adds, jaxpr.eqns)) / 1e6 == pytest.approx(
            millions, abs=0.1
        )


@pytest.mark.parametrize("name", models.REGISTRY)
def test_logits_and_features(name):
    _, (logits, variables) = trace(name)
    stages, width = next(
        shape for start, shape in FEATURES.items() if name.startswith(start)
    )
    expected = {f"stage{n}": (h, h, c) for n, (h, c) in enumerate(stages, start=1)} | {
        "pooled": (width,)
    }
    kept, variables = (
        variables["intermediates"],
        {key: variables[key] for key in ("params", "batch_stats")},
    )
    assert logits.shape == (1, 100) and logits.dtype == jnp.float32
    assert {key: feature.shape[1:] for key, (feature,) in kept.items()} == expected

    model, images = (
        models.create(name, 100),
        jax.ShapeDtypeStruct((5, 64, 64, 3), jnp.float32),
    )
    apply = functools.partial(
        models.apply_with_features, model, train=True, mutable=("batch_stats",)
    )
    logits, features, updates = jax.eval_shape(apply, variables, images)
    expected = {
        f"stage{n}": (5, 2 * h, 2 * h, c) for n, (h, c) in enumerate(stages, start=1)
    } | {"pooled": (5, width)}
    if name.startswith("vgg"):
        expected["stage4"] = (5, 4, 4, 512)  # a large image is pooled once more
    assert logits.shape == (5, 100)
    assert {key: feature.shape for key, feature in features.items()} == expected
    assert jax.tree.structure(updates) == jax.tree.structure(
        {"batch_stats": variables["batch_stats"]}
    )


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_grey_images(name):
    model = models.create(name, 100)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    assert set(variables) == {"params", "batch_stats"}
    images = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)
    assert jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variables, images
    ).shape == (5, 100)


@pytest.mark.parametrize(
    "name, images, message",
    [
        (
            "vgg8",
            (2, 7, 32, 3),
            r"VGG takes .* at least 8×8 pixels, not an array of shape \[2, 7, 32, 3\]",
        ),
        ("resnet18_imagenet", (2, 0, 8, 3), r"ResNet takes .* at least 1×1 pixels"),
        (
            "resnet8",
            (8, 8, 3),
            r"CifarResNet takes images \[B, H, W, channels\] .* not an array of shape \[8, 8, 3\]",
        ),
    ],
)
def test_wrong_image_shape(name, images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: models.create(name, 10).init(
                jax.random.key(0), jnp.zeros(images), train=False
            )
        )


@pytest.mark.parametrize(
    "name, layer, kernel, classifier, bias",
    [
        (
            "resnet8x4",
            "stage3_block1_conv2",
            (2 / (9 * 256)) ** 0.5,
            (3 * 256) ** -0.5,
            (3 * 256) ** -0.5,
        ),
        (
            "resnet8x4",
            "stage2_block1_conv1",
            (2 / (9 * 128)) ** 0.5,
            (3 * 256) ** -0.5,
            (3 * 256) ** -0.5,
        ),  # strided
        (
            "wrn_16_2",
            "stage3_block1_conv2",
            (2 / (9 * 128)) ** 0.5,
            (3 * 128) ** -0.5,
            0,
        ),
        ("vgg8", "stage4_conv1", (2 / (9 * 512)) ** 0.5, 0.01, 0),
        (
            "mobilenetv2",
            "group7_block1_conv2",
            (2 / (9 * 480)) ** 0.5,
            0.01,
            0,
        ),  # depthwise: fan-out of all channels
        (
            "shufflenetv1",
            "stage3_block2_conv3",
            (3 * 80) ** -0.5,
            (3 * 960) ** -0.5,
            (3 * 960) ** -0.5,
        ),
        (
            "shufflenetv2",
            "stage3_block2_conv1",
            (3 * 232) ** -0.5,
            (3 * 1024) ** -0.5,
            (3 * 1024) ** -0.5,
        ),
        (
            "resnet50",
            "stage4_block1_conv3",
            (2 / 2048) ** 0.5,
            (3 * 2048) ** -0.5,
            (3 * 2048) ** -0.5,
        ),
    ],
)
def test_standard_deviations_at_initialisation(name, layer, kernel, classifier, bias):
    @jax.jit  # which compiles these layers' random numbers only
    def init(key):
        params = models.create(name, 100).init(
            key, jnp.zeros((1, 8, 8, 3)), train=False
        )["params"]
        return (
            params[layer]["kernel"],
            params["classifier"]["kernel"],
            params["classifier"]["bias"],
        )

    leaves = init(jax.random.key(1))
    np.testing.assert_allclose(
        [leaf.std() for leaf in leaves[:2]], [kernel, classifier], rtol=0.02
    )
    assert float(leaves[2].std()) == pytest.approx(bias, rel=0.15)
    if bias:  # uniform up to √3 deviations
        assert all(float(jnp.abs(leaf).max()) <= 3**0.5 * bias for leaf in leaves[1:])


@functools.cache
def small():
    """A small model's variables and images."""
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1)) * 3 + 1
    init = jax.jit(functools.partial(models.create("resnet8", 10).init, train=False))
    return init(
        jax.random.key(1, impl="rbg"), images
    ), images  # this generator compiles fast


@functools.cache
def forward(precision):
    """Logits, features and updates of `small` in training."""
    model = models.create("resnet8", 10, precision=precision)
    apply = functools.partial(
        models.apply_with_features, model, train=True, mutable=("batch_stats",)
    )
    return jax.jit(apply)(*small())


@pytest.mark.parametrize("precision", models.PRECISIONS)
def test_precisions(precision):
    logits, features, updates = forward(precision)
    for leaf in jax.tree.leaves((small()[0], updates, logits, features["pooled"])):
        assert leaf.dtype == jnp.float32
    assert features["stage2"].dtype == (
        jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    )
    exact = forward("float32")[0]
    np.testing.assert_allclose(
        logits, exact, atol=0.2 if precision == "bfloat16" else 1e-5
    )
    if precision == "bfloat16":
        assert not np.array_equal(logits, exact)


def test_values_of_features():
    logits, features, updates = forward("float32")
    variables, images = small()
    plain = jax.jit(
        functools.partial(
            models.create("resnet8", 10).apply, train=True, mutable=["batch_stats"]
        )
    )
    plain_logits, plain_updates = plain(variables, images)
    assert set(plain_updates) == {"batch_stats"}
    jax.tree.map(
        np.testing.assert_array_equal, (plain_logits, plain_updates), (logits, updates)
    )
    assert all(
        float(features[f"stage{n}"].min()) < 0 for n in (1, 2, 3)
    )  # before the ReLU
    pooled = np.maximum(features["stage3"], 0).mean((1, 2))
    np.testing.assert_allclose(features["pooled"], pooled, rtol=1e-5, atol=1e-6)
    classifier = variables["params"]["classifier"]
    np.testing.assert_allclose(
        logits,
        pooled @ classifier["kernel"] + classifier["bias"][None],
        rtol=1e-4,
        atol=1e-5,
    )


def test_batch_norm_statistics():
    variables, images = small()
    conv = jax.lax.conv_general_dilated(
        images,
        variables["params"]["stem"]["kernel"],
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    running = forward("float32")[-1]["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(
        running["mean"], 0.1 * conv.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        running["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-4
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet8x5", 10), "did you mean 'resnet8x4'"),
        (("wrn_16_4", 10), "did you mean 'wrn_16_"),
        (
            ("alexnet", 10),
            "unknown model 'alexnet'.* The models are: resnet8, .*resnet50_imagenet",
        ),
        (("resnet8", 0), "num_classes=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(*arguments)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision='float16' must be one of"):
        models.create("resnet8", 10, precision="float16")


@pytest.mark.parametrize(
    "name, module, message",
    [("resnet8", "depth=9", "6n \\+ 2"), ("wrn_16_1", "depth=15", "6n \\+ 4")],
)
def test_impossible_depth(name, module, message):
    model = models.create(name, 10).clone(depth=int(module.removeprefix("depth=")))
    with pytest.raises(ValueError, match=f"{module} must be {message}"):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
        )
