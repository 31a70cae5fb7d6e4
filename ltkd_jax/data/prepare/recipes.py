"""Prepares data sets as TFDS directories, without TensorFlow.

The images are downloaded, or come from a local archive or folder. A data set that TFDS
knows gets the directory that TFDS itself would write, with the same name, version,
features, example ids and order; `tfds.builder(name, data_dir=DIR)` reads it without a
network. Any other is read by `tfds.builder_from_directory`.
"""

import contextlib
import csv
import dataclasses
import functools
import inspect
import io
import logging
import os
import pathlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ltkd_jax import files
from ltkd_jax.data import datasets
from ltkd_jax.data.prepare import archives, download, folders, tfds_writer
from ltkd_jax.data.prepare.tfds_writer import PrepareError

# Of data sets that cannot be downloaded: what --source must be.
_REQUIRED_SOURCES = {
    "tiny_imagenet": "the zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet2012": (
        "the images from https://image-net.org (an account is needed), unpacked"
    ),
    "folder": "your folder of images",
}
SPLIT_TABLE = "split.csv"
# The config of the training program for each of `DATASETS`.
_CONFIGS = {
    "cifar100": "configs/cifar100lt.py:ltkd",
    "cifar10": "configs/cifar10lt.py:ltkd",
    "fashion_mnist": "configs/fashionmnistlt.py:ltkd",
    "tiny_imagenet": "configs/tinyimagenetlt.py:ltkd",
    "imagenet2012": "configs/imagenetlt.py:ltkd",
    "folder": "configs/folderlt.py:ltkd,name={name}",
}
_MAX_REASONS = 10  # lines of the report of what was left out
_log = logging.getLogger(__name__)
SourceContent = archives.DecodedImages | folders.ImageFiles
DATASETS = ("cifar100", "cifar10", "fashion_mnist", *_REQUIRED_SOURCES)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Describes how a data set is made.

    Attributes:
      name: of the data set.
      downloads: the official files; empty if they cannot be downloaded.
      read: reads and verifies the source: the only download, the folder of several
        downloads, or what the user gives.
    """

    name: str
    downloads: tuple[download.RemoteFile, ...]
    read: Callable[[pathlib.Path], SourceContent]


def official_recipe(name: str) -> Recipe:
    """Returns the recipe of an official data set.

    It verifies the official checksums or numbers of images.

    Args:
      name: one of `DATASETS` except "folder".

    >>> official_recipe("cifar100").downloads[0].name
    'cifar-100-binary.tar.gz'
    """
    import tensorflow_datasets as tfds

    if name == "tiny_imagenet":
        return Recipe(name, (), folders.tiny_imagenet)
    stock_class = tfds.builder_cls(name)
    read: Callable[[pathlib.Path], SourceContent]
    if name == "imagenet2012":
        # The class names and the labels of the validation images come with TFDS.
        package = pathlib.Path(inspect.getfile(stock_class)).parent
        class_names = (package / "labels.txt").read_text().split()
        validation_labels = (package / "validation_labels.txt").read_text().split()
        read = functools.partial(
            folders.imagenet,
            class_names=tuple(class_names),
            validation_labels=validation_labels,
        )
        return Recipe(name, (), read)
    if name == "fashion_mnist":
        sha256 = archives.FASHION_MNIST_SHA256
        read = functools.partial(archives.read_idx, sha256=sha256)
    else:
        layouts = {"cifar100": archives.CIFAR100, "cifar10": archives.CIFAR10}
        read = functools.partial(archives.read_cifar, layout=layouts[name])
    downloads = tuple(
        download.RemoteFile(url, info.filename, info.size, info.checksum)
        for url, info in stock_class.url_infos.items()
    )
    return Recipe(name, downloads, read)


def custom_recipe(name: str, *, test_per_class: int = 0) -> Recipe:
    """Returns the recipe of a custom data set, a folder of images by class.

    Args:
      name: of the data set: small letters, digits and _, a letter first.
      test_per_class: number of images of each class to hold out for the test, see
        `folders.custom`.

    Raises:
      PrepareError: the name has another form, or an official data set has it.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", name or ""):
        raise PrepareError(
            f"--name={name!r}: give a name of small letters, digits and _, which "
            "starts with a letter"
        )
    in_tfds = name in tfds.list_builders(with_community_datasets=False)
    if in_tfds or name in (*DATASETS, "digits"):
        raise PrepareError(
            f"--name={name!r} is the name of a well-known data set: give another"
        )
    read = functools.partial(folders.custom, test_per_class=test_per_class)
    return Recipe(name, (), read)


