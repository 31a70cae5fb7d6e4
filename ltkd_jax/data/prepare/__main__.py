"""Prepares a data set once: `python -m ltkd_jax.data.prepare NAME --data_dir=DIR`."""

import argparse
import contextlib
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from ltkd_jax import console, signals
from ltkd_jax.data import records
from ltkd_jax.data.prepare import archives, download, recipes
from ltkd_jax.data.prepare.tfds_writer import PrepareError

_EPILOG = """\
sources (--source):
  cifar100, cifar10  the official cifar-100-python.tar.gz or cifar-100-binary.tar.gz
                     (cifar-10-...)
  fashion_mnist      a folder or a tar archive with the four official *-ubyte.gz
                     files, such as /usr/share/datasets/fashion-mnist of Debian's
                     package dataset-fashion-mnist
  tiny_imagenet      the official tiny-imagenet-200.zip, or the folder that it
                     unpacks to
  imagenet2012       a folder with train/WNID/*.JPEG and val/WNID/*.JPEG
                     (or val/*.JPEG)
  folder             your own images, a folder or a zip of CLASS/...,
                     or of train/CLASS/... and test/CLASS/...
  Grey, palette and CMYK images among colour ones are read as colour. Your own images
  are turned as their EXIF orientation says. What is left out is reported at the end.

examples:
  python -m ltkd_jax.data.prepare cifar100 --data_dir ~/tensorflow_datasets
  python -m ltkd_jax.data.prepare cifar100 --data_dir data \\
      --source cifar-100-python.tar.gz
  python -m ltkd_jax.data.prepare folder --name birds --source ~/birds \\
      --test_per_class 20 --data_dir data
"""


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ltkd_jax.data.prepare",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=recipes.DATASETS)
    parser.add_argument(
        "--data_dir",
        type=console.path_argument,
        help="TFDS's directory (default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--source",
        type=console.path_argument,
        metavar="PATH",
        help="a local archive or folder; without it, one is downloaded",
    )
    parser.add_argument(
        "--name",
        help="of your own data set, for `folder`: what config.data.name is then set to",
    )
    parser.add_argument(
        "--test_per_class",
        type=console.at_least(0),
        default=0,
        metavar="N",
        help="images of each class to hold out for the test; a `folder` without train "
        "and test needs it",
    )
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help="leave out images that do not decode, and name them",
    )
    args = parser.parse_args(argv)
    if args.dataset == "folder" and not (args.name and args.source):
        parser.error("folder needs --name and --source")
    if args.dataset != "folder" and (args.name or args.test_per_class):
        parser.error("--name and --test_per_class are for folder only")
    return args


def _prepare(args: argparse.Namespace) -> None:
    """Prepares the data set unless it is there, and prints where it is."""
    data_dir = records.resolve_data_dir(args.data_dir)
    name = args.name or args.dataset
    if args.dataset == "folder":
        recipe = recipes.custom_recipe(name, test_per_class=args.test_per_class)
    else:
        recipe = recipes.official_recipe(name)
    builder = records.find_builder(name, data_dir)
    if builder is not None:
        path = pathlib.Path(builder.data_path)
        print(f"{name} is already prepared: {path}")
        if args.source:
            print("nothing was read; to prepare it again, remove that folder first")
        # TFDS itself writes none. Where the directory is read-only or damaged, it is
        # no error here that there is none.
        if not (path / recipes.SPLIT_TABLE).exists():
            with contextlib.suppress(OSError, ValueError):
                recipes.write_split_table(name, data_dir, path)
        _print_next_command(args.dataset, name, data_dir)
        return
    path = recipes.prepare(
        recipe,
        data_dir,
        args.source,
        skip_damaged=args.skip_damaged,
        show_progress=True,
    )
    print(f"{name} is prepared: {path}")
    for split, info in records.open_builder(name, data_dir).info.splits.items():
        print(f"  {split}: {info.num_examples:,} images")
    print(f"  {recipes.SPLIT_TABLE}: key, label, class and split of each image")
    _print_next_command(args.dataset, name, data_dir)


def _print_next_command(dataset: str, name: str, data_dir: pathlib.Path) -> None:
    print("train on it, in a checkout of ltkd_jax:")
    print(f"  {recipes.training_command(dataset, name, data_dir)}")


def _interrupt(signal_number: int, frame: Any) -> None:
    # Unlike the signal's default action, an exception runs the `finally` blocks, which
    # remove temporary files.
    print("interrupted; nothing half-written is left", file=sys.stderr)
    sys.exit(128 + signal_number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments; None means those of the process.

    Returns:
      The exit code: 0, or 2 after a failure, whose message is on the standard error.
    """
    console.replace_unencodable()
    args = _parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        with signals.use_handler(_interrupt):
            _prepare(args)
    except (
        archives.ArchiveError,
        download.DownloadError,
        PrepareError,
        records.DatasetNotPreparedError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
