"""Labelled images: in memory, or as records on disk that are decoded when they are asked for.

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
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ltkd_jax.data import resize

if TYPE_CHECKING:
    from PIL import Image

Builder = Any  # of TFDS, which has no type hints
_BLOCK = 256  # records that are read at once

# A PNG up to its first data chunk: signature, then the header chunk.
_PNG_HEADER = struct.Struct(">8sI4sIIBBBBBI")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_MODES = {0: "L", 2: "RGB"}  # colour type to Pillow's mode


FINGERPRINT = "fingerprint.txt"  # of all records, beside those that `write` wrote


class DamagedRecord(ValueError):
    """A record on disk cannot be read, or its image does not decode; the message names it."""


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.images.shape[1:]

    def take(self, indices: np.ndarray) -> "Images":
        """Those of the indices."""
        return Images(self.images[indices], self.labels[indices], self.keys[indices])

    subset = take  # as `Records` has it


@dataclasses.dataclass(frozen=True)
class Records:
    """Labelled images of a TFDS directory, sorted by key, as they lie on disk. May be pickled.

    Attributes:
      files: the array_record files.
      numbers: int64 `[N]`, the record of each image.
      labels: int32 `[N]`.
      keys: str `[N]`, unique.
      shape: height, width and channels of an image as it is read.
      fit: "stored", every image has `shape` already; else it is made of each by `resize.center`, "whole", or with a
        "margin" left out as ImageNet's habit is.
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
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(list(self.files))

    def subset(self, indices: np.ndarray) -> "Records":
        """Those of the indices, still on disk."""
        return dataclasses.replace(
            self, numbers=self.numbers[indices], labels=self.labels[indices], keys=self.keys[indices]
        )

    def take(self, indices: np.ndarray) -> Images:
        """Those of the indices, decoded."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        for start in range(0, len(indices), _BLOCK):
            block = indices[start : start + _BLOCK]
            with self._naming(block[0]):
                found = self._source.__getitems__(self.numbers[block])
            for i, (index, record) in enumerate(zip(block, found), start):
                images[i] = self._whole(index, record)
        return Images(images, self.labels[indices], self.keys[indices])

    def image(self, index: int) -> np.ndarray:
        """An image as it is evaluated, uint8 `[H, W, C]`.

        Raises:
          ValueError: it does not decode; the message has its key.
        """
        with self._naming(index):
            record = self._source[int(self.numbers[index])]
        return self._whole(index, record)

    def crop(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """A random resized crop of an image, uint8 `[H, W, C]`, see `resize.random_crop`.

        Raises:
          ValueError: it does not decode; the message has its key.
        """
        with self._naming(index):
            return resize.random_crop(self._open(self._source[int(self.numbers[index])]), self.shape[0], rng)

    def _whole(self, index: int, record: bytes) -> np.ndarray:
        with self._naming(index):
            if self.fit == "stored":
                return decode(_encoded(record), self.shape[-1]).reshape(self.shape)
            return resize.center(self._open(record), self.shape[0], margin=self.fit == "margin")

    def _open(self, record: bytes) -> "Image.Image":
        from PIL import Image

        return resize.in_mode(Image.open(io.BytesIO(_encoded(record))), self.shape[-1])

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # decoders and readers raise whatever they meet
            key, where = str(self.keys[index]), pathlib.Path(self.files[0]).parent
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedRecord(f"image {key!r} in {where} does not decode ({reason}): prepare it again") from error


def read(builder: Builder, split: str, size: int = 0, *, margin: bool = False) -> Records:
    """The images of a split, sorted by key.

    Args:
      builder: of a prepared TFDS directory, see `open_builder`.
      split: such as "train".
      size: to which images are resized; 0 leaves them as they are stored.
      margin: whether resizing leaves out a border.

    Raises:
      ValueError: images of differing sizes and no size to bring them to, or a size that they do not have.
    """
    stored = builder.info.features["image"].shape
    fixed = None not in stored
    if not size and not fixed:
        raise ValueError(f"{builder.name}: its images differ in size: set data.image_size, such as 64 or 224")
    shape = stored if fixed and not size else (size, size, stored[-1])
    fit = "stored" if shape == stored else "margin" if margin else "whole"
    labels, keys = index(builder, split)
    order = np.argsort(keys)
    return Records(_files(builder, split), order, labels[order], keys[order], shape, fit)


def _files(builder: Builder, split: str) -> tuple[str, ...]:
    return tuple(sorted(str(path) for path in builder.info.splits[split].filepaths))


def index(builder: Builder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 `[N]` and keys str `[N]` in the order of the records.

    Where images differ in size, and so may be too large to read them all at every start, this is kept beside the
    records as `index-SPLIT.npz`.
    """
    files, shape = _files(builder, split), builder.info.features["image"].shape
    path, stamp = _index_path(builder, split), [os.stat(file).st_size for file in files]
    if None in shape and path.exists():
        try:
            with np.load(path) as kept:
                if kept["sizes"].tolist() == stamp:
                    return kept["labels"], kept["keys"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: it is only a copy
    labels, keys = _scan(files, shape[-1])
    keep_index(builder, split, files, labels, keys)
    return labels, keys


def keep_index(builder: Builder, split: str, files: Sequence[str], labels: np.ndarray, keys: np.ndarray) -> None:
    """Keeps what `index` gives, where images differ in size."""
    if None not in builder.info.features["image"].shape:
        return
    path = _index_path(builder, split)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, labels=labels, keys=keys, sizes=[os.stat(file).st_size for file in files])
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a directory that is read only is read again


