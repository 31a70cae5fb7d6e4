"""Lists images by class in a folder or a zip archive, which is never unpacked to disk."""

import dataclasses
import functools
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
_HIDDEN = (
    ".",
    "__MACOSX",
)  # how names begin that are passed over; the second is what macOS adds to its archives
_MAX_FILE = 256 << 20  # bytes
_COMPRESSIONS = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
)  # others expand without a bound
_TEST_SEED = 20_240_601  # a constant: what is held out for the test is the same at every preparation


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file: its id, unique in its split, its label, and a function that returns its bytes."""

    id: str
    label: int
    read: Callable[[], bytes]

    def __post_init__(self) -> None:
        try:
            self.id.encode()
        except UnicodeEncodeError:
            raise ArchiveError(
                f"the name of image {self.id!r} is not UTF-8: rename it"
            ) from None


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files by split, and the names of the classes in the order of their labels."""

    splits: dict[str, list[Entry]]
    class_names: tuple[str, ...]


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Yields the paths below a folder, those of folders with a final "/". Links are followed, but not in circles."""

    def refuse(error: OSError) -> NoReturn:
        raise ArchiveError(f"{error.filename} cannot be read ({error.strerror})")

    for folder, names, files in os.walk(root, followlinks=True, onerror=refuse):
        above = {
            os.path.realpath(parent)
            for parent in (folder, *map(str, pathlib.Path(folder).parents))
        }
        names[:] = [
            name
            for name in names
            if os.path.realpath(os.path.join(folder, name)) not in above
        ]
        parent = pathlib.Path(folder).relative_to(root)
        yield from ((parent / name).as_posix() for name in files)
        yield from (f"{(parent / name).as_posix()}/" for name in names)


class Tree:
    """Files by their path below a root, in a folder or a zip archive.

    Attributes:
      names: sorted paths of the files, and of the folders with a final "/".

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
            self.names = sorted(self._zip.namelist())
        except Exception as error:  # whatever the parser of a damaged archive raises
            raise ArchiveError(
                f"{root} is no folder, and no whole zip archive ({error}): give the folder, or get the archive again"
            ) from error

    def __str__(self) -> str:
        return str(self._root)

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          ArchiveError: it cannot be read whole.
        """
        try:
            if self._zip is None:
                path = self._root / name
                if not path.is_file():  # opening a pipe would wait for ever
                    raise ArchiveError(f"{self} has no file {name}")
                size = path.stat().st_size
            else:
                info = self._zip.getinfo(name)
                if info.compress_type not in _COMPRESSIONS:
                    raise ArchiveError(
                        f"{self}: {name} is compressed in an unusual way: unpack it and give the folder"
                    )
                size = info.file_size
            if size > _MAX_FILE:
                raise ArchiveError(
                    f"{self}: {name} has {size} bytes, and at most {_MAX_FILE} are read"
                )
            # So many bytes and no more: a zip may hold more than it declares, and a device has no end.
            with path.open("rb") if self._zip is None else self._zip.open(name) as file:
                return file.read(size)
        except ArchiveError:
            raise
        except Exception as error:  # whatever the decompressor of a damaged file raises
            raise ArchiveError(
                f"{self}: {name} cannot be read ({error}); get it again"
            ) from error

    def by_class(self, folder: str, below: str = "") -> dict[str, list[str]]:
        """Returns the image files at any depth below `folder/CLASS/below`, by CLASS."""
        files: dict[str, list[str]] = {}
        for name in self.names:
            rest = name.removeprefix(folder)
            class_name, _, file = rest.partition("/")
            hidden = any(part.startswith(_HIDDEN) for part in rest.split("/"))
            if (
                name.startswith(folder)
                and not hidden
                and file.startswith(below)
                and _is_image(file)
            ):
                files.setdefault(class_name, []).append(name)
        return files

    def folders(self, folder: str = "") -> set[str]:
        """Returns the names of the folders in a folder, empty ones too."""
        paths = [
            name.removeprefix(folder) for name in self.names if name.startswith(folder)
        ]
        names = {path.partition("/")[0] for path in paths if "/" in path}
        return {name for name in names if not name.startswith(_HIDDEN)}


def own(source: str | os.PathLike[str], *, test_per_class: int = 0) -> Files:
    """Lists a folder (or zip) of one's own images by class: CLASS/…, or train/CLASS/… and test/CLASS/… (or val).

    Classes are numbered in the order of their sorted names. Hidden files and files of other types are passed over.

    Args:
      source: the folder.
      test_per_class: where there is no test folder, the images of each class to hold out for the test, chosen by a
        hash of their paths.

    Raises:
      ArchiveError: no class, one without images, classes that differ between training and test, or no test.
    """
    tree, base = Tree(source), ""
    while (
        len(top := tree.folders(base)) == 1
    ):  # an archive often holds one folder with everything in it
        base += f"{top.pop()}/"
    split = {
        name.lower(): name for name in top if name.lower() in ("train", *_TEST_NAMES)
    }
    test = next((split[name] for name in _TEST_NAMES if name in split), None)
    if "train" in split and test:
        names, train = _list_classes(tree, f"{base}{split['train']}/")
        test_names, test_entries = _list_classes(tree, f"{base}{test}/")
        if names != test_names:
            odd = sorted(set(names) ^ set(test_names))
            raise ArchiveError(
                f"{source}: class {odd[0]!r} is in one of train and test only ({len(odd)} such classes)"
            )
        return Files({"train": train, "test": test_entries}, names)
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
    names, entries = _list_classes(tree, base)
    labels = np.array([entry.label for entry in entries])
    keys = np.array([entry.id for entry in entries])
    sizes = np.bincount(labels)
    if test_per_class >= sizes.min():
        raise ArchiveError(
            f"{source}: class {names[sizes.argmin()]!r} has {sizes.min()} images, of which --test_per_class="
            f"{test_per_class} leaves none to train on: hold out fewer, or add images"
        )
    try:
        held_out = longtail.balanced_subset(
            labels,
            keys,
            num_classes=len(names),
            per_class=test_per_class,
            seed=_TEST_SEED,
        )
    except ValueError as error:
        raise ArchiveError(f"{source}: {error}") from error
    kept = np.setdiff1d(np.arange(len(entries)), held_out)
    return Files(
        {"train": [entries[i] for i in kept], "test": [entries[i] for i in held_out]},
        names,
    )


def _list_classes(tree: Tree, folder: str) -> tuple[tuple[str, ...], list[Entry]]:
    """Returns the sorted class names, and an entry for each image, whose id is its path below the folder."""
    files = tree.by_class(folder)
    names = tuple(sorted(tree.folders(folder)))
    where = f"{tree}/{folder}"
    if len(names) < 2:
        raise ArchiveError(
            f"{where} has {len(names)} class folders, and at least 2 are needed"
        )
    odd = [
        name
        for name in names
        if not name or name != " ".join(name.split()) or not name.isprintable()
    ]
    if odd:
        raise ArchiveError(
            f"{where}: class folder {odd[0]!r}: no name, or white space at an end, twice or of another kind; rename it"
        )
    empty = [name for name in names if name not in files]
    if empty:
        raise ArchiveError(
            f"{where}: class folder {empty[0]!r} has no image ({len(empty)} such folders): fill it or remove it; "
            f"images are files that end in {', '.join(_SUFFIXES)}"
        )
    entries = []
    for label, class_name in enumerate(names):
        entries += [
            _entry(tree, path, path.removeprefix(folder), label)
            for path in files[class_name]
        ]
    return names, entries


def _entry(tree: Tree, path: str, key: str, label: int) -> Entry:
    return Entry(key, label, functools.partial(tree.read, path))


def _is_image(path: str) -> bool:
    return path.lower().endswith(_SUFFIXES)


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def tiny_imagenet(
    source: str | os.PathLike[str],
    *,
    classes: int = 200,
    per_class: int = 500,
    test_images: int = 10_000,
) -> Files:
    """Lists the official tiny-imagenet-200.zip, or the folder that it unpacks to. Its validation images are the test.

    Labels are in the order of the sorted WordNet ids.

    Args:
      source: the archive or the folder.
      classes, per_class, test_images: the official numbers.

    Raises:
      ArchiveError: something of it is missing, or there is more.
    """
    tree = Tree(source)
    root = "" if "wnids.txt" in tree.names else "tiny-imagenet-200/"
    names = tuple(
        sorted(tree.read(f"{root}wnids.txt").decode(errors="replace").split())
    )
    if len(set(names)) != classes:
        raise ArchiveError(
            f"{source}: wnids.txt names {len(set(names))} classes, expected {classes}"
        )
    label_of = {name: label for label, name in enumerate(names)}
    by_class = tree.by_class(f"{root}train/", "images/")
    train = []
    for name in names:
        paths = by_class.get(name, [])
        if len(paths) != per_class:
            raise ArchiveError(
                f"{source}: class {name!r} has {len(paths)} training images, expected {per_class}"
            )
        train += [
            _entry(tree, path, pathlib.PurePosixPath(path).stem, label_of[name])
            for path in paths
        ]
    present = set(tree.names)
    test = []
    for line in (
        tree.read(f"{root}val/val_annotations.txt")
        .decode(errors="replace")
        .splitlines()
    ):
        file, name, *_ = [*line.split("\t"), ""]
        path = f"{root}val/images/{file}"
        if name not in label_of or path not in present:
            raise ArchiveError(
                f"{source}: val_annotations.txt names {file!r} of class {name!r}, which is not there"
            )
        test.append(
            _entry(tree, path, pathlib.PurePosixPath(path).stem, label_of[name])
        )
    if len({entry.id for entry in test}) != test_images:
        raise ArchiveError(
            f"{source}: val_annotations.txt names {len(test)} images, expected {test_images}"
        )
    return Files({"train": train, "test": test}, names)


def imagenet(
    source: str | os.PathLike[str],
    *,
    class_names: tuple[str, ...],
    validation_labels: list[str],
) -> Files:
    """Lists ImageNet as it is usually unpacked: train/WNID/*.JPEG, and val/WNID/*.JPEG or all images in val itself.

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
        subfolders = tree.folders(folder)
        if split == "validation" and not subfolders:
            paths = [
                path
                for path in tree.names
                if path.startswith(folder) and _is_image(path)
            ]
            if len(paths) != len(validation_labels):
                raise ArchiveError(
                    f"{source}/{folder} has {len(paths)} images, expected {len(validation_labels)}"
                )
            label_of = {name: label for label, name in enumerate(class_names)}
            pairs = zip(paths, validation_labels)
            splits[split] = [
                _entry(tree, path, _file_name(path), label_of[name])
                for path, name in pairs
            ]
            continue
        odd = sorted(subfolders ^ set(class_names))
        if odd:
            problem = (
                "is missing" if odd[0] in class_names else "is no class of ImageNet"
            )
            raise ArchiveError(
                f"{source}/{folder}: folder {odd[0]!r} {problem} ({len(odd)} such folders)"
            )
        entries = _list_classes(tree, folder)[1]
        splits[split] = [
            dataclasses.replace(entry, id=_file_name(entry.id)) for entry in entries
        ]
    return Files(splits, class_names)