def prepare(
    recipe: Recipe,
    data_dir: pathlib.Path,
    source: str | os.PathLike[str] | None = None,
    *,
    skip_damaged: bool = False,
    show_progress: bool = False,
) -> pathlib.Path:
    """Writes the TFDS directory of a data set, with its `split.csv`.

    The directory appears only when it is complete. Files that were left out are counted
    in warnings at the end.

    Args:
      recipe: how the data set is made.
      data_dir: TFDS's directory; the data set is written to `data_dir/NAME/VERSION`.
      source: path of an archive or folder; None downloads the official files into
        `data_dir/downloads/NAME`.
      skip_damaged: whether image files that do not decode are left out, with a warning,
        instead of raising an error.
      show_progress: whether to show bars on the standard error.

    Returns:
      The path of the directory.

    Raises:
      ArchiveError: the source is not the official one, or lacks something.
      DownloadError: a file cannot be downloaded.
      PrepareError: there is no source, an image does not decode, or the directory
        exists already.
    """
    if source is None:
        source = _download(recipe, data_dir, show_progress)
    content = recipe.read(pathlib.Path(source))
    files.make_folder(data_dir, "give another --data_dir")
    # Written here first, on the same file system, so that one rename completes it.
    temporary = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{recipe.name}.incomplete.", dir=data_dir)
    )
    try:
        written = _write(recipe.name, content, temporary, skip_damaged, show_progress)
        write_split_table(recipe.name, temporary, written)
        final = data_dir / written.relative_to(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(written, final)
        except OSError as error:
            raise PrepareError(
                f"{final} is in the way ({error.strerror}): move it away, and run again"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(content, folders.ImageFiles):
        _report_left_out(content.left_out)
    return final


def write_split_table(name: str, data_dir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes `split.csv`, with a row for each image: key, label, class and split.

    It tells another framework, such as that of a teacher, which images are in which
    set. Split is "train" or "test"; the rows of each are sorted by key.

    Args:
      name: of the data set.
      data_dir: TFDS's directory.
      folder: to write into.
    """
    # Only keys and labels are read, so any size will do.
    source = datasets.load(name, data_dir, size=32)
    with (
        files.atomic_write(folder / SPLIT_TABLE) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("key", "label", "class", "split"))
        for split, images in (("train", source.train), ("test", source.test)):
            for key, label in zip(images.keys, images.labels):
                writer.writerow((key, label, source.class_names[label], split))


def training_command(dataset: str, name: str, data_dir: pathlib.Path) -> str:
    """Returns the command that trains on a prepared data set.

    Args:
      dataset: one of `DATASETS`.
      name: of the data set, another one for a "folder" only.
      data_dir: TFDS's directory.

    >>> command = training_command("folder", "birds", pathlib.Path("data"))
    >>> shlex.split(command)[3:]
    ['--config=configs/folderlt.py:ltkd,name=birds', '--config.data.dir=data']
    """
    config = _CONFIGS[dataset].format(name=name)
    return (
        f"python -m experiments.main --config={config} "
        f"--config.data.dir={shlex.quote(str(data_dir))}"
    )


def _report_left_out(left_out: dict[str, list[str]]) -> None:
    """Warns of the files of a source that are in no split, the most frequent first."""
    by_frequency = sorted(left_out.items(), key=lambda item: -len(item[1]))
    for reason, paths in by_frequency[:_MAX_REASONS]:
        names = folders.examples([repr(path) for path in paths])
        _log.warning("left out: %d %s: %s", len(paths), reason, names)
    rest = sum(len(paths) for _, paths in by_frequency[_MAX_REASONS:])
    if rest:
        _log.warning("left out: %d other files", rest)


def _download(
    recipe: Recipe, data_dir: pathlib.Path, show_progress: bool
) -> pathlib.Path:
    """Downloads the official files; returns the only one's path, or their folder's."""
    if not recipe.downloads:
        custom_source = _REQUIRED_SOURCES["folder"]
        required_source = _REQUIRED_SOURCES.get(recipe.name, custom_source)
        raise PrepareError(
            f"{recipe.name} cannot be downloaded: give --source, {required_source}"
        )
    folder = data_dir / "downloads" / recipe.name
    files.make_folder(folder, "give another --data_dir")
    paths = [
        download.fetch(file, folder, show_progress=show_progress)
        for file in recipe.downloads
    ]
    return paths[0] if len(paths) == 1 else folder


def _write(
    name: str,
    content: SourceContent,
    directory: pathlib.Path,
    skip_damaged: bool,
    show_progress: bool,
) -> pathlib.Path:
    """Writes `directory/NAME/VERSION`, and returns its path."""
    import tensorflow_datasets as tfds

    # TFDS can switch its bars for the entire process only.
    if show_progress:
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    builder_class = _builder_class(name, content)
    builder = builder_class(data_dir=directory, file_format="array_record")
    if isinstance(content, folders.ImageFiles):
        tfds_writer.write(
            builder, content, skip_damaged=skip_damaged, show_progress=show_progress
        )
    else:
        # TFDS prints the path, which is a temporary one.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def _builder_class(name: str, content: SourceContent) -> Any:
    """Returns a TFDS builder class that describes a data set and yields its examples.

    If TFDS knows the data set, this is a subclass of TFDS's own ("stock") builder class
    with the same name, version and module, all of which TFDS writes into the directory
    and looks for when it reads it. Only the methods that produce the examples are
    replaced, since the stock ones read their source through TensorFlow.

    Any other data set gets a builder with an id, a colour image and a label. Its
    methods for examples are never called, as `tfds_writer` writes its image files, but
    TFDS demands that they exist.
    """
    import tensorflow_datasets as tfds

    def info(self: Any) -> Any:
        shape = (64, 64, 3) if name == "tiny_imagenet" else (None, None, 3)
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=content.class_names),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        assert isinstance(content, archives.DecodedImages)
        # The stock builders of CIFAR set the names from their own download here.
        for label, class_names in content.class_names.items():
            self.info.features[label].names = class_names
        return {split: self._generate_examples(split) for split in content.splits}

    def generate_examples(
        self: Any, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        assert isinstance(content, archives.DecodedImages)
        has_id = "id" in self.info.features
        return _examples(content, split, has_id)

    attributes: dict[str, Any] = {
        "name": name,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
    }
    if name in tfds.list_builders(with_community_datasets=False):
        base_class = tfds.builder_cls(name)
        class_name = base_class.__name__
        attributes["VERSION"] = base_class.VERSION
        attributes["__module__"] = base_class.__module__
    else:
        base_class = tfds.core.GeneratorBasedBuilder
        class_name = "Builder"
        attributes["VERSION"] = tfds.core.Version("1.0.0")
        attributes["__module__"] = __name__
        attributes["_info"] = info
    # TFDS registers every builder class by its name, and refuses a second of one name.
    with tfds.core.registered.skip_registration():
        return type(class_name, (base_class,), attributes)


def _examples(
    content: archives.DecodedImages, split: str, has_id: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the key and the features of each example of a split, as TFDS expects."""
    from PIL import Image

    images, labels = content.splits[split]
    for index, image in enumerate(images):
        example: dict[str, Any] = {}
        for label, values in labels.items():
            example[label] = int(values[index])
        if has_id:
            example["id"] = f"{split}_{index:05d}"
        # Pillow's grey images have no channel axis.
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        example["image"] = Image.fromarray(pixels)
        yield index, example
