"""Loads data sets by name, with what training needs to know of them."""

import dataclasses
import os
import pathlib

import numpy as np

from ltkd_jax import names
from ltkd_jax.data import augment, features, longtail, records
from ltkd_jax.data.records import Images, Records

_DIGITS_TEST_PER_CLASS = 70
# A constant, so that the digits' test set is the same in runs of different seeds.
_DIGITS_TEST_SEED = 20_240_601


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds a data set, and what training needs to know of it.

    Attributes:
      name: of the data set.
      train: its training images.
      test: its test images.
      num_classes: C.
      class_names: `[C]`, in label order.
      mean: of each channel on the [0, 1] scale, or of each column of features.
      std: likewise.
      views: the crops and flips of its training images; features have one view.
    """

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
    """Describes what TFDS does not know of a data set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: augment.Views
    test_split: str = "test"


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_SPECS = {
    "cifar100": _Spec(
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        views=augment.Views(pad=4, flip=True),
    ),
    "cifar10": _Spec(
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        views=augment.Views(pad=4, flip=True),
    ),
    "fashion_mnist": _Spec(
        mean=(0.2860,),
        std=(0.3530,),
        views=augment.Views(pad=2, flip=True),
    ),
    "digits": _Spec(
        mean=(0.3041,),
        std=(0.3753,),
        views=augment.Views(pad=1, flip=False),
    ),
    # The papers do not state their crops. These are as many views as CIFAR's, few
    # enough to keep a teacher's logits for every view.
    "tiny_imagenet": _Spec(
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        views=augment.Views(pad=4, flip=True),
    ),
    "imagenet2012": _Spec(
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        views=augment.Views(pad=4, flip=True),
        test_split="validation",
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
    """Returns a data set: digits, an official one, or a custom one.

    The digits come from scikit-learn, and features from the file `name.npz` in
    `data_dir`, see `features`. All others must have been prepared by
    `python -m ltkd_jax.data.prepare`; custom ones are prepared from a folder of images.

    Args:
      name: of the data set.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR, or ~/tensorflow_datasets.
        Digits need none.
      size: side to which images are resized; 0 leaves them as they are stored.
      margin: whether resizing for evaluation cuts off a border, see
        `resize.center_crop`.

    Raises:
      DatasetNotPreparedError: an official data set is not in `data_dir`; the message
        has the command that prepares it.
      ValueError: the name is unknown, a label is out of range, the size is missing or
        not possible, or features cannot be used, see `features.read`.

    >>> source = load("digits")
    >>> source.train.shape, len(source.test), str(source.train.keys[0])
    ((8, 8, 1), 700, 'digits_0000')
    """
    train: Images | Records
    test: Images | Records
    features_path = None if name in _SPECS else features.find(name, data_dir)
    if features_path:
        return _load_features(name, features_path, size)
    if name == "digits":
        if size:
            raise ValueError(
                "digits are 8 pixels wide and are not resized to "
                f"data.image_size={size}: set it to 0"
            )
        spec = _SPECS[name]
        train, test = _load_digits()
        class_names = tuple(str(digit) for digit in range(10))
    else:
        builder = _open_builder(name, data_dir)
        spec = _SPECS[name] if name in _SPECS else _custom_spec(builder, size)
        train = records.open_records(builder, "train", size, margin=margin)
        test = records.open_records(builder, spec.test_split, size, margin=margin)
        class_names = tuple(builder.info.features["label"].names)
    for images in (train, test):
        longtail.check_labels(images.labels, len(class_names))
    return Source(
        name=name,
        train=train,
        test=test,
        num_classes=len(class_names),
        class_names=class_names,
        mean=spec.mean,
        std=spec.std,
        views=spec.views,
    )


def _open_builder(
    name: str, data_dir: str | os.PathLike[str] | None
) -> records.Builder:
    """Returns the builder of an official or a custom data set."""
    if name in _SPECS:
        return records.open_builder(name, data_dir)
    builder = records.find_builder(name, data_dir)
    if builder is None:
        # It may be a misspelt official name, or a folder that was never prepared.
        folder = records.resolve_data_dir(data_dir)
        raise ValueError(
            f"{names.unknown('data set', name, sorted(_SPECS))}; and {folder} has none "
            "of this name: give the directory of the prepared data (--config.data.dir "
            "or --data_dir), or make it of your own folder: python -m "
            f"ltkd_jax.data.prepare folder --name {name} --source FOLDER --data_dir "
            f"{folder}; features are read from {name.removesuffix('.npz')}.npz in that "
            "directory, and their name has no .npz"
        )
    return builder


def _custom_spec(builder: records.Builder, size: int) -> _Spec:
    """Returns ImageNet's statistics, and crops in CIFAR's proportion, 4 of 32 pixels.

    Raises:
      ValueError: the data set is not of colour images and labels.
    """
    features = builder.info.features
    if not {"image", "label"} <= set(features) or features["image"].shape[-1] != 3:
        raise ValueError(
            f"{builder.name} has the features {sorted(features)}: a colour image and a "
            "label are needed"
        )
    side = size or features["image"].shape[0] or 0
    views = augment.Views(pad=side // 8, flip=True)
    return _Spec(_IMAGENET_MEAN, _IMAGENET_STD, views)


def _load_features(name: str, path: pathlib.Path, size: int) -> Source:
    """Returns the features of a file."""
    if size:
        raise ValueError(
            f"{path} holds features, which have no pixels: set data.image_size={size} "
            "to 0, and data.stream to False"
        )
    data = features.read(path)
    return Source(
        name=name,
        train=data.train,
        test=data.test,
        num_classes=len(data.class_names),
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        views=augment.Views(pad=0, flip=False),
    )


def _load_digits() -> tuple[Images, Images]:
    """Returns the training and test images of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Their values are 0 to 16.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    keys = np.array([f"digits_{i:04d}" for i in range(len(pixels))])
    images = Images(pixels, bunch.target.astype(np.int32), keys)
    test_indices = longtail.balanced_subset(
        images.labels,
        keys,
        num_classes=10,
        per_class=_DIGITS_TEST_PER_CLASS,
        seed=_DIGITS_TEST_SEED,
    )
    train_indices = np.setdiff1d(np.arange(len(images)), test_indices)
    return images.take(train_indices), images.take(test_indices)
