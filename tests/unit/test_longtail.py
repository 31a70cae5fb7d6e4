"""Tests the long-tailed draw and its class counts, against published totals."""

import itertools
import re
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ltkd_jax.data import longtail

IMBALANCES = (10, 20, 50, 100)
TOTALS = {  # (n_max, classes): totals at each imbalance
    (500, 100): (19_573, 15_907, 12_608, 10_847),
    (5_000, 10): (20_431, 17_023, 13_996, 12_406),
    (500, 200): (39_072, 31_711, 25_082, 21_549),
}


def balanced_set(per_class=60, num_classes=10, *, order_seed=0):
    """Returns labels and keys of a balanced set, in a random order."""
    order = np.random.default_rng(order_seed).permutation(per_class * num_classes)
    labels = np.repeat(np.arange(num_classes), per_class)
    keys = np.array([f"train_{i:05d}" for i in range(len(labels))])
    return labels[order], keys[order]


@pytest.mark.parametrize(
    "size, totals", TOTALS.items(), ids=["cifar100", "cifar10", "tiny_imagenet"]
)
def test_counts_published_totals(size, totals):
    n_max, num_classes = size
    for imbalance, total in zip(IMBALANCES, totals, strict=True):
        counts = longtail.counts(n_max, imbalance, num_classes)
        assert counts.dtype == np.int64 and counts.shape == (num_classes,)
        assert counts.sum() == total
        assert counts[0] == n_max and counts[-1] == n_max // imbalance
        assert (np.diff(counts) <= 0).all()


def test_counts_with_held_out_images():
    assert longtail.counts(490, 100, 100).sum() == 10_626
    assert longtail.counts(490, 100, 100)[-1] == 4


@hypothesis.given(st.integers(1, 3000), st.integers(1, 300))
def test_counts_whole_ratios(last, imbalance):
    """n_max / γ is a whole number, which floating point may put just below itself."""
    assert longtail.counts(last * imbalance, imbalance, 7)[-1] == last


def test_counts_at_the_edges():
    assert longtail.counts(5, 1, 3).tolist() == [5, 5, 5]
    assert longtail.counts(5, 10, 1).tolist() == [5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((500, 0.5, 100), "imbalance=0.5"),
        ((500, float("nan"), 100), "imbalance=nan"),
        ((500, float("inf"), 100), "imbalance=inf"),
        ((50, 100, 100), "class 85 would get 0 images.*at most 50"),
        ((0, 10, 100), "n_max=0"),
        ((500, 10, 0), "num_classes=0"),
    ],
)
def test_counts_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        longtail.counts(*arguments)


def test_split_sizes_and_types():
    labels, keys = balanced_set()
    split = longtail.split(
        labels,
        keys,
        num_classes=10,
        imbalance=10,
        outer_per_class=4,
        validation_per_class=6,
        seed=1,
    )
    expected = longtail.counts(50, 10, 10)
    np.testing.assert_array_equal(np.bincount(labels[split.train]), expected)
    assert np.bincount(labels[split.outer]).tolist() == [4] * 10
    assert np.bincount(labels[split.validation]).tolist() == [6] * 10
    all_indices = np.concatenate(split)
    assert len(np.unique(all_indices)) == len(all_indices)
    for indices in split:
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()


def test_split_independent_of_order():
    draws = []
    for order_seed in (0, 1):
        labels, keys = balanced_set(order_seed=order_seed)
        split = longtail.split(
            labels,
            keys,
            num_classes=10,
            imbalance=20,
            outer_per_class=3,
            validation_per_class=3,
        )
        draws.append([sorted(keys[indices]) for indices in split])
    assert draws[0] == draws[1]


