"""Writes image files as a TFDS directory of array_record files, however many there are.

TFDS's own writer shuffles through TensorFlow once a split has more than 1,000 MiB. Here the order is that of a hash of
the ids, which needs no more than the ids, and the metadata is TFDS's.
"""

import concurrent.futures
import functools
import hashlib
import io
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ltkd_jax.data import records, resize
from ltkd_jax.data.prepare import folders

_BLOCK = 256  # images that are checked side by side
SHARD_SIZE = 256 << 20  # bytes
_Shape = tuple[
    int | None, int | None, int
]  # height, width and channels; None where images differ
_log = logging.getLogger(__name__)


class PrepareError(ValueError):
    """The data directory is in the way, or an image is damaged; the message says what to do."""


def write(
    builder: records.Builder,
    files: folders.Files,
    *,
    skip_damaged: bool = False,
    show_progress: bool = False,
) -> None:
    """Writes all splits and the metadata into `builder.data_path`, and a fingerprint of all records beside them.

    Args:
      builder: TFDS's, for its name, version and features: "image", "label", and "id" or "file_name".
      files: the images. Each is decoded once to check it; a JPEG's or PNG's own bytes are kept.
      skip_damaged: whether files that do not decode are left out, with a warning, rather than refused.
      show_progress: whether to show a bar on the standard error.

    Raises:
      PrepareError: a file does not decode, an id occurs twice, or nothing is left of a class.
    """
    from tensorflow_datasets.core import example_serializer, naming, splits

    folder = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True)
    features = builder.info.features
    serialize = example_serializer.ExampleSerializer(
        features.get_serialized_info()
    ).serialize_example
    id_name = "id" if "id" in features else "file_name"
    fingerprint = hashlib.sha256()
    split_infos = []
    for split in files.splits:
        shards, labels, keys = _Shards(folder, split), [], []
        for entry, data in _checked(
            files, split, features["image"].shape, skip_damaged, show_progress
        ):
            example = {
                id_name: entry.id,
                "image": io.BytesIO(data),
                "label": entry.label,
            }
            record = serialize(features.encode_example(example))
            fingerprint.update(record)
            shards.write(record)
            labels.append(entry.label)
            keys.append(entry.id)
        template = naming.ShardedFileTemplate(
            folder,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="array_record",
        )
        paths = shards.close(template)
        records.keep_index(
            builder, split, paths, np.array(labels, np.int32), np.array(keys)
        )
        split_infos.append(
            splits.SplitInfo(split, shards.lengths, shards.num_bytes, template)
        )
    builder.info.set_splits(splits.SplitDict(split_infos))
    builder.info.write_to_directory(folder)
    (folder / records.FINGERPRINT).write_text(fingerprint.hexdigest())


class _Shards:
    """Writes the files of a split, a new one when one is full, and names them when their number is known."""

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._writer: Any = None
        self._room = 0
        self.lengths: list[int] = []
        self.num_bytes = 0

    def write(self, record: bytes) -> None:
        from array_record.python import array_record_module

        if self._room <= 0:
            if self._writer is not None:
                self._writer.close()
            # One record a group: any of them is read without its neighbours.
            self._writer = array_record_module.ArrayRecordWriter(
                str(self._path(len(self.lengths))), "group_size:1"
            )
            self.lengths.append(0)
            self._room = SHARD_SIZE
        self._writer.write(record)
        self.lengths[-1] += 1
        self.num_bytes += len(record)
        self._room -= len(record)

    def close(self, template: Any) -> tuple[str, ...]:
        self._writer.close()
        paths = []
        for index in range(len(self.lengths)):
            paths.append(
                str(
                    template.sharded_filepath(
                        shard_index=index, num_shards=len(self.lengths)
                    )
                )
            )
            os.rename(self._path(index), paths[-1])
        return tuple(paths)

    def _path(self, index: int) -> pathlib.Path:
        return self._folder / f"{self._split}.{index}.unfinished"


def _checked(
    files: folders.Files,
    split: str,
    shape: _Shape,
    skip_damaged: bool,
    show_progress: bool,
) -> Iterator[tuple[folders.Entry, bytes]]:
    """Yields each entry of a split that decodes, with its bytes, in the order of a hash of the ids."""
    entries = sorted(
        files.splits[split],
        key=lambda entry: hashlib.blake2b(entry.id.encode()).digest(),
    )
    for entry, following in itertools.pairwise(entries):
        if entry.id == following.id:
            raise PrepareError(
                f"{split} image {entry.id!r} is there twice: keep one of them"
            )
    sizes = np.zeros(len(files.class_names), int)
    bar = tqdm(
        total=len(entries),
        desc=split,
        unit="image",
        disable=not show_progress,
        dynamic_ncols=True,
    )
    with concurrent.futures.ThreadPoolExecutor() as pool, bar:
        for block in (entries[i : i + _BLOCK] for i in range(0, len(entries), _BLOCK)):
            for entry, data in zip(
                block, pool.map(functools.partial(_encode, shape=shape), block)
            ):
                bar.update()
                if isinstance(data, bytes):
                    sizes[entry.label] += 1
                    yield entry, data
                    continue
                message = f"{split} image {entry.id!r} of class {files.class_names[entry.label]!r}: {data}"
                if not skip_damaged:
                    raise PrepareError(
                        f"{message}; repair or remove it, or leave such images out by --skip_damaged"
                    )
                _log.warning("left out: %s", message)
    if not sizes.all():
        raise PrepareError(
            f"{split} images of class {files.class_names[sizes.argmin()]!r}: none of them decodes"
        )
    if sizes.sum() < len(entries):
        _log.warning(
            "%d of %d %s images were left out",
            len(entries) - sizes.sum(),
            len(entries),
            split,
        )


def _encode(entry: folders.Entry, shape: _Shape) -> bytes | str:
    """Returns an image as a JPEG or PNG file, or what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = entry.read()
        image = Image.open(io.BytesIO(data))
        image.load()
        if shape[0] is not None and image.size != (shape[1], shape[0]):
            return f"it is {image.width}×{image.height} pixels, expected {shape[1]}×{shape[0]}"
        converted = resize.in_mode(image, 3)
        if image.format in ("JPEG", "PNG"):
            return data
        file = io.BytesIO()
        converted.save(file, format="png")
        return file.getvalue()
    except UnidentifiedImageError:
        return "does not decode (an unknown kind of image file)"
    except Exception as error:  # whatever a decoder raises
        return f"does not decode ({error})"
