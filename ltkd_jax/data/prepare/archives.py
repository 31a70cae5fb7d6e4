"""The official archives of small image data sets: verified, bounded, and never extracted to disk."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Collection
from typing import Any, Self

import numpy as np

from ltkd_jax.data import longtail

_MAX_MEMBER = 256 << 20  # bytes; the largest official member has 154 MB
_MAX_HEADER = 1 << 20  # bytes; tarfile reads what these hold into memory before it shows a member
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_MAX_MEMBERS = 64  # official archives have at most 10
_REMEDY = "get the official file again, by running without --source or from the data set's home page"


class ArchiveError(ValueError):
    """A source is not the official one, or can't be read: what was expected, what was found, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Content:
    """What an archive holds, in the official order.

    splits: from a split's name to images uint8 `[N, H, W, C]` and, by the name of the label, integers `[N]`.
    class_names: by the name of the label; empty where TFDS knows the names itself.
    """

    splits: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]
    class_names: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Cifar:
    """The layouts of a CIFAR archive, as pickles and as binary records, and the checksums that prove them.

    label_bytes are the names of a binary record's leading bytes; each of the other dictionaries is by
    split or by the name of the label. `pickle_md5` covers every member that is unpickled.
    """

    num_classes: dict[str, int]
    label_bytes: tuple[str, ...]
    binary_splits: dict[str, tuple[str, ...]]
    binary_names: dict[str, str]
    binary_sha256: str
    pickle_splits: dict[str, tuple[str, ...]]
    pickle_labels: dict[str, bytes]
    pickle_names: dict[str, bytes]
    pickle_meta: str
    pickle_md5: dict[str, str]


