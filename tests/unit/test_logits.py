"""Files of logits: every form of them, round trips, and errors that name the array, the value and the remedy."""

import numpy as np
import pytest

from ltkd_jax.data import logits
from ltkd_jax.data.logits import LogitsError, LogitsFile

C = 6


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
        "log_probabilities": log_softmax(z).astype(np.float32)
    },
}


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("form", FORMS)
def test_file_forms_are_equal(form, savez, tmp_path):
    z, labels = draw()
    savez(tmp_path / "x.npz", **FORMS[form](z), labels=labels.astype(">i2"))
    examples = LogitsFile(tmp_path / "x.npz").logits()
    assert examples.labels.tolist() == labels.tolist() and examples.num_classes == C
    blocks = list(examples.blocks(16))
    assert [block.shape for block in blocks] == [(16, C), (16, C), (8, C)]
    np.testing.assert_allclose(
        np.concatenate(blocks), z - z.max(axis=1, keepdims=True), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        log_softmax(examples.to_logits()), log_softmax(z), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "dtype, exponent", [(np.float16, -24), (np.float32, -149), (np.float64, -1074)]
)
@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_probability_zero_is_the_smallest_of_its_type(dtype, exponent, kind):
    p = np.array([[1, 0, 0]], dtype)
    with np.errstate(divide="ignore"):
        values = p if kind == "probabilities" else np.log(p)
    (block,) = logits.from_arrays(values, [1], kind=kind).blocks(8)
    np.testing.assert_allclose(
        block, [[0, exponent * np.log(2), exponent * np.log(2)]], rtol=1e-6
    )


def test_probability_zero_is_the_smallest_of_its_row():
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
        "labels is int64[40, 6]; give integers [N], such as np.argm",
    ),
    ("logits", lambda z, y: (z, y[1:]), "labels holds 39 labels for 40 rows"),
    ("logits", lambda z, y: (z, y - 1), "labels[7]=-1, and 6 of 40 are outside 0..5"),
    (
        "logits",
        lambda z, y: (np.where(np.arange(40)[:, None] == 3, -np.inf, z), y),
        "the first is row 3, from -inf",
    ),
    (
        "logits",
        lambda z, y: (np.where(np.arange(40)[:, None] == 3, 1e300, z), y),
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
def test_arrays_that_do_not_fit(kind, change, message):
    values, labels = change(*draw())
    with pytest.raises(LogitsError) as raised:
        logits.from_arrays(values, labels, kind=kind, source="the file")
    assert str(raised.value).startswith("the file: ") and message in str(raised.value)


def test_keys_that_do_not_fit():
    z, labels = draw()
    with pytest.raises(LogitsError, match=r"keys is \[39\]"):
        logits.from_arrays(z, labels, keys=labels[1:])


def test_bad_rows_are_counted():
    z = np.zeros((9000, C), np.float16)
    z[[4999, 5001, 8999], 2] = np.nan
    with pytest.raises(
        LogitsError, match="3 of 9000 rows hold NaN .* the first is row 4999"
    ):
        logits.from_arrays(z, np.zeros(9000, int))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a file of arrays", b"\x93NUMPY", None]
)
def test_file_that_is_no_archive(tmp_path, content):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(
        LogitsError, match=r"x.npz cannot be read .*; write one by np.savez\(\"x.npz\""
    ):
        LogitsFile(tmp_path / "x.npz")


def test_file_that_is_damaged(tmp_path):
    z, labels = draw()
    np.savez(tmp_path / "x.npz", logits=z, labels=labels)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(LogitsError, match="x.npz: logits is damaged .*CRC"):
        LogitsFile(tmp_path / "x.npz").logits()


def test_file_that_lacks_an_array(tmp_path):
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
