"""Holds labelled images in memory, or as records on disk that are decoded when read.

Features are held in memory as images are.

This is the only module of the library that reads TFDS directories. It reads their
array_record files without TensorFlow.
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
# The file with a hash of all images, which data sets made from image files have.
FINGERPRINT = "fingerprint.txt"
_READ_BATCH = 256  # number of records in one call of the reader


class DamagedRecordError(ValueError):
    """Raised for a record that cannot be read or decoded; the message names it."""


class DatasetNotPreparedError(ValueError):
    """Raised for a data set that is not there; the message has the command for it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Holds labelled images or features in memory, sorted by key.

    Attributes:
      images: uint8 `[N, H, W, channels]`, or features, float32 `[N, D]`.
      labels: int32 `[N]`.
      keys: str `[N]`, unique.
    """

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns height, width and channels, or the number of columns."""
        return self.images.shape[1:]

    def take(self, indices: np.ndarray) -> "Images":
        """Returns the images at `indices`."""
        return Images(self.images[indices], self.labels[indices], self.keys[indices])

    subset = take  # the same interface as `Records`


@dataclasses.dataclass(frozen=True)
class Records:
    """Describes labelled images of a TFDS directory, which stay on disk, sorted by key.

    It can be pickled, and the copy opens the files for itself.

    Attributes:
      files: paths of the array_record files.
      record_indices: int64 `[N]`, of each image, the position of its record in the
        files, counted through all of them.
      labels: int32 `[N]`.
      keys: str `[N]`, unique.
      shape: height, width and channels of a decoded image.
      resize_mode: "none" if all images are stored in `shape`; else how an evaluation
        resizes them: "center" or "margin", `resize.center_crop` without or with one.
    """

    files: tuple[str, ...]
    record_indices: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    shape: tuple[int, int, int]
    resize_mode: str = "none"

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # The fields only: an open reader, which `_reader` caches, cannot be pickled.
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @functools.cached_property
    def _reader(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(list(self.files))

    def subset(self, indices: np.ndarray) -> "Records":
        """Returns the images at `indices`, still on disk."""
        return dataclasses.replace(
            self,
            record_indices=self.record_indices[indices],
            labels=self.labels[indices],
            keys=self.keys[indices],
        )

    def take(self, indices: np.ndarray) -> Images:
        """Returns the images at `indices`, decoded, in memory.

        Raises:
          DamagedRecordError: an image cannot be read or decoded.
        """
        images = np.empty((len(indices), *self.shape), np.uint8)
        for start in range(0, len(indices), _READ_BATCH):
            batch = indices[start : start + _READ_BATCH]
            # The reader does not say which of its records failed: name the first.
            with self._name_in_errors(batch[0]):
                contents = self._reader.__getitems__(self.record_indices[batch])
            for i, (index, record) in enumerate(zip(batch, contents), start):
                with self._name_in_errors(index):
                    images[i] = self._decode(record)
        return Images(images, self.labels[indices], self.keys[indices])

    def image(self, index: int) -> np.ndarray:
        """Returns one image as an evaluation uses it, uint8 `[H, W, channels]`.

        Raises:
          DamagedRecordError: the image cannot be read or decoded.
        """
        return self.take(np.array([index])).images[0]

    def random_crop(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a random crop of one image, uint8 `[H, W, channels]`.

        Args:
          index: of the image.
          rng: the only source of randomness, see `resize.random_crop`.

        Raises:
          DamagedRecordError: the image cannot be read or decoded.
        """
        with self._name_in_errors(index):
            record = self._reader[int(self.record_indices[index])]
            image = _open_image(_parse(record), self.shape[-1])
            return resize.random_crop(image, self.shape[0], rng)

    def _decode(self, record: bytes) -> np.ndarray:
        """Returns the image of a record in `shape`."""
        image = _open_image(_parse(record), self.shape[-1])
        if self.resize_mode == "none":
            # The reshape adds the channel axis that Pillow's grey images lack.
            return np.asarray(image).reshape(self.shape)
        margin = self.resize_mode == "margin"
        return resize.center_crop(image, self.shape[0], margin=margin)

    @contextlib.contextmanager
    def _name_in_errors(self, index: int) -> Iterator[None]:
        """Raises any error of the block as one that names the image and its folder."""
        try:
            yield
        except Exception as error:  # whatever a decoder or reader raises
            key = str(self.keys[index])
            folder = pathlib.Path(self.files[0]).parent
            raise DamagedRecordError(
                f"image {key!r} in {folder} does not decode ({_first_line(error)}): "
                "prepare it again"
            ) from error


def open_records(
    builder: Builder, split: str, size: int = 0, *, margin: bool = False
) -> Records:
    """Returns the images of a split of a TFDS directory, sorted by key.

    Only their labels and keys are read.

    Args:
      builder: from `open_builder`.
      split: name of the split, such as "train".
      size: side to which images are resized; 0 leaves them as they are stored.
      margin: whether resizing for evaluation cuts off a border, see
        `resize.center_crop`.

    Raises:
      ValueError: the images differ in size, and `size` is 0.
    """
    stored_shape = builder.info.features["image"].shape
    is_fixed = None not in stored_shape
    if not size and not is_fixed:
        raise ValueError(
            f"{builder.name}: its images differ in size: set data.image_size, such as "
            "64 or 224 (in Python the argument `size`)"
        )
    shape = (size, size, stored_shape[-1]) if size else stored_shape
    resize_mode = "margin" if margin else "center"
    if shape == stored_shape:
        resize_mode = "none"
    labels, keys = read_index(builder, split)
    order = np.argsort(keys)
    return Records(
        files=_record_paths(builder, split),
        record_indices=order,
        labels=labels[order],
        keys=keys[order],
        shape=shape,
        resize_mode=resize_mode,
    )


def _record_paths(builder: Builder, split: str) -> tuple[str, ...]:
    return tuple(sorted(str(path) for path in builder.info.splits[split].filepaths))


def read_index(builder: Builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels int32 `[N]` and keys str `[N]` in the order of the records.

    Where images differ in size, reading all records at every start may take long. Then
    the index is kept beside the records as `index-SPLIT.npz`.

    Raises:
      DamagedRecordError: a file of records is damaged.
    """
    paths = _record_paths(builder, split)
    saved_index = _load_index(builder, split, paths)
    if saved_index is not None:
        return saved_index
    labels, keys = _scan(paths, builder.info.features["image"].shape[-1])
    write_index(builder, split, paths, labels, keys)
    return labels, keys


def _load_index(
    builder: Builder, split: str, paths: Sequence[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the saved index, or None if it is absent, damaged or out of date."""
    path = _index_path(builder, split)
    if not path.exists():
        return None
    # A damaged index is no error: it is made again from the records.
    try:
        with np.load(path) as arrays:
            if arrays["sizes"].tolist() == _file_sizes(paths):
                return arrays["labels"], arrays["keys"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def write_index(
    builder: Builder,
    split: str,
    paths: Sequence[str],
    labels: np.ndarray,
    keys: np.ndarray,
) -> None:
    """Saves what `read_index` returns, if the images differ in size.

    Args:
      builder: of the directory.
      split: name of the split.
      paths: of the split's record files. Their sizes are saved, too, since other sizes
        show that the index is out of date.
      labels: int32 `[N]`.
      keys: str `[N]`.
    """
    if None not in builder.info.features["image"].shape:
        return
    # Where the directory is read-only, every start reads all records.
    with (
        contextlib.suppress(OSError),
        files.atomic_write(_index_path(builder, split)) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez_compressed(file, labels=labels, keys=keys, sizes=_file_sizes(paths))


def _index_path(builder: Builder, split: str) -> pathlib.Path:
    return pathlib.Path(builder.data_path) / f"index-{split}.npz"


def _file_sizes(paths: Sequence[str]) -> list[int]:
    return [os.stat(path).st_size for path in paths]


def _scan(paths: Sequence[str], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels and keys of all records; without ids, keys are of the pixels.

    This parses the records without TFDS, whose generic decoding takes three times as
    long. Threads would make it slower still, since Python code takes most of the time.
    """
    labels = []
    ids = []
    digests = []
    try:
        for record in _read_all(paths):
            features = _parse(record)
            labels.append(features["label"].int64_list.value[0])
            if "id" in features:
                ids.append(features["id"].bytes_list.value[0].decode())
            elif "file_name" in features:
                ids.append(features["file_name"].bytes_list.value[0].decode())
            else:
                pixels = np.asarray(_open_image(features, channels)).tobytes()
                digests.append(hashlib.blake2b(pixels, digest_size=16).hexdigest())
    except RuntimeError as error:  # of the array_record reader
        raise DamagedRecordError(
            f"{paths[0]} or another file of its split is damaged ({error}): prepare it "
            "again"
        ) from error
    label_array = np.array(labels, np.int32)
    if digests:
        return label_array, content_keys(np.array(digests), label_array)
    return label_array, np.array(ids)


def _read_all(paths: Sequence[str]) -> Iterator[bytes]:
    """Yields all records of some files in order."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    reader = ArrayRecordDataSource(list(paths))
    for start in range(0, len(reader), _READ_BATCH):
        stop = min(start + _READ_BATCH, len(reader))
        yield from reader.__getitems__(range(start, stop))


def _parse(record: bytes) -> Any:
    """Returns the features of a record by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _open_image(features: Any, channels: int) -> "Image.Image":
    from PIL import Image

    encoded = features["image"].bytes_list.value[0]
    return resize.convert_mode(Image.open(io.BytesIO(encoded)), channels)


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def content_keys(digests: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns keys '<digest>_<occurrence>', which do not depend on the records' order.

    Equal images are counted in the order of their labels.

    Args:
      digests: str `[N]`, a hash of each image's pixels.
      labels: integers `[N]`.

    >>> content_keys(np.array(["b", "a", "b"]), np.array([1, 0, 0])).tolist()
    ['b_1', 'a_0', 'b_0']
    """
    occurrences: dict[str, int] = {}
    keys = np.empty(len(digests), dtype=object)
    # lexsort sorts by its last key first: by digest, and equal images by label.
    for i in np.lexsort((labels, digests)):
        occurrence = occurrences.get(digests[i], 0)
        occurrences[digests[i]] = occurrence + 1
        keys[i] = f"{digests[i]}_{occurrence}"
    return keys.astype(str)


def open_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Builder:
    """Returns the TFDS builder of a prepared data set, without using the network.

    Args:
      name: of the data set.
      data_dir: TFDS's directory, see `resolve_data_dir`.

    Raises:
      DatasetNotPreparedError: the data set is absent, damaged or in another format.
    """
    builder = find_builder(name, data_dir)
    if builder is None:
        root = resolve_data_dir(data_dir)
        # These two cannot be downloaded.
        source = " --source PATH" if name in ("tiny_imagenet", "imagenet2012") else ""
        raise DatasetNotPreparedError(
            f"{name} is not prepared in {root}; run: python -m ltkd_jax.data.prepare "
            f"{name} --data_dir {root}{source}"
        )
    return builder


def fingerprint(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> str | None:
    """Returns a hash of all images of a data set prepared from image files, or None.

    Args:
      name: of the data set.
      data_dir: TFDS's directory, see `resolve_data_dir`.
    """
    paths = _find_in_versions(name, data_dir, FINGERPRINT)
    return paths[-1].read_text().strip() if paths else None


def _find_in_versions(
    name: str, data_dir: str | os.PathLike[str] | None, file_name: str
) -> list[pathlib.Path]:
    """Returns the sorted paths of a file in all versions of a data set."""
    # Any other name could be a pattern, or a path out of the directory.
    if not re.fullmatch(r"\w+", name):
        return []
    return sorted((resolve_data_dir(data_dir) / name).glob(f"*/{file_name}"))


def find_builder(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> Builder | None:
    """Returns the TFDS builder of a data set, or None if the data set is absent.

    Args:
      name: of the data set.
      data_dir: TFDS's directory, see `resolve_data_dir`.

    Raises:
      DatasetNotPreparedError: the data set is damaged or in another format, or
        `data_dir` is the folder of a single data set.
    """
    # Looked up before TFDS is imported, which takes a second.
    info_paths = _find_in_versions(name, data_dir, "dataset_info.json")
    if not info_paths:
        _check_is_above_data_sets(resolve_data_dir(data_dir))
        return None
    import tensorflow_datasets as tfds

    newest = max(info_paths, key=lambda path: path.stat().st_mtime)
    in_tfds = name in tfds.list_builders(with_community_datasets=False)
    try:
        if in_tfds:
            # Its stock builder accepts no version but its own.
            builder = tfds.builder(name, data_dir=resolve_data_dir(data_dir))
        else:
            builder = tfds.builder_from_directory(newest.parent)
        if not builder.is_prepared():
            return None
    except Exception as error:  # whatever TFDS's parsers raise
        raise DatasetNotPreparedError(
            f"{newest.parent} is damaged ({_first_line(error)}): remove it and prepare "
            "it again"
        ) from error
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise DatasetNotPreparedError(
            f"{builder.data_path} holds {file_format} files, and only array_record is "
            "read without TensorFlow; prepare it elsewhere: python -m "
            f"ltkd_jax.data.prepare {name} --data_dir DIR"
        )
    return builder


def _check_is_above_data_sets(root: pathlib.Path) -> None:
    """Checks that TFDS's directory is not the folder of a data set or of its version.

    Otherwise a second copy would be prepared inside of that data set.
    """
    if (root / "dataset_info.json").is_file():
        above = root.parent.parent
    elif any(root.glob("[0-9]*.[0-9]*.[0-9]*/dataset_info.json")):
        above = root.parent
    else:
        return
    raise DatasetNotPreparedError(
        f"{root} is the folder of a single data set: give the directory above it, "
        f"{above}, as data.dir (--data_dir of ltkd_jax.data.prepare)"
    )


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns TFDS's directory as an absolute path.

    Args:
      data_dir: the directory; None means $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: it is in a home directory that is not known.
    """
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return pathlib.Path(files.expand_user(root)).absolute()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the data directory is set by --data_dir, by config.data.dir or "
            "by $TFDS_DATA_DIR"
        ) from None
