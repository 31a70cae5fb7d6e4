"""Loads image data sets by name, in one form, with what training needs to know of them."""

import dataclasses
import os

import numpy as np

from ltkd_jax import names
from ltkd_jax.data import augment, longtail, records
from ltkd_jax.data.records import Images, Records

_DIGITS_TEST_PER_CLASS = 70
_DIGITS_TEST_SEED = 20_240_601  # a constant: the digits' test set is the same whatever the seed of a run


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set and what training needs to know of it; mean and std are of each channel, on the [0, 1] scale."""

    name: str
    train: Images | Records
    test: Images | Records
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: augment.Views


@dataclasses.dataclass(frozen=True)
class _Spec:
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: augment.Views
    test: str = "test"  # the split


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SPECS = {
    "cifar100": _Spec(
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
        augment.Views(pad=4, flip=True),
    ),
    "cifar10": _Spec(
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        augment.Views(pad=4, flip=True),
    ),
    "fashion_mnist": _Spec((0.2860,), (0.3530,), augment.Views(pad=2, flip=True)),
    "digits": _Spec((0.3041,), (0.3753,), augment.Views(pad=1, flip=False)),
    # As many views as CIFAR's, so that a teacher's table pays; the paper's are not known.
    "tiny_imagenet": _Spec(*_IMAGENET, augment.Views(pad=4, flip=True)),
    "imagenet2012": _Spec(
        *_IMAGENET, augment.Views(pad=4, flip=True), test="validation"
    ),
}

NAMES = tuple(_SPECS)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    size: int = 0,
    margin: bool = False,
) -> Source:
    """Returns digits (from scikit-learn), a data set that `prepare` knows, or a prepared folder of one's own.

    Args:
      name: name of the data set.
      data_dir: TFDS's directory; None is $TFDS_DATA_DIR, or ~/tensorflow_datasets. Digits need none.
      size: side to which images are resized; 0 leaves them as they are stored.
      margin: whether resizing leaves out a border, see `resize.center`.

    Raises:
      DatasetNotPreparedError: the data set is not in `data_dir`; the message has the command that prepares it.
      ValueError: for an unknown name, labels out of range, or a missing or impossible size.

    >>> source = load("digits")
    >>> source.train.shape, len(source.test), str(source.train.keys[0])
    ((8, 8, 1), 700, 'digits_0000')
    """
    train: Images | Records
    test: Images | Records
    if name == "digits":
        if size:
            raise ValueError(
                f"digits are 8 pixels wide and are not resized to data.image_size={size}: set it to 0"
            )
        spec = _SPECS[name]
        train, test, class_names = _load_digits()
    else:
        builder = _open(name, data_dir)
        spec = _SPECS[name] if name in _SPECS else _own_spec(builder, size)
        train, test = (
            records.read(builder, split, size, margin=margin)
            for split in ("train", spec.test)
        )
        class_names = tuple(builder.info.features["label"].names)
    for images in (train, test):
        longtail.check_labels(images.labels, len(class_names))
    return Source(
        name,
        train,
        test,
        len(class_names),
        class_names,
        spec.mean,
        spec.std,
        spec.views,
    )


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> records.Builder:
    if name in _SPECS:
        return records.open_builder(name, data_dir)
    builder = records.find_builder(name, data_dir)
    if builder is None:
        raise ValueError(
            f"{names.unknown('data set', name, sorted(_SPECS))}. A folder of your own is made a data set by: python "
            f"-m ltkd_jax.data.prepare folder --name {name} --source FOLDER "
            f"--data_dir {records.resolve_data_dir(data_dir)}"
        )
    return builder


def _own_spec(builder: records.Builder, size: int) -> _Spec:
    """Returns ImageNet's statistics, and crops in proportion to CIFAR's 4 of 32 pixels."""
    features = builder.info.features
    if not {"image", "label"} <= set(features) or features["image"].shape[-1] != 3:
        raise ValueError(
            f"{builder.name} has the features {sorted(features)}: a colour image and a label are needed"
        )
    pad = (size or features["image"].shape[0] or 0) // 8
    return _Spec(*_IMAGENET, augment.Views(pad=pad, flip=True))


def _load_digits() -> tuple[Images, Images, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    keys = np.array([f"digits_{i:04d}" for i in range(len(pixels))])
    images = Images(pixels, bunch.target.astype(np.int32), keys)
    test = longtail.balanced(
        images.labels,
        keys,
        num_classes=10,
        per_class=_DIGITS_TEST_PER_CLASS,
        seed=_DIGITS_TEST_SEED,
    )
    train = np.setdiff1d(np.arange(len(images)), test)
    return (
        images.take(train),
        images.take(test),
        tuple(str(digit) for digit in range(10)),
    )
