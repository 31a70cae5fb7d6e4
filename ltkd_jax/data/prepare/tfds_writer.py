"""Writes image files as a TFDS directory of array_record files.

TFDS's own writer shuffles through TensorFlow if a split has more than 1,000 MiB. Here
the examples are in the order of a hash of their ids, so that only the ids and digests
are in memory at once, whatever the number of images. The metadata are written by TFDS.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ltkd_jax.data import records, resize
from ltkd_jax.data.prepare import folders

_CHECK_BLOCK = 256  # number of images that are checked in parallel
SHARD_BYTES = 256 << 20
# Height, width and channels; height and width are None where images differ in size.
_Shape = tuple[int | None, int | None, int]
_log = logging.getLogger(__name__)


class PrepareError(ValueError):
    """Raised for a data set that cannot be written; the message has the remedy."""


def write(
    builder: records.Builder,
    files: folders.ImageFiles,
    *,
    skip_damaged: bool = False,
    show_progress: bool = False,
) -> None:
    """Writes all splits, the metadata, and a fingerprint into `builder.data_path`.

    The fingerprint is a hash of the splits, ids, labels and images of all records.
    Equal images in two splits or classes are kept, and reported by a warning.

    Args:
      builder: of TFDS, with its name, version and features "image", "label", and "id"
        or "file_name".
      files: the image files. Each is decoded once to check it. The bytes of an upright
        JPEG or PNG are stored unchanged; all others become upright PNGs.
      skip_damaged: whether files that do not decode are left out, with a warning,
        instead of raising an error.
      show_progress: whether to show a bar on the standard error.

    Raises:
      PrepareError: a file does not decode, an id occurs twice, or no image of a class
        decodes.
    """
    from tensorflow_datasets.core import example_serializer, naming, splits

    folder = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True)
    features = builder.info.features
    id_name = "id" if "id" in features else "file_name"
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(image_file: folders.ImageFile, data: bytes) -> bytes:
        example = {
            id_name: image_file.id,
            "image": io.BytesIO(data),
            "label": image_file.label,
        }
        return serializer.serialize_example(features.encode_example(example))

    fingerprint = hashlib.sha256()
    repeats = _Repeats()
    split_infos = []
    for split in files.splits:
        shards = _ShardWriter(folder, split)
        labels = []
        keys = []
        for image_file, data in _decodable_files(
            files, split, features["image"].shape, skip_damaged, show_progress
        ):
            shards.write(serialize(image_file, data))
            # Not of the record: protobuf orders its features anew in each process.
            digest = hashlib.sha256(data)
            content = [split, image_file.id, image_file.label, digest.hexdigest()]
            fingerprint.update(json.dumps(content).encode())
            repeats.add(digest.digest(), split, image_file)
            labels.append(image_file.label)
            keys.append(image_file.id)
        template = naming.ShardedFileTemplate(
            folder,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="array_record",
        )
        paths = shards.close(template)
        records.write_index(
            builder, split, paths, np.array(labels, np.int32), np.array(keys)
        )
        split_infos.append(
            splits.SplitInfo(split, shards.lengths, shards.num_bytes, template)
        )
    builder.info.set_splits(splits.SplitDict(split_infos))
    builder.info.write_to_directory(folder)
    (folder / records.FINGERPRINT).write_text(fingerprint.hexdigest())
    repeats.report()


class _Repeats:
    """Collects images that occur in two splits or in two classes, byte by byte."""

    def __init__(self) -> None:
        # By the image's digest: its first occurrence.
        self._first: dict[bytes, tuple[str, folders.ImageFile]] = {}
        self._in_two_splits: list[str] = []
        self._in_two_classes: list[str] = []

    def add(self, digest: bytes, split: str, image_file: folders.ImageFile) -> None:
        """Adds an image."""
        first_split, first_file = self._first.setdefault(digest, (split, image_file))
        pair = f"{first_file.path!r} and {image_file.path!r}"
        if split != first_split:
            self._in_two_splits.append(pair)
        if image_file.label != first_file.label:
            self._in_two_classes.append(pair)

    def report(self) -> None:
        """Warns of the images that were added twice."""
        for place, pairs in (
            ("in training and test", self._in_two_splits),
            ("in two classes", self._in_two_classes),
        ):
            if pairs:
                _log.warning(
                    "the same image is %s, %d times: %s; remove one of each two",
                    place,
                    len(pairs),
                    folders.examples(pairs),
                )


class _ShardWriter:
    """Writes the array_record files ("shards") of a split.

    A new file begins when one has `SHARD_BYTES`. Their names contain their number, so
    they are named when all are written.

    Attributes:
      lengths: number of records in each file.
      num_bytes: of all records.
    """

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        self._folder = folder
        self._split = split
        self._writer: Any = None
        self._free_bytes = 0
        self.lengths: list[int] = []
        self.num_bytes = 0

    def write(self, record: bytes) -> None:
        """Appends a record."""
        from array_record.python import array_record_module

        if self._free_bytes <= 0:
            if self._writer is not None:
                self._writer.close()
            path = self._unfinished_path(len(self.lengths))
            # One record in a group: each is read without decompressing its neighbours.
            self._writer = array_record_module.ArrayRecordWriter(
                str(path), "group_size:1"
            )
            self.lengths.append(0)
            self._free_bytes = SHARD_BYTES
        self._writer.write(record)
        self.lengths[-1] += 1
        self.num_bytes += len(record)
        self._free_bytes -= len(record)

    def close(self, template: Any) -> tuple[str, ...]:
        """Closes the last file, and renames all by TFDS's template; returns paths."""
        self._writer.close()
        num_shards = len(self.lengths)
        paths = []
        for index in range(num_shards):
            path = template.sharded_filepath(shard_index=index, num_shards=num_shards)
            os.rename(self._unfinished_path(index), path)
            paths.append(str(path))
        return tuple(paths)

    def _unfinished_path(self, index: int) -> pathlib.Path:
        return self._folder / f"{self._split}.{index}.unfinished"


