"""`metrics.jsonl`: one JSON line for each epoch of a run.

Each line is written once, however often the run is interrupted.
"""

import json
import logging
import pathlib
from collections.abc import Callable

from ltkd_jax import files

_log = logging.getLogger(__name__)


class MetricsLog:
    """Writes the log of one run.

    Args:
      path: of the file.
      on_record: called with each record that is written.
    """

    def __init__(
        self, path: pathlib.Path, on_record: Callable[[dict], None] = lambda _: None
    ):
        self._path = path
        self._on_record = on_record

    def truncate(self, step: int, epochs: int) -> None:
        """Drops the records after a step, and lines that are incomplete or no record.

        It logs a warning if records before that step are missing: the results do not
        depend on them.

        Args:
          step: of the checkpoint that the run resumes from.
          epochs: the number of epochs until that step.
        """
        text = ""
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines(keepends=True)
        lines = [line for line in lines if _step_of(line) <= step]
        if len(lines) < epochs:
            _log.warning(
                "%s has %d of the %d epochs until step %d",
                self._path,
                len(lines),
                epochs,
                step,
            )
        files.write_text(self._path, "".join(lines))

    def write(self, record: dict) -> None:
        """Appends a record."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._on_record(record)


def _step_of(line: str) -> float:
    """Returns the step of a line, infinity if it is incomplete or no record."""
    try:
        # A process killed while writing leaves a line without its end.
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        step = None
    return step if isinstance(step, int) else float("inf")
