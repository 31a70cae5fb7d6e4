"""Puts a data set where TFDS reads it, without TensorFlow: from the network, or from an archive at hand.

The directory is the stock one: name, version, features, example ids and order are those that TFDS itself
would write, and `tfds.builder(name, data_dir=DIR)` reads it without a network.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable

from ltkd_jax.data import archives, download, sources

_EPILOG = """\
sources (--source):
  cifar100, cifar10  the official cifar-100-python.tar.gz or cifar-100-binary.tar.gz (cifar-10-...)
  fashion_mnist      a folder or a tar archive with the four official *-ubyte.gz files, such as
                     /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist

examples:
  python -m ltkd_jax.data.prepare cifar100 --data_dir ~/tensorflow_datasets
  python -m ltkd_jax.data.prepare cifar100 --data_dir data --source cifar-100-python.tar.gz
"""


class PrepareError(ValueError):
    """The data directory is in the way; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is made: what to fetch, and how it is read and verified (a path to its content)."""

    name: str
    files: tuple[download.File, ...]
    read: Callable[[pathlib.Path], archives.Content]


def recipe(name: str) -> Recipe:
    """The official recipe of cifar100, cifar10 or fashion_mnist, with the official checksums.

    >>> recipe("cifar100").files[0].name
    'cifar-100-binary.tar.gz'
    """
    import tensorflow_datasets as tfds

    infos = tfds.builder_cls(name).url_infos
    files = tuple(download.File(url, info.filename, info.size, info.checksum) for url, info in infos.items())
    if name == "fashion_mnist":
        return Recipe(name, files, functools.partial(archives.read_idx, sha256=archives.FASHION_MNIST_SHA256))
    layout = {"cifar10": archives.cifar10, "cifar100": archives.cifar100}[name](files[0].sha256)
    return Recipe(name, files, functools.partial(archives.read_cifar, layout=layout))


def prepare(how: Recipe, data_dir: pathlib.Path, source=None, *, show_progress: bool = False) -> pathlib.Path:
    """Writes the TFDS directory of a data set and returns its path; nothing half-written is left at that path.

    Args:
      how: the recipe.
      data_dir: TFDS's directory; the data set becomes `data_dir/NAME/VERSION`.
      source: path of an archive or folder; None fetches the official files into `data_dir/downloads/NAME`.
      show_progress: shows bars on the standard error.

    Raises:
      ArchiveError: the source is not the official one.
      DownloadError: a file can't be fetched.
      PrepareError: something else is at the final path.
    """
    if source is None:
        folder = data_dir / "downloads" / how.name
        fetched = [download.fetch(file, folder, show_progress=show_progress) for file in how.files]
        source = fetched[0] if len(fetched) == 1 else folder
    return _write(how.name, how.read(pathlib.Path(source)), data_dir, show_progress)


def _write(name: str, content: archives.Content, data_dir: pathlib.Path, show_progress: bool) -> pathlib.Path:
    """Writes under a temporary name on the same file system, and renames."""
    import tensorflow_datasets as tfds

    # The bars of TFDS have a switch for the whole process only.
    (tfds.enable_progress_bar if show_progress else tfds.disable_progress_bar)()
    data_dir.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.incomplete.", dir=data_dir))
    try:
        builder = _builder_class(name, content)(data_dir=temporary, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces the temporary path
            builder.download_and_prepare()
        written = pathlib.Path(builder.data_path)
        final = data_dir / written.relative_to(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(written, final)
        except OSError as error:
            raise PrepareError(f"{final} is in the way ({error.strerror}): move it away, and run again") from error
        return final
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _builder_class(name: str, content: archives.Content):
    """The stock builder, but for where its examples come from: those of TFDS read files through TensorFlow."""
    import tensorflow_datasets as tfds
    from PIL import Image

    stock = tfds.builder_cls(name)

    def split_generators(self, dl_manager):
        for label, names in content.class_names.items():
            self.info.features[label].names = names
        return {split: self._generate_examples(split) for split in content.splits}

    def generate_examples(self, split):
        images, labels = content.splits[split]
        has_id = "id" in self.info.features
        for index, image in enumerate(images):
            example = {label: int(values[index]) for label, values in labels.items()}
            if has_id:
                example["id"] = f"{split}_{index:05d}"
            example["image"] = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            yield index, example

    body = {
        "name": name,
        "VERSION": stock.VERSION,
        "__module__": stock.__module__,  # the directory then names the stock module
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
    }
    with tfds.core.registered.skip_registration():
        return type(stock.__name__, (stock,), body)


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ltkd_jax.data.prepare",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=("cifar100", "cifar10", "fashion_mnist"))
    parser.add_argument("--data_dir", help="TFDS's directory (default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    parser.add_argument("--source", metavar="ARCHIVE", help="an archive or folder at hand; without it, fetch one")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """The command line; returns the exit code, 2 with a message on the standard error if it can't be done."""
    args = _parse(argv)
    data_dir = sources.resolve_data_dir(args.data_dir)
    try:
        builder = sources.find_builder(args.dataset, data_dir)
        if builder is not None:
            print(f"{args.dataset} is already prepared: {builder.data_path}")
            return 0
        path = prepare(recipe(args.dataset), data_dir, args.source, show_progress=True)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except (
        archives.ArchiveError,
        download.DownloadError,
        PrepareError,
        sources.DatasetNotPrepared,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.dataset} is prepared: {path}")
    return 0


if __name__ == "__main__":
    # An exception, unlike the signal, lets temporary files be removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