FORMS = {
    "str": lambda keys: keys,
    "list": lambda keys: keys.tolist(),
    "bytes": np.char.encode,
    "padded": lambda keys: np.char.encode(keys).astype("S99"),
    "objects": lambda keys: keys.astype(object),
    "bytes_as_objects": lambda keys: np.char.encode(keys).astype(object),
    "padded_objects": lambda keys: np.array(
        [key.encode() + b"\0\0" for key in keys], object
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_in_every_form(form):
    labels, keys = balanced_set()
    keys = np.char.add(keys, "ü")
    converted = FORMS[form](keys)
    options = dict(num_classes=10, outer_per_class=3, validation_per_class=3)
    actual = longtail.split(labels, converted, imbalance=20, **options)
    expected = longtail.split(labels, keys, imbalance=20, **options)
    for actual_indices, expected_indices in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(actual_indices, expected_indices)

    image_list = longtail.ImageList(
        tuple(f"train/{key}" for key in keys[::2]), tuple(labels[::2]), "list.txt"
    )
    actual = longtail.split_by_list(image_list, labels, converted, **options)
    expected = longtail.split_by_list(image_list, labels, keys, **options)
    for actual_indices, expected_indices in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(actual_indices, expected_indices)

    with pytest.raises(ValueError, match="overlaps the training set"):
        longtail.check_outer(labels, converted, keys, num_classes=10)


def test_integer_keys():
    labels, _ = balanced_set()
    keys = np.arange(len(labels))
    options = dict(num_classes=10, imbalance=20)
    expected = longtail.split(labels, keys.astype(str), **options).train
    for converted in (keys, keys.astype(object), keys.astype(np.uint16)):
        actual = longtail.split(labels, converted, **options).train
        np.testing.assert_array_equal(actual, expected)


def test_split_seed():
    labels, keys = balanced_set()

    def draw(seed):
        return longtail.split(
            labels, keys, num_classes=10, imbalance=20, seed=seed
        ).train

    assert len(draw(0)) == len(draw(1)) and set(draw(0)) != set(draw(1))
    np.testing.assert_array_equal(draw(0), draw(0))


def test_split_golden_values():
    """A change of the hash would silently change every reported split."""
    labels, keys = balanced_set(4, 2)
    split = longtail.split(
        labels,
        keys,
        num_classes=2,
        imbalance=2,
        outer_per_class=1,
        validation_per_class=1,
    )
    assert sorted(keys[split.train]) == ["train_00000", "train_00001", "train_00004"]
    assert sorted(keys[split.outer]) == ["train_00002", "train_00005"]
    assert sorted(keys[split.validation]) == ["train_00003", "train_00007"]


def test_split_nested_by_imbalance():
    labels, keys = balanced_set()
    train_sets = [
        set(longtail.split(labels, keys, num_classes=10, imbalance=imbalance).train)
        for imbalance in (50, 20, 10, 1)
    ]
    for smaller, larger in itertools.pairwise(train_sets):
        assert smaller < larger


def test_split_train_independent_of_held_out():
    labels, keys = balanced_set()
    options = dict(num_classes=10, imbalance=10, n_max=40)
    without = longtail.split(labels, keys, **options)
    with_held_out = longtail.split(
        labels, keys, **options, outer_per_class=10, validation_per_class=10
    )
    np.testing.assert_array_equal(without.train, with_held_out.train)


def test_split_distribution():
    labels, keys = balanced_set(20, 1)
    num_draws = np.zeros(20)
    for seed in range(400):
        split = longtail.split(
            labels, keys, num_classes=1, imbalance=1, n_max=5, seed=seed
        )
        num_draws[split.train] += 1
    assert num_draws.sum() == 2000
    # 5 of 20 images a draw: 400 draws of probability 1/4, within 5 standard deviations.
    assert np.abs(num_draws - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_split_default_n_max():
    labels = np.array([0] * 30 + [1] * 20)
    keys = np.array([str(i) for i in range(50)])
    split = longtail.split(
        labels, keys, num_classes=2, imbalance=2, validation_per_class=4
    )
    assert np.bincount(labels[split.train]).tolist() == [16, 8]


def test_split_small_tail_class():
    labels = np.array([0] * 30 + [1] * 5)
    keys = np.array([str(i) for i in range(35)])
    split = longtail.split(labels, keys, num_classes=2, imbalance=6, n_max=30)
    assert np.bincount(labels[split.train]).tolist() == [30, 5]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=np.array([0, 1, 2, 1])), r"labels\[2\]=2.*0\.\.1"),
        (dict(labels=np.array([0, -1, 0, 1])), r"labels\[1\]=-1"),
        (dict(labels=np.array([0.0, 1, 0, 1])), "vector of integers"),
        (dict(labels=np.array([0, 0, 0, 0])), "class 1 has no image"),
        (dict(keys=np.array(["a", "b", "b", "c"])), "'b' occurs 2 times"),
        (dict(keys=np.array(["a", "b"])), "2 keys for 4 labels"),
        (dict(keys=np.array(["a", b"a", "b", "c"], object)), "'a' occurs 2 times"),
        (dict(keys=np.array([0.0, 1, 2, 3])), r"keys\[0\]=0.0 is of type float"),
        (dict(keys=np.array(["a", "b", None, "c"])), r"keys\[2\]=None is of type None"),
        (dict(keys=np.eye(4) > 0), r"keys: shape \(4, 4\)"),
        (dict(keys=np.array([True, False] * 2)), r"keys\[0\]=True is of type bool"),
        (
            dict(keys=np.array([b"a", b"\xfc", b"b", b"c"])),
            r"keys\[1\]=b'.xfc' is not UTF",
        ),
        (dict(n_max=3), "n_max=3: class 0 needs 3 images, but has 2"),
        (dict(n_max=-1), "n_max=-1"),
        (dict(outer_per_class=-1), "outer_per_class=-1"),
        (dict(validation_per_class=2), "1 must remain for training"),
        (dict(imbalance=0), "imbalance=0"),
    ],
)
def test_split_bad_input(change, message):
    arguments = dict(
        labels=np.array([0, 1, 0, 1]),
        keys=np.array(["a", "b", "c", "d"]),
        num_classes=2,
        imbalance=1,
    )
    with pytest.raises(ValueError, match=message):
        longtail.split(**arguments | change)


