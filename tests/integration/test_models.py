"""The models: published sizes, shapes, features, initialisation, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_models import SMALL_MODELS

from ltkd_jax import models

# Trainable parameters with 100 classes and 3 channels, as published for the common
# CIFAR distillation zoo, and millions of multiply-adds of one 32×32 image.
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
    # As torchvision has them, without 900 of the 1000 classes.
    "resnet18_imagenet": (11_689_512 - 900 * 513, None),
    "resnet34_imagenet": (21_797_672 - 900 * 513, None),
    "resnet50_imagenet": (25_557_032 - 900 * 2049, None),
}
# Features of a 32×32 image: (side, channels) of each stage, and D. A key is the
# beginning of a model's name; the first that fits counts.
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

IMAGE_MODELS = [name for name in models.REGISTRY if not name.startswith("mlp_")]


# Cached, because tracing a deep net takes up to a second.
@functools.cache
def trace(name):
    """Returns the equations of `init` on a 32×32 image, and its outputs' shapes."""
    model = models.create(name, 100)
    images = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(model.init_with_output, train=False, mutable=True)
    make_jaxpr = jax.make_jaxpr(lambda key: init(key, images), return_shape=True)
    return make_jaxpr(jax.random.key(0))


def multiply_adds(equation):
    """Returns the multiply-adds of an equation.

    At an image's borders, it counts as many as inside, as the zoo does.
    """
    if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
        return 0
    output_shape = equation.outvars[0].aval.shape
    # [h, w, in, out] or [in, out]
    kernel_shape = equation.invars[1].aval.shape
    return np.prod(output_shape) * np.prod(kernel_shape[:-1])


def expected_features(name, scale=1):
    """Returns the shapes, without B, for images of `scale` times 32 pixels."""
    prefix = next(prefix for prefix in FEATURES if name.startswith(prefix))
    stages, pooled_width = FEATURES[prefix]
    shapes = {"pooled": (pooled_width,)}
    for stage, (side, channels) in enumerate(stages, start=1):
        shapes[f"stage{stage}"] = (scale * side, scale * side, channels)
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    jaxpr, (_, variables) = trace(name)
    num_parameters, millions = PUBLISHED[name]
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == num_parameters
    if millions is not None:
        total = sum(multiply_adds(equation) for equation in jaxpr.eqns)
        assert total / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_logits_and_features(name):
    _, (logits, variables) = trace(name)
    assert logits.shape == (1, 100)
    assert logits.dtype == jnp.float32
    features = variables["intermediates"]
    shapes = {key: feature.shape[1:] for key, (feature,) in features.items()}
    assert shapes == expected_features(name)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_features_of_large_images(name):
    _, (_, outputs) = trace(name)
    variables = {key: outputs[key] for key in ("params", "batch_stats")}
    apply = functools.partial(
        models.apply_with_features,
        models.create(name, 100),
        train=True,
        mutable=("batch_stats",),
    )
    images = jax.ShapeDtypeStruct((5, 64, 64, 3), jnp.float32)
    logits, features, updates = jax.eval_shape(apply, variables, images)
    assert logits.shape == (5, 100)
    expected = expected_features(name, scale=2)
    if name.startswith("vgg"):
        # A large image is pooled once more.
        expected["stage4"] = (4, 4, 512)
    assert {key: x.shape for key, x in features.items()} == {
        key: (5, *shape) for key, shape in expected.items()
    }
    batch_stats = {"batch_stats": variables["batch_stats"]}
    assert jax.tree.structure(updates) == jax.tree.structure(batch_stats)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_grey_images(name):
    model = models.create(name, 100)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    assert set(variables) == {"params", "batch_stats"}
    images = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)
    apply = functools.partial(model.apply, train=False)
    assert jax.eval_shape(apply, variables, images).shape == (5, 100)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        (
            "vgg8",
            (2, 7, 32, 3),
            r"VGG takes .* at least 8×8 pixels, not an array of shape \[2, 7, 32, 3\]",
        ),
        ("resnet18_imagenet", (2, 0, 8, 3), r"ResNet takes .* at least 1×1 pixels"),
        ("mlp_1_32", (2, 8, 8, 3), r"MLP takes features .* shape \[2, 8, 8, 3\]: ch"),
        ("resnet8", (2, 8), r"CifarResNet takes .* shape \[2, 8\]: .*mlp_2_512"),
        (
            "resnet8",
            (8, 8, 3),
            r"CifarResNet takes images \[B, H, W, channels\] .* shape \[8, 8, 3\]",
        ),
    ],
)
def test_wrong_image_shape(name, shape, message):
    init = functools.partial(models.create(name, 10).init, train=False)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape))


