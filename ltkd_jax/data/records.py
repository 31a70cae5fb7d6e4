"""Holds labelled images in memory, or as records on disk that are decoded when they are taken.

The only module of the library that reads TFDS directories.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ltkd_jax import files
from ltkd_jax.data import resize

if TYPE_CHECKING:
    from PIL import Image

Builder = Any  # of TFDS, which has no type hints
FINGERPRINT = (
    "fingerprint.txt"  # holds a hash of all records, beside those of image files
)
_BLOCK = 256  # records that are read at once


class DamagedRecordError(ValueError):
    """A record on disk cannot be read, or its image does not decode; the message names it."""


class DatasetNotPreparedError(ValueError):
    """The data set is not in the data directory; the message says which command puts it there."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images in memory, sorted by key.

    Attributes:
      images: uint8 `[N, H, W, C]`.
      labels: int32 `[N]`.
      keys: str `[N]`, unique.
    """

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.images.shape[1:]

    def take(self, indices: np.ndarray) -> "Images":
        """Returns the images at `indices`."""
        return Images(self.images[indices], self.labels[indices], self.keys[indices])

    subset = take  # the counterpart of `Records.subset`


@dataclasses.dataclass(frozen=True)
class Records:
    """Labelled images of a TFDS directory, sorted by key, which stay on disk. May be pickled.

    Attributes:
      files: the array_record files.
      numbers: int64 `[N]`, the number of each image's record.
      labels: int32 `[N]`.
      keys: str `[N]`, unique.
      shape: height, width and channels of a decoded image.
      fit: "stored" if every image has `shape` already; else `resize.center` makes it of the "whole" image, or of what a
        "margin" leaves, as is usual for ImageNet.
    """

    files: tuple[str, ...]
    numbers: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    shape: tuple[int, int, int]
    fit: str = "stored"

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @functools.cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(list(self.files))

    def subset(self, indices: np.ndarray) -> "Records":
        """Returns the images at `indices`, still on disk."""
        return dataclasses.replace(
            self,
            numbers=self.numbers[indices],
            labels=self.labels[indices],
            keys=self.keys[indices],
        )

    def take(self, indices: np.ndarray) -> Images:
        """Returns the images at `indices`, decoded."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        for start in range(0, len(indices), _BLOCK):
            block = indices[start : start + _BLOCK]
            with self._named_errors(block[0]):
                contents = self._source.__getitems__(self.numbers[block])
            for i, (index, record) in enumerate(zip(block, contents), start):
                images[i] = self._decode(index, record)
        return Images(images, self.labels[indices], self.keys[indices])

    def image(self, index: int) -> np.ndarray:
        """Returns an image for evaluation, uint8 `[H, W, C]`.

        Raises:
          DamagedRecordError: it does not decode.
        """
        return self.take(np.array([index])).images[0]

    def crop(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a random resized crop of an image, uint8 `[H, W, C]`, see `resize.random_crop`.

        Raises:
          DamagedRecordError: it does not decode.
        """
        with self._named_errors(index):
            record = self._source[int(self.numbers[index])]
            return resize.random_crop(
                _open_image(_parse(record), self.shape[-1]), self.shape[0], rng
            )

    def _decode(self, index: int, record: bytes) -> np.ndarray:
        with self._named_errors(index):
            image = _open_image(_parse(record), self.shape[-1])
            if self.fit == "stored":
                return np.asarray(image).reshape(self.shape)
            return resize.center(image, self.shape[0], margin=self.fit == "margin")

    @contextlib.contextmanager
    def _named_errors(self, index: int) -> Iterator[None]:
        """Raises any error as one that names the image and its folder."""
        try:
            yield
        except Exception as error:  # whatever a decoder or reader raises
            key, folder = str(self.keys[index]), pathlib.Path(self.files[0]).parent
            raise DamagedRecordError(
                f"image {key!r} in {folder} does not decode ({_reason(error)}): prepare it again"
            ) from error


def read(
    builder: Builder, split: str, size: int = 0, *, margin: bool = False
) -> Records:
    """Returns the images of a split, sorted by key.

    Args:
      builder: builder of a prepared TFDS directory, see `open_builder`.
      split: name of the split, such as "train".
      size: side to which images are resized; 0 leaves them as they are stored.
      margin: whether resizing leaves out a border.

    Raises:
      ValueError: the images differ in size, and `size` is 0.
    """
    stored = builder.info.features["image"].shape
    fixed = None not in stored
    if not size and not fixed:
        raise ValueError(
            f"{builder.name}: its images differ in size: set data.image_size, such as 64 or 224"
        )
    shape = stored if fixed and not size else (size, size, stored[-1])
    fit = "stored" if shape == stored else "margin" if margin else "whole"
    labels, keys = index(builder, split)
    order = np.argsort(keys)
    return Records(
        _files(builder, split), order, labels[order], keys[order], shape, fit
    )


def _files(builder: Builder, split: str) -> tuple[str, ...]:
    return tuple(sorted(str(path) for path in builder.info.splits[split].filepaths))


def index(builder: Builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels int32 `[N]` and keys str `[N]` in the order of the records.

    Where images differ in size, and so may be too large to read all of them at every start, the index is kept beside
    the records as `index-SPLIT.npz`.
    """
    paths = _files(builder, split)
    index_path = _index_path(builder, split)
    if index_path.exists():
        # What is damaged or out of date is only a copy.
        with contextlib.suppress(
            OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
        ):
            with np.load(index_path) as arrays:
                if arrays["sizes"].tolist() == [
                    os.stat(path).st_size for path in paths
                ]:
                    return arrays["labels"], arrays["keys"]
    labels, keys = _scan(paths, builder.info.features["image"].shape[-1])
    keep_index(builder, split, paths, labels, keys)
    return labels, keys


def keep_index(
    builder: Builder,
    split: str,
    paths: Sequence[str],
    labels: np.ndarray,
    keys: np.ndarray,
) -> None:
    """Saves the arrays that `index` returns, where images differ in size."""
    if None not in builder.info.features["image"].shape:
        return
    # A directory that cannot be written to is scanned again each time.
    with (
        contextlib.suppress(OSError),
        files.atomic_write(_index_path(builder, split)) as temporary,
    ):
        with open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                labels=labels,
                keys=keys,
                sizes=[os.stat(path).st_size for path in paths],
            )


