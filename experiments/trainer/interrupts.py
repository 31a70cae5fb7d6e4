"""Requests to stop a run: SIGTERM, SIGINT, or a deadline.

The training loop checks for one between two calls of the compiled steps, saves, and
raises `StoppedError`. Waiting for another run's lock ends in the same way.
"""

import contextlib
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from ltkd_jax import files, signals
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


@contextlib.contextmanager
def wait_for_lock(
    path: pathlib.Path, stop: StopRequest, description: str
) -> Iterator[None]:
    """Holds a lock, which another run may hold until it has finished a training.

    Raises:
      StoppedError: the run was asked to stop while it was waiting.
    """
    with contextlib.ExitStack() as stack:
        waiting = False
        while True:
            try:
                stack.enter_context(files.lock(path))
                break
            except BlockingIOError:
                if not waiting:
                    print(
                        f"waiting for {description}, which another run is making "
                        f"({path})",
                        file=sys.stderr,
                    )
                    waiting = True
            # Polling, since a blocking lock would not notice the time limit.
            if stop.reason:
                raise StoppedError(
                    f"stopped by {stop.reason} while waiting for {description} of "
                    "another run"
                )
            time.sleep(0.5)
        yield
