"""Measures speed and memory, mostly as ratios within one run.

    python -m experiments.benchmark train     # the training step: images/s, FLOPs, …
    python -m experiments.benchmark train --methods=ltkd,bikd --precisions=tf32,bfloat16
    python -m experiments.benchmark profile --method=ltkd  # the step by operation
    python -m experiments.benchmark loss      # losses, beside a bound by their bytes
    python -m experiments.benchmark bilevel   # beside naive differentiation
    python -m experiments.benchmark bilevel --repeats=0    # the compiler's counts alone
    python -m experiments.benchmark stream    # images/s of a stream and of a plain loop
    python -m experiments.benchmark pytorch   # steps and the loss, beside PyTorch's
    python -m experiments.benchmark compiled  # kernels and bytes on a GPU, without it

The modules of experiments/benchmark say what each of them measures, and
docs/performance.md has results.
"""

import argparse
import importlib.util
import re
import sys

from experiments import runtime
from experiments.benchmark import (
    bilevel_step,
    compiled,
    compilers,
    input_pipeline,
    loss,
    profile,
    train_step,
)
from experiments.config.validation import ConfigError
from ltkd_jax import console

_PRECISIONS = ("float32", "tf32", "bfloat16")
_LOGITS_SOURCES = ("table", "network")
_PYTORCH_METHODS = ("ce", "kd", "ltkd", "bikd")


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


def _some_of(choices, description, default=None):
    """Returns the options of an argument that takes names, by default all of them."""
    return {
        "type": _names(choices),
        "default": list(default or choices),
        "help": f"{description}: {', '.join(choices)}",
    }


def _device_counts(text):
    """Parses numbers of devices, such as 1,8."""
    return [console.at_least(1)(number) for number in text.split(",")]


def _sizes(text):
    """Parses sizes such as 64x100,1024x1000."""
    sizes = []
    for size in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be sizes BATCHxCLASSES with commas between them, such "
                "as 64x100,1024x1000"
            )
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def _pytorch(**options):
    """Returns the comparison with PyTorch, which is an optional dependency."""
    if importlib.util.find_spec("torch") is None:
        sys.exit('error: PyTorch is not installed: pip install -e ".[train,torch]"')
    from experiments.benchmark import pytorch_comparison

    return pytorch_comparison.report(**options)


# Options that several commands have.


def _add_models(parser):
    parser.add_argument("--teacher", default="resnet32x4", help="a model")
    parser.add_argument("--student", default="resnet8x4", help="a model")


def _add_steps(parser, methods):
    _add_models(parser)
    parser.add_argument("--methods", **_some_of(methods, "some of"))
    parser.add_argument(
        "--precisions", **_some_of(_PRECISIONS, "of the networks", ["float32"])
    )
    parser.add_argument(
        "--steps",
        type=console.at_least(1),
        default=3,
        help="steps that are timed together, at least; bikd takes multiples of its k",
    )
    _add_repeats(parser, 3, "rounds, of which the best counts")


def _add_precision(parser):
    parser.add_argument(
        "--precision", choices=_PRECISIONS, default="float32", help="of the networks"
    )


def _add_losses(parser, default, sizes):
    parser.add_argument("--losses", **_some_of(tuple(loss.LOSSES), "some of", default))
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=",".join(f"{rows}x{columns}" for rows, columns in sizes),
        help="[B, C] of the losses' logits",
    )


def _add_repeats(parser, default, description, minimum=1):
    parser.add_argument(
        "--repeats", type=console.at_least(minimum), default=default, help=description
    )


# Commands.


def _add_train(commands):
    parser = _add_command(
        commands,
        "train",
        train_step.report,
        "the training step: rate, FLOPs, time to the first step, memory",
    )
    _add_steps(parser, train_step.METHODS)
    parser.add_argument(
        "--teachers", **_some_of(_LOGITS_SOURCES, "sources of the teacher's logits")
    )


def _add_profile(commands):
    parser = _add_command(
        commands,
        "profile",
        profile.report,
        "where the training step's time goes, by a trace",
    )
    _add_models(parser)
    parser.add_argument(
        "--method", choices=train_step.METHODS, default="ltkd", help="a method"
    )
    parser.add_argument(
        "--teacher_from",
        choices=_LOGITS_SOURCES,
        default="table",
        help="source of the teacher's logits",
    )
    _add_precision(parser)
    parser.add_argument(
        "--steps",
        type=console.at_least(1),
        default=3,
        help="steps that are traced, at least",
    )