# Lists, and splits without a long tail.


def test_split_by_list(tmp_path):
    path = tmp_path / "ImageNet_LT_train.txt"
    path.write_text("train/n01/n01_b.JPEG 0\n\ntrain/n02/n02 c.JPEG 1\n")
    image_list = longtail.read_list(path)
    keys = np.array(["n01_a.JPEG", "n01_b.JPEG", "n02 c.JPEG", "n02_d.JPEG", "e", "f"])
    labels = np.array([0, 0, 1, 1, 0, 1])
    split = longtail.split_by_list(image_list, labels, keys, num_classes=2)
    assert split.train.tolist() == [1, 2]
    assert not len(split.outer) and not len(split.validation)
    split = longtail.split_by_list(
        image_list, labels, keys, num_classes=2, outer_per_class=1
    )
    assert split.train.tolist() == [1, 2]
    assert np.bincount(labels[split.outer]).tolist() == [1, 1]
    assert not set(split.outer) & set(split.train)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.JPEG", "list.txt:1: 'a.JPEG'"),
        ("a.JPEG 0\nb.JPEG one", "list.txt:2"),
        ("", "is empty"),
        (
            "a.JPEG 0\nx/gone.JPEG 1\nx/gone2.JPEG 1",
            "'x/gone.JPEG' and 1 more of its 3 images",
        ),
        ("a.JPEG 1", "'a.JPEG' has label 1, but 0"),
        ("a.JPEG 0\nx/a.JPEG 0", "'x/a.JPEG' is the image 'a.JPEG' again"),
    ],
)
def test_list_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    labels = np.array([0, 1])
    keys = np.array(["a.JPEG", "b.JPEG"])
    with pytest.raises(ValueError, match=message):
        image_list = longtail.read_list(tmp_path / "list.txt")
        longtail.match_list(image_list, labels, keys)


@pytest.mark.parametrize(
    "path",
    [
        "train\\café\\b c.JPEG",
        unicodedata.normalize("NFD", "train/café/b c.JPEG"),
        unicodedata.normalize("NFD", "train\\café\\b c.JPEG"),
    ],
    ids=["backslash", "decomposed", "both"],
)
def test_list_of_another_system(tmp_path, path):
    (tmp_path / "list.txt").write_text(f"{path} 1\n", "utf-8")
    image_list = longtail.read_list(tmp_path / "list.txt")
    labels = np.array([0, 1])
    for form in ("NFC", "NFD"):
        key = unicodedata.normalize(form, "café/b c.JPEG")
        keys = np.array(["café/a.JPEG", key])
        assert longtail.match_list(image_list, labels, keys).tolist() == [1]


