"""Image data sets as NumPy arrays in one form: the only module of the library that reads TFDS."""

import dataclasses
import difflib
import hashlib
import io
import os
import pathlib
import struct

import numpy as np

from ltkd_jax.data import augment, longtail

_DIGITS_TEST_PER_CLASS = 70
_DIGITS_TEST_SEED = 20_240_601  # a constant: the digits' test set is the same whatever the seed of a run

# A PNG up to its first data chunk: signature, then the header chunk.
_PNG_HEADER = struct.Struct(">8sI4sIIBBBBBI")
_PNG_MODES = {0: "L", 2: "RGB"}  # colour type to Pillow's mode


class DatasetNotPrepared(ValueError):
    """The data set is not in the data directory; the message says which command puts it there."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images, sorted by key: images uint8 `[N, H, W, C]`, labels int32 `[N]`, keys str `[N]`, unique."""

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set and what training needs to know of it; mean and std are of each channel, on the [0, 1] scale."""

    name: str
    train: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: augment.Views


@dataclasses.dataclass(frozen=True)
class _Spec:
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: augment.Views


_SPECS = {
    "cifar100": _Spec(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), augment.Views(pad=4, flip=True)),
    "cifar10": _Spec(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), augment.Views(pad=4, flip=True)),
    "fashion_mnist": _Spec(10, (0.2860,), (0.3530,), augment.Views(pad=2, flip=True)),
    "digits": _Spec(10, (0.3041,), (0.3753,), augment.Views(pad=1, flip=False)),
}


def load(name: str, data_dir: str | None = None) -> Source:
    """Reads a data set: digits (comes with scikit-learn), or cifar100, cifar10, fashion_mnist (prepared by TFDS).

    Args:
      name: of the data set.
      data_dir: TFDS's directory; None is $TFDS_DATA_DIR, or ~/tensorflow_datasets. Digits need none.

    Raises:
      DatasetNotPrepared: the data set is not in `data_dir`; the message has the command that prepares it.
      ValueError: for an unknown name, or labels out of range.

    >>> source = load("digits")
    >>> source.train.images.shape, len(source.test), str(source.train.keys[0])
    ((1097, 8, 8, 1), 700, 'digits_0000')
    """
    if name not in _SPECS:
        close = difflib.get_close_matches(name, _SPECS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"data set {name!r} is unknown: give one of {', '.join(sorted(_SPECS))}{hint}")
    spec = _SPECS[name]
    train, test, class_names = _load_digits() if name == "digits" else _load_tfds(name, data_dir)
    for images in (train, test):
        longtail.check_labels(images.labels, spec.num_classes)
    return Source(name=name, train=train, test=test, class_names=class_names, **vars(spec))


def open_builder(name: str, data_dir: str | None = None):
    """The stock TFDS builder of a data set that is prepared in `data_dir`.

    Raises:
      DatasetNotPrepared: at once, without a look at the network, if it is not there or in another format.
    """
    builder = find_builder(name, data_dir)
    if builder is None:
        root = resolve_data_dir(data_dir)
        raise DatasetNotPrepared(
            f"{name} is not prepared in {root}; run: python -m ltkd_jax.data.prepare {name} --data_dir {root}"
        )
    return builder


def find_builder(name: str, data_dir: str | None = None):
    """As `open_builder`, but None if the data set is not there."""
    root = resolve_data_dir(data_dir)
    # TFDS itself takes a second to import: look first.
    if not any(root.glob(f"{name}/*/dataset_info.json")):
        return None
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=root)
    if not builder.is_prepared():
        return None
    if builder.info.file_format.value != "array_record":
        raise DatasetNotPrepared(
            f"{builder.data_path} holds {builder.info.file_format.value} files, and only array_record is read without "
            f"TensorFlow; prepare it elsewhere: python -m ltkd_jax.data.prepare {name} --data_dir DIR"
        )
    return builder


def resolve_data_dir(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """TFDS's directory: as given, or TFDS's own default."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def _load_digits() -> tuple[Images, Images, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    keys = np.array([f"digits_{i:04d}" for i in range(len(images))])
    everything = Images(images, bunch.target.astype(np.int32), keys)
    test = longtail.balanced(
        everything.labels, keys, num_classes=10, per_class=_DIGITS_TEST_PER_CLASS, seed=_DIGITS_TEST_SEED
    )
    train = np.setdiff1d(np.arange(len(images)), test)
    return _take(everything, train), _take(everything, test), tuple(str(d) for d in range(10))


def _load_tfds(name: str, data_dir: str | None) -> tuple[Images, Images, tuple[str, ...]]:
    builder = open_builder(name, data_dir)
    return _read(builder, "train"), _read(builder, "test"), tuple(builder.info.features["label"].names)


def _read(builder, split: str) -> Images:
    """One split, sorted by key.

    Records are parsed here and not by TFDS, whose generic decoding takes three times as long; threads
    make it slower still, since it is Python code that takes the time.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    shape, has_id = builder.info.features["image"].shape, "id" in builder.info.features
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    ids = []
    for i, record in enumerate(source.__getitems__(range(len(source)))):
        feature = tf_example_pb2.Example.FromString(record).features.feature
        images[i] = decode_png(feature["image"].bytes_list.value[0]).reshape(shape)
        labels[i] = feature["label"].int64_list.value[0]
        if has_id:
            ids.append(feature["id"].bytes_list.value[0].decode())
    keys = np.array(ids) if has_id else _content_keys(images, labels)
    return _take(Images(images, labels, keys), np.argsort(keys))


def decode_png(data: bytes) -> np.ndarray:
    """The pixels of a PNG, uint8 `[H, W]` or `[H, W, 3]`; twice as quick as PIL.Image.open for a small image."""
    from PIL import Image

    _, _, _, width, height, depth, colour, _, _, interlaced, _ = _PNG_HEADER.unpack_from(data)
    length, kind = struct.unpack_from(">I4s", data, _PNG_HEADER.size)
    start = _PNG_HEADER.size + 8
    next_kind = data[start + length + 8 : start + length + 12]
    if depth != 8 or colour not in _PNG_MODES or interlaced or kind != b"IDAT" or next_kind != b"IEND":
        return np.asarray(Image.open(io.BytesIO(data)))
    mode = _PNG_MODES[colour]
    image = Image.frombytes(mode, (width, height), data[start : start + length], "zip", mode, 0)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, *(() if mode == "L" else (3,)))


def _content_keys(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Keys '<hash of the pixels>_<occurrence>'; equal images are counted in the order of their labels."""
    digests = np.array([hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images])
    order = np.lexsort((labels, digests))
    seen: dict[str, int] = {}
    keys = np.empty(len(images), dtype=object)
    for i in order:
        occurrence = seen[digests[i]] = seen.get(digests[i], -1) + 1
        keys[i] = f"{digests[i]}_{occurrence}"
    return keys.astype(str)


def _take(images: Images, indices: np.ndarray) -> Images:
    return Images(images.images[indices], images.labels[indices], images.keys[indices])
