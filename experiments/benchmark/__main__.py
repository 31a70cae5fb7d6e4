"""Measures what the project is fast for, as ratios within one run.

    python -m experiments.benchmark train                        # the step: images/s, FLOPs, compilation, memory
    python -m experiments.benchmark train --methods=ltkd,bikd --precisions=float32,tf32,bfloat16
    python -m experiments.benchmark profile --method=ltkd        # where the step's time goes, operation by operation
    python -m experiments.benchmark loss                         # LTKD's loss alone, beside the floor of its bytes
    python -m experiments.benchmark bilevel                      # the bilevel step beside naive differentiation
    python -m experiments.benchmark bilevel --repeats=0          # the compiler's counts alone
    python -m experiments.benchmark stream                       # images per second of a stream, of a plain loop
    python -m experiments.benchmark --against=torch              # KD, LTKD and BiKD beside a plain PyTorch twin

What each of them counts stands in the modules of experiments/benchmark, what it found in docs/performance.md.
"""

import argparse
import dataclasses
import importlib.util
import sys

from experiments import runtime
from experiments.benchmark import bilevel_step, input_pipeline, loss, profile, train_step
from experiments.config import checks

_PAIR = {"teacher": "resnet32x4", "student": "resnet8x4"}
_PRECISIONS = ("float32", "tf32", "bfloat16")


def _listed(choices):
    """A parser of names with commas between them."""

    def parse(text):
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: give some of {', '.join(choices)}, with commas between them")
        return names

    return parse


def _at_least(least):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return value

    return parse


def _pair_options(parser):
    for name, default in _PAIR.items():
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}")


def _steps_options(parser, methods):
    _pair_options(parser)
    parser.add_argument("--methods", type=_listed(methods), default=list(methods), help=", ".join(methods))
    parser.add_argument("--precisions", type=_listed(_PRECISIONS), default=["float32"], help=", ".join(_PRECISIONS))
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        default=3,
        help="that are timed together, at least; default: 3; bikd takes multiples of its k",
    )
    parser.add_argument("--repeats", type=_at_least(1), default=3, help="rounds, of which the best counts; default: 3")


def _parser():
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    what = parser.add_subparsers(dest="what", required=True)

    step = what.add_parser("train", help="the training step: rate, FLOPs, time to the first step, memory")
    _steps_options(step, train_step.METHODS)
    step.add_argument("--teachers", type=_listed(("table", "network")), default=["table", "network"],
                      help="where the teacher's logits come from: its table, its network, or both")  # fmt: skip

    traced = what.add_parser("profile", help="where the training step's time goes, by a trace")
    _pair_options(traced)
    traced.add_argument("--method", choices=train_step.METHODS, default="ltkd", help="default: ltkd")
    traced.add_argument("--teacher_from", choices=["table", "network"], default="table", help="default: table")
    traced.add_argument("--precision", choices=_PRECISIONS, default="float32", help="default: float32")
    traced.add_argument("--steps", type=_at_least(1), default=3, help="that are traced, at least; default: 3")

    twin = what.add_parser("torch", help="KD, LTKD and BiKD beside a plain PyTorch twin; also as --against=torch")
    _steps_options(twin, ("kd", "ltkd", "bikd"))

    alone = what.add_parser("loss", help="LTKD's loss and its gradient, beside the floor of its bytes")
    alone.add_argument("--repeats", type=_at_least(1), default=5, help="default: 5")

    pair = what.add_parser("bilevel", help="the bilevel step: FLOPs, memory and time beside naive differentiation")
    least = {"batch_size": 1, "num_classes": 3}
    for field in dataclasses.fields(bilevel_step.Pair):
        kind = _at_least(least[field.name]) if field.name in least else field.type
        pair.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"default: {field.default}")
    pair.add_argument("--repeats", type=_at_least(0), default=3, help="timed rounds after a first; 0 times nothing")

    reading = what.add_parser("stream", help="images per second of a stream")
    for name, default, at_least in (("images", 512, 1), ("size", 224, 8), ("batch_size", 64, 1), ("batches", 16, 1),
                                    ("repeats", 2, 1)):  # fmt: skip
        reading.add_argument(f"--{name}", type=_at_least(at_least), default=default, help=f"default: {default}")
    reading.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="0 reads by threads (default: 0 2)")
    return parser


def _bilevel(*, repeats, **pair):
    return bilevel_step.report(bilevel_step.Pair(**pair), repeats)


def _against_torch(**options):
    if importlib.util.find_spec("torch") is None:
        sys.exit('error: there is no PyTorch here: pip install -e ".[train,torch]"')
    from experiments.benchmark import pytorch_comparison

    return pytorch_comparison.report(**options)


def main(argv=None):
    words = ["torch" if word == "--against=torch" else word for word in (sys.argv[1:] if argv is None else argv)]
    options = vars(_parser().parse_args(words))
    reports = {
        "train": train_step.report,
        "profile": profile.report,
        "torch": _against_torch,
        "loss": loss.report,
        "bilevel": _bilevel,
    }
    report = {**reports, "stream": input_pipeline.report}[options.pop("what")]
    runtime.initialize()
    try:
        print(report(**options))
    except (ValueError, checks.ConfigError) as error:  # an unknown model, method or precision
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
