"""Files that are either whole or not there, and locks between processes."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file under a temporary name on the same file system, then renames it."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(path: str | os.PathLike[str], size: int) -> None:
    """Gives a file, new or old, its room on the disk, where the system can do that.

    Raises:
      OSError: there is no room.
    """
    with open(path, "ab") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, max(size, 1))


@contextlib.contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds an exclusive lock on a file, which the system frees however the process ends.

    Args:
      path: the lock file; its folder is made.

    Raises:
      BlockingIOError: another process, or another call in this one, holds it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