def test_mlp():
    """The values of two hidden layers, by NumPy; the bias-free layers have one norm."""
    rng = np.random.default_rng(0)
    model = models.create("mlp_2_512", 7)
    x = rng.normal(size=(3, 5)).astype(np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    variables = jax.tree.map(
        lambda leaf: (
            rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            * np.sign(np.asarray(leaf) + 0.5)
        ),
        variables,
    )
    params = variables["params"]
    expected = x.astype(np.float64)
    for i in (1, 2):
        norm = params[f"hidden{i}_norm"]
        running = variables["batch_stats"][f"hidden{i}_norm"]
        expected = expected @ params[f"hidden{i}"]["kernel"].astype(np.float64)
        expected = (expected - running["mean"]) / np.sqrt(running["var"] + 1e-5)
        expected = np.maximum(expected * norm["scale"] + norm["bias"], 0)
    classifier = params["classifier"]
    expected = expected @ classifier["kernel"].astype(np.float64) + classifier["bias"]
    apply = functools.partial(models.apply_with_features, model, train=False)
    logits, features, _ = apply(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert features["pooled"].shape == (3, 512)
    assert {key: set(layer) for key, layer in params.items()} == {
        "hidden1": {"kernel"},
        "hidden2": {"kernel"},
        "hidden1_norm": {"scale", "bias"},
        "hidden2_norm": {"scale", "bias"},
        "classifier": {"kernel", "bias"},
    }
    low, _, _ = models.apply_with_features(
        models.create("mlp_2_512", 7, precision="bfloat16"), variables, x, train=False
    )
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, expected, rtol=0.05)
    assert not np.array_equal(low, logits)


# Standard deviations of a convolution's kernel, the classifier's kernel and its bias.
@pytest.mark.parametrize(
    "name, layer, conv_std, kernel_std, bias_std",
    [
        (
            "resnet8x4",
            "stage3_block1_conv2",
            (2 / (9 * 256)) ** 0.5,
            (3 * 256) ** -0.5,
            (3 * 256) ** -0.5,
        ),
        # A convolution of stride 2.
        (
            "resnet8x4",
            "stage2_block1_conv1",
            (2 / (9 * 128)) ** 0.5,
            (3 * 256) ** -0.5,
            (3 * 256) ** -0.5,
        ),
        (
            "wrn_16_2",
            "stage3_block1_conv2",
            (2 / (9 * 128)) ** 0.5,
            (3 * 128) ** -0.5,
            0,
        ),
        ("vgg8", "stage4_conv1", (2 / (9 * 512)) ** 0.5, 0.01, 0),
        # A depthwise convolution, with the fan-out of all channels.
        ("mobilenetv2", "group7_block1_conv2", (2 / (9 * 480)) ** 0.5, 0.01, 0),
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
def test_initial_standard_deviations(name, layer, conv_std, kernel_std, bias_std):
    # Under `jit`, XLA drops the random numbers of all other layers.
    @jax.jit
    def init(key):
        images = jnp.zeros((1, 8, 8, 3))
        params = models.create(name, 100).init(key, images, train=False)["params"]
        classifier = params["classifier"]
        return params[layer]["kernel"], classifier["kernel"], classifier["bias"]

    conv_kernel, kernel, bias = init(jax.random.key(1))
    np.testing.assert_allclose(conv_kernel.std(), conv_std, rtol=0.02)
    np.testing.assert_allclose(kernel.std(), kernel_std, rtol=0.02)
    assert float(bias.std()) == pytest.approx(bias_std, rel=0.15)
    if bias_std:
        # A uniform distribution ends at √3 standard deviations.
        bound = 3**0.5 * bias_std
        assert float(jnp.abs(kernel).max()) <= bound
        assert float(jnp.abs(bias).max()) <= bound


@functools.cache
def small_model():
    """Returns the variables and the images of a small model."""
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1)) * 3 + 1
    init = jax.jit(functools.partial(models.create("resnet8", 10).init, train=False))
    # The generator "rbg" compiles fast.
    return init(jax.random.key(1, impl="rbg"), images), images


@functools.cache
def forward(precision):
    """Returns logits, features and updates of `small_model` in training mode."""
    model = models.create("resnet8", 10, precision=precision)
    apply = functools.partial(
        models.apply_with_features, model, train=True, mutable=("batch_stats",)
    )
    return jax.jit(apply)(*small_model())


@pytest.mark.parametrize("precision", models.PRECISIONS)
def test_precisions(precision):
    variables, _ = small_model()
    logits, features, updates = forward(precision)
    for leaf in jax.tree.leaves((variables, updates, logits, features["pooled"])):
        assert leaf.dtype == jnp.float32
    exact_logits, _, _ = forward("float32")
    if precision == "bfloat16":
        assert features["stage2"].dtype == jnp.bfloat16
        np.testing.assert_allclose(logits, exact_logits, atol=0.2)
        assert not np.array_equal(logits, exact_logits)
    else:
        assert features["stage2"].dtype == jnp.float32
        np.testing.assert_allclose(logits, exact_logits, atol=1e-5)


def test_values_of_features():
    logits, features, updates = forward("float32")
    variables, images = small_model()
    apply = functools.partial(
        models.create("resnet8", 10).apply, train=True, mutable=["batch_stats"]
    )
    plain_logits, plain_updates = jax.jit(apply)(variables, images)
    assert set(plain_updates) == {"batch_stats"}
    np.testing.assert_array_equal(plain_logits, logits)
    jax.tree.map(np.testing.assert_array_equal, plain_updates, updates)
    # They are taken before the ReLU.
    for stage in (1, 2, 3):
        assert float(features[f"stage{stage}"].min()) < 0
    pooled = np.maximum(features["stage3"], 0).mean((1, 2))
    np.testing.assert_allclose(features["pooled"], pooled, rtol=1e-5, atol=1e-6)
    classifier = variables["params"]["classifier"]
    expected_logits = pooled @ classifier["kernel"] + classifier["bias"][None]
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics():
    variables, images = small_model()
    conv = jax.lax.conv_general_dilated(
        images,
        variables["params"]["stem"]["kernel"],
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    _, _, updates = forward("float32")
    running = updates["batch_stats"]["stem_norm"]
    mean = 0.1 * conv.mean((0, 1, 2))
    variance = 0.9 + 0.1 * conv.var((0, 1, 2))
    np.testing.assert_allclose(running["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], variance, rtol=1e-4)


def apply_to_drawn_variables(model):
    """Returns logits and features, and the number of norms, in float64."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape), shapes)
    apply = functools.partial(models.apply_with_features, model, train=False)
    # Only a norm subtracts from a feature map.
    equations = jax.make_jaxpr(apply)(variables, images).eqns
    num_norms = sum(
        equation.primitive.name == "sub" and equation.outvars[0].aval.ndim == 4
        for equation in equations
    )
    logits, features, _ = jax.jit(apply)(variables, images)
    return (logits, features), num_norms


@pytest.mark.parametrize(
    "name", sorted(set(SMALL_MODELS) - {"resnet18", "resnet18_imagenet"})
)
def test_folded_norms(name):
    with jax.enable_x64(True):
        model = models.create(name, 10)
        expected, num_norms = apply_to_drawn_variables(model)
        actual, num_left = apply_to_drawn_variables(models.fold_norms(model))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), actual, expected
    )
    # The other norms of the wide ResNet follow a sum, whose terms are used as well.
    expected_left = 7 if name == "wrn_16_1" else 0
    assert num_norms > num_left == expected_left


def test_folding_keeps_variables_and_training():
    variables, images = small_model()
    model = models.fold_norms(models.create("resnet8", 10))
    initial = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(1), images
    )
    assert jax.tree.structure(initial) == jax.tree.structure(variables)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, _ = jax.jit(apply)(variables, images)
    np.testing.assert_array_equal(logits, forward("float32")[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("resnet8x5", 10), "did you mean 'resnet8x4'"),
        (("wrn_16_4", 10), "did you mean 'wrn_16_"),
        (
            ("alexnet", 10),
            "unknown model 'alexnet'.* are: resnet8, .*resnet50_imagenet.*--import",
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
    "name, depth, form", [("resnet8", 9, "6n \\+ 2"), ("wrn_16_1", 15, "6n \\+ 4")]
)
def test_impossible_depth(name, depth, form):
    model = models.create(name, 10).clone(depth=depth)
    init = functools.partial(model.init, train=False)
    with pytest.raises(ValueError, match=f"depth={depth} must be {form}"):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_register():
    with pytest.raises(
        ValueError, match="'resnet8' already, of ltkd_jax.models.resnet"
    ):
        models.register("resnet8", lambda num_classes, **_: None)
    assert models.create("resnet8", 10).num_classes == 10
