"""Splits the system tests into n shards of about the same duration: `--shard=k/n`."""

import argparse
import collections
import json
import pathlib
import statistics

# The stored durations: file name → seconds.
DURATIONS = pathlib.Path(__file__).with_name("durations.json")
_measured_seconds = collections.Counter()


def _parse_shard(text):
    """Returns k and n of the text "k/n"."""
    shard, _, num_shards = text.partition("/")
    are_numbers = shard.isdigit() and num_shards.isdigit()
    if not are_numbers or not 1 <= int(shard) <= int(num_shards):
        raise argparse.ArgumentTypeError(f"{text!r} is not k/n with k from 1 to n")
    return int(shard), int(num_shards)


def pytest_addoption(parser):
    """Adds `--shard`, `--store-durations` and `--store-budgets`."""
    parser.addoption(
        "--shard",
        type=_parse_shard,
        help="k/n: run the k-th of n shards of the system tests",
    )
    parser.addoption(
        "--store-durations",
        action="store_true",
        help=f"write how long each file took to {DURATIONS}",
    )
    parser.addoption(
        "--store-budgets",
        action="store_true",
        help="write the budgets of test_compiled.py in place of checking them",
    )


def pytest_collection_modifyitems(config, items):
    """Keeps the files of one shard, the longest first.

    A file is never split, because its tests share fixtures. Each file is added to the
    shard that is the shortest so far.
    """
    if not config.option.shard:
        return
    shard, num_shards = config.option.shard
    stored = json.loads(DURATIONS.read_text())
    # A file that has not been measured yet counts as a typical one.
    typical = statistics.median(stored.values())
    deselected = collections.defaultdict(list)
    for item in items:
        deselected[item.path].append(item)
    seconds = {path: stored.get(path.name, typical) for path in deselected}
    totals = [0] * num_shards
    selected = []
    for path in sorted(seconds, key=seconds.get, reverse=True):
        shortest = totals.index(min(totals))
        totals[shortest] += seconds[path]
        if shortest == shard - 1:
            selected += deselected.pop(path)
    for tests in deselected.values():
        config.hook.pytest_deselected(items=tests)
    # pytest reads the list that it passed in.
    items[:] = selected


def pytest_runtest_logreport(report):
    """Adds the duration of a test, of its setup or of its teardown to its file's."""
    _measured_seconds[pathlib.Path(report.location[0]).name] += report.duration


def pytest_sessionfinish(session):
    """Writes the durations if `--store-durations` is set."""
    # Under xdist, the main process receives the reports of all tests. A worker has only
    # some of them, and must not write.
    is_worker = hasattr(session.config, "workerinput")
    if not session.config.option.store_durations or is_worker:
        return
    measured = {name: round(seconds) for name, seconds in _measured_seconds.items()}
    durations = json.loads(DURATIONS.read_text()) | measured
    existing = {path.name for path in DURATIONS.parent.glob("test_*.py")}
    durations = {
        name: durations[name] for name in sorted(durations) if name in existing
    }
    DURATIONS.write_text(json.dumps(durations, indent=1) + "\n")
