"""Classifies images or features with a trained student, or with a teacher.

    python -m experiments.predict runs/digits-10-ltkd-resnet20-resnet8-s0 a.png b.png
    python -m experiments.predict RUN --top=3 images/*.png
    python -m experiments.predict RUN rows.npz
    python -m experiments.predict RUN --export=student.stablehlo

RUN is the folder of a finished run, or of a teacher. The data set is not needed. Of
features, the rows `x` of an .npz file are classified, see `ltkd_jax.data.features`.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from experiments import runtime
from experiments.config import load
from ltkd_jax import console, files, inference
from ltkd_jax.data import features


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    console.replace_unencodable()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=console.path_argument, help="the folder of a run or of a teacher"
    )
    parser.add_argument(
        "images",
        nargs="*",
        type=console.path_argument,
        help="image files, or .npz files of features",
    )
    parser.add_argument(
        "--top",
        type=console.at_least(1),
        default=1,
        help="how many classes are printed (default: 1)",
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        type=console.path_argument,
        help="write the model as StableHLO, with any batch",
    )
    load.add_import_argument(parser)
    args = parser.parse_args(argv)
    if not args.images and not args.export:
        parser.error("give images, or --export=FILE")
    runtime.initialize()
    try:
        load.import_modules(args.modules)
        classifier = inference.load(args.run)
        if args.export:
            path = pathlib.Path(args.export)
            files.make_folder(path.parent, "give another --export")
            with files.atomic_write(path) as temporary:
                temporary.write_bytes(classifier.export())
            print(args.export)
        if classifier.takes_features:
            for path in args.images:
                rows, keys = features.read_rows(path)
                _print_classes(
                    classifier, rows, [f"{path} {key}" for key in keys], args.top
                )
        elif args.images:
            _print_classes(classifier, args.images, args.images, args.top)
    # An ImportError is of the package that jax needs for an export.
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def _print_classes(
    classifier: inference.Classifier, inputs: Any, input_names: list[str], top: int
) -> None:
    """Prints the most probable classes of each input, with their probabilities."""
    logits, _ = classifier(inputs)
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    for name, row in zip(input_names, probabilities):
        best = np.argsort(-row)[:top]
        classes = [f"{classifier.class_names[c]} {100 * row[c]:.1f} %" for c in best]
        print(f"{name}: {', '.join(classes)}")


if __name__ == "__main__":
    main()
