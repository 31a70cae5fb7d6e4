"""Requests to stop a run: SIGTERM, SIGINT, or a deadline.

The training loop checks for one between two calls of the compiled steps, saves, and
raises `StoppedError`.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from ltkd_jax import signals
from ltkd_jax.training import hosts


class StoppedError(Exception):
    """Reports a run that has saved and stopped; the same command resumes it."""


class StopRequest:
    """Records whether a run should stop.

    Args:
      deadline: by the clock of `time.monotonic()`; None for no deadline.

    Attributes:
      signal: the number of the signal received, None before one is.
    """

    def __init__(self, deadline: float | None = None):
        self._deadline = deadline
        self.signal: int | None = None

    @property
    def reason(self) -> str | None:
        """Returns why this process should stop; None if it should not."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time limit"
        return None

    def any_reason(self) -> str | None:
        """Returns the reason of the first process that has one.

        All processes must call it at the same step, so they all stop there.
        """
        for reason in hosts.all_gather(self.reason):
            if reason is not None:
                return reason
        return None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Records signals until the block ends; a repeated one ends the process."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            # The default action is restored for a user who does not want to wait.
            signal.signal(number, signal.SIG_DFL)

        with signals.use_handler(handle):
            yield self
