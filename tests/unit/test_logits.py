"""Files of logits: their forms, round trips, and errors."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax.data import logits
from ltkd_jax.data.logits import LogitsError, LogitsFile

C = 6
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def draw(number=40):
    rng = np.random.default_rng(0)
    return rng.normal(size=(number, C)) * 2, rng.integers(0, C, number)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


FORMS = {
    "float64": lambda z: {"logits": z},
    "by_columns": lambda z: {"logits": np.asfortranarray(z)},
    "big_endian": lambda z: {"logits": z.astype(">f4")},
    "probabilities": lambda z: {"probabilities": np.exp(log_softmax(z))},
    "log_probabilities": lambda z: {
        "log_probabilities": log_softmax(z).astype(np.float32),
    },
}


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("form", FORMS)
def test_file_forms(form, savez, tmp_path):
    z, labels = draw()
    savez(tmp_path / "x.npz", **FORMS[form](z), labels=labels.astype(">i2"))
    examples = LogitsFile(tmp_path / "x.npz").logits()
    assert examples.labels.tolist() == labels.tolist() and examples.num_classes == C
    blocks = list(examples.blocks(16))
    assert [block.shape for block in blocks] == [(16, C), (16, C), (8, C)]
    below_max = z - z.max(axis=1, keepdims=True)
    assert_close(np.concatenate(blocks), below_max)
    assert_close(log_softmax(examples.to_logits()), log_softmax(z))


@pytest.mark.parametrize(
    "dtype, exponent", [(np.float16, -24), (np.float32, -149), (np.float64, -1074)]
)
@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_probability_zero_of_its_type(dtype, exponent, kind):
    """It counts as the smallest positive number of its type."""
    values = np.array([[1, 0, 0]], dtype)
    if kind == "log_probabilities":
        with np.errstate(divide="ignore"):
            values = np.log(values)
    (block,) = logits.from_arrays(values, [1], kind=kind).blocks(8)
    smallest = exponent * np.log(2)
    np.testing.assert_allclose(block, [[0, smallest, smallest]], rtol=1e-6)


def test_probability_zero_of_its_row():
    """A log of −inf counts as the smallest finite one of its row."""
    values = np.array([[0, -200, -np.inf]], np.float32)
    (block,) = logits.from_arrays(values, [1], kind="log_probabilities").blocks(8)
    assert block.tolist() == [[0, -200, -200]]


def test_save_and_read(tmp_path):
    z, labels = draw()
    names = [f"image {i}" for i in range(len(z))]
    test = logits.from_arrays(z, labels, keys=names)
    train = logits.from_arrays(
        np.exp(log_softmax(z[:7])), labels[:7], kind="probabilities"
    )
    logits.save(tmp_path / "x.npz", test, train, class_counts=np.arange(C))
    file = LogitsFile(tmp_path / "x.npz")
    assert set(file.names) == {
        "logits",
        "labels",
        "keys",
        "train_probabilities",
        "train_labels",
        "class_counts",
    }
    assert file.array("class_counts").tolist() == list(range(C))
    assert file.has_logits() and file.has_logits(logits.TRAIN_PREFIX)
    for examples, saved in (
        (test, file.logits()),
        (train, file.logits(logits.TRAIN_PREFIX)),
    ):
        np.testing.assert_array_equal(saved.values, examples.values)
        np.testing.assert_array_equal(saved.labels, examples.labels)
        assert saved.kind == examples.kind
    assert (
        file.logits().keys.tolist() == names
        and file.logits(logits.TRAIN_PREFIX).keys is None
    )


def test_views(tmp_path):
    z, labels = draw()
    views = np.stack([z, z + 1], axis=1)
    np.savez(tmp_path / "x.npz", train_logits=views, train_labels=labels)
    file = LogitsFile(tmp_path / "x.npz")
    assert file.logits(logits.TRAIN_PREFIX, views=True).to_logits().shape == (40, 2, C)
    with pytest.raises(
        LogitsError, match=r"train_logits is float64\[40, 2, 6\]; give floats \[N, C\]"
    ):
        file.logits(logits.TRAIN_PREFIX)
    views[3, 1, 0] = np.nan
    with pytest.raises(LogitsError, match="1 of 40 rows"):
        logits.from_arrays(views, labels, views=True)


def with_row(z, value, row=3):
    z = z.copy()
    z[row] = value
    return z


# (kind, change of values and labels, message)
ERRORS = [
    ("logits", lambda z, y: (z[0], y), "floats [N, C]"),
    ("logits", lambda z, y: (z.astype(int), y), "logits is int64[40, 6]"),
    (
        "logits",
        lambda z, y: (z[:, :1], y),
        "[40, 1]; give at least 1 row and 2 classes",
    ),
    ("logits", lambda z, y: (z[:0], y[:0]), "[0, 6]; give at least 1 row"),
    (
        "logits",
        lambda z, y: (z, y.astype(np.float32)),
        "labels is float32[40]; give integers [N], such as labels.ast",
    ),
    (
        "logits",
        lambda z, y: (z, np.eye(C, dtype=int)[y]),
        "labels is int64[40, 6], labels that are one-hot: give np.argmax",
    ),
    (
        "logits",
        lambda z, y: (z, np.eye(C)[y]),
        "labels is float64[40, 6], labels that are one-hot: give np.argmax",
    ),
    ("logits", lambda z, y: (z, y[:, None]), "labels is int64[40, 1]; give integers"),
    ("logits", lambda z, y: (z, y + 1), "labels run from 1 to 6, the number of"),
    (
        "logits",
        lambda z, y: (np.exp(log_softmax(z)), y),
        "logits: all 40 rows are non-negative and sum to 1, so they are probabilities",
    ),
    (
        "logits",
        lambda z, y: (np.exp(log_softmax(z)).astype(np.float16), y),
        "name the array probabilities",
    ),
    ("logits", lambda z, y: (np.eye(C)[y], y), "so they are probabilities"),
    (
        "logits",
        lambda z, y: (z.astype(jnp.bfloat16), y),
        "logits is bfloat16[40, 6]: NumPy cannot read bfloat16",
    ),
    ("logits", lambda z, y: (z, y[1:]), "labels holds 39 labels for 40 rows"),
    ("logits", lambda z, y: (z, y - 1), "labels[7]=-1, and 6 of 40 are outside 0..5"),
    (
        "logits",
        lambda z, y: (with_row(z, -np.inf), y),
        "the first is row 3, from -inf",
    ),
    (
        "logits",
        lambda z, y: (with_row(z, 1e300), y),
        "1 of 40 rows hold NaN or infinite",
    ),
    (
        "probabilities",
        lambda z, y: (z, y),
        "probabilities: 40 of 40 rows are no probabilities",
    ),
    (
        "log_probabilities",
        lambda z, y: (z, y),
        "40 of 40 rows are no logs of probabilities",
    ),
]


@pytest.mark.parametrize(
    "kind, change, message", ERRORS, ids=[message for _, _, message in ERRORS]
)
def test_arrays_bad_input(kind, change, message):
    values, labels = change(*draw())
    with pytest.raises(LogitsError) as raised:
        logits.from_arrays(values, labels, kind=kind, source="the file")
    error = str(raised.value)
    assert error.startswith("the file: ") and message in error


def test_keys_bad_input():
    z, labels = draw()
    with pytest.raises(LogitsError, match=r"keys is \[39\]"):
        logits.from_arrays(z, labels, keys=labels[1:])
    with pytest.raises(
        LogitsError, match=r"arrays: train_keys\[0\]=b'\\xff' is not UTF"
    ):
        logits.from_arrays(z, labels, keys=np.array([b"\xff"] * 40), prefix="train_")


def test_keys_as_bytes(tmp_path):
    z, labels = draw()
    keys = np.array([f"image {i}" for i in range(len(z))])
    np.savez(tmp_path / "x.npz", logits=z, labels=labels, keys=keys.astype("S20"))
    assert LogitsFile(tmp_path / "x.npz").logits().keys.tolist() == keys.tolist()
    # NumPy would have to unpickle objects, which may run code.
    np.savez(tmp_path / "x.npz", logits=z, labels=labels, keys=keys.astype(object))
    with pytest.raises(LogitsError, match="keys is not a plain array.* dtype=str"):
        LogitsFile(tmp_path / "x.npz").logits()


def test_file_of_bfloat16(tmp_path):
    z, labels = draw()
    np.savez(tmp_path / "x.npz", logits=z.astype(jnp.bfloat16), labels=labels)
    message = r"x.npz: logits is \|V2\[40, 6\]: .*bfloat16.*save .astype\(np.float32\)"
    with pytest.raises(LogitsError, match=message):
        LogitsFile(tmp_path / "x.npz").logits()


def test_some_rows_of_logits_are_distributions():
    """A few rows, or all but one, may be logits that sum to 1 by chance."""
    z, labels = draw()
    p = np.exp(log_softmax(z))
    logits.from_arrays(p[:9], labels[:9])
    logits.from_arrays(with_row(p, -1.0, row=39), labels)
    with pytest.raises(LogitsError, match="name the array train_probabilities"):
        views = np.stack([p, p], axis=1)
        logits.from_arrays(views, labels, prefix="train_", views=True)


def test_number_of_bad_rows():
    z = np.zeros((9000, C), np.float16)
    z[[4999, 5001, 8999], 2] = np.nan
    with pytest.raises(
        LogitsError, match="3 of 9000 rows hold NaN .* the first is row 4999"
    ):
        logits.from_arrays(z, np.zeros(9000, int))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a file of arrays", b"\x93NUMPY", None]
)
def test_file_is_no_archive(tmp_path, content):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(
        LogitsError, match=r"x.npz cannot be read .*; write one by np.savez\(\"x.npz\""
    ):
        LogitsFile(tmp_path / "x.npz")


def test_file_is_damaged(tmp_path):
    z, labels = draw()
    np.savez(tmp_path / "x.npz", logits=z, labels=labels)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(LogitsError, match="x.npz: logits is damaged .*CRC"):
        LogitsFile(tmp_path / "x.npz").logits()


def test_file_lacks_an_array(tmp_path):
    z, labels = draw()
    np.savez(
        tmp_path / "x.npz", output=z, train_logits=z, names=np.array(["a"], object)
    )
    file = LogitsFile(tmp_path / "x.npz")
    with pytest.raises(
        LogitsError,
        match="arrays output, train_logits, names; it lacks logits or .* and labels",
    ):
        file.logits()
    with pytest.raises(LogitsError, match="lacks train_labels$"):
        file.logits(logits.TRAIN_PREFIX)
    with pytest.raises(LogitsError, match="names is not a plain array"):
        file.array("names")
