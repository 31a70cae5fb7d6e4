"""Splits the system tests into parts of about the same duration, `--shard=k/n`."""

import argparse
import collections
import json
import pathlib
import statistics

DURATIONS = pathlib.Path(__file__).with_name(
    "durations.json"
)  # seconds that each file takes
_seconds = collections.Counter()


def _parse_shard(text):
    part, _, num_parts = text.partition("/")
    if not (
        part.isdigit() and num_parts.isdigit() and 1 <= int(part) <= int(num_parts)
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not k/n with k from 1 to n")
    return int(part), int(num_parts)


def pytest_addoption(parser):
    parser.addoption(
        "--shard",
        type=_parse_shard,
        help="k/n: run the k-th of n parts of the system tests",
    )
    parser.addoption(
        "--store-durations",
        action="store_true",
        help=f"write how long each file took to {DURATIONS}",
    )


def pytest_collection_modifyitems(config, items):
    """Keeps the files of one part, the longest first.

    Files stay whole, because the tests of a file share fixtures. Each goes to the part that is the shortest so far.
    """
    if not config.option.shard:
        return
    part, num_parts = config.option.shard
    stored = json.loads(DURATIONS.read_text())
    typical = statistics.median(stored.values())
    files = collections.defaultdict(list)
    for item in items:
        files[item.path].append(item)
    seconds = {path: stored.get(path.name, typical) for path in files}
    totals = [0] * num_parts
    kept = []
    for path in sorted(files, key=seconds.get, reverse=True):
        shortest = totals.index(min(totals))
        totals[shortest] += seconds[path]
        if shortest == part - 1:
            kept += files.pop(path)
    config.hook.pytest_deselected(
        items=[item for tests in files.values() for item in tests]
    )
    items[:] = kept


def pytest_runtest_logreport(report):
    _seconds[pathlib.Path(report.location[0]).name] += report.duration


def pytest_sessionfinish(session):
    is_worker = hasattr(
        session.config, "workerinput"
    )  # of xdist, whose main process hears of all tests
    if session.config.option.store_durations and not is_worker:
        measured = {name: round(seconds) for name, seconds in _seconds.items()}
        stored = json.loads(DURATIONS.read_text()) | measured
        present = {path.name for path in DURATIONS.parent.glob("test_*.py")}
        stored = {name: stored[name] for name in sorted(stored) if name in present}
        DURATIONS.write_text(json.dumps(stored, indent=1) + "\n")
