"""Signal handlers for the time of a block."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles SIGTERM and SIGINT by `handler` until the block ends, then restores the handlers of before.

    Outside the main thread, where Python allows no handler to be set, it does nothing.

    Args:
      handler: a function of (signal number, frame).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
