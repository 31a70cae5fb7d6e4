"""ReviewKD: its loss and its fusion against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import losses, models
from ltkd_jax.models import review

# --- The loss ---

SHAPES = [(16, 3), (8, 5), (7, 4), (4, 6), (2, 3), (1, 8)]  # (height, channels)


def average_cells(x, side):
    """Averages over cells i from floor(i·n/side) to ceil((i + 1)·n/side)."""
    b, h, w, c = x.shape
    result = np.zeros((b, side, side, c))

    def cell(i, size):
        return slice(
            int(np.floor(i * size / side)), int(np.ceil((i + 1) * size / side))
        )

    for i in range(side):
        for j in range(side):
            result[:, i, j] = x[:, cell(i, h), cell(j, w)].mean(axis=(1, 2))
    return result


def mean_square(x):
    return (x**2).mean(axis=(1, 2, 3))


def expected_loss(students, teachers):
    """Returns the sum over features, from the formulas, in float64."""
    total = 0.0
    for student, teacher in zip(students, teachers):
        student = student.astype(np.float64)
        teacher = teacher.astype(np.float64)
        loss = mean_square(student - teacher)
        weight = 1.0
        sum_weights = 1.0
        for side in (4, 2, 1):
            if side < student.shape[1]:
                weight /= 2
                sum_weights += weight
                cells = average_cells(student, side) - average_cells(teacher, side)
                loss = loss + weight * mean_square(cells)
        total = total + loss / sum_weights
    return total


def draw_features(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    features = []
    for size, channels in SHAPES:
        x = rng.normal(size=(4, size, size, channels)) * scale
        features.append(x.astype(np.float32))
    return features


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_loss_equals_formulas(scale):
    students = draw_features(scale, 0)
    teachers = draw_features(scale, 1)
    actual = jax.jit(losses.hierarchical_context)(students, teachers)
    assert actual.shape == (4,) and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected_loss(students, teachers), rtol=1e-5)


def test_loss_gradient():
    """It equals finite differences; the teacher gets none."""
    students = draw_features(seed=2)
    teachers = draw_features(seed=3)

    def total(students, teachers):
        return losses.hierarchical_context(students, teachers).sum()

    gradient_fn = jax.jit(jax.grad(total, argnums=(0, 1)))
    student_gradient, teacher_gradient = gradient_fn(students, teachers)
    assert all(not np.asarray(leaf).any() for leaf in teacher_gradient)
    directions = draw_features(seed=4)
    step = 1e-4

    def moved_loss(sign):
        moved = []
        for student, direction in zip(students, directions):
            moved.append(student + sign * step * direction.astype(np.float64))
        return expected_loss(moved, teachers).sum()

    expected = (moved_loss(1) - moved_loss(-1)) / (2 * step)
    actual = sum((g * d).sum() for g, d in zip(student_gradient, directions))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_loss_of_bfloat16_is_float32():
    students = [jnp.asarray(x, jnp.bfloat16) for x in draw_features(seed=0)]
    teachers = [jnp.asarray(x, jnp.bfloat16) for x in draw_features(seed=1)]
    actual = jax.jit(losses.hierarchical_context)(students, teachers)
    assert actual.dtype == jnp.float32
    expected = expected_loss(
        [np.asarray(x, np.float32) for x in students],
        [np.asarray(x, np.float32) for x in teachers],
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_loss_bad_input():
    features = draw_features()
    with pytest.raises(ValueError, match="5 features of the student, 6 of the teacher"):
        losses.hierarchical_context(features[1:], features)
    with pytest.raises(ValueError, match="0 features"):
        losses.hierarchical_context((), ())
    with pytest.raises(AssertionError):
        losses.hierarchical_context([jnp.ones((2, 4, 4, 3))], [jnp.ones((2, 4, 4, 2))])


# --- The fusion ---

# (height, channels) of the student's maps, and of the teacher's.
STUDENT_MAPS = [(4, 6), (2, 5), (1, 5)]
TARGETS = ((8, 3), (2, 4), (1, 7))


def batch_norm(x, params):
    mean = x.mean(axis=(0, 1, 2))
    var = x.var(axis=(0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def convolve_3x3(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    result = 0.0
    for i in range(3):
        for j in range(3):
            result = result + padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return result


def resize_nearest(x, size):
    """Pixel i of the result is pixel floor(i · n / size)."""
    result = np.zeros((len(x), size, size, x.shape[-1]))
    for i in range(size):
        for j in range(size):
            result[:, i, j] = x[:, i * x.shape[1] // size, j * x.shape[2] // size]
    return result


def expected_fusion(params, maps):
    """Returns the fused maps in training mode, in float64, from the formulas."""
    fused = []
    deeper = None
    for level in (3, 2, 1):
        prefix = f"level{level}_"
        p = {}
        for key, value in params.items():
            if key.startswith(prefix):
                p[key.removeprefix(prefix)] = value
        x = maps[level - 1] @ p["conv1"]["kernel"][0, 0]
        x = batch_norm(x, p["norm1"])
        if deeper is not None:
            y = resize_nearest(deeper, x.shape[1])
            both = np.concatenate([x, y], axis=-1)
            z = both @ p["attention"]["kernel"] + p["attention"]["bias"]
            z = 1 / (1 + np.exp(-z))
            x = x * z[..., :1] + y * z[..., 1:]
        target_size, _ = TARGETS[level - 1]
        deeper = resize_nearest(x, target_size)
        output = convolve_3x3(deeper, p["conv2"]["kernel"])
        fused.insert(0, batch_norm(output, p["norm2"]))
    return fused


def test_fusion_equals_formulas():
    rng = np.random.default_rng(0)
    maps = []
    for size, channels in STUDENT_MAPS:
        maps.append(rng.normal(size=(3, size, size, channels)).astype(np.float32))
    maps = tuple(maps)
    fusion = review.Fusion(targets=TARGETS, precision=jax.lax.Precision.HIGHEST)
    variables = jax.jit(lambda: fusion.init(jax.random.key(0), maps, train=True))()
    # The scale and bias of a new batch norm are 1 and 0, which would hide a wrong use.
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        variables["params"],
    )
    apply = jax.jit(
        lambda v: fusion.apply(v, maps, train=True, mutable=["batch_stats"])
    )
    fused, _ = apply(variables | {"params": params})
    expected = expected_fusion(
        jax.tree.map(lambda x: np.asarray(x, np.float64), params),
        [x.astype(np.float64) for x in maps],
    )
    for actual, reference, (size, channels) in zip(fused, expected, TARGETS):
        assert actual.shape == (3, size, size, channels)
        np.testing.assert_allclose(actual, reference, rtol=1e-3, atol=1e-3)


# --- The student with a fusion ---


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def reviewed():
    student, teacher = models.create("resnet8", 5), models.create("resnet14", 5)
    return student, review.with_fusion(student, teacher, (8, 8, 1))


def test_fusion_leaves_the_student_unchanged():
    student, both = reviewed()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

    def init(model):
        return jax.jit(lambda key: model.init(key, images, train=False))

    key = jax.random.key(0)
    student_variables = init(student)(key)
    variables = init(both)(key)
    assert_trees_equal(student_variables["params"], variables["params"]["student"])

    @jax.jit
    def apply(variables, student_variables):
        return (
            both.apply(variables, images, train=False),
            student.apply(student_variables, images, train=False),
            both.apply_with_features(variables, images),
            both.apply(variables, images, train=True, mutable=["batch_stats"]),
        )

    evaluated, expected, with_features, trained = apply(variables, student_variables)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    logits, maps, updates = with_features
    logits_without_fusion, updates_without_fusion = trained
    np.testing.assert_allclose(logits, logits_without_fusion, rtol=1e-6)
    shapes = [x.shape[1:] for x in maps]
    assert shapes == [(8, 8, 16), (4, 4, 32), (2, 2, 64), (1, 1, 64)]

    batch_stats = variables["batch_stats"]
    new_stats = updates["batch_stats"]
    stats_without_fusion = updates_without_fusion["batch_stats"]
    structure = jax.tree.structure(batch_stats)
    assert jax.tree.structure(new_stats) == structure
    assert jax.tree.structure(stats_without_fusion) == structure
    # The fusion's statistics change only where it is applied.
    assert_trees_equal(stats_without_fusion["fusion"], batch_stats["fusion"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), new_stats, batch_stats)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("vgg8", "vgg13"),
        ("resnet8x4", "resnet32x4"),
        ("shufflenetv1", "wrn_40_2"),
        ("mobilenetv2", "resnet50"),
    ],
)
def test_pairs_of_the_paper(student, teacher):
    pair = models.create(student, 100), models.create(teacher, 100)
    both = review.with_fusion(*pair, (32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda x: both.init(jax.random.key(0), x, train=False), images
    )
    _, maps, _ = jax.eval_shape(both.apply_with_features, variables, images)
    assert tuple((x.shape[1], x.shape[-1]) for x in maps) == both.fusion.targets


def test_pair_without_matching_stages():
    pair = models.create("resnet8", 5), models.create("resnet18", 5)
    with pytest.raises(
        ValueError, match="the student has 3, the teacher 4: choose another pair"
    ):
        review.with_fusion(*pair, (32, 32, 3))
