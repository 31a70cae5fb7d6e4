"""A signal handler that is installed for the duration of a block."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def use_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles SIGTERM and SIGINT by `handler` until the block ends.

    The previous handlers are then restored. Outside the main thread, where Python does
    not allow handlers to be set, this does nothing.

    Args:
      handler: a function of (signal number, frame).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
