"""Atomic writes, JSON, checksums, and locks between processes."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

PathLike = str | os.PathLike[str]
# What systems and file managers leave in folders, some of it with small copies of the
# images: macOS in archives, Windows, Synology, Linux.
_SYSTEM_NAMES = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "lost+found",
}


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden or left behind by a system.

    Args:
      name: without its folders.

    >>> is_hidden("._a.jpg"), is_hidden("Thumbs.db"), is_hidden("a.jpg")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def expand_user(path: PathLike) -> str:
    """Returns a path with the home directory in place of a leading ~ or ~USER.

    Raises:
      FileNotFoundError: the home directory is not known.
    """
    expanded = os.path.expanduser(os.fspath(path))
    # What Python cannot expand it leaves as it is.
    if expanded.startswith("~"):
        raise FileNotFoundError(
            f"{str(path)!r} is in a home directory that is not known: set HOME, or "
            "give a path without ~"
        )
    return expanded


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path that replaces `path` when the block ends.

    An exception leaves `path` unchanged.

    >>> import tempfile
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("complete")
    >>> target.read_text()
    'complete'
    """
    path = pathlib.Path(path)
    # In the same folder, since a rename is atomic within one file system only. The
    # process id keeps processes that write the same file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # Otherwise a power failure could leave the new name on an empty file.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file as UTF-8, atomically; what UTF-8 does not have becomes "?"."""
    with atomic_write(path) as temporary:
        # Python decodes an argument that is not in the console's encoding to
        # surrogates, which UTF-8 does not have.
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: PathLike, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: PathLike, remedy: str = "remove it") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: the file.
      remedy: what to do about a damaged file, for the error message.

    Raises:
      ValueError: the file cannot be read, or does not contain a JSON object.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no JSON object): {remedy}")
    return value


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reserve(path: PathLike, size: int) -> None:
    """Reserves disk space for a new or existing file, where the system supports it.

    Args:
      path: the file; created if it does not exist.
      size: bytes.

    Raises:
      OSError: the disk is full.
    """
    with open(path, "ab") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            # A length of 0 is an error.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))


def make_folder(path: PathLike, remedy: str) -> pathlib.Path:
    """Makes a folder and those above it unless they exist, and returns it.

    Args:
      path: of the folder.
      remedy: what to do if that fails, for the error message.

    Raises:
      OSError: it cannot be made or written to.
    """
    path = pathlib.Path(path)
    reason = None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if not os.access(path, os.W_OK | os.X_OK):
            reason = "Permission denied"
    if reason:
        raise OSError(
            f"the folder {path} cannot be made or written to ({reason}): {remedy}"
        )
    return path


@contextlib.contextmanager
def lock(path: PathLike) -> Iterator[None]:
    """Holds an exclusive lock on a file until the block ends.

    The system releases it even if the process is killed.

    Args:
      path: the lock file; its folder is created.

    Raises:
      BlockingIOError: another process, or another call in this one, holds the lock.
      ImportError: the system is Windows, which has no such locks.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        raise ImportError(
            "training and checkpoints need Linux or macOS, for their locks: on Windows "
            "use the Windows Subsystem for Linux (WSL)"
        ) from None
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Closing the file releases the lock. The file stays: if it were removed, a process
    # that has opened the old file and one that creates it anew could both hold a lock.
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
