"""Reads the official archives of CIFAR and (Fashion-)MNIST without unpacking them.

Every archive is verified by its checksum before anything of it is parsed.
"""

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

# The most that is read of a file, so that an archive cannot fill the memory. No
# official file is larger, so the checksum of a file that is cut off here fails.
MAX_FILE_BYTES = 1 << 28
_REMEDY = (
    "get the official file again, by running without --source or from the data set's "
    "home page"
)


class ArchiveError(ValueError):
    """Raised for a source that is not the official one, or cannot be read.

    The message has the remedy.
    """


@dataclasses.dataclass(frozen=True)
class DecodedImages:
    """Holds the images and labels of an archive, in the official order.

    Attributes:
      splits: by the split's name, (images uint8 `[N, H, W, channels]`, labels). The
        labels are integers `[N]` by the label's name, such as "coarse_label".
      class_names: by the label's name; empty where TFDS knows the names itself.
    """

    splits: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]
    class_names: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class CifarLayout:
    """Describes the two official archives of a CIFAR data set.

    One archive holds binary records, the other pickles.

    Attributes:
      splits: the files of each split, which end in `.bin` in the binary archive.
      binary_names: by the label's name, the file of its class names; in the order of
        the label bytes at the start of a record.
      binary_sha256: checksum of the binary archive.
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


CIFAR100 = CifarLayout(
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
CIFAR10 = CifarLayout(
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
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


def read_cifar(source: pathlib.Path, layout: CifarLayout) -> DecodedImages:
    """Reads a CIFAR archive, of binary records or of pickles.

    Nothing is parsed or unpickled unless the archive's checksum matches: a pickle can
    run code.

    Args:
      source: the archive.
      layout: of the data set's two archives.

    Raises:
      ArchiveError: the file is neither of the two archives.
    """
    is_binary = _verify_cifar(source, layout)
    contents = _read_tar(source)
    splits = {}
    for split, file_names in layout.splits.items():
        batches = []
        for file_name in file_names:
            if is_binary:
                batches.append(_parse_records(contents[f"{file_name}.bin"], layout))
            else:
                batches.append(_parse_pickle(contents[file_name], layout))
        arrays = {}
        for name in batches[0]:
            arrays[name] = np.concatenate([batch[name] for batch in batches])
        # An image is stored as 32×32 pixels of red, then of green, then of blue.
        images = arrays.pop("image").reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = images, arrays
    if is_binary:
        class_names = _binary_class_names(contents, layout)
    else:
        class_names = _pickle_class_names(contents, layout)
    return DecodedImages(splits, class_names)


def _verify_cifar(source: pathlib.Path, layout: CifarLayout) -> bool:
    """Returns whether the file is the binary archive; raises if it is neither."""
    try:
        digest = files.sha256(source)
    except OSError as error:
        raise ArchiveError(
            f"{source} cannot be read ({error.strerror}); give the path of the archive"
        ) from error
    if digest not in (layout.binary_sha256, layout.pickle_sha256):
        raise ArchiveError(
            f"{source} is not the official archive: sha256 expected "
            f"{layout.binary_sha256} (binary) or {layout.pickle_sha256} (python), "
            f"found {digest}; {_REMEDY}"
        )
    return digest == layout.binary_sha256


def _parse_records(data: bytes, layout: CifarLayout) -> dict[str, np.ndarray]:
    """Returns the labels and pixels of binary records.

    A record is one byte for each label, and 3,072 bytes of pixels.
    """
    num_labels = len(layout.binary_names)
    records = np.frombuffer(data, np.uint8).reshape(-1, num_labels + 3072)
    arrays = {label: records[:, i] for i, label in enumerate(layout.binary_names)}
    return {**arrays, "image": records[:, num_labels:]}


def _parse_pickle(data: bytes, layout: CifarLayout) -> dict[str, np.ndarray]:
    """Returns the labels and pixels of a pickled dictionary."""
    # Python 2 wrote the pickles, so their strings are bytes here.
    batch = pickle.loads(data, encoding="bytes")
    arrays = {}
    for label, name in layout.pickle_names.items():
        arrays[label] = np.asarray(batch[f"{name}s".encode()])
    return {**arrays, "image": batch[b"data"]}


def _binary_class_names(
    contents: dict[str, bytes], layout: CifarLayout
) -> dict[str, tuple[str, ...]]:
    """Returns the class names of each label from text files of one name a line."""
    class_names = {}
    for label, file_name in layout.binary_names.items():
        class_names[label] = tuple(contents[file_name].decode().split())
    return class_names


def _pickle_class_names(
    contents: dict[str, bytes], layout: CifarLayout
) -> dict[str, tuple[str, ...]]:
    """Returns the class names of each label from a pickled dictionary."""
    meta = pickle.loads(contents[layout.pickle_meta], encoding="bytes")
    class_names = {}
    for label, name in layout.pickle_names.items():
        encoded_names = meta[f"{name}_names".encode()]
        class_names[label] = tuple(encoded.decode() for encoded in encoded_names)
    return class_names


def read_idx(source: pathlib.Path, sha256: dict[str, str]) -> DecodedImages:
    """Reads the four gzipped idx files of (Fashion-)MNIST in a folder or a tar archive.

    Args:
      source: the folder or the archive.
      sha256: checksum of each file's decompressed content, by the file's name.

    Raises:
      ArchiveError: a file is missing or is not the expected one.
    """
    if source.is_dir():
        contents = _read_folder(source, sha256)
    else:
        contents = _read_tar(source, sha256)
    missing = sorted(set(sha256) - set(contents))
    if missing:
        raise ArchiveError(f"{source} has no file {', '.join(missing)}; {_REMEDY}")
    arrays = {}
    for name in sha256:
        data = _decompress(contents[name], f"{source}: {name}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != sha256[name]:
            raise ArchiveError(
                f"{source}: sha256 of {name} expected {sha256[name]}, found {digest}; "
                f"{_REMEDY}"
            )
        arrays[name] = _parse_idx(data)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = arrays[f"{prefix}-images-idx3-ubyte.gz"][..., None]
        splits[split] = images, {"label": arrays[f"{prefix}-labels-idx1-ubyte.gz"]}
    return DecodedImages(splits, class_names={})


def _decompress(data: bytes, name: str) -> bytes:
    """Returns the content of a gzip file, at most `MAX_FILE_BYTES` of it."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            return file.read(MAX_FILE_BYTES)
    except Exception as error:  # whatever gzip raises for a damaged file
        raise ArchiveError(
            f"{name} is truncated or damaged ({error}); {_REMEDY}"
        ) from error


