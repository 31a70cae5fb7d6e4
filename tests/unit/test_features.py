"""Files of features: what is read from them, and every mistake in them."""

import numpy as np
import pytest

from ltkd_jax.data import augment, datasets, features


def arrays(num_train=12, num_test=6, columns=4):
    """Returns the arrays of a small file, with three classes."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(3.0, 20.0, (num_train, columns)).astype(np.float32),
        "y": np.arange(num_train) % 3,
        "x_test": rng.normal(3.0, 20.0, (num_test, columns)).astype(np.float32),
        "y_test": np.arange(num_test) % 3,
    }


def load(folder, **changes):
    """Writes the file with changes, of which None removes an array, and loads it."""
    content = {**arrays(), **changes}
    content = {name: array for name, array in content.items() if array is not None}
    np.savez(folder / "points.npz", **content)
    return datasets.load("points", folder)


def test_source(tmp_path):
    expected = arrays()
    source = load(tmp_path)
    assert source.name == "points" and source.views.num == 1
    assert source.class_names == ("0", "1", "2") and source.num_classes == 3
    for images, suffix in ((source.train, ""), (source.test, "_test")):
        np.testing.assert_array_equal(images.images, expected[f"x{suffix}"])
        np.testing.assert_array_equal(images.labels, expected[f"y{suffix}"])
        assert images.images.dtype == np.float32 and images.labels.dtype == np.int32
        assert images.shape == (4,)
    x = expected["x"].astype(np.float64)
    np.testing.assert_allclose(source.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(source.std, x.std(axis=0), rtol=1e-12)
    normalized = augment.normalize(source.train.images, source.mean, source.std)
    np.testing.assert_allclose(
        normalized, (x - x.mean(axis=0)) / x.std(axis=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "keys", [np.arange(12)[::-1] + 10, np.array(list("lkjihgfedcba"))]
)
def test_names_and_keys(tmp_path, keys):
    names = np.array([b"cat", b"dog", b"eel"])
    source = load(tmp_path, keys=keys, class_names=names)
    assert source.class_names == ("cat", "dog", "eel")
    # Sorted by key, so reversed, with the rows and the labels.
    assert source.train.keys.tolist() == sorted(keys.astype(str))
    np.testing.assert_array_equal(source.train.images, arrays()["x"][::-1])
    np.testing.assert_array_equal(source.train.labels, arrays()["y"][::-1])
    assert source.test.keys[5] == "row_00000005"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16, np.uint8, bool])
def test_types(tmp_path, dtype):
    x = (
        np.arange(48).reshape(12, 4) % 5 > 1
        if dtype is bool
        else np.arange(48).reshape(12, 4)
    )
    source = load(tmp_path, x=x.astype(dtype), x_test=x.astype(dtype)[:6])
    np.testing.assert_array_equal(source.train.images, x.astype(np.float32))


def test_extreme_columns(tmp_path):
    """Columns of any scale and shift that float32 has are normalised."""
    x = arrays()["x"].astype(np.float64)
    x = x / np.abs(x).max() * [1e-29, 1e30, 1.0, 1.0] + [0, 0, 1e4, -1e-4]
    source = load(tmp_path, x=x, x_test=x[:6])
    normalized = augment.normalize(source.train.images, source.mean, source.std)
    expected = (x - x.mean(axis=0)) / x.std(axis=0)
    np.testing.assert_allclose(normalized, expected, atol=0.01)


def test_constant_columns(tmp_path):
    """They become 0, also where the mean of equal numbers is rounded."""
    x = arrays()["x"] * [0, 0, 1e-40, 1] + [0, 0.1, 0, 0]
    source = load(tmp_path, x=x, x_test=x[:6] + 1)
    normalized = augment.normalize(source.train.images, source.mean, source.std)
    np.testing.assert_allclose(normalized[:, :3], 0, atol=1e-6)
    # A value of the test set that differs is not magnified.
    normalized = augment.normalize(source.test.images, source.mean, source.std)
    np.testing.assert_allclose(normalized[:, :3], 1, rtol=1e-5)


def with_value(name, row, column, value):
    x = arrays()[name].astype(np.float64)
    x[row, column] = value
    return {name: x}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(x_test=None, y_test=None),
            "arrays x, y; it lacks x_test, y_test: .*test",
        ),
        (dict(y=None), "it lacks y:"),
        (
            dict(x=np.zeros((12, 2, 2))),
            r"x is float64\[12, 2, 2\]; .*\[N, D\].*reshape",
        ),
        (dict(x=np.zeros(12)), r"x is float64\[12\]; .*\[N, D\]"),
        (dict(x=np.zeros((12, 0))), r"x is float64\[12, 0\]"),
        (dict(x=np.full((12, 4), "a")), r"x is <U1\[12, 4\]; give numbers"),
        (dict(x=np.zeros((12, 4), complex)), "x is complex128"),
        (dict(x=np.array([[None] * 4] * 12)), "x is not a plain array.*give numbers"),
        (dict(x_test=np.ones((6, 3))), r"x_test is of shape \[6, 3\]; give the 4 col"),
        (with_value("x", 7, 2, np.nan), r"x\[7, 2\]=nan: 1 values .*fill them in"),
        (with_value("x_test", 5, 0, -np.inf), r"x_test\[5, 0\]=-inf: 1 values"),
        (with_value("x", 0, 3, 1e39), r"x\[0, 3\]=1e\+39: 1 values .*beyond ±1e\+30"),
        (dict(y=np.arange(12) % 3 + 1), "y holds 3 different labels, from 1 to 3: .*0"),
        (dict(y=np.arange(12) % 3 - 1), "y holds 3 different labels, from -1 to 1"),
        (dict(y=np.arange(12) % 3 * 10**12), "from 0 to 20+: .*without gaps"),
        (dict(y=np.arange(12) % 3 * 2), "from 0 to 4: count them from 0 without gaps"),
        (dict(y=np.arange(12) % 3.0), r"y is float64\[12\]; .*integers"),
        (dict(y=np.eye(12)), r"y is float64\[12, 12\]"),
        (dict(y=np.array(["a"] * 12)), r"y is <U1\[12\]; .*return_inverse"),
        (dict(y=np.arange(10) % 3), "y holds 10 labels for the 12 rows of x: give one"),
        (dict(y_test=np.arange(6) % 4), r"y_test\[3\]=3: 1 labels are outside 0\.\.2"),
        (dict(y_test=np.arange(5) % 3), "y_test holds 5 labels for the 6 rows of x_t"),
        (
            dict(x_test=np.zeros((0, 4)), y_test=np.zeros(0, int)),
            "y_test .*at least one",
        ),
        (dict(x=np.zeros((0, 4)), y=np.zeros(0, int)), r"y is int64\[0\]"),
        (dict(class_names=["a", "b"]), r"y\[2\]=2: 4 labels are outside 0\.\.1"),
        (dict(class_names=["a", "b", "a"]), "class_names has 'a' twice"),
        (dict(class_names=list("abcd")), "y has no row of class 3 .1 of 4 classes"),
        (dict(class_names=[["a"]]), r"class_names: shape \(1, 1\)"),
        (dict(class_names=np.array(["a", None])), "class_names is not a plain array"),
        (dict(keys=["a"] * 12), "keys: 'a' occurs 12 times"),
        (dict(keys_test=["a"] * 5), "keys_test: 5 keys for 6 labels"),
        (dict(keys=np.arange(12.0)), r"keys\[0\]=0.0 is of type float"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"points.npz.*{message}"):
        load(tmp_path, **changes)


def test_images_are_no_features(tmp_path):
    with pytest.raises(ValueError, match="points.npz.*pixels: set data.image_size=32"):
        np.savez(tmp_path / "points.npz", **arrays())
        datasets.load("points", tmp_path, size=32)


@pytest.mark.parametrize("name", ["../points", "points.npz", "other", ""])
def test_other_names(tmp_path, name):
    load(tmp_path)
    assert features.find(name, tmp_path) is None


@pytest.mark.parametrize("name", ["My-Emb", "v1.2", "my points"])
def test_any_name_that_is_no_path(tmp_path, name):
    np.savez(tmp_path / f"{name}.npz", **arrays())
    assert datasets.load(name, tmp_path).name == name


def test_no_archive(tmp_path):
    (tmp_path / "points.npz").write_text("x,y")
    with pytest.raises(ValueError, match=r"points.npz cannot be read.*x_test=x_test"):
        datasets.load("points", tmp_path)


def test_rows(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, x=[[1, 2], [3, 4]], keys=["b", "a"])
    x, keys = features.read_rows(path)
    assert x.tolist() == [[1, 2], [3, 4]] and keys.tolist() == ["b", "a"]
    np.savez(path, rows=x)
    with pytest.raises(ValueError, match="rows.npz has the arrays rows; it lacks x"):
        features.read_rows(path)
    path.write_text("1,2")
    with pytest.raises(ValueError, match=r'np.savez\("rows.npz", x=x\)'):
        features.read_rows(path)