def _index_path(builder: Builder, split: str) -> pathlib.Path:
    return pathlib.Path(builder.data_path) / f"index-{split}.npz"


def _scan(paths: Sequence[str], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels and keys of all records. Where they have no id, keys are made of the pixels.

    Records are parsed here and not by TFDS, whose generic decoding takes three times as long; threads
    make it slower still, since it is Python code that takes the time.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    labels, ids, digests = [], [], []
    try:
        source = ArrayRecordDataSource(list(paths))
        for start in range(0, len(source), _BLOCK):
            for record in source.__getitems__(
                range(start, min(start + _BLOCK, len(source)))
            ):
                features = _parse(record)
                labels.append(features["label"].int64_list.value[0])
                id_name = next(
                    (name for name in ("id", "file_name") if name in features), None
                )
                if id_name:
                    ids.append(features[id_name].bytes_list.value[0].decode())
                else:
                    pixels = np.asarray(_open_image(features, channels)).tobytes()
                    digests.append(hashlib.blake2b(pixels, digest_size=16).hexdigest())
    except RuntimeError as error:
        raise DamagedRecordError(
            f"{paths[0]} or a file beside it is damaged ({error}): prepare it again"
        ) from error
    label_array = np.array(labels, np.int32)
    return label_array, content_keys(
        np.array(digests), label_array
    ) if digests else np.array(ids)


def _parse(record: bytes) -> Any:
    """Returns the features of a record by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _open_image(features: Any, channels: int) -> "Image.Image":
    from PIL import Image

    return resize.in_mode(
        Image.open(io.BytesIO(features["image"].bytes_list.value[0])), channels
    )


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, or its type where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def content_keys(digests: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns keys '<hash of the pixels>_<occurrence>'; equal images are counted in the order of their labels."""
    occurrences: dict[str, int] = {}
    keys = np.empty(len(digests), dtype=object)
    for i in np.lexsort((labels, digests)):
        occurrence = occurrences.get(digests[i], 0)
        occurrences[digests[i]] = occurrence + 1
        keys[i] = f"{digests[i]}_{occurrence}"
    return keys.astype(str)


def open_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Builder:
    """Returns the TFDS builder of a data set that is prepared in `data_dir`, without using the network.

    Raises:
      DatasetNotPreparedError: it is not there, is damaged, or is in another format.
    """
    builder = find_builder(name, data_dir)
    if builder is None:
        root = resolve_data_dir(data_dir)
        source = " --source PATH" if name in ("tiny_imagenet", "imagenet2012") else ""
        raise DatasetNotPreparedError(
            f"{name} is not prepared in {root}; run: python -m ltkd_jax.data.prepare {name} --data_dir {root}{source}"
        )
    return builder


def fingerprint(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> str | None:
    """Returns a hash of all records of a data set that was prepared from image files; None where there is none."""
    paths = _glob(name, data_dir, FINGERPRINT)
    return paths[-1].read_text().strip() if paths else None


def _glob(
    name: str, data_dir: str | os.PathLike[str] | None, file_name: str
) -> list[pathlib.Path]:
    """Returns the sorted paths of a file in all versions of a data set."""
    if not re.fullmatch(r"\w+", name):  # not a name but a pattern or a path
        return []
    return sorted((resolve_data_dir(data_dir) / name).glob(f"*/{file_name}"))


def find_builder(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> Builder | None:
    """Returns the builder as `open_builder` does, but None if the data set is not there."""
    # TFDS itself takes a second to import: look first.
    prepared = _glob(name, data_dir, "dataset_info.json")
    if not prepared:
        return None
    import tensorflow_datasets as tfds

    newest = max(prepared, key=lambda path: path.stat().st_mtime)
    in_tfds = name in tfds.list_builders(with_community_datasets=False)
    try:
        if in_tfds:
            builder = tfds.builder(name, data_dir=resolve_data_dir(data_dir))
        else:
            builder = tfds.builder_from_directory(newest.parent)
        if not builder.is_prepared():
            return None
    except Exception as error:  # whatever TFDS's parsers raise
        raise DatasetNotPreparedError(
            f"{newest.parent} is damaged ({_reason(error)}): remove it and prepare it again"
        ) from error
    if builder.info.file_format.value != "array_record":
        raise DatasetNotPreparedError(
            f"{builder.data_path} holds {builder.info.file_format.value} files, and only array_record is read without "
            f"TensorFlow; prepare it elsewhere: python -m ltkd_jax.data.prepare {name} --data_dir DIR"
        )
    return builder


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns TFDS's directory: as given, or TFDS's own default."""
    return (
        pathlib.Path(
            data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        )
        .expanduser()
        .absolute()
    )
