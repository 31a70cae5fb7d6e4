"""ReviewKD: its loss and its fusion against float64 NumPy, and a student that is the same with and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import losses, models
from ltkd_jax.models import review

SHAPES = [(16, 3), (8, 5), (7, 4), (4, 6), (2, 3), (1, 8)]


def cells(x, side):
    """Adaptive average pooling as its definition says: cell i covers floor(i·n/side) to ceil((i + 1)·n/side)."""
    b, h, w, c = x.shape
    out = np.zeros((b, side, side, c))
    for i in range(side):
        for j in range(side):
            rows = slice(int(np.floor(i * h / side)), int(np.ceil((i + 1) * h / side)))
            columns = slice(
                int(np.floor(j * w / side)), int(np.ceil((j + 1) * w / side))
            )
            out[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return out


def context(students, teachers):
    """The sum over features of the loss, written from its formulas, in float64."""
    total = 0.0
    for student, teacher in zip(students, teachers):
        student, teacher = student.astype(np.float64), teacher.astype(np.float64)
        loss, weight, weights = (
            ((student - teacher) ** 2).mean(axis=(1, 2, 3)),
            1.0,
            1.0,
        )
        for side in (4, 2, 1):
            if side < student.shape[1]:
                weight /= 2
                weights += weight
                loss = loss + weight * (
                    (cells(student, side) - cells(teacher, side)) ** 2
                ).mean(axis=(1, 2, 3))
        total = total + loss / weights
    return total


def features(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(4, size, size, c)) * scale).astype(np.float32)
        for size, c in SHAPES
    ]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_loss_is_its_formulas(scale):
    students, teachers = features(scale, 0), features(scale, 1)
    got = jax.jit(losses.hierarchical_context)(students, teachers)
    assert got.shape == (4,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, context(students, teachers), rtol=1e-5)


def test_its_gradient_is_that_of_finite_differences_and_none_goes_into_the_teacher():
    students, teachers = features(seed=2), features(seed=3)
    loss = lambda s, t: losses.hierarchical_context(s, t).sum()
    by_student, by_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(students, teachers)
    assert all(not np.asarray(leaf).any() for leaf in by_teacher)
    direction = features(seed=4)
    up, down = (
        [s + sign * 1e-4 * d.astype(np.float64) for s, d in zip(students, direction)]
        for sign in (1, -1)
    )
    slope = (context(up, teachers) - context(down, teachers)).sum() / 2e-4
    np.testing.assert_allclose(
        sum((g * d).sum() for g, d in zip(by_student, direction)), slope, rtol=1e-4
    )


def test_in_bfloat16_it_is_accumulated_in_float32():
    students, teachers = (
        [jnp.asarray(x, jnp.bfloat16) for x in features(seed=s)] for s in (0, 1)
    )
    got = jax.jit(losses.hierarchical_context)(students, teachers)
    assert got.dtype == jnp.float32
    exact = context(
        *([np.asarray(x, np.float32) for x in part] for part in (students, teachers))
    )
    np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_another_number_or_shape_of_features_is_an_error():
    with pytest.raises(ValueError, match="5 features of the student, 6 of the teacher"):
        losses.hierarchical_context(features()[1:], features())
    with pytest.raises(ValueError, match="0 features"):
        losses.hierarchical_context((), ())
    with pytest.raises(AssertionError):
        losses.hierarchical_context([jnp.ones((2, 4, 4, 3))], [jnp.ones((2, 4, 4, 2))])


# The fusion.

IN, TARGETS = [(4, 6), (2, 5), (1, 5)], ((8, 3), (2, 4), (1, 7))


def norm(x, part):
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * part["scale"] + part["bias"]


def conv3(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return sum(
        padded[:, i : i + h, j : j + w] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def nearest(x, size):
    """By loops: pixel i of the result is pixel floor(i · n / size)."""
    out = np.zeros((len(x), size, size, x.shape[-1]))
    for i in range(size):
        for j in range(size):
            out[:, i, j] = x[:, i * x.shape[1] // size, j * x.shape[2] // size]
    return out


def fused(params, maps):
    """The fusion's forward in training mode, in float64, from the deepest feature on."""
    results, deeper = [], None
    for level in (3, 2, 1):
        p = {
            key.removeprefix(f"level{level}_"): value
            for key, value in params.items()
            if f"level{level}" in key
        }
        x = norm(maps[level - 1] @ p["conv1"]["kernel"][0, 0], p["norm1"])
        if deeper is not None:
            y = nearest(deeper, x.shape[1])
            z = (
                np.concatenate([x, y], axis=-1) @ p["attention"]["kernel"]
                + p["attention"]["bias"]
            )
            z = 1 / (1 + np.exp(-z))
            x = x * z[..., :1] + y * z[..., 1:]
        deeper = nearest(x, TARGETS[level - 1][0])
        results.insert(0, norm(conv3(deeper, p["conv2"]["kernel"]), p["norm2"]))
    return results


