"""Reads the official archives of CIFAR and (Fashion-)MNIST, verified by checksum, without unpacking them to disk."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import pickle
import tarfile
from collections.abc import Collection

import numpy as np

from ltkd_jax import files

MAX_FILE = (
    1 << 28
)  # bytes; no official file has more, so that what is cut off here fails its checksum
_REMEDY = "get the official file again, by running without --source or from the data set's home page"


class ArchiveError(ValueError):
    """A source is not the expected one or cannot be read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Content:
    """Images and labels of an archive, in the official order.

    Attributes:
      splits: by the name of the split, images uint8 `[N, H, W, C]` and, by the name of the label, integers `[N]`.
      class_names: by the name of the label; empty where TFDS knows the names itself.
    """

    splits: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]
    class_names: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Cifar:
    """Describes the two official archives of a CIFAR data set, of binary records and of pickles.

    Attributes:
      splits: the files of each split; those of binary records end in `.bin`.
      binary_names: the file of the class names of each label, in the order of the leading bytes of a record.
      binary_sha256: checksum of the archive of binary records.
      pickle_names: what each label is called in the pickles.
      pickle_meta: the pickle of the class names.
      pickle_sha256: checksum of the archive of pickles.
    """

    splits: dict[str, tuple[str, ...]]
    binary_names: dict[str, str]
    binary_sha256: str
    pickle_names: dict[str, str]
    pickle_meta: str
    pickle_sha256: str


CIFAR100 = Cifar(
    splits={"train": ("train",), "test": ("test",)},
    binary_names={
        "coarse_label": "coarse_label_names.txt",
        "label": "fine_label_names.txt",
    },
    binary_sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    pickle_names={"coarse_label": "coarse_label", "label": "fine_label"},
    pickle_meta="meta",
    pickle_sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)
CIFAR10 = Cifar(
    splits={
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    },
    binary_names={"label": "batches.meta.txt"},
    binary_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    pickle_names={"label": "label"},
    pickle_meta="batches.meta",
    pickle_sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
# Of the decompressed files: redistributions differ in the gzip header (name and time).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_cifar(source: pathlib.Path, cifar: Cifar) -> Content:
    """Reads a CIFAR archive of either kind. Nothing of it is parsed or unpickled unless its checksum matches.

    Raises:
      ArchiveError: it is neither of the archives that `cifar` describes.
    """
    try:
        digest = files.sha256(source)
    except OSError as error:
        raise ArchiveError(
            f"{source} cannot be read ({error.strerror}); give the path of the archive"
        ) from error
    if digest not in (cifar.binary_sha256, cifar.pickle_sha256):
        raise ArchiveError(
            f"{source} is not the official archive: sha256 expected {cifar.binary_sha256} (binary) or "
            f"{cifar.pickle_sha256} (python), found {digest}; {_REMEDY}"
        )
    is_binary = digest == cifar.binary_sha256
    contents = _read_tar(source)
    splits = {}
    for split, names in cifar.splits.items():
        if is_binary:
            batches = [_parse_records(contents[f"{name}.bin"], cifar) for name in names]
        else:
            batches = [_parse_pickle(contents[name], cifar) for name in names]
        arrays = {}
        for key in batches[0]:
            arrays[key] = np.concatenate([batch[key] for batch in batches])
        planes = arrays.pop("image")  # one for each channel
        splits[split] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), arrays
    class_names = {}
    if is_binary:
        for label, name in cifar.binary_names.items():
            class_names[label] = tuple(contents[name].decode().split())
    else:
        meta = pickle.loads(contents[cifar.pickle_meta], encoding="bytes")
        for label, name in cifar.pickle_names.items():
            class_names[label] = tuple(
                class_name.decode() for class_name in meta[f"{name}_names".encode()]
            )
    return Content(splits, class_names)


def _parse_records(data: bytes, cifar: Cifar) -> dict[str, np.ndarray]:
    """Returns labels and planes of binary records, of a byte for each label and 3,072 bytes of pixels."""
    num_labels = len(cifar.binary_names)
    records = np.frombuffer(data, np.uint8).reshape(-1, num_labels + 3072)
    arrays = {label: records[:, i] for i, label in enumerate(cifar.binary_names)}
    return {**arrays, "image": records[:, num_labels:]}


def _parse_pickle(data: bytes, cifar: Cifar) -> dict[str, np.ndarray]:
    """Returns labels and planes of a pickled dictionary, whose keys are byte strings of Python 2."""
    batch = pickle.loads(data, encoding="bytes")
    arrays = {
        label: np.asarray(batch[f"{name}s".encode()])
        for label, name in cifar.pickle_names.items()
    }
    return {**arrays, "image": batch[b"data"]}


def read_idx(source: pathlib.Path, sha256: dict[str, str]) -> Content:
    """Reads the four gzipped idx files of (Fashion-)MNIST in a folder or a tar archive.

    Args:
      source: the folder or the archive.
      sha256: checksum of each file's decompressed content, by the file's name.

    Raises:
      ArchiveError: a file is missing or is not the expected one.
    """
    contents = (
        _read_folder(source, sha256) if source.is_dir() else _read_tar(source, sha256)
    )
    missing = sorted(set(sha256) - set(contents))
    if missing:
        raise ArchiveError(f"{source} has no file {', '.join(missing)}; {_REMEDY}")
    arrays = {}
    for name in sha256:
        try:
            with gzip.open(io.BytesIO(contents[name])) as file:
                content = file.read(MAX_FILE)
        except (
            Exception
        ) as error:  # whatever the decompressor raises for a damaged file
            raise ArchiveError(
                f"{source}: {name} is truncated or damaged ({error}); {_REMEDY}"
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256[name]:
            raise ArchiveError(
                f"{source}: sha256 of {name} expected {sha256[name]}, found {digest}; {_REMEDY}"
            )
        arrays[name] = _parse_idx(content)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = arrays[f"{prefix}-images-idx3-ubyte.gz"][..., None]
        splits[split] = images, {"label": arrays[f"{prefix}-labels-idx1-ubyte.gz"]}
    return Content(splits, class_names={})


def _read_folder(folder: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """Returns the contents of those of the named files that exist."""
    contents = {}
    for name in names:
        if (folder / name).is_file():  # opening a pipe would wait for ever
            with open(folder / name, "rb") as file:
                contents[name] = file.read(MAX_FILE)
    return contents


def _read_tar(
    path: pathlib.Path, names: Collection[str] | None = None
) -> dict[str, bytes]:
    """Returns the contents of the named files in a tar archive, or of all, by their names without a folder."""
    try:
        contents = {}
        # As a stream: a member of a compressed archive is reached only by decompressing what lies before it.
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and (names is None or name in names):
                    file = tar.extractfile(member)
                    assert file is not None  # so for every regular file
                    contents[name] = file.read(MAX_FILE)
        return contents
    except Exception as error:  # whatever the parser of a damaged archive raises
        raise ArchiveError(
            f"{path} is truncated or cannot be read ({error}); {_REMEDY}"
        ) from error


def _parse_idx(data: bytes) -> np.ndarray:
    """Returns the array of an idx file of bytes: type, number of dimensions, sizes, values."""
    num_dimensions = data[3]
    shape = np.frombuffer(data, ">u4", count=num_dimensions, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
