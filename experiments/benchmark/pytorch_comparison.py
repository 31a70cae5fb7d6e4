"""Compares training steps, and LTKD's loss, with PyTorch.

The images are noise of CIFAR's size. All steps are timed on the same device, in
alternation, and the best time of each is reported. The column "/ first" has its ratio
to the time of the method's first row.

A step of this library gathers, crops and flips its batch. It reads the teacher's logits
from a table, or computes them. To make the table takes a forward pass of every view;
that time is not included. A step of PyTorch gets a finished batch and computes the
teacher's logits; see `pytorch_baseline` for its two forms.
"""

import functools

import torch

from experiments import provenance
from experiments.benchmark import loss, pytorch_baseline, timing, train_step
from experiments.reporting import writers

# The rows of this library, by the source of the teacher's logits.
_OURS = {
    "none": "ours",
    "table": "ours, teacher's table",
    "network": "ours, teacher in the step",
}
# PyTorch's rows: whether the step is tuned.
_PYTORCH = {"PyTorch": False, "PyTorch, channels last, compiled": True}


def measure(
    method, precision, *, repeats: int, steps: int, **models: str
) -> tuple[int, dict[str, float]]:
    """Returns the batch size, and the seconds of a step by implementation.

    This library's come first, with the teacher's table before the teacher in the step.
    """
    trainings = {}
    for case in train_step.cases([method], ["table", "network"], [precision]):
        trainings[_OURS[case.teacher]] = train_step.start(case, **models)
    first_training = next(iter(trainings.values()))
    batch_size = first_training.trainer.recipe.batch_size
    # Rounded up to complete periods, so that all implementations make the same steps.
    period = max(training.period for training in trainings.values())
    steps = -(-steps // period) * period
    measures = {}
    for name, training in trainings.items():
        measures[name] = functools.partial(training.seconds, steps)
    for name, tuned in _PYTORCH.items():
        step = pytorch_baseline.Step(
            method, **models, batch_size=batch_size, precision=precision, tuned=tuned
        )
        measures[name] = functools.partial(step.seconds, steps)
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
            first_seconds = next(iter(seconds.values()))
            for name, step_seconds in seconds.items():
                row = [
                    method,
                    precision,
                    f"{batch_size}",
                    name,
                    f"{1e3 * step_seconds:,.2f}",
                    f"{step_seconds / first_seconds:.2f}",
                ]
                rows.append(row)
    header = ["method", "precision", "batch", "implementation", "ms", "/ first"]
    table = writers.Table(header, rows, num_text_columns=4)

    def ltkd_call_of(size):
        return pytorch_baseline.ltkd_call(*loss.random_logits(size))

    lines = [
        f"{teacher} → {student}, a step of training",
        writers.as_text(table),
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{provenance.short()}",
        "",
        loss.report(
            losses=["ltkd3"],
            sizes=loss.SIZES,
            precisions=["float32"],
            repeats=repeats,
            others={"ltkd3, PyTorch": ltkd_call_of},
        ),
    ]
    return "\n".join(lines)
