"""Reports where the time of a training step goes, from a trace of the device.

Each operation is counted under the JAX primitive that it comes from.
"""

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

# How many operations have a row; the others share one.
_NUM_LISTED = 12


def primitives(hlo: str) -> dict[str, str]:
    """Returns the JAX primitive of each instruction of a compiled program.

    For an instruction of the backward pass, ", backward" is appended. A fusion without
    a primitive of its own gets that of the last instruction that it fuses or, if this
    has none either, the compiler's name of that instruction.
    """
    labels = {}
    # By computation: the label of its last instruction, which is its root.
    root_labels = {}
    # By fusion without a primitive: the computation that it calls.
    calls = {}
    computation = ""
    for line in hlo.splitlines():
        start = re.match(r"\s*(?:ENTRY )?%(\S+) \(.*\{$", line)
        if start:
            computation = start[1]
        instruction = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        if not instruction:
            continue
        name = instruction[1]
        path = re.search(r'op_name="([^"]*)"', line)
        if path:
            # Such as "jit(f)/transpose(jvp(Net))/conv".
            label = path[1].split("/")[-1]
            if "transpose(" in path[1]:
                label += ", backward"
            labels[name] = label
            root_labels[computation] = label
        else:
            root_labels[computation] = _without_number(name)
            called = re.search(r"calls=%([^\s,]+)", line)
            if called:
                calls[name] = called[1]
    for name, called_computation in calls.items():
        labels[name] = root_labels[called_computation]
    return labels


def _without_number(name):
    return re.sub(r"[._]\d+$", "", name)


def time_by_operation(trace: dict, labels: dict[str, str]) -> collections.Counter:
    """Returns {operation: microseconds} of a trace.

    Args:
      trace: in the format of Chrome's trace viewer.
      labels: what `primitives` returns; an instruction that is not in it has the
        compiler's name.
    """
    micros = collections.Counter()
    for event in trace["traceEvents"]:
        # Complete events ("X") have a duration.
        if event.get("ph") != "X":
            continue
        instruction = event.get("args", {}).get("hlo_op")
        if instruction:
            label = labels.get(instruction, _without_number(instruction))
            micros[label] += event["dur"]
    return micros


def table(micros: collections.Counter) -> writers.Table:
    """Returns the operations that take most time, and the others as one row."""
    total = sum(micros.values())
    listed = micros.most_common(_NUM_LISTED)
    listed_total = sum(time for _, time in listed)
    listed.append(("the rest", total - listed_total))
    rows = []
    for name, time in listed:
        rows.append([name, f"{time / 1e3:,.2f}", f"{100 * time / total:.1f} %"])
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
    """Returns the times of at least `steps` traced steps as text."""
    logits_source = "none" if method == "ce" else teacher_from
    case = train_step.Case(method, logits_source, precision)
    training = train_step.start(case, teacher=teacher, student=student)
    # Warms up, so that the trace does not contain the first allocation of memory.
    training.seconds(steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            seconds = training.seconds(steps)
        (path,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    micros = time_by_operation(trace, primitives(training.hlo()))
    lines = [
        f"{teacher} → {student}, {method}, {1e3 * seconds:.1f} ms a step while traced; "
        "all that was traced:",
        writers.as_text(table(micros)),
        f"{provenance.short()}, precision {precision}",
    ]
    return "\n".join(lines)
