"""Where a training step's time goes, by the device's own trace: each operation under the primitive it comes from."""

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax

from experiments import provenance
from experiments.benchmark import train_step
from experiments.reporting import writers

_SHOWN = 12


def sources(hlo: str) -> dict[str, str]:
    """Returns the JAX primitive behind each instruction of a compiled program, and whether in the backward pass.

    A fusion without a name gets that of what it computes last, which may have no more than the compiler's name.
    """
    labels, root_labels, unnamed = {}, {}, {}
    computation = ""
    for line in hlo.splitlines():
        if start := re.match(r"\s*(?:ENTRY )?%(\S+) \(.*\{$", line):
            computation = start[1]
        instruction = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        path = re.search(r'op_name="([^"]*)"', line)
        calls = re.search(r"calls=%([^\s,]+)", line)
        if instruction and path:
            label = path[1].split("/")[-1] + (
                ", backward" if "transpose(" in path[1] else ""
            )
            labels[instruction[1]] = root_labels[computation] = label
        elif instruction:
            root_labels[computation] = _unnumbered(instruction[1])
            unnamed |= {instruction[1]: calls[1]} if calls else {}
    return labels | {name: root_labels[called] for name, called in unnamed.items()}


def _unnumbered(name):
    return re.sub(r"[._]\d+$", "", name)


def operations(trace: dict, labels: dict[str, str]) -> collections.Counter:
    """Returns the microseconds by label in a trace of Chrome's form; without a label, by the compiler's name."""
    spent = collections.Counter()
    for event in trace["traceEvents"]:
        operation = (
            event.get("args", {}).get("hlo_op") if event.get("ph") == "X" else None
        )
        if operation:
            spent[labels.get(operation, _unnumbered(operation))] += event["dur"]
    return spent


def table(spent: collections.Counter) -> writers.Table:
    """Returns the operations that take most, and the rest as one."""
    total = sum(spent.values())
    shown = spent.most_common(_SHOWN)
    shown.append(("the rest", total - sum(micros for _, micros in shown)))
    rows = [
        [name, f"{micros / 1e3:,.2f}", f"{100 * micros / total:.1f} %"]
        for name, micros in shown
    ]
    return writers.Table(["operation", "ms", "share"], rows)


def report(
    *,
    method: str,
    teacher_from: str,
    precision: str,
    teacher: str,
    student: str,
    steps: int,
) -> str:
    """Returns the trace of so many steps as text."""
    case = train_step.Case(
        method, "none" if method == "ce" else teacher_from, precision
    )
    running = train_step.start(case, teacher=teacher, student=student)
    running.seconds(steps)  # warm
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            seconds = running.seconds(steps)
        (path,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        spent = operations(
            json.loads(gzip.decompress(path.read_bytes())), sources(running.hlo())
        )
    lines = [
        f"{teacher} → {student}, {method}, {1e3 * seconds:.1f} ms a step while traced; all that was traced:"
    ]
    return "\n".join(
        [
            *lines,
            writers.as_text(table(spent)),
            f"{provenance.short()}, precision {precision}",
        ]
    )
