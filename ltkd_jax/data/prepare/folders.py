"""Images by class in a folder or a zip archive: listed and checked, never extracted to disk."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np

from ltkd_jax.data import longtail
from ltkd_jax.data.prepare.archives import ArchiveError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_TEST_NAMES = ("test", "val", "valid", "validation")
_PASSED_OVER = ("__MACOSX",)  # what macOS adds to its archives
_MAX_FILE = 256 << 20  # bytes
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others expand without a bound
_TEST_SEED = 20_240_601  # a constant: what is held out for the test is the same at every preparation


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file: its id, unique in its split, its label, and how its bytes are read."""

    id: str
    label: int
    read: Callable[[], bytes]

    def __post_init__(self) -> None:
        try:
            self.id.encode()
        except UnicodeEncodeError:
            raise ArchiveError(f"the name of image {self.id!r} is not UTF-8: rename it") from None


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files by split, and the names of the classes in the order of their labels."""

    splits: dict[str, list[Entry]]
    class_names: tuple[str, ...]


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Paths of the files below a folder, links followed, each folder once on its own way down."""

    def unreadable(error: OSError) -> NoReturn:
        raise ArchiveError(f"{error.filename} can't be read ({error.strerror})")

    for folder, names, files in os.walk(root, followlinks=True, onerror=unreadable):
        above = {os.path.realpath(parent) for parent in (folder, *map(str, pathlib.Path(folder).parents))}
        names[:] = [name for name in names if os.path.realpath(os.path.join(folder, name)) not in above]
        yield from (pathlib.Path(folder, name).relative_to(root).as_posix() for name in files)


