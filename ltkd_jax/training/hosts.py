"""Makes several processes act as one: they share results, decisions and errors.

All processes must call `run_on_primary`, `run_on_all` and `all_gather` in the same
order. These exchange values through the coordination service that `jax.distributed`
starts, where a process may wait for hours; a collective over devices would time out
within seconds. In a program of one process, each of them is a plain call.
"""

import collections
import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

_T = TypeVar("_T")

# A process may wait for days, such as for a teacher that another one trains. If a
# process dies, its missing heartbeat ends all others much sooner.
_WAIT_MS = 7 * 24 * 3600 * 1000

# The number of a call is part of its key in the service. All processes make the same
# calls in the same order, so their numbers agree.
_call_numbers = itertools.count()

# Keys that this process has set in `all_gather` and not deleted yet.
_gather_keys: collections.deque[str] = collections.deque()


def start(distributed: str) -> None:
    """Makes this process one of several; it must come before any other use of JAX.

    Args:
      distributed: "auto" in a cluster that JAX recognises (a TPU pod, Slurm, Open MPI,
        Kubernetes); else "HOST:PORT,INDEX,COUNT" with the address of the first process,
        the index of this one and the number of processes.

    Raises:
      ValueError: `distributed` is neither, or JAX recognises no cluster.
      RuntimeError: JAX has computed something already. If the other processes do not
        connect, JAX ends the process after five minutes with its own message.
    """
    if distributed == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"distributed='auto': JAX recognises no cluster ({error}): give "
                "HOST:PORT,INDEX,COUNT instead"
            ) from error
    else:
        address, index, count = _parse_address(distributed)
        jax.distributed.initialize(
            address, count, index, cluster_detection_method="deactivate"
        )
    # Starting the devices makes all processes wait for each other, with a time limit.
    # Done here, it cannot expire because one of them has first loaded its data.
    jax.devices()


def _parse_address(distributed: str) -> tuple[str, int, int]:
    """Returns address, index and number of processes from "HOST:PORT,INDEX,COUNT"."""
    try:
        address, index_text, count_text = distributed.split(",")
        index = int(index_text)
        count = int(count_text)
        is_valid = ":" in address and 0 <= index < count
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"distributed={distributed!r} must be auto, or HOST:PORT,INDEX,COUNT with "
            "INDEX below COUNT"
        )
    return address, index, count


def is_primary() -> bool:
    """Returns whether this is process 0, the only one that writes files."""
    return _distributed_state().process_id == 0


def run_on_primary(fn: Callable[[], _T]) -> _T:
    """Runs `fn` on process 0 only, and returns its result in every process.

    All processes must call it; they wait until `fn` has returned. If it raises, every
    process raises its exception.

    Args:
      fn: called without arguments. Its result must be picklable; arrays in it are sent
        over the devices.

    >>> run_on_primary(lambda: 3)
    3
    """
    client = _distributed_state().client
    if client is None:
        return fn()
    key = f"ltkd_jax/primary/{next(_call_numbers)}"
    result: Any = None
    error: Exception | None = None
    buffers: list[np.ndarray] = []
    if is_primary():
        result, error = _capture(fn)
        # A result that cannot be sent is an error in every process: the others wait.
        pickled, pickle_error = _capture(lambda: _pickle(result))
        content, buffers = pickled or (b"", [])
        error = error or pickle_error
        sizes = [buffer.size for buffer in buffers]
        sent_error = None if error is None else _picklable(error)
        client.key_value_set_bytes(key, pickle.dumps((content, sizes, sent_error)))
    message = client.blocking_key_value_get_bytes(key, _WAIT_MS)
    content, sizes, received_error = pickle.loads(message)
    # Once all processes have read the message, it can be deleted.
    client.wait_at_barrier(key, _WAIT_MS)
    if is_primary():
        client.key_value_delete(key)
    if received_error is not None:
        # Process 0 raises the original exception, the others the received copy.
        raise error or received_error
    if sizes:
        # Arrays are too large for the service, so the devices send them. They are sent
        # as one array, since a transfer is compiled for each shape.
        if is_primary():
            joined = np.concatenate(buffers)
        else:
            joined = np.zeros(sum(sizes), np.uint8)
        joined = _broadcast(joined)
        # Copied, since arrays from JAX are read-only.
        buffers = [buffer.copy() for buffer in np.split(joined, np.cumsum(sizes)[:-1])]
    return result if is_primary() else pickle.loads(content, buffers=buffers)


def run_on_all(fn: Callable[[], _T]) -> _T:
    """Runs `fn` in every process, and returns the process's own result.

    All processes must call it; they wait for each other. If `fn` raises in some of
    them, every process raises: its own exception if it has one, else that of the first
    process that failed. Otherwise a process would wait forever for one that has failed.

    Args:
      fn: called without arguments.

    >>> run_on_all(lambda: 3)
    3
    """
    result, error = _capture(fn)
    if error is not None:
        all_gather(_picklable(error))
        raise error
    for index, other_error in enumerate(all_gather(None)):
        if other_error is not None:
            cause = RuntimeError(f"in process {index}")
            raise other_error.with_traceback(None) from cause
    return result


def all_gather(value: _T) -> list[_T]:
    """Returns the values of all processes, in the order of their indices.

    All processes must call it; they wait for each other.

    Args:
      value: this process's value; small and picklable.

    >>> all_gather("a")
    ['a']
    """
    client = _distributed_state().client
    if client is None:
        return [value]
    folder = f"ltkd_jax/gather/{next(_call_numbers)}"
    # Padded with zeros, so that sorting the keys sorts the indices.
    own_key = f"{folder}/{_distributed_state().process_id:06d}"
    client.key_value_set_bytes(own_key, pickle.dumps(value))
    client.wait_at_barrier(folder, _WAIT_MS)
    # The other processes may not have read this value yet. But all have entered this
    # call, so they have read that of the call before, and its key can be deleted.
    _gather_keys.append(own_key)
    if len(_gather_keys) > 1:
        client.key_value_delete(_gather_keys.popleft())
    entries = sorted(client.key_value_dir_get_bytes(folder))
    return [pickle.loads(content) for _, content in entries]


def _capture(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Returns (result, None), or (None, exception) if `fn` raises."""
    try:
        return fn(), None
    except Exception as error:
        return None, error


def _picklable(error: Exception) -> Exception:
    """Returns the exception, or one with its message if it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _pickle(value: Any) -> tuple[bytes, list[np.ndarray]]:
    """Returns a pickle without the data of its arrays, and these data as uint8."""
    pickle_buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=pickle_buffers.append)
    return content, [np.frombuffer(buffer.raw(), np.uint8) for buffer in pickle_buffers]


def _broadcast(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0, sent over the devices."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _distributed_state() -> Any:
    """Returns JAX's state of this process; its `client` is None in a single process.

    It is private, because JAX has no public name for the client. `jax.process_index`
    would start the devices, which a process that only reads files must not need.
    """
    from jax._src import distributed

    return distributed.global_state
