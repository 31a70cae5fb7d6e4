"""Several processes as one: what is done once, and what all must agree on.

All of it goes through the coordination service that `jax.distributed` starts, where a process may wait for hours;
a collective over devices would give up in seconds. In a program of one process every function is a plain call.
"""

import collections
import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

_T = TypeVar("_T")

# One process may wait for days for what another makes. One that died ends all of them much sooner, by its heartbeat.
_WAIT_MS = 7 * 24 * 3600 * 1000
_calls = itertools.count()
_forgotten: collections.deque[str] = collections.deque()


def start(where: str) -> None:
    """Makes this process one of several, before anything else of jax is used.

    Args:
      where: "auto", on what jax recognises (a TPU pod, Slurm, Open MPI, Kubernetes), or
        "HOST:PORT,INDEX,COUNT": the address of the first process, the number of this one, how many there are.

    Raises:
      ValueError: neither of both, or no cluster is recognised.
      RuntimeError: jax has computed something already. Where the others do not come, jax ends the process after five
        minutes, with a message of its own.
    """
    if where == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"distributed='auto': jax recognises no cluster here ({error}): give HOST:PORT,INDEX,COUNT"
            ) from error
    else:
        try:
            address, *numbers = where.split(",")
            index, count = map(int, numbers)
            known = ":" in address and 0 <= index < count
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"distributed={where!r} must be auto, or HOST:PORT,INDEX,COUNT with INDEX below COUNT"
            )
        jax.distributed.initialize(
            address, count, index, cluster_detection_method="deactivate"
        )
    jax.devices()  # a meeting of all: one that came later would make the others give up


def is_primary() -> bool:
    """Whether this process is the one that writes."""
    return _state().process_id == 0


def run_on_primary(fn: Callable[[], _T]) -> _T:
    """Runs `fn` on process 0 and returns its result, or raises its exception, in every process.

    Large arrays of the result travel over the devices.

    >>> run_on_primary(lambda: 3)
    3
    """
    client = _state().client
    if client is None:
        return fn()
    key = f"ltkd_jax/primary/{next(_calls)}"
    result: Any = None
    error: Exception | None = None
    buffers: list[Any] = []
    if is_primary():
        result, error = _attempt(fn)
        content = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        buffers = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        sizes = [buffer.size for buffer in buffers]
        client.key_value_set_bytes(
            key, pickle.dumps((content, sizes, error and _portable(error)))
        )
    content, sizes, told = pickle.loads(
        client.blocking_key_value_get_bytes(key, _WAIT_MS)
    )
    client.wait_at_barrier(key, _WAIT_MS)  # all have read it
    if is_primary():
        client.key_value_delete(key)
    if told:
        raise error or told
    if sizes:  # in one piece, since every size is compiled for
        joined = (
            np.concatenate(buffers) if is_primary() else np.zeros(sum(sizes), np.uint8)
        )
        joined = _broadcast(joined)
        buffers = [part.copy() for part in np.split(joined, np.cumsum(sizes)[:-1])]
    return result if is_primary() else pickle.loads(content, buffers=buffers)


def run_on_all(fn: Callable[[], _T]) -> _T:
    """Runs `fn` in every process and returns its own result; an exception of one is raised in all of them.

    >>> run_on_all(lambda: 3)
    3
    """
    result, error = _attempt(fn)
    if error is not None:
        all_gather(_portable(error))
        raise error
    for index, told in enumerate(all_gather(None)):
        if told is not None:
            raise told.with_traceback(None) from RuntimeError(f"in process {index}")
    return result


def all_gather(value: _T) -> list[_T]:
    """Returns the values of all processes, in their order; all of them must call it.

    >>> all_gather("here")
    ['here']
    """
    client = _state().client
    if client is None:
        return [value]
    key = f"ltkd_jax/gather/{next(_calls)}"
    mine = f"{key}/{_state().process_id:06d}"
    client.key_value_set_bytes(mine, pickle.dumps(value))
    client.wait_at_barrier(key, _WAIT_MS)
    _forgotten.append(mine)
    if len(_forgotten) > 1:
        client.key_value_delete(
            _forgotten.popleft()
        )  # of the last call, which all have left
    return [
        pickle.loads(content)
        for _, content in sorted(client.key_value_dir_get_bytes(key))
    ]


def _attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return fn(), None
    except Exception as error:
        return None, error


def _portable(error: Exception) -> Exception:
    """The error, or its words where it does not travel."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _broadcast(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _state() -> Any:
    """This process among the others, if there are any: its `client` is None where there are none.

    jax has no public name for the client; and `jax.process_index` would start the devices, of which there may be none.
    """
    from jax._src import distributed

    return distributed.global_state
