"""Requests to stop: SIGTERM, SIGINT, or a deadline. The loop asks between two calls, saves, and raises Stopped."""

import contextlib
import signal
import time

from ltkd_jax import signals
from ltkd_jax.training import hosts


class Stopped(Exception):
    """The run was asked to stop, has saved, and resumes by the same command."""


class StopRequest:
    """Whether a run is to stop.

    Args:
      deadline: of `time.monotonic()`, None for none.

    Attributes:
      signal: the number of the signal that asked, None for none.
    """

    def __init__(self, deadline: float | None = None):
        self._deadline = deadline
        self.signal = None

    @property
    def reason(self) -> str | None:
        """Why this process is to stop; None while it is not."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time limit"
        return None

    def reason_of_any(self) -> str | None:
        """Returns the reason of the first process that has one: all stop at the same step."""
        return next(filter(None, hosts.all_gather(self.reason)), None)

    @contextlib.contextmanager
    def listening(self):
        """Catches the signals until the block ends; a second one ends the process at once."""

        def handle(number, _frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        with signals.use_handler(handle):
            yield self
