"""Image files into a TFDS directory of array_record files, however many there are.

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

_CHECKED_AT_ONCE = 256
_SHARD = 256 << 20  # bytes
_Shape = tuple[int | None, int | None, int]  # height, width and channels; None where images differ
_log = logging.getLogger(__name__)


class PrepareError(ValueError):
    """The data directory is in the way, or an image is damaged; the message says what to do."""


def write(
    builder: records.Builder, files: folders.Files, *, skip_damaged: bool = False, show_progress: bool = False
) -> None:
    """Writes all splits and the metadata into `builder.data_path`, and a fingerprint of all records beside them.

    Args:
      builder: of TFDS, for its name, version and features: "image", "label", and "id" or "file_name".
      files: each is decoded once to see that it can be; a JPEG's or PNG's own bytes are kept.
      skip_damaged: whether files that do not decode are left out, with a warning, rather than refused.
      show_progress: shows a bar on the standard error.

    Raises:
      PrepareError: a file that does not decode, an id that is there twice, or a class of which nothing is left.
    """
    from tensorflow_datasets.core import example_serializer, naming, splits

    out = pathlib.Path(builder.data_path)
    out.mkdir(parents=True)
    features, fingerprint, found = builder.info.features, hashlib.sha256(), {}
    serialize = example_serializer.ExampleSerializer(features.get_serialized_info()).serialize_example
    id_name = "id" if "id" in features else "file_name"
    for split in files.splits:
        shards, labels, keys = _Shards(out, split), [], []
        for entry, data in _readable(files, split, features["image"].shape, skip_damaged, show_progress):
            example = {id_name: entry.id, "image": io.BytesIO(data), "label": entry.label}
            record = serialize(features.encode_example(example))
            fingerprint.update(record)
            shards.write(record)
            labels.append(entry.label)
            keys.append(entry.id)
        template = naming.ShardedFileTemplate(
            out, dataset_name=builder.name, split=split, filetype_suffix="array_record"
        )
        paths = shards.close(template)
        records.keep_index(builder, split, paths, np.array(labels, np.int32), np.array(keys))
        found[split] = splits.SplitInfo(split, shards.lengths, shards.num_bytes, template)
    builder.info.set_splits(splits.SplitDict(found.values()))
    builder.info.write_to_directory(out)
    (out / records.FINGERPRINT).write_text(fingerprint.hexdigest())


class _Shards:
    """The files of a split, a new one when one is full; named at the end, when it is known how many there are."""

    def __init__(self, out: pathlib.Path, split: str) -> None:
        self._out, self._split = out, split
        self._writer: Any = None
        self.lengths: list[int] = []
        self.num_bytes, self._room = 0, 0

    def write(self, record: bytes) -> None:
        from array_record.python import array_record_module

        if self._room <= 0:
            if self._writer is not None:
                self._writer.close()
            # One record a group: any of them is read without its neighbours.
            self._writer = array_record_module.ArrayRecordWriter(str(self._path(len(self.lengths))), "group_size:1")
            self.lengths.append(0)
            self._room = _SHARD
        self._writer.write(record)
        self.lengths[-1] += 1
        self.num_bytes += len(record)
        self._room -= len(record)

    def close(self, template: Any) -> tuple[str, ...]:
        self._writer.close()
        paths = []
        for index in range(len(self.lengths)):
            paths.append(str(template.sharded_filepath(shard_index=index, num_shards=len(self.lengths))))
            os.rename(self._path(index), paths[-1])
        return tuple(paths)

    def _path(self, index: int) -> pathlib.Path:
        return self._out / f"{self._split}.{index}.unfinished"


def _readable(
    files: folders.Files, split: str, shape: _Shape, skip_damaged: bool, show_progress: bool
) -> Iterator[tuple[folders.Entry, bytes]]:
    """(entry, bytes) of a split's files, in the order of a hash of their ids."""
    entries = sorted(files.splits[split], key=lambda entry: hashlib.blake2b(entry.id.encode()).digest())
    for entry, following in itertools.pairwise(entries):
        if entry.id == following.id:
            raise PrepareError(f"{split} image {entry.id!r} is there twice: keep one of them")
    kept, damaged = np.zeros(len(files.class_names), int), 0
    blocks = (entries[i : i + _CHECKED_AT_ONCE] for i in range(0, len(entries), _CHECKED_AT_ONCE))
    bar = tqdm(total=len(entries), desc=split, unit="image", disable=not show_progress, dynamic_ncols=True)
    with concurrent.futures.ThreadPoolExecutor() as pool, bar:
        for block in blocks:
            for entry, (data, error) in zip(block, pool.map(functools.partial(_check, shape=shape), block)):
                bar.update()
                if data is not None:
                    kept[entry.label] += 1
                    yield entry, data
                    continue
                message = f"{split} image {entry.id!r} of class {files.class_names[entry.label]!r}: {error}"
                if not skip_damaged:
                    raise PrepareError(f"{message}; mend or remove it, or leave such images out by --skip_damaged")
                _log.warning("left out: %s", message)
                damaged += 1
    if not kept.all():
        raise PrepareError(f"{split} images of class {files.class_names[kept.argmin()]!r}: none of them decodes")
    if damaged:
        _log.warning("%d of %d %s images were left out", damaged, len(entries), split)


def _check(entry: folders.Entry, shape: _Shape) -> tuple[bytes, None] | tuple[None, str]:
    """(bytes of a JPEG or PNG, None), or (None, what is wrong with the file)."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = entry.read()
        image = Image.open(io.BytesIO(data))
        image.load()
        if shape[0] is not None and image.size != (shape[1], shape[0]):
            return None, f"it is {image.width}×{image.height} pixels, expected {shape[1]}×{shape[0]}"
        converted = resize.in_mode(image, 3)
        if image.format not in ("JPEG", "PNG"):
            file = io.BytesIO()
            converted.save(file, format="png")
            data = file.getvalue()
    except UnidentifiedImageError:
        return None, "does not decode (no kind of image file that is known)"
    except Exception as error:  # decoders raise whatever they meet
        return None, f"does not decode ({error})"
    return data, None