def test_list_of_keys_that_look_the_same():
    """A path matches the key of its own Unicode form, and no key if both are others."""
    keys = np.array([unicodedata.normalize(form, "é.JPEG") for form in ("NFC", "NFD")])
    labels = np.array([0, 1])
    for label, key in enumerate(keys):
        image_list = longtail.ImageList((str(key),), (label,), "list.txt")
        assert longtail.match_list(image_list, labels, keys).tolist() == [label]
    image_list = longtail.ImageList(("x\\é.JPEG",), (0,), "list.txt")
    with pytest.raises(ValueError, match="list.txt: .* not among"):
        longtail.match_list(image_list, labels, keys)


def test_list_skips_hidden_files():
    """Lists that a shell wrote hold the files that systems leave behind."""
    paths = ("a.JPEG", "x/._a.JPEG", "x\\._b.JPEG", "x/.DS_Store", "x/Thumbs.db")
    image_list = longtail.ImageList(paths, (0,) * len(paths), "list.txt")
    keys = np.array(["a.JPEG", "b.JPEG"])
    assert longtail.match_list(image_list, np.array([0, 1]), keys).tolist() == [0]


def test_split_without_imbalance():
    labels = np.repeat([0, 1, 2], (9, 5, 3))
    keys = np.arange(17).astype(str)
    split = longtail.split(
        labels,
        keys,
        num_classes=3,
        imbalance=None,
        outer_per_class=1,
        validation_per_class=1,
    )
    assert np.bincount(labels[split.train]).tolist() == [7, 3, 1]
    assert len(set(np.concatenate(split))) == 17
    with pytest.raises(ValueError, match="class 2 has 3 images"):
        longtail.split(labels, keys, num_classes=3, imbalance=None, outer_per_class=3)


@pytest.mark.parametrize("imbalance, n_max", [(None, 0), (4, 0), (2.5, 0), (4, 9)])
@pytest.mark.parametrize("outer, validation", [(30, 0), (0, 30), (20, 3), (9, 30)])
def test_held_out_numbers_that_fit(imbalance, n_max, outer, validation):
    """The error has numbers of images that can be held out, and they are the most."""
    sizes = np.array([40, 12, 7])
    labels = np.repeat(np.arange(3), sizes)
    options = dict(num_classes=3, imbalance=imbalance, n_max=n_max)

    def split(outer, validation):
        return longtail.split(
            labels,
            np.arange(len(labels)).astype(str),
            outer_per_class=outer,
            validation_per_class=validation,
            **options,
        )

    with pytest.raises(longtail.ClassSizeError) as error:
        split(outer, validation)
    message = str(error.value)
    assert message.startswith(
        f"outer_per_class={outer} and validation_per_class={validation}: class "
        f"{error.value.label} has {sizes[error.value.label]} images"
    )
    numbers = re.search(r"at most (\d+) .*_class=(\d+) .*_class=(\d+)$", message)
    most, outer, validation = map(int, numbers.groups())
    fitting = split(outer, validation)
    assert np.bincount(labels[fitting.train]).min() >= 1
    assert outer + validation <= most
    split(most, 0)
    with pytest.raises(longtail.ClassSizeError):
        split(0, most + 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(imbalance=3), "imbalance=3: .*class 1 with 2, .*less than 1.*at most 2"),
        (dict(imbalance=1, n_max=3), "class 1 needs 3 images, but has 2"),
    ],
)
def test_class_too_small_to_draw(options, message):
    labels = np.array([0, 0, 0, 1, 1])
    keys = np.arange(5).astype(str)
    with pytest.raises(longtail.ClassSizeError, match=message) as error:
        longtail.split(labels, keys, num_classes=2, **options)
    assert error.value.label == 1


def test_nothing_to_hold_out():
    labels = np.array([0, 0, 0, 1])
    keys = np.arange(4).astype(str)
    with pytest.raises(longtail.ClassSizeError, match="class 1 has 1 .*: add images"):
        longtail.split(
            labels, keys, num_classes=2, imbalance=None, validation_per_class=1
        )