def cifar100(binary_sha256: str) -> Cifar:
    """The official CIFAR-100; the binary archive's checksum is TFDS's."""
    return Cifar(
        num_classes={"coarse_label": 20, "label": 100},
        label_bytes=("coarse_label", "label"),
        binary_splits={"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
        binary_names={
            "coarse_label": "cifar-100-binary/coarse_label_names.txt",
            "label": "cifar-100-binary/fine_label_names.txt",
        },
        binary_sha256=binary_sha256,
        pickle_splits={"train": ("cifar-100-python/train",), "test": ("cifar-100-python/test",)},
        pickle_labels={"coarse_label": b"coarse_labels", "label": b"fine_labels"},
        pickle_names={"coarse_label": b"coarse_label_names", "label": b"fine_label_names"},
        pickle_meta="cifar-100-python/meta",
        pickle_md5={
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        },
    )


def cifar10(binary_sha256: str) -> Cifar:
    """The official CIFAR-10; the binary archive's checksum is TFDS's."""
    binary, pickled = "cifar-10-batches-bin", "cifar-10-batches-py"
    return Cifar(
        num_classes={"label": 10},
        label_bytes=("label",),
        binary_splits={
            "train": tuple(f"{binary}/data_batch_{i}.bin" for i in range(1, 6)),
            "test": (f"{binary}/test_batch.bin",),
        },
        binary_names={"label": f"{binary}/batches.meta.txt"},
        binary_sha256=binary_sha256,
        pickle_splits={
            "train": tuple(f"{pickled}/data_batch_{i}" for i in range(1, 6)),
            "test": (f"{pickled}/test_batch",),
        },
        pickle_labels={"label": b"labels"},
        pickle_names={"label": b"label_names"},
        pickle_meta=f"{pickled}/batches.meta",
        pickle_md5={
            f"{pickled}/data_batch_1": "c99cafc152244af753f735de768cd75f",
            f"{pickled}/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            f"{pickled}/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            f"{pickled}/data_batch_4": "634d18415352ddfa80567beed471001a",
            f"{pickled}/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            f"{pickled}/test_batch": "40351d587109b95175f43aff81a1287e",
            f"{pickled}/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    )


# Of the decompressed files, since redistributions differ in the gzip header (name and time), not in the content.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_cifar(source: pathlib.Path, layout: Cifar) -> Content:
    """A CIFAR archive of either layout. A pickle is loaded only if its checksum is the expected one.

    Raises:
      ArchiveError: it is neither the binary archive nor the one of pickles that `layout` describes.
    """
    found = _sha256(source)
    if found == layout.binary_sha256:
        content = _from_records(_read_members(source, _flatten(layout.binary_splits, layout.binary_names)), layout)
    else:
        try:
            members = _read_members(source, layout.pickle_md5)
            _check(source, members, layout.pickle_md5, "md5")
        except ArchiveError as error:
            raise ArchiveError(
                f"{error}; it is not the binary archive either: sha256 expected {layout.binary_sha256}, found {found}"
            ) from error
        content = _from_pickles(members, layout)
    for _, labels in content.splits.values():
        for name, values in labels.items():
            longtail.check_labels(values, layout.num_classes[name])
    return content


def read_idx(source: pathlib.Path, sha256: dict[str, str], num_classes: int = 10) -> Content:
    """The four gzipped idx files of (Fashion-)MNIST, in a folder or a tar archive.

    Args:
      source: of the files.
      sha256: of each file's decompressed content, by its name.
      num_classes: that the labels are checked against.

    Raises:
      ArchiveError: a file is missing or is not the expected one.
    """
    members = {name: _gunzip(source, name, data) for name, data in _read_members(source, sha256).items()}
    _check(source, members, sha256, "sha256")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _parse_idx(members[f"{prefix}-images-idx3-ubyte.gz"])[..., None]
        labels = longtail.check_labels(_parse_idx(members[f"{prefix}-labels-idx1-ubyte.gz"]), num_classes)
        splits[split] = images, {"label": labels}
    return Content(splits, class_names={})


def _flatten(splits: dict[str, tuple[str, ...]], names: dict[str, str]) -> set[str]:
    return {member for members in splits.values() for member in members} | set(names.values())


def _sha256(path: pathlib.Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArchiveError(f"{path} can't be read ({error.strerror}); give the path of the archive") from error


def _read_members(source: pathlib.Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The contents of the wanted members, from a folder or a tar stream."""
    source = pathlib.Path(source)
    try:
        members = _read_folder(source, wanted) if source.is_dir() else _read_tar(source, wanted)
    except ArchiveError:
        raise
    except Exception as error:  # of whatever kind the parser of a damaged archive raises
        raise ArchiveError(f"{source} is truncated or can't be read ({error}); {_REMEDY}") from error
    missing = sorted(set(wanted) - set(members))
    if missing:
        raise ArchiveError(f"{source}: expected {', '.join(missing)}, found no such file in it; {_REMEDY}")
    return members


def _read_folder(folder: pathlib.Path, wanted: Collection[str]) -> dict[str, bytes]:
    members = {}
    for name in wanted:
        if (folder / name).is_file():
            _check_size(folder, name, (folder / name).stat().st_size)
            members[name] = (folder / name).read_bytes()
    return members


def _read_tar(path: pathlib.Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Members by their exact names, into memory: nothing that an archive says becomes a path on disk."""
    members = {}
    with tarfile.open(path, "r|*", tarinfo=_TarInfo) as tar:
        for number, member in enumerate(tar):
            name = member.name.removeprefix("./")
            # Also of members that are not wanted, since skipping them means decompressing them.
            _check_size(path, name, member.size)
            if number >= _MAX_MEMBERS:
                raise ArchiveError(f"{path} has more than {_MAX_MEMBERS} members; {_REMEDY}")
            if name not in wanted:
                continue
            if not member.isreg() or member.issparse() or name in members:
                raise ArchiveError(f"{path}: {name} is a link, or occurs twice; {_REMEDY}")
            file = tar.extractfile(member)
            assert file is not None  # the member is a regular one
            members[name] = file.read()
    return members


class _TarInfo(tarfile.TarInfo):
    """A header, of which that of a long name or of attributes is refused before its content is read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED and info.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {info.size} bytes, and at most {_MAX_HEADER} are read")
        return info


def _check_size(source: pathlib.Path, name: str, size: int) -> None:
    if size > _MAX_MEMBER:
        raise ArchiveError(f"{source}: {name} has {size} bytes, and at most {_MAX_MEMBER} are read; {_REMEDY}")


def _check(source: pathlib.Path, members: dict[str, bytes], digests: dict[str, str], algorithm: str) -> None:
    for name, expected in digests.items():
        found = hashlib.new(algorithm, members[name], usedforsecurity=False).hexdigest()
        if found != expected:
            raise ArchiveError(f"{source}: {algorithm} of {name} expected {expected}, found {found}; {_REMEDY}")


def _gunzip(source: pathlib.Path, name: str, data: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(_MAX_MEMBER + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ArchiveError(f"{source}: {name} is truncated or can't be read ({error}); {_REMEDY}") from error
    _check_size(source, f"{name}, decompressed,", len(content))
    return content


def _planes_to_images(planes: np.ndarray) -> np.ndarray:
    """uint8 `[N, 3072]`, a plane for each channel, to `[N, 32, 32, 3]`."""
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _from_records(members: dict[str, bytes], layout: Cifar) -> Content:
    splits = {}
    for split, names in layout.binary_splits.items():
        width = len(layout.label_bytes)
        records = np.frombuffer(b"".join(members[name] for name in names), np.uint8).reshape(-1, width + 3072)
        labels = {name: records[:, i].astype(np.int64) for i, name in enumerate(layout.label_bytes)}
        splits[split] = _planes_to_images(records[:, width:]), labels
    class_names = {name: tuple(members[file].decode().split()) for name, file in layout.binary_names.items()}
    return Content(splits, class_names)


def _from_pickles(members: dict[str, bytes], layout: Cifar) -> Content:
    loaded = {name: _Unpickler(io.BytesIO(data), encoding="bytes").load() for name, data in members.items()}
    splits = {}
    for split, names in layout.pickle_splits.items():
        images = _planes_to_images(np.concatenate([loaded[name][b"data"] for name in names]))
        labels = {
            label: np.concatenate([np.asarray(loaded[name][key], np.int64) for name in names])
            for label, key in layout.pickle_labels.items()
        }
        splits[split] = images, labels
    meta = loaded[layout.pickle_meta]
    class_names = {label: tuple(n.decode() for n in meta[key]) for label, key in layout.pickle_names.items()}
    return Content(splits, class_names)


class _Unpickler(pickle.Unpickler):
    """Builds arrays and nothing else: a second line of defence behind the checksum."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # The old module still works, with a warning.
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]  # private, and so in no stub
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a CIFAR pickle")


def _parse_idx(data: bytes) -> np.ndarray:
    """The idx format: two zero bytes, the type (8 is uint8), the number of dimensions, the sizes, the values."""
    if data[:3] != b"\0\0\x08":
        raise ArchiveError(f"not an idx file of bytes: expected it to start with 000008, found {data[:3].hex()}")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