def _decodable_files(
    files: folders.ImageFiles,
    split: str,
    shape: _Shape,
    skip_damaged: bool,
    show_progress: bool,
) -> Iterator[tuple[folders.ImageFile, bytes]]:
    """Yields each image file of a split with its bytes, in the order of a hash of ids.

    Raises:
      PrepareError: a file does not decode, an id occurs twice, or no image of a class
        decodes.
    """
    image_files = sorted(files.splits[split], key=_hash_of_id)
    _check_unique(image_files, split)
    class_sizes = np.zeros(len(files.class_names), int)
    bar = tqdm(
        total=len(image_files),
        desc=split,
        unit="image",
        disable=not show_progress,
        dynamic_ncols=True,
    )
    encode = functools.partial(
        _encode, shape=shape, apply_orientation=files.apply_orientation
    )
    with concurrent.futures.ThreadPoolExecutor() as pool, bar:
        # In blocks, since `map` starts on all of its input at once, and keeps the
        # results in memory.
        for start in range(0, len(image_files), _CHECK_BLOCK):
            block = image_files[start : start + _CHECK_BLOCK]
            for image_file, encoded in zip(block, pool.map(encode, block)):
                bar.update()
                if isinstance(encoded, bytes):
                    class_sizes[image_file.label] += 1
                    yield image_file, encoded
                    continue
                class_name = files.class_names[image_file.label]
                message = (
                    f"{split} image {image_file.id!r} of class {class_name!r}: "
                    f"{encoded.problem}"
                )
                if not skip_damaged:
                    raise PrepareError(
                        f"{message}; repair or remove it, or leave such images out by "
                        "--skip_damaged"
                    )
                _log.warning("left out: %s", message)
    if not class_sizes.all():
        class_name = files.class_names[class_sizes.argmin()]
        raise PrepareError(
            f"{split} images of class {class_name!r}: none of them decodes"
        )
    num_left_out = len(image_files) - class_sizes.sum()
    if num_left_out:
        _log.warning(
            "%d of %d %s images were left out", num_left_out, len(image_files), split
        )


def _hash_of_id(image_file: folders.ImageFile) -> bytes:
    return hashlib.blake2b(image_file.id.encode()).digest()


def _check_unique(image_files: list[folders.ImageFile], split: str) -> None:
    """Checks that no id repeats in a list that is sorted by a hash of the ids."""
    for image_file, next_file in itertools.pairwise(image_files):
        if image_file.id == next_file.id:
            raise PrepareError(
                f"{split} image {image_file.id!r} occurs twice: keep one of them"
            )


@dataclasses.dataclass(frozen=True)
class _Damaged:
    """Says why an image file cannot be used."""

    problem: str


def _encode(
    image_file: folders.ImageFile, shape: _Shape, apply_orientation: bool
) -> bytes | _Damaged:
    """Returns an image as the bytes of a JPEG or PNG file, or why that is not possible.

    The problem is returned, not raised, so that other images of a block go on.
    """
    from PIL import Image, UnidentifiedImageError

    height, width, _ = shape
    try:
        data = image_file.read()
        image = Image.open(io.BytesIO(data))
        # `open` reads the header only.
        image.load()
        upright = resize.make_upright(image) if apply_orientation else image
        if height is not None and upright.size != (width, height):
            return _Damaged(
                f"it is {upright.width}×{upright.height} pixels, "
                f"expected {width}×{height}"
            )
        converted = resize.convert_mode(upright, 3)
        if image.format in ("JPEG", "PNG") and upright is image:
            return data
        file = io.BytesIO()
        converted.save(file, format="png")
        return file.getvalue()
    except UnidentifiedImageError:
        return _Damaged("does not decode (an unknown kind of image file)")
    except Exception as error:  # whatever a decoder raises
        return _Damaged(f"does not decode ({error})")