class Tree:
    """Files by their path below a root, in a folder or a zip archive.

    Raises:
      ArchiveError: the root is neither, or the archive is damaged.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = pathlib.Path(root)
        self._zip: zipfile.ZipFile | None = None
        if self._root.is_dir():
            self.names = sorted(_walk(self._root))
            return
        try:
            self._zip = zipfile.ZipFile(self._root)
            self.names = sorted(info.filename for info in self._zip.infolist() if not info.is_dir())
        except Exception as error:  # of whatever kind the parser of a damaged archive raises
            raise ArchiveError(
                f"{root} is no folder, and no whole zip archive ({error}): give the folder, or get the archive again"
            ) from error

    def __str__(self) -> str:
        return str(self._root)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
          ArchiveError: it can't be read whole.
        """
        try:
            if self._zip is None:
                path = self._root / name
                if not path.is_file():  # opening a pipe would wait for ever
                    raise KeyError(name)
                size = path.stat().st_size
            else:
                info = self._zip.getinfo(name)
                if info.compress_type not in _COMPRESSIONS:
                    raise ArchiveError(f"{self}: {name} is compressed in an unusual way: unpack it and give the folder")
                size = info.file_size
            if size > _MAX_FILE:
                raise ArchiveError(f"{self}: {name} has {size} bytes, and at most {_MAX_FILE} are read")
            # So many bytes and no more: a zip may hold more than it declares, and a device has no end.
            with path.open("rb") if self._zip is None else self._zip.open(name) as file:
                return file.read(size)
        except ArchiveError:
            raise
        except KeyError as error:
            raise ArchiveError(f"{self} has no file {name}") from error
        except Exception as error:  # of whatever kind the decompressor of a damaged file raises
            raise ArchiveError(f"{self}: {name} can't be read ({error}); get it again") from error

    def by_class(self, folder: str, below: str = "") -> dict[str, list[str]]:
        """Image files of each class: those at any depth below `folder/CLASS/below`, by CLASS."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            rest = name.removeprefix(folder)
            class_name, _, file = rest.partition("/")
            hidden = any(part.startswith((".", *_PASSED_OVER)) for part in rest.split("/"))
            if not name.startswith(folder) or not file or hidden:
                continue
            files = found.setdefault(class_name, [])
            if file.startswith(below) and file.lower().endswith(_SUFFIXES):
                files.append(name)
        return found

    def folders(self, folder: str = "") -> set[str]:
        """Names of the folders in a folder, empty ones too."""
        if self._zip is None:
            base = self._root / folder
            found = {path.name for path in base.iterdir() if path.is_dir()} if base.is_dir() else set()
        else:
            below = [i.filename.removeprefix(folder) for i in self._zip.infolist() if i.filename.startswith(folder)]
            found = {rest.split("/")[0] for rest in below if "/" in rest}
        return {name for name in found if not name.startswith((".", *_PASSED_OVER))}


def own(source: str | os.PathLike[str], *, test_per_class: int = 0) -> Files:
    """Anyone's folder (or zip) of images by class: CLASS/…, or train/CLASS/… and test/CLASS/… (or val).

    Classes are numbered in the order of their sorted names. Hidden files and files of other types are passed over.

    Args:
      source: the folder.
      test_per_class: where there is no test folder: images of each class to hold out for the test, chosen by a hash of
        their paths.

    Raises:
      ArchiveError: no class, one without images, classes that differ between training and test, or no test.
    """
    tree, base = Tree(source), ""
    while len(top := tree.folders(base)) == 1:  # an archive often holds one folder with everything in it
        base += f"{top.pop()}/"
    split = {name.lower(): name for name in top if name.lower() in ("train", *_TEST_NAMES)}
    test = next((split[name] for name in _TEST_NAMES if name in split), None)
    if "train" in split and test:
        names, train = _entries(tree, f"{base}{split['train']}/")
        return Files({"train": train, "test": _entries(tree, f"{base}{test}/", names)[1]}, names)
    if split:
        raise ArchiveError(
            f"{source} has the folders {', '.join(sorted(top))}: beside train one of {', '.join(_TEST_NAMES)} is "
            "needed, or a folder for each class and no such folder"
        )
    if test_per_class < 1:
        raise ArchiveError(
            f"{source} has no folders train and test: give --test_per_class=N to hold N images of each class out for "
            "the balanced test"
        )
    names, entries = _entries(tree, base)
    labels, keys = np.array([entry.label for entry in entries]), np.array([entry.id for entry in entries])
    sizes = np.bincount(labels)
    if test_per_class >= sizes.min():
        raise ArchiveError(
            f"{source}: class {names[sizes.argmin()]!r} has {sizes.min()} images, of which --test_per_class="
            f"{test_per_class} leaves none to train on: hold out fewer, or add images"
        )
    try:
        drawn = longtail.balanced(labels, keys, num_classes=len(names), per_class=test_per_class, seed=_TEST_SEED)
    except ValueError as error:
        raise ArchiveError(f"{source}: {error}") from error
    held = set(drawn.tolist())
    parts = {"train": [e for i, e in enumerate(entries) if i not in held], "test": [entries[i] for i in sorted(held)]}
    return Files(parts, names)


def _entries(
    tree: Tree, folder: str, class_names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[Entry]]:
    """Sorted class names, and an entry for each image, whose id is its path below the folder."""
    found = tree.by_class(folder)
    names = tuple(sorted(tree.folders(folder)))
    where = f"{tree}/{folder}"
    if len(names) < 2:
        raise ArchiveError(f"{where} has {len(names)} class folders, and at least 2 are needed")
    odd = [name for name in names if not name or name != " ".join(name.split()) or not name.isprintable()]
    if odd:
        raise ArchiveError(
            f"{where}: class folder {odd[0]!r}: no name, or white space at an end, twice or of another kind; rename it"
        )
    if class_names is not None and names != class_names:
        odd = sorted(set(names) ^ set(class_names))
        raise ArchiveError(f"{where}: class {odd[0]!r} is in one of train and test only ({len(odd)} such classes)")
    empty = [name for name in names if not found.get(name)]
    if empty:
        raise ArchiveError(
            f"{where}: class folder {empty[0]!r} has no image ({len(empty)} such folders): fill it or remove it; "
            f"images are files that end in {', '.join(_SUFFIXES)}"
        )
    entries = []
    for label, class_name in enumerate(names):
        for name in found[class_name]:
            entries.append(Entry(name.removeprefix(folder), label, _reader(tree, name)))
    return names, entries


def _reader(tree: Tree, name: str) -> Callable[[], bytes]:
    return lambda: tree.read(name)


def tiny_imagenet(
    source: str | os.PathLike[str], *, classes: int = 200, per_class: int = 500, test_images: int = 10_000
) -> Files:
    """The official tiny-imagenet-200.zip, or the folder that it unpacks to. Its validation images are the test.

    Labels are in the order of the sorted WordNet ids.

    Args:
      source: of either.
      classes, per_class, test_images: the official numbers.

    Raises:
      ArchiveError: something of it is missing, or there is more.
    """
    tree = Tree(source)
    root = "" if "wnids.txt" in tree.names else "tiny-imagenet-200/"
    names = tuple(sorted(tree.read(f"{root}wnids.txt").decode(errors="replace").split()))
    if len(set(names)) != classes:
        raise ArchiveError(f"{source}: wnids.txt names {len(set(names))} classes, expected {classes}")
    number = {name: label for label, name in enumerate(names)}
    found = tree.by_class(f"{root}train/", "images/")
    train = []
    for name in names:
        files = found.get(name, [])
        if len(files) != per_class:
            raise ArchiveError(f"{source}: class {name!r} has {len(files)} training images, expected {per_class}")
        train += [Entry(_stem(file), number[name], _reader(tree, file)) for file in files]
    present, test = set(tree.names), []
    for line in tree.read(f"{root}val/val_annotations.txt").decode(errors="replace").splitlines():
        file, name, *_ = [*line.split("\t"), ""]
        path = f"{root}val/images/{file}"
        if name not in number or path not in present:
            raise ArchiveError(f"{source}: val_annotations.txt names {file!r} of class {name!r}, which is not there")
        test.append(Entry(_stem(file), number[name], _reader(tree, path)))
    if len({entry.id for entry in test}) != test_images:
        raise ArchiveError(f"{source}: val_annotations.txt names {len(test)} images, expected {test_images}")
    return Files({"train": train, "test": test}, names)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]


def imagenet(source: str | os.PathLike[str], *, class_names: tuple[str, ...], validation_labels: list[str]) -> Files:
    """ImageNet as it is usually unpacked: train/WNID/*.JPEG, and val/WNID/*.JPEG or all images in val itself.

    Args:
      source: the folder.
      class_names: the WordNet ids, sorted.
      validation_labels: the id of each validation image, in the order of their names; for a val without folders.

    Raises:
      ArchiveError: something of it is missing.
    """
    tree = Tree(source)
    splits = {}
    for split, folder in (("train", "train/"), ("validation", "val/")):
        there = tree.folders(folder)
        if split == "validation" and not there:
            splits[split] = _flat(tree, folder, class_names, validation_labels)
            continue
        odd = sorted(there ^ set(class_names))
        if odd:
            what = "is missing" if odd[0] in class_names else "is no class of ImageNet"
            raise ArchiveError(f"{source}/{folder}: folder {odd[0]!r} {what} ({len(odd)} such folders)")
        entries = _entries(tree, folder)[1]
        splits[split] = [dataclasses.replace(entry, id=entry.id.rpartition("/")[2]) for entry in entries]
    return Files(splits, class_names)


def _flat(tree: Tree, folder: str, class_names: tuple[str, ...], validation_labels: list[str]) -> list[Entry]:
    files = [name for name in tree.names if name.startswith(folder) and name.lower().endswith(_SUFFIXES)]
    if len(files) != len(validation_labels):
        raise ArchiveError(f"{tree}/{folder} has {len(files)} images, expected {len(validation_labels)}")
    number = {name: label for label, name in enumerate(class_names)}
    return [
        Entry(file.rpartition("/")[2], number[name], _reader(tree, file))
        for file, name in zip(files, validation_labels)
    ]