def _read_folder(folder: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """Returns the contents of those of the named files that exist."""
    contents = {}
    for name in names:
        # Regular files only: to open a pipe would wait for ever.
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                contents[name] = file.read(MAX_FILE_BYTES)
    return contents


def _read_tar(
    path: pathlib.Path, names: Collection[str] | None = None
) -> dict[str, bytes]:
    """Returns the contents of the named files of a tar archive, or of all its files.

    They are named without their folders.
    """
    try:
        contents = {}
        # "|": read once from start to end. To reach a file of a compressed archive, all
        # that precedes it must be decompressed.
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and (names is None or name in names):
                    file = tar.extractfile(member)
                    assert file is not None  # true for every regular file
                    contents[name] = file.read(MAX_FILE_BYTES)
        return contents
    except Exception as error:  # whatever tarfile raises for a damaged archive
        raise ArchiveError(
            f"{path} is truncated or cannot be read ({error}); {_REMEDY}"
        ) from error


def _parse_idx(data: bytes) -> np.ndarray:
    """Returns the array of an idx file of bytes.

    The file is a header of 4 bytes, whose last is the number of dimensions, then the
    sizes and the values.
    """
    num_dimensions = data[3]
    shape = np.frombuffer(data, ">u4", count=num_dimensions, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
