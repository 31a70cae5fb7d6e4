"""`metrics.jsonl`: a JSON line for each epoch, each written once however often a run is interrupted."""

import json
import logging
import pathlib
from collections.abc import Callable

from ltkd_jax import files

_log = logging.getLogger(__name__)


class MetricsLog:
    """The log of one run.

    Args:
      path: of the file.
      on_record: called with each record as it is written.
    """

    def __init__(
        self, path: pathlib.Path, on_record: Callable[[dict], None] = lambda _: None
    ):
        self._path = path
        self._on_record = on_record

    def truncate(self, step: int, epochs: int) -> None:
        """Drops records after the checkpoint that a run resumes from, and lines that are torn or no record.

        It warns of missing epochs until that step; the results do not need them.
        """
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        kept = [
            line for line in text.splitlines(keepends=True) if _step_of(line) <= step
        ]
        if len(kept) < epochs:
            _log.warning(
                "%s has %d of the %d epochs until step %d",
                self._path,
                len(kept),
                epochs,
                step,
            )
        files.write_text(self._path, "".join(kept))

    def write(self, record: dict) -> None:
        """Appends a record."""
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self._on_record(record)


def _step_of(line):
    """Returns the step of a line; infinity for one that is torn or no record."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        step = None
    return step if isinstance(step, int) else float("inf")