def _index_path(builder: Builder, split: str) -> pathlib.Path:
    return pathlib.Path(builder.data_path) / f"index-{split}.npz"


def _scan(files: Sequence[str], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and keys of all records. Where they have no id, keys are made of the pixels.

    Records are parsed here and not by TFDS, whose generic decoding takes three times as long; threads
    make it slower still, since it is Python code that takes the time.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(list(files))
        return _gather(source, channels)
    except RuntimeError as error:
        raise DamagedRecord(f"{files[0]} or a file beside it is damaged ({error}): prepare it again") from error


def _gather(source: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    labels, keys, digests = np.empty(len(source), np.int32), [], []
    for start in range(0, len(source), _BLOCK):
        rows = range(start, min(start + _BLOCK, len(source)))
        for row, record in zip(rows, source.__getitems__(rows)):
            feature = _parse(record)
            labels[row] = feature["label"].int64_list.value[0]
            name = next((key for key in ("id", "file_name") if key in feature), None)
            if name:
                keys.append(feature[name].bytes_list.value[0].decode())
            else:
                pixels = decode(feature["image"].bytes_list.value[0], channels)
                digests.append(hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest())
    return labels, content_keys(np.array(digests), labels) if digests else np.array(keys)


def _parse(record: bytes) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _encoded(record: bytes) -> bytes:
    return _parse(record)["image"].bytes_list.value[0]


def content_keys(digests: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Keys '<hash of the pixels>_<occurrence>'; equal images are counted in the order of their labels."""
    seen: dict[str, int] = {}
    keys = np.empty(len(digests), dtype=object)
    for i in np.lexsort((labels, digests)):
        occurrence = seen[digests[i]] = seen.get(digests[i], -1) + 1
        keys[i] = f"{digests[i]}_{occurrence}"
    return keys.astype(str)


def decode(data: bytes, channels: int) -> np.ndarray:
    """The pixels of an image file, uint8 `[H, W, 3]` for three channels, else `[H, W]`; grey ones are made colour.

    A small PNG is read twice as quickly as by `PIL.Image.open`.
    """
    from PIL import Image

    if data[:8] == _PNG_SIGNATURE:
        _, _, _, width, height, depth, colour, _, _, interlaced, _ = _PNG_HEADER.unpack_from(data)
        length, kind = struct.unpack_from(">I4s", data, _PNG_HEADER.size)
        start = _PNG_HEADER.size + 8
        next_kind = data[start + length + 8 : start + length + 12]
        mode = "L" if channels == 1 else "RGB"
        plain = depth == 8 and _PNG_MODES.get(colour) == mode and not interlaced
        if plain and kind == b"IDAT" and next_kind == b"IEND":
            image = Image.frombytes(mode, (width, height), data[start : start + length], "zip", mode, 0)
            return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, *(() if mode == "L" else (3,)))
    return np.asarray(resize.in_mode(Image.open(io.BytesIO(data)), channels))


def open_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Builder:
    """The TFDS builder of a data set that is prepared in `data_dir`.

    Raises:
      DatasetNotPrepared: at once, without a look at the network, if it is not there or in another format.
    """
    builder = find_builder(name, data_dir)
    if builder is None:
        root = resolve_data_dir(data_dir)
        source = " --source PATH" if name in ("tiny_imagenet", "imagenet2012") else ""
        raise DatasetNotPrepared(
            f"{name} is not prepared in {root}; run: python -m ltkd_jax.data.prepare {name} --data_dir {root}{source}"
        )
    return builder


def fingerprint(name: str, data_dir: str | os.PathLike[str] | None = None) -> str | None:
    """A hash of all records of a data set that was prepared from image files; None where there is none."""
    found = sorted((resolve_data_dir(data_dir) / name).glob(f"*/{FINGERPRINT}")) if re.fullmatch(r"\w+", name) else []
    return found[-1].read_text().strip() if found else None


def find_builder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Builder | None:
    """As `open_builder`, but None if the data set is not there."""
    root = resolve_data_dir(data_dir)
    # TFDS itself takes a second to import: look first.
    prepared = [] if not re.fullmatch(r"\w+", name) else list((root / name).glob("*/dataset_info.json"))
    if not prepared:
        return None
    import tensorflow_datasets as tfds

    newest = max(prepared, key=lambda path: path.stat().st_mtime)
    known = tfds.list_builders(with_community_datasets=False)  # out here: a package that TFDS lacks is no damage
    try:
        if name in known:
            builder = tfds.builder(name, data_dir=root)
        else:
            builder = tfds.builder_from_directory(newest.parent)  # TFDS has no code for it: the directory tells all
        if not builder.is_prepared():
            return None
    except Exception as error:  # of whatever kind its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetNotPrepared(f"{newest.parent} is damaged ({reason}): remove it and prepare it again") from error
    if builder.info.file_format.value != "array_record":
        raise DatasetNotPrepared(
            f"{builder.data_path} holds {builder.info.file_format.value} files, and only array_record is read without "
            f"TensorFlow; prepare it elsewhere: python -m ltkd_jax.data.prepare {name} --data_dir DIR"
        )
    return builder


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """TFDS's directory: as given, or TFDS's own default."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
