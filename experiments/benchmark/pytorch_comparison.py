"""The steps of KD, LTKD and BiKD, and LTKD's loss, beside a plain PyTorch twin on the same device.

Both trainings are of noise of CIFAR's size, in turns; of each the best of the repeats counts. Ours fetches, crops and
flips its batch, and looks the teacher's logits up in its table or, as the twin does, computes them in the step. The
table's own making, one forward of every view, is not in it. The twin's images are ready.
"""

import functools

import torch

from experiments import provenance
from experiments.benchmark import loss, pytorch_baseline, timing, train_step
from experiments.reporting import writers


def measure(
    method, precision, *, repeats: int, steps: int, **models: str
) -> dict[str, float]:
    """Returns the batch size, and the seconds of a step with the table, with the teacher's network, and of the twin."""
    sources = ("table", "network")
    ours = {
        source: train_step.start(train_step.Case(method, source, precision), **models)
        for source in sources
    }
    batch_size = ours["table"].trainer.recipe.batch_size
    twin = pytorch_baseline.Step(
        method, **models, batch_size=batch_size, precision=precision
    )
    period = max(running.period for running in ours.values())
    steps = -(-steps // period) * period  # as many of the twin's as of ours
    measures = {
        source: functools.partial(running.seconds, steps)
        for source, running in ours.items()
    }
    measures["twin"] = functools.partial(timing.seconds, twin, steps)
    return {"batch": batch_size, **timing.best_of_rounds(measures, repeats)}


def report(
    *, methods, precisions, teacher: str, student: str, repeats: int, steps: int
) -> str:
    """Returns the whole comparison as text."""
    rows = []
    for precision in precisions:
        for method in methods:
            options = dict(
                repeats=repeats, steps=steps, teacher=teacher, student=student
            )
            seconds = measure(method, precision, **options)
            row = [
                method,
                precision,
                f"{seconds['batch']}",
                f"{1e3 * seconds['twin']:,.1f}",
            ]
            for source in ("table", "network"):
                row += [
                    f"{1e3 * seconds[source]:,.1f}",
                    f"{seconds['twin'] / seconds[source]:.2f}",
                ]
            rows.append(row)
    header = [
        "method",
        "precision",
        "batch",
        "PyTorch, ms",
        "ours, table, ms",
        "PyTorch / ours",
    ]
    header += ["ours, teacher in the step, ms", "PyTorch / ours"]
    lines = [
        f"{teacher} → {student}, a step of training",
        writers.as_text(writers.Table(header, rows)),
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; {provenance.short()}",
        "",
        loss.report(
            repeats=repeats,
            twin=lambda size: pytorch_baseline.ltkd_alone(*loss.logits(size)),
        ),
    ]
    return "\n".join(lines)
