"""Compares the steps of KD, LTKD and BiKD, and LTKD's loss, with plain PyTorch.

The images are noise of CIFAR's size. All steps are timed on the same device, in
alternation, and the best time of each is reported.

A step of this library gathers, crops and flips its batch. It reads the teacher's logits
from a table, or computes them. To make the table takes a forward pass of every view;
that time is not included. A step of PyTorch gets a finished batch and computes the
teacher's logits.
"""

import functools

import torch

from experiments import provenance
from experiments.benchmark import loss, pytorch_baseline, timing, train_step
from experiments.reporting import writers

_LOGITS_SOURCES = ("table", "network")


def measure(
    method, precision, *, repeats: int, steps: int, **models: str
) -> tuple[int, dict[str, float]]:
    """Returns the batch size, and the seconds of a step by implementation.

    The implementations are "pytorch" and this library with two sources of the teacher's
    logits: "table" and "network".
    """
    trainings = {}
    for source in _LOGITS_SOURCES:
        case = train_step.Case(method, source, precision)
        trainings[source] = train_step.start(case, **models)
    batch_size = trainings["table"].trainer.recipe.batch_size
    pytorch_step = pytorch_baseline.Step(
        method, **models, batch_size=batch_size, precision=precision
    )
    # Rounded up to complete periods, so that all implementations make the same steps.
    period = max(training.period for training in trainings.values())
    steps = -(-steps // period) * period
    measures = {}
    for source, training in trainings.items():
        measures[source] = functools.partial(training.seconds, steps)
    measures["pytorch"] = functools.partial(timing.seconds, pytorch_step, steps)
    return batch_size, timing.best_of_rounds(measures, repeats)


def report(
    *, methods, precisions, teacher: str, student: str, repeats: int, steps: int
) -> str:
    """Returns the comparison as text."""
    rows = []
    for precision in precisions:
        for method in methods:
            batch_size, seconds = measure(
                method,
                precision,
                repeats=repeats,
                steps=steps,
                teacher=teacher,
                student=student,
            )
            pytorch_seconds = seconds["pytorch"]
            row = [method, precision, f"{batch_size}", f"{1e3 * pytorch_seconds:,.1f}"]
            for source in _LOGITS_SOURCES:
                row.append(f"{1e3 * seconds[source]:,.1f}")
                row.append(f"{pytorch_seconds / seconds[source]:.2f}")
            rows.append(row)
    header = [
        "method",
        "precision",
        "batch",
        "PyTorch, ms",
        "ours, table, ms",
        "PyTorch / ours",
        "ours, teacher in the step, ms",
        "PyTorch / ours",
    ]

    def ltkd_call_of(shape):
        return pytorch_baseline.ltkd_call(*loss.random_logits(shape))

    lines = [
        f"{teacher} → {student}, a step of training",
        writers.as_text(writers.Table(header, rows)),
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{provenance.short()}",
        "",
        loss.report(repeats=repeats, pytorch_call_of=ltkd_call_of),
    ]
    return "\n".join(lines)