def _add_loss(commands):
    parser = _add_command(
        commands,
        "loss",
        loss.report,
        "losses and their gradients, beside a lower bound by their bytes",
    )
    _add_losses(parser, ["kd", "dkd", "ltkd3", "optax_kl"], loss.SIZES)
    parser.add_argument(
        "--precisions",
        **_some_of(("float32", "bfloat16"), "dtypes of the logits", ["float32"]),
    )
    _add_repeats(parser, 5, "timed calls, of which the best counts")


def _add_bilevel(commands):
    parser = _add_command(
        commands,
        "bilevel",
        bilevel_step.report,
        "the bilevel step: FLOPs, memory, time, beside a naive one",
    )
    _add_models(parser)
    parser.add_argument("--method", default="kd", help="whose terms are weighted")
    parser.add_argument(
        "--batch_size", type=console.at_least(1), default=100, help="images"
    )
    parser.add_argument(
        "--num_classes",
        type=console.at_least(3),
        default=100,
        help="at least 3, one a group",
    )
    _add_precision(parser)
    _add_repeats(parser, 3, "timed rounds after a first; 0 times nothing", minimum=0)


def _add_stream(commands):
    parser = _add_command(
        commands, "stream", input_pipeline.report, "images per second of a stream"
    )
    parser.add_argument(
        "--images",
        type=console.at_least(1),
        default=512,
        help="JPEGs that are written and read",
    )
    parser.add_argument(
        "--size", type=console.at_least(8), default=224, help="pixels of a crop's side"
    )
    parser.add_argument(
        "--batch_size", type=console.at_least(1), default=64, help="images"
    )
    parser.add_argument(
        "--batches",
        type=console.at_least(1),
        default=16,
        help="that are timed together",
    )
    _add_repeats(parser, 2, "rounds, of which the best counts")
    parser.add_argument(
        "--num_workers",
        type=console.at_least(0),
        nargs="*",
        default=[0, 2],
        help="0 reads by threads",
    )


def _add_pytorch(commands):
    parser = _add_command(
        commands, "pytorch", _pytorch, "training steps beside PyTorch's"
    )
    _add_steps(parser, _PYTORCH_METHODS)


def _add_compiled(commands):
    parser = _add_command(
        commands,
        "compiled",
        compiled.report,
        "kernels, bytes and memory by the compilers of GPUs and TPUs, without one",
    )
    _add_models(parser)
    parser.add_argument(
        "--target", choices=compilers.TARGETS, default="h100", help="a device"
    )
    parser.add_argument(
        "--devices", type=_device_counts, default=[1], help="numbers, such as 1,8"
    )
    parser.add_argument(
        "--memory_gib",
        type=console.at_least(1),
        help="memory of a device that the programs must fit into, if not the target's",
    )
    parser.add_argument("--programs", **_some_of(compiled.PROGRAMS, "what to compile"))
    parser.add_argument(
        "--methods", **_some_of(train_step.METHODS, "of the steps", ["ltkd", "bikd"])
    )
    parser.add_argument(
        "--teachers", **_some_of(_LOGITS_SOURCES, "sources of the teacher's logits")
    )
    parser.add_argument(
        "--precisions",
        **_some_of(_PRECISIONS, "of the networks and the logits", ["bfloat16"]),
    )
    _add_losses(parser, list(loss.LOSSES), [(4096, 10_000)])


def _add_command(commands, name, report, description):
    """Adds a command, and returns the parser of its options."""
    parser = commands.add_parser(
        name,
        help=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(report=report)
    return parser


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    _add_train(commands)
    _add_profile(commands)
    _add_loss(commands)
    _add_bilevel(commands)
    _add_stream(commands)
    _add_pytorch(commands)
    _add_compiled(commands)
    return parser


def main(argv=None):
    """Runs the command."""
    console.replace_unencodable()
    options = vars(_parser().parse_args(argv))
    report = options.pop("report")
    runtime.initialize()
    try:
        print(report(**options))
    # An unknown model, method or precision.
    except (ValueError, ConfigError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
