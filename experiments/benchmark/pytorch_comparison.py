"""The steps of KD, LTKD and BiKD, and LTKD's loss, beside a plain PyTorch twin on the same device.

Both trainings are of noise of CIFAR's size, interleaved; of each the best of the repeats. Ours fetches, crops and flips
its batch, and looks the teacher up in its table or, where that is said, runs it in the step as the twin does; the
table's own making, one forward of every view, is not in it. The twin's images are ready.
"""

import time

from experiments import provenance
from experiments.benchmark import loss, pytorch_baseline, train_step
from experiments.reporting import writers

METHODS = ("kd", "ltkd", "bikd")


def _twins_seconds(step, steps):
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def measure(method, precision, models, *, repeats: int, steps: int) -> dict[str, float]:
    """Seconds of a step, with the table, with the teacher's network, and of the twin."""
    ours = {
        kind: train_step.start(train_step.Case(method, kind, precision), tuple(models.items()))
        for kind in ("table", "network")
    }
    batch_size = ours["table"].program.recipe.batch_size
    twin = pytorch_baseline.Step(method, **models, batch_size=batch_size, precision=precision)
    rounds, period = [], max(running.period for running in ours.values())
    steps = -(-steps // period) * period  # as many of the twin's as of ours
    for _ in range(repeats + 1):
        found = {kind: running.seconds(steps) for kind, running in ours.items()}
        rounds.append(found | {"twin": _twins_seconds(twin, steps)})
    return {"batch": batch_size} | {key: min(found[key] for found in rounds[1:]) for key in rounds[0]}


def table(measured: dict) -> writers.Table:
    """Rows of `{(method, precision): measure(…)}`."""
    rows = []
    for (method, precision), found in measured.items():
        twin = found["twin"]
        row = [method, precision, f"{found['batch']}", f"{1e3 * twin:,.1f}"]
        for kind in ("table", "network"):
            row += [f"{1e3 * found[kind]:,.1f}", f"{twin / found[kind]:.2f}"]
        rows.append(row)
    names = ["method", "precision", "batch", "PyTorch, ms", "ours, table, ms", "PyTorch / ours"]
    return writers.Table([*names, "ours, teacher in the step, ms", "PyTorch / ours"], rows)


def report(*, methods, precisions, teacher: str, student: str, repeats: int, steps: int) -> str:
    """The whole comparison as text."""
    models = {"teacher": teacher, "student": student}
    measured = {
        (method, precision): measure(method, precision, models, repeats=repeats, steps=steps)
        for precision in precisions
        for method in methods
    }
    alone = loss.report(repeats, lambda size: pytorch_baseline.ltkd_alone(*loss.logits(size)))
    torch = pytorch_baseline.torch
    lines = [
        f"{teacher} → {student}, a step of training",
        writers.as_text(table(measured)),
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; {provenance.short()}",
    ]
    return "\n".join([*lines, "", alone])
