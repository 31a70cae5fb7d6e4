"""Reports which groups of classes a model favours, from its logits.

    python -m experiments.audit --logits=teacher.npz [--compare=student.npz]
    python -m experiments.audit --checkpoint=runs/teachers/HASH [--save=teacher.npz]

The model may be of any framework. FILE.npz holds `logits` [N, C] and `labels` [N],
preferably on balanced input. It may also hold `class_counts` [C], the training images
of each class, `class_names` [C], `train_logits` and `train_labels`
(ltkd_jax/data/logits.py):

    np.savez("teacher.npz", logits=logits, labels=labels, class_counts=counts)

The command prints tables and writes audit.html and audit.json: the mass on head, medium
and tail classes; how much of the loss is about the group and how much about the class
within it; calibration by group; which classes lose mass.
"""

import argparse
import pathlib
import sys

from experiments import runtime
from experiments.audit import run, summary
from experiments.config import load
from ltkd_jax import console


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    console.replace_unencodable()
    parser = _parser()
    options = parser.parse_args(argv)
    if options.save and not options.checkpoint:
        parser.error("--save writes the logits of a --checkpoint")
    if options.counts is not None and options.imbalance is not None:
        parser.error("give either --counts or --imbalance")
    runtime.initialize()
    arguments = vars(options)
    modules = arguments.pop("modules")
    checkpoint = arguments.pop("checkpoint")
    path = arguments.pop("logits") or checkpoint
    try:
        load.import_modules(modules)
        record = run.run(path, **arguments)
    except (ValueError, OSError) as error:
        # One line, also if the message has several.
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(summary.as_text(record))
    print(f"\n{options.output}   {pathlib.Path(options.output).with_suffix('.json')}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--logits",
        type=console.path_argument,
        metavar="FILE.npz",
        help="logits and labels of any model",
    )
    model.add_argument(
        "--checkpoint",
        type=console.path_argument,
        metavar="FOLDER",
        help="a teacher's folder, or the work directory of a run",
    )
    parser.add_argument(
        "--compare",
        type=console.path_argument,
        metavar="PATH",
        help="a second model, such as its student, as either of these",
    )
    parser.add_argument(
        "--counts",
        type=console.path_argument,
        metavar="FILE",
        help="training images of each class: .json, .npy or text",
    )
    parser.add_argument(
        "--imbalance",
        metavar="GAMMA[,N_MAX]",
        help="or exponential ones, in the order of classes",
    )
    parser.add_argument(
        "--groups",
        dest="fractions",
        type=_fractions,
        metavar="FRACTIONS",
        help="of the classes, the most frequent first; default: 0.33,0.34,0.33",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=4.0,
        help="of distillation; default: 4",
    )
    parser.add_argument(
        "--data_dir",
        type=console.path_argument,
        default="",
        help="of the data set of a --checkpoint",
    )
    parser.add_argument(
        "--subset",
        type=console.path_argument,
        default="",
        metavar="LIST",
        help="of its training images, if it had one",
    )
    parser.add_argument(
        "--save",
        type=console.path_argument,
        metavar="FILE.npz",
        help="write the logits of a --checkpoint, as --logits reads them",
    )
    parser.add_argument(
        "--output",
        type=console.path_argument,
        default="audit.html",
        help="the page, with a .json beside it; default: audit.html",
    )
    load.add_import_argument(parser)
    return parser


def _fractions(text):
    try:
        return tuple(float(fraction) for fraction in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give fractions of the classes, such as 0.33,0.34,0.33"
        ) from None


def _temperature(text):
    try:
        if 1e-3 <= float(text) <= 1e3:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0.001 to 1000")


if __name__ == "__main__":
    main()
