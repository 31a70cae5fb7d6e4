"""Lists images by class in a folder or a zip archive, without unpacking it to disk."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NoReturn

import numpy as np

from ltkd_jax import files
from ltkd_jax.data import longtail
from ltkd_jax.data.prepare.archives import ArchiveError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_TEST_NAMES = ("test", "val", "valid", "validation")
# Of files that accompany images: they are left out without a report.
_TEXT_SUFFIXES = (".txt", ".md", ".csv", ".tsv", ".json", ".xml")
_MAX_FILE_BYTES = 256 << 20
# Other compressions expand without a bound.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# The flag of a member whose name is UTF-8.
_ZIP_UTF8 = 0x800
# A constant, so that every preparation of a folder holds out the same test images.
_TEST_SEED = 20_240_601


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Describes an image file.

    Attributes:
      id: unique in its split.
      path: in its source.
      label: of its class.
      read: returns its bytes.
    """

    id: str
    path: str
    label: int
    read: Callable[[], bytes]

    def __post_init__(self) -> None:
        # File names are arbitrary bytes on Linux, but TFDS stores ids as UTF-8.
        try:
            self.id.encode()
        except UnicodeEncodeError:
            raise ArchiveError(
                f"the name of image {self.id!r} is not UTF-8: rename it"
            ) from None


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Lists the image files of a data set.

    Attributes:
      splits: the image files of each split, by its name.
      class_names: in label order.
      left_out: paths of the files of the source that are in no split, by a description
        of them. Hidden files and texts are not among them.
      apply_orientation: whether the EXIF orientation of the images is applied. Official
        data sets are stored as they were published.
    """

    splits: dict[str, list[ImageFile]]
    class_names: tuple[str, ...]
    left_out: dict[str, list[str]]
    apply_orientation: bool = False


def examples(names: Sequence[str]) -> str:
    """Returns a few of the names, for a message.

    >>> examples(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Yields the relative paths below a folder; those of folders end in "/".

    Symbolic links are followed, but not in circles. Hidden folders are not entered,
    since those of a system often cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise ArchiveError(f"{error.filename} cannot be read ({error.strerror})")

    for folder, folder_names, file_names in os.walk(
        root, followlinks=True, onerror=refuse
    ):
        ancestors = {os.path.realpath(folder)}
        for ancestor in pathlib.Path(folder).parents:
            ancestors.add(os.path.realpath(str(ancestor)))
        # A change of this list in place decides where os.walk descends.
        folder_names[:] = [
            name
            for name in folder_names
            if not files.is_hidden(name)
            and os.path.realpath(os.path.join(folder, name)) not in ancestors
        ]
        relative = pathlib.Path(folder).relative_to(root)
        for name in file_names:
            yield (relative / name).as_posix()
        for name in folder_names:
            yield f"{(relative / name).as_posix()}/"


def _zip_path(info: zipfile.ZipInfo) -> str:
    """Returns the path of an archive's member, from the name that the archive has."""
    name = info.filename
    if not info.flag_bits & _ZIP_UTF8:
        # Without the flag a name is in code page 437 by the specification, and zipfile
        # reads it so. But programs of Linux and macOS write UTF-8 without it.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    # Some programs of Windows write "\\" against the specification of zip, and others
    # name all files from ".".
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./")


class FileTree:
    """Gives access to the files of a folder or a zip archive by their relative paths.

    Hidden files, and what systems leave behind, are not part of it.

    Attributes:
      paths: sorted, of the files and the folders; those of folders end in "/".

    Raises:
      ArchiveError: the root is no folder and no intact zip archive.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = pathlib.Path(root)
        self._zip: zipfile.ZipFile | None = None
        # Of the members of an archive: their names in it, by their paths.
        self._zip_names: dict[str, str] = {}
        if self._root.is_dir():
            paths = list(_walk(self._root))
        else:
            try:
                self._zip = zipfile.ZipFile(self._root)
            except Exception as error:  # whatever zipfile raises for a damaged archive
                raise ArchiveError(
                    f"{root} is no folder and no intact zip archive ({error}): give "
                    "the folder; unpack an archive of another kind, such as .tar.gz, "
                    "and give its folder; or get the archive again"
                ) from error
            paths = [_zip_path(info) for info in self._zip.infolist()]
            self._zip_names = dict(zip(paths, self._zip.namelist()))
        self.paths = sorted(
            path for path in paths if not any(map(files.is_hidden, path.split("/")))
        )

    def __str__(self) -> str:
        return str(self._root)

    def read(self, path: str) -> bytes:
        """Returns the content of a file.

        Raises:
          ArchiveError: the file is absent, damaged, too large, or compressed in an
            unusual way.
        """
        try:
            size = self._size(path)
            if size > _MAX_FILE_BYTES:
                raise ArchiveError(
                    f"{self}: {path} has {size} bytes, and at most {_MAX_FILE_BYTES} "
                    "are read"
                )
            # No more than that: a file of a zip may expand to more than it declares,
            # and a device has no end.
            with self._open(path) as file:
                return file.read(size)
        except ArchiveError:
            raise
        except Exception as error:  # whatever zipfile raises for a damaged file
            raise ArchiveError(
                f"{self}: {path} cannot be read ({error}); get it again"
            ) from error

    def _size(self, path: str) -> int:
        """Returns the size of a file, or that which its archive declares."""
        if self._zip is None:
            # Regular files only: to open a pipe would wait for ever.
            if not (self._root / path).is_file():
                raise ArchiveError(f"{self} has no file {path}")
            return (self._root / path).stat().st_size
        info = self._zip.getinfo(self._zip_names[path])
        if info.compress_type not in _COMPRESSIONS:
            raise ArchiveError(
                f"{self}: {path} is compressed in an unusual way: unpack it and give "
                "the folder"
            )
        return info.file_size

    def _open(self, path: str) -> IO[bytes]:
        if self._zip is None:
            return (self._root / path).open("rb")
        return self._zip.open(self._zip_names[path])

    def images_by_class(self, folder: str, subfolder: str = "") -> dict[str, list[str]]:
        """Returns the paths of the images below `folder/CLASS/subfolder`, by class.

        Args:
          folder: "" or a path that ends in "/".
          subfolder: likewise, in each class folder.
        """
        images: dict[str, list[str]] = {}
        for path in self.paths:
            if not path.startswith(folder):
                continue
            class_name, _, file = path.removeprefix(folder).partition("/")
            if file.startswith(subfolder) and _is_image(file):
                images.setdefault(class_name, []).append(path)
        return images

    def folders(self, folder: str = "") -> set[str]:
        """Returns the names of the folders in a folder, empty ones included.

        Args:
          folder: "" or a path that ends in "/".
        """
        names = set()
        for path in self.paths:
            if not path.startswith(folder):
                continue
            # An archive need not list folders themselves: their files show them, too.
            name, slash, _ = path.removeprefix(folder).partition("/")
            if slash:
                names.add(name)
        return names


def custom(source: str | os.PathLike[str], *, test_per_class: int = 0) -> ImageFiles:
    """Lists a custom data set: a folder or a zip archive of images by class.

    Its layout is CLASS/…, or train/CLASS/… and test/CLASS/…, where "test" may also be
    "val", "valid" or "validation". Classes are numbered in the order of their sorted
    names. A folder "train" or "test" that holds no folders is a class where the other
    one is absent.

    Args:
      source: the folder or the archive.
      test_per_class: number of images of each class to hold out for the test, drawn by
        a hash of their paths; 0 where there are folders "train" and "test".

    Raises:
      ArchiveError: there are no classes, a class has no image, training and test have
        different classes, or there is no test set, or one beside `test_per_class`.
    """
    tree = FileTree(source)
    # Archives often hold a single folder with everything in it.
    base = ""
    folder_names = tree.folders(base)
    while len(folder_names) == 1:
        base += f"{folder_names.pop()}/"
        folder_names = tree.folders(base)

    # "Train" is "train", too.
    split_folders = {
        name.lower(): f"{base}{name}/"
        for name in sorted(folder_names)
        if name.lower() in ("train", *_TEST_NAMES)
    }
    test_folders = [
        split_folders[name] for name in _TEST_NAMES if name in split_folders
    ]
    if "train" in split_folders and test_folders:
        content = _list_splits(tree, split_folders["train"], *test_folders)
        if test_per_class:
            raise ArchiveError(
                f"--test_per_class={test_per_class}: {source} has test images already, "
                f"in {test_folders[0]}: leave the option out, or move them"
            )
        return dataclasses.replace(content, apply_orientation=True)
    if any(map(tree.folders, split_folders.values())):
        name = next(iter(split_folders))
        raise ArchiveError(
            f"{source} has the folders {', '.join(sorted(folder_names))}: beside train "
            f"one of {', '.join(_TEST_NAMES)} is needed, or a folder for each class; "
            f"if {name} is a class, move the images in its folders up into {name}"
        )
    if test_per_class < 1:
        raise ArchiveError(
            f"{source} has no folders train and test: give --test_per_class=N to hold "
            "N images of each class out for the balanced test"
        )
    class_names, image_files = _list_classes(tree, base)
    content = _hold_out_test(tree, class_names, image_files, test_per_class)
    return dataclasses.replace(content, apply_orientation=True)


def _list_splits(
    tree: FileTree, train_folder: str, test_folder: str, *unused_folders: str
) -> ImageFiles:
    """Lists a folder of training images and one of test images."""
    for folder in (train_folder, test_folder):
        if not tree.folders(folder):
            raise ArchiveError(
                f"{tree}/{folder} has no class folders: put its images into "
                f"{folder}CLASS, or rename it if it is a class itself"
            )
    class_names, train = _list_classes(tree, train_folder)
    test_class_names, test = _list_classes(tree, test_folder)
    if class_names != test_class_names:
        unshared = sorted(set(class_names) ^ set(test_class_names))
        raise ArchiveError(
            f"{tree}: class {unshared[0]!r} is in one of train and test only "
            f"({len(unshared)} such classes); names that look the same may differ in "
            "their Unicode form: rename the folders to the same names"
        )
    reasons = {
        folder: f"images in {folder!r}, as {test_folder!r} is the test set"
        for folder in unused_folders
    }
    return _collect(tree, {"train": train, "test": test}, class_names, reasons)


def _collect(
    tree: FileTree,
    splits: dict[str, list[ImageFile]],
    class_names: tuple[str, ...],
    reasons: dict[str, str] | None = None,
) -> ImageFiles:
    """Returns the image files of a data set, with the files that are left out.

    Args:
      tree: the source.
      splits: the image files of each split, by its name.
      class_names: in label order.
      reasons: by folder, a description of its images, which are left out.
    """
    used_paths: set[str] = set()
    for image_files in splits.values():
        used_paths.update(image_file.path for image_file in image_files)
    left_out: dict[str, list[str]] = {}
    for path in tree.paths:
        suffix = pathlib.PurePosixPath(path).suffix.lower()
        if path in used_paths or path.endswith("/") or suffix in _TEXT_SUFFIXES:
            continue
        if not _is_image(path):
            reason = f"files that end in {suffix!r}"
        else:
            reason = "images outside of the class folders"
            for folder, folder_reason in (reasons or {}).items():
                if path.startswith(folder):
                    reason = folder_reason
        left_out.setdefault(reason, []).append(path)
    return ImageFiles(splits, class_names, left_out)


def _hold_out_test(
    tree: FileTree,
    class_names: tuple[str, ...],
    image_files: list[ImageFile],
    test_per_class: int,
) -> ImageFiles:
    """Draws a balanced test set; the other images are the training set."""
    labels = np.array([image_file.label for image_file in image_files])
    keys = np.array([image_file.id for image_file in image_files])
    class_sizes = np.bincount(labels)
    if test_per_class >= class_sizes.min():
        raise ArchiveError(
            f"{tree}: class {class_names[class_sizes.argmin()]!r} has "
            f"{class_sizes.min()} images, of which --test_per_class={test_per_class} "
            "leaves none to train on: hold out fewer, or add images"
        )
    try:
        test_indices = longtail.balanced_subset(
            labels,
            keys,
            num_classes=len(class_names),
            per_class=test_per_class,
            seed=_TEST_SEED,
        )
    except ValueError as error:
        raise ArchiveError(f"{tree}: {error}") from error
    train_indices = np.setdiff1d(np.arange(len(image_files)), test_indices)
    splits = {
        "train": [image_files[i] for i in train_indices],
        "test": [image_files[i] for i in test_indices],
    }
    return _collect(tree, splits, class_names)


def _list_classes(
    tree: FileTree, folder: str
) -> tuple[tuple[str, ...], list[ImageFile]]:
    """Returns the sorted class names, and the images with their paths as ids."""
    images = tree.images_by_class(folder)
    class_names = tuple(sorted(tree.folders(folder)))
    if len(class_names) < 2:
        raise ArchiveError(
            f"{tree}/{folder} has {len(class_names)} class folders, and at least 2 are "
            "needed"
        )
    malformed = [name for name in class_names if not _is_class_name(name)]
    if malformed:
        raise ArchiveError(
            f"{tree}/{folder}: class folder {malformed[0]!r}: a class name has "
            "printable characters, and single spaces inside of it only; rename it"
        )
    empty = [name for name in class_names if name not in images]
    if empty:
        raise ArchiveError(
            f"{tree}/{folder}: class folder {empty[0]!r} has no image ({len(empty)} "
            "such folders): fill it or remove it; images are files that end in "
            f"{', '.join(_SUFFIXES)}"
        )
    image_files = []
    for label, class_name in enumerate(class_names):
        for path in images[class_name]:
            image_id = path.removeprefix(folder)
            image_files.append(_image_file(tree, path, image_id, label))
    return class_names, image_files


def _is_class_name(name: str) -> bool:
    # TFDS keeps class names in a text file, one a line, and strips them.
    return bool(name) and name == " ".join(name.split()) and name.isprintable()


def _image_file(tree: FileTree, path: str, image_id: str, label: int) -> ImageFile:
    return ImageFile(image_id, path, label, functools.partial(tree.read, path))


def _is_image(path: str) -> bool:
    return path.lower().endswith(_SUFFIXES)


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return pathlib.PurePosixPath(path).stem


def tiny_imagenet(
    source: str | os.PathLike[str],
    *,
    num_classes: int = 200,
    train_per_class: int = 500,
    num_test: int = 10_000,
) -> ImageFiles:
    """Lists the official tiny-imagenet-200.zip, or the folder that it unpacks to.

    Its validation images are the test set. Labels are in the order of the sorted
    WordNet ids.

    Args:
      source: the archive or the folder.
      num_classes, train_per_class, num_test: the official numbers, which are checked.

    Raises:
      ArchiveError: a number differs, or a listed image is missing.
    """
    tree = FileTree(source)
    root = "" if "wnids.txt" in tree.paths else "tiny-imagenet-200/"
    # A damaged file must not raise an error of decoding: its numbers will differ.
    wnids = tree.read(f"{root}wnids.txt").decode(errors="replace").split()
    class_names = tuple(sorted(wnids))
    if len(set(class_names)) != num_classes:
        raise ArchiveError(
            f"{source}: wnids.txt names {len(set(class_names))} classes, expected "
            f"{num_classes}"
        )
    images = tree.images_by_class(f"{root}train/", "images/")
    train = []
    for label, name in enumerate(class_names):
        paths = images.get(name, [])
        if len(paths) != train_per_class:
            raise ArchiveError(
                f"{source}: class {name!r} has {len(paths)} training images, expected "
                f"{train_per_class}"
            )
        train += [_image_file(tree, path, _stem(path), label) for path in paths]
    test = _list_tiny_validation(tree, f"{root}val/", class_names)
    if len({image_file.id for image_file in test}) != num_test:
        raise ArchiveError(
            f"{source}: val_annotations.txt names {len(test)} images, expected "
            f"{num_test}"
        )
    return _collect(tree, {"train": train, "test": test}, class_names)


def _list_tiny_validation(
    tree: FileTree, folder: str, class_names: tuple[str, ...]
) -> list[ImageFile]:
    """Lists the validation images; a file of annotations names their classes."""
    label_of = {name: label for label, name in enumerate(class_names)}
    all_paths = set(tree.paths)
    annotations = tree.read(f"{folder}val_annotations.txt").decode(errors="replace")
    image_files = []
    for line in annotations.splitlines():
        # Image, class, and a bounding box; a damaged line may lack its class.
        file_name, class_name, *_ = [*line.split("\t"), ""]
        path = f"{folder}images/{file_name}"
        if class_name not in label_of or path not in all_paths:
            raise ArchiveError(
                f"{tree}: val_annotations.txt names {file_name!r} of class "
                f"{class_name!r}, which is not there"
            )
        label = label_of[class_name]
        image_files.append(_image_file(tree, path, _stem(path), label))
    return image_files


def imagenet(
    source: str | os.PathLike[str],
    *,
    class_names: tuple[str, ...],
    validation_labels: list[str],
) -> ImageFiles:
    """Lists ImageNet as it is usually unpacked.

    That is train/WNID/*.JPEG, and val/WNID/*.JPEG or all images in val itself.

    Args:
      source: the folder.
      class_names: the WordNet ids, sorted.
      validation_labels: the WordNet id of each validation image, in the order of their
        names; used if val has no folders.

    Raises:
      ArchiveError: a folder is missing or superfluous, or val has other images.
    """
    tree = FileTree(source)
    train = _list_wnid_folders(tree, "train/", class_names)
    if tree.folders("val/"):
        validation = _list_wnid_folders(tree, "val/", class_names)
    else:
        validation = _list_flat_validation(tree, "val/", class_names, validation_labels)
    return _collect(tree, {"train": train, "validation": validation}, class_names)


def _list_wnid_folders(
    tree: FileTree, folder: str, class_names: tuple[str, ...]
) -> list[ImageFile]:
    """Lists the images of a folder per WordNet id; an image's id is its file name."""
    unexpected = sorted(tree.folders(folder) ^ set(class_names))
    if unexpected:
        name = unexpected[0]
        problem = "is missing" if name in class_names else "is no class of ImageNet"
        raise ArchiveError(
            f"{tree}/{folder}: folder {name!r} {problem} ({len(unexpected)} such "
            "folders)"
        )
    _, image_files = _list_classes(tree, folder)
    return [
        dataclasses.replace(image_file, id=_file_name(image_file.id))
        for image_file in image_files
    ]


def _list_flat_validation(
    tree: FileTree,
    folder: str,
    class_names: tuple[str, ...],
    validation_labels: list[str],
) -> list[ImageFile]:
    """Lists the validation images of one folder, which has no folders of classes."""
    paths = [path for path in tree.paths if path.startswith(folder) and _is_image(path)]
    # The labels go by position: another image in place of a missing one shifts them.
    expected = [
        f"ILSVRC2012_val_{number:08d}"
        for number in range(1, len(validation_labels) + 1)
    ]
    stems = [_stem(path) for path in paths]
    if stems != expected:
        differing = sorted(set(stems) ^ set(expected)) or ["one of them twice"]
        raise ArchiveError(
            f"{tree}/{folder} has {len(paths)} images, expected {len(expected)}, "
            f"{expected[0]}.JPEG to {expected[-1]}.JPEG; missing or unexpected: "
            f"{', '.join(differing[:3])}; unpack the official images again"
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    return [
        _image_file(tree, path, _file_name(path), label_of[wnid])
        for path, wnid in zip(paths, validation_labels)
    ]
