"""Where a training step's time goes, by the device's own trace: operations by their share.

python -m experiments.benchmark profile --method=ltkd --precision=bfloat16
"""

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax

from experiments import provenance, tables
from experiments.benchmarks import train

_SHOWN = 20


def operations(trace: dict) -> collections.Counter:
    """Microseconds of each operation in a trace of Chrome's form, instances that differ in a number added up.

    Of a trace with devices, what ran on them; else what XLA ran on the host.
    """
    events = trace["traceEvents"]
    process = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    thread = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    on_device = [pid for pid, name in process.items() if name.startswith("/device:")]
    spent = collections.Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        where = thread.get((event["pid"], event["tid"]), "")
        if (event["pid"] in on_device and "XLA" not in where) if on_device else "XLA" in where or "Eigen" in where:
            spent[re.sub(r"[._]\d+$", "", event["name"])] += event["dur"]
    return spent


def table(spent: collections.Counter) -> tables.Table:
    """The operations that take most, and the rest as one."""
    total, shown = sum(spent.values()), spent.most_common(_SHOWN)
    rest = total - sum(micros for _, micros in shown)
    rows = [[name[:80], f"{micros / 1e3:,.2f}", f"{100 * micros / total:.1f} %"] for name, micros in shown]
    return tables.Table(
        ["operation", "ms", "share"], rows + [["the rest", f"{rest / 1e3:,.2f}", f"{100 * rest / total:.1f} %"]]
    )


def report(*, method: str, teacher_from: str, precision: str, teacher: str, student: str, steps: int) -> str:
    """The trace of so many steps, as text."""
    case = train.Case(method, "none" if method == "ce" else teacher_from, precision)
    running = train.start(case, (("teacher", teacher), ("student", student)))
    running.seconds(steps)  # warm
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            seconds = running.seconds(steps)
        (path,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        spent = operations(json.loads(gzip.decompress(path.read_bytes())))
    lines = [
        f"{teacher} → {student}, {method}, {1e3 * seconds:.2f} ms a step while traced",
        tables.as_text(table(spent)),
    ]
    return "\n".join([*lines, f"{provenance.short()}, precision {precision}"])
