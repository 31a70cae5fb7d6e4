"""Measures what the project is fast for, as ratios within one run.

    python -m experiments.benchmark train                        # the step: images/s, FLOPs, compilation, memory
    python -m experiments.benchmark train --methods=ltkd,bikd --precisions=float32,tf32,bfloat16
    python -m experiments.benchmark profile --method=ltkd        # where the step's time goes, operation by operation
    python -m experiments.benchmark loss                         # LTKD's loss alone, beside the floor of its bytes
    python -m experiments.benchmark bilevel                      # the bilevel step beside naive differentiation
    python -m experiments.benchmark bilevel --repeats=0          # the compiler's counts alone
    python -m experiments.benchmark stream                       # images per second of a stream, of a plain loop
    python -m experiments.benchmark pytorch                      # KD, LTKD and BiKD beside a plain PyTorch twin

The modules of experiments/benchmark say what each of them counts, docs/performance.md what it was.
"""

import argparse
import importlib.util
import sys

from experiments import runtime
from experiments.benchmark import (
    bilevel_step,
    input_pipeline,
    loss,
    profile,
    train_step,
)
from experiments.config.validation import ConfigError

_PRECISIONS = ("float32", "tf32", "bfloat16")


def _names(choices):
    """Returns a parser of names with commas between them."""

    def parse(text):
        names = [name for name in text.split(",") if name]
        if not names or not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give some of {', '.join(choices)}, with commas between them"
            )
        return names

    return parse


def _at_least(minimum):
    def parse(text):
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number of at least {minimum}"
            )
        return int(text)

    return parse


def _add_models(parser):
    parser.add_argument("--teacher", default="resnet32x4", help="a model")
    parser.add_argument("--student", default="resnet8x4", help="a model")


def _add_steps(parser, methods):
    _add_models(parser)
    parser.add_argument(
        "--methods",
        type=_names(methods),
        default=list(methods),
        help=", ".join(methods),
    )
    parser.add_argument(
        "--precisions",
        type=_names(_PRECISIONS),
        default=["float32"],
        help=", ".join(_PRECISIONS),
    )
    parser.add_argument("--steps", type=_at_least(1), default=3,
                        help="steps that are timed together, at least; bikd takes multiples of its k")  # fmt: skip
    parser.add_argument(
        "--repeats",
        type=_at_least(1),
        default=3,
        help="rounds, of which the best counts",
    )


def _pytorch(**options):
    if importlib.util.find_spec("torch") is None:
        sys.exit('error: PyTorch is not installed: pip install -e ".[train,torch]"')
    from experiments.benchmark import pytorch_comparison

    return pytorch_comparison.report(**options)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True)

    def command(name, report, description):
        added = commands.add_parser(
            name,
            help=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        added.set_defaults(report=report)
        return added

    train = command(
        "train",
        train_step.report,
        "the training step: rate, FLOPs, time to the first step, memory",
    )
    _add_steps(train, train_step.METHODS)
    sources = ("table", "network")
    train.add_argument(
        "--teachers",
        type=_names(sources),
        default=list(sources),
        help="of the teacher's logits",
    )

    traced = command(
        "profile", profile.report, "where the training step's time goes, by a trace"
    )
    _add_models(traced)
    traced.add_argument(
        "--method", choices=train_step.METHODS, default="ltkd", help="a method"
    )
    traced.add_argument(
        "--teacher_from",
        choices=sources,
        default="table",
        help="source of the teacher's logits",
    )
    traced.add_argument(
        "--precision", choices=_PRECISIONS, default="float32", help="of the networks"
    )
    traced.add_argument(
        "--steps", type=_at_least(1), default=3, help="steps that are traced, at least"
    )

    alone = command(
        "loss",
        loss.report,
        "LTKD's loss and its gradient, beside the floor of its bytes",
    )
    alone.add_argument(
        "--repeats",
        type=_at_least(1),
        default=5,
        help="timed calls, of which the best counts",
    )

    bilevel = command(
        "bilevel",
        bilevel_step.report,
        "the bilevel step: FLOPs, memory, time, beside a naive one",
    )
    _add_models(bilevel)
    bilevel.add_argument("--method", default="kd", help="whose terms are weighted")
    bilevel.add_argument("--batch_size", type=_at_least(1), default=100, help="images")
    bilevel.add_argument(
        "--num_classes", type=_at_least(3), default=100, help="at least 3, one a group"
    )
    bilevel.add_argument(
        "--precision", choices=_PRECISIONS, default="float32", help="of the networks"
    )
    bilevel.add_argument(
        "--repeats",
        type=_at_least(0),
        default=3,
        help="timed rounds after a first; 0 times nothing",
    )

    stream = command("stream", input_pipeline.report, "images per second of a stream")
    stream.add_argument(
        "--images",
        type=_at_least(1),
        default=512,
        help="JPEGs that are written and read",
    )
    stream.add_argument(
        "--size", type=_at_least(8), default=224, help="pixels of a crop's side"
    )
    stream.add_argument("--batch_size", type=_at_least(1), default=64, help="images")
    stream.add_argument(
        "--batches", type=_at_least(1), default=16, help="that are timed together"
    )
    stream.add_argument(
        "--repeats",
        type=_at_least(1),
        default=2,
        help="rounds, of which the best counts",
    )
    stream.add_argument(
        "--num_workers",
        type=_at_least(0),
        nargs="*",
        default=[0, 2],
        help="0 reads by threads",
    )

    twin = command("pytorch", _pytorch, "KD, LTKD and BiKD beside a plain PyTorch twin")
    _add_steps(twin, ("kd", "ltkd", "bikd"))
    return parser


def main(argv=None):
    options = vars(_parser().parse_args(argv))
    report = options.pop("report")
    runtime.initialize()
    try:
        print(report(**options))
    except (ValueError, ConfigError) as error:  # an unknown model, method or precision
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
