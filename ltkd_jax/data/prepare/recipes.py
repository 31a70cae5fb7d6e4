"""Puts a data set where TFDS reads it, without TensorFlow: downloaded, or from a local archive or folder.

The directory of a data set that TFDS knows is the stock one: name, version, features, example ids and order are those
that TFDS itself would write, and `tfds.builder(name, data_dir=DIR)` reads it without a network. Any other is read by
`tfds.builder_from_directory`.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ltkd_jax.data.prepare import archives, download, folders, tfds_writer
from ltkd_jax.data.prepare.tfds_writer import PrepareError

_WITHOUT_URL = {
    "tiny_imagenet": "the zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet2012": "the images from https://image-net.org (an account is needed), unpacked",
    "folder": "your folder of images",
}
Content = archives.Content | folders.Files
DATASETS = ("cifar100", "cifar10", "fashion_mnist", *_WITHOUT_URL)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is made: its name, the files to download, and the function that reads and verifies a path."""

    name: str
    files: tuple[download.File, ...]
    read: Callable[[pathlib.Path], Content]


def recipe(name: str) -> Recipe:
    """Returns the recipe of a well-known data set, with the official checksums or numbers of images.

    >>> recipe("cifar100").files[0].name
    'cifar-100-binary.tar.gz'
    """
    import tensorflow_datasets as tfds

    if name == "tiny_imagenet":
        return Recipe(name, (), folders.tiny_imagenet)
    stock = tfds.builder_cls(name)
    if name == "imagenet2012":
        package = pathlib.Path(inspect.getfile(stock)).parent
        read: Callable[[pathlib.Path], Content] = functools.partial(
            folders.imagenet,
            class_names=tuple((package / "labels.txt").read_text().split()),
            validation_labels=(package / "validation_labels.txt").read_text().split(),
        )
        return Recipe(name, (), read)
    if name == "fashion_mnist":
        read = functools.partial(
            archives.read_idx, sha256=archives.FASHION_MNIST_SHA256
        )
    else:
        read = functools.partial(
            archives.read_cifar, cifar=getattr(archives, name.upper())
        )
    files = tuple(
        download.File(url, info.filename, info.size, info.checksum)
        for url, info in stock.url_infos.items()
    )
    return Recipe(name, files, read)


def own_recipe(name: str, *, test_per_class: int = 0) -> Recipe:
    """Returns the recipe of a folder of one's own images by class, see `folders.own`.

    Raises:
      PrepareError: the name is malformed, or is that of a well-known data set.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", name or ""):
        raise PrepareError(
            f"--name={name!r}: give a name of small letters, digits and _, which starts with a letter"
        )
    if (
        name in DATASETS
        or name == "digits"
        or name in tfds.list_builders(with_community_datasets=False)
    ):
        raise PrepareError(
            f"--name={name!r} is the name of a well-known data set: give another"
        )
    return Recipe(
        name, (), functools.partial(folders.own, test_per_class=test_per_class)
    )


def prepare(
    recipe: Recipe,
    data_dir: pathlib.Path,
    source: str | os.PathLike[str] | None = None,
    *,
    skip_damaged: bool = False,
    show_progress: bool = False,
) -> pathlib.Path:
    """Writes the TFDS directory of a data set and returns its path; nothing half-written is left at that path.

    Args:
      recipe: how the data set is made.
      data_dir: TFDS's directory; the data set becomes `data_dir/NAME/VERSION`.
      source: path of an archive or folder; None downloads the official files into `data_dir/downloads/NAME`.
      skip_damaged: whether image files that do not decode are left out, with a warning, rather than refused.
      show_progress: whether to show bars on the standard error.

    Raises:
      ArchiveError: the source is not the official one, or lacks something.
      DownloadError: a file cannot be downloaded.
      PrepareError: something else is at the final path, or an image does not decode.
    """
    import tensorflow_datasets as tfds

    if source is None:
        if not recipe.files:
            wanted = _WITHOUT_URL.get(recipe.name, _WITHOUT_URL["folder"])
            raise PrepareError(
                f"{recipe.name} cannot be downloaded: give --source, {wanted}"
            )
        folder = data_dir / "downloads" / recipe.name
        downloaded = [
            download.fetch(file, folder, show_progress=show_progress)
            for file in recipe.files
        ]
        source = downloaded[0] if len(downloaded) == 1 else folder
    content = recipe.read(pathlib.Path(source))

    # TFDS can switch its bars for the whole process only.
    (tfds.enable_progress_bar if show_progress else tfds.disable_progress_bar)()
    data_dir.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that a rename completes it.
    temporary = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{recipe.name}.incomplete.", dir=data_dir)
    )
    try:
        builder = _builder_class(recipe.name, content)(
            data_dir=temporary, file_format="array_record"
        )
        if isinstance(content, folders.Files):
            tfds_writer.write(
                builder, content, skip_damaged=skip_damaged, show_progress=show_progress
            )
        else:
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # TFDS announces the temporary path
                builder.download_and_prepare()
        written = pathlib.Path(builder.data_path)
        final = data_dir / written.relative_to(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(written, final)
        except OSError as error:
            raise PrepareError(
                f"{final} is in the way ({error.strerror}): move it away, and run again"
            ) from error
        return final
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _builder_class(name: str, content: Content) -> Any:
    """Returns the builder of an own data set, or TFDS's with other examples, since its own reads through TensorFlow."""
    import tensorflow_datasets as tfds
    from PIL import Image

    in_tfds = name in tfds.list_builders(with_community_datasets=False)
    stock = tfds.builder_cls(name) if in_tfds else tfds.core.GeneratorBasedBuilder

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
        assert isinstance(
            content, archives.Content
        )  # others are written by `tfds_writer`
        for label, names in content.class_names.items():
            self.info.features[label].names = names
        return {split: self._generate_examples(split) for split in content.splits}

    def generate_examples(
        self: Any, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        assert isinstance(content, archives.Content)
        images, labels = content.splits[split]
        for index, image in enumerate(images):
            example: dict[str, Any] = {
                label: int(values[index]) for label, values in labels.items()
            }
            if "id" in self.info.features:
                example["id"] = f"{split}_{index:05d}"
            example["image"] = Image.fromarray(
                image.squeeze(-1) if image.shape[-1] == 1 else image
            )
            yield index, example

    body: dict[str, Any] = {
        "name": name,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
    }
    if in_tfds:
        # The directory names the module of its builder: TFDS's own.
        body |= {"VERSION": stock.VERSION, "__module__": stock.__module__}
    else:
        body |= {
            "VERSION": tfds.core.Version("1.0.0"),
            "__module__": __name__,
            "_info": info,
        }
    with tfds.core.registered.skip_registration():
        return type(stock.__name__ if in_tfds else "Builder", (stock,), body)