def test_the_fusion_is_its_formulas():
    rng = np.random.default_rng(0)
    maps = tuple(
        rng.normal(size=(3, size, size, c)).astype(np.float32) for size, c in IN
    )
    fusion = review.Fusion(targets=TARGETS, precision=jax.lax.Precision.HIGHEST)
    variables = jax.jit(lambda: fusion.init(jax.random.key(0), maps, train=True))()
    # Batch norm's scale and bias are 1 and 0 at first, which would hide a wrong use of them.
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        variables["params"],
    )
    apply = jax.jit(
        lambda v: fusion.apply(v, maps, train=True, mutable=["batch_stats"])
    )
    got, _ = apply(variables | {"params": params})
    expected = fused(
        jax.tree.map(lambda x: np.asarray(x, np.float64), params),
        [x.astype(np.float64) for x in maps],
    )
    for ours, truth, (size, channels) in zip(got, expected, TARGETS):
        assert ours.shape == (3, size, size, channels)
        np.testing.assert_allclose(ours, truth, rtol=1e-3, atol=1e-3)


def reviewed():
    student, teacher = models.create("resnet8", 5), models.create("resnet14", 5)
    return student, review.with_fusion(student, teacher, (8, 8, 1))


def test_the_student_beside_a_fusion_is_the_student_alone():
    student, both = reviewed()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    key = jax.random.key(0)
    alone, variables = (
        jax.jit(lambda k, m=m: m.init(k, images, train=False))(key)
        for m in (student, both)
    )
    jax.tree.map(
        np.testing.assert_array_equal, alone["params"], variables["params"]["student"]
    )
    evaluated, expected, (logits, maps, updates), (without, plain) = jax.jit(
        lambda v, a: (
            both.apply(v, images, train=False),
            student.apply(a, images, train=False),
            both.apply_with_features(v, images),
            both.apply(v, images, train=True, mutable=["batch_stats"]),
        )
    )(variables, alone)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    np.testing.assert_allclose(logits, without, rtol=1e-6)
    assert [x.shape[1:] for x in maps] == [
        (8, 8, 16),
        (4, 4, 32),
        (2, 2, 64),
        (1, 1, 64),
    ]
    structure = jax.tree.structure(variables["batch_stats"])
    assert (
        jax.tree.structure(updates["batch_stats"])
        == structure
        == jax.tree.structure(plain["batch_stats"])
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        plain["batch_stats"]["fusion"],
        variables["batch_stats"]["fusion"],
    )
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        updates["batch_stats"],
        variables["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("vgg8", "vgg13"),
        ("resnet8x4", "resnet32x4"),
        ("shufflenetv1", "wrn_40_2"),
        ("mobilenetv2", "resnet50"),
    ],
)
def test_the_papers_pairs_fit(student, teacher):
    pair = models.create(student, 100), models.create(teacher, 100)
    both = review.with_fusion(*pair, (32, 32, 3))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda x: both.init(jax.random.key(0), x, train=False), images
    )
    _, maps, _ = jax.eval_shape(both.apply_with_features, variables, images)
    assert tuple((x.shape[1], x.shape[-1]) for x in maps) == both.fusion.targets


def test_a_pair_without_matching_stages_is_an_error():
    pair = models.create("resnet8", 5), models.create("resnet18", 5)
    with pytest.raises(
        ValueError, match="the student has 3, the teacher 4: choose another pair"
    ):
        review.with_fusion(*pair, (32, 32, 3))
