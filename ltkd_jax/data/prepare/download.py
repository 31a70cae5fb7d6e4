"""Fetching a file whose checksum is known: resumable, and nothing unverified at the final name."""

import dataclasses
import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from typing import BinaryIO

from tqdm import tqdm

_CHUNK = 1 << 18


class DownloadError(ValueError):
    """A file can't be fetched; the message says what to do instead."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file on the network: its address, its size in bytes and its sha256."""

    url: str
    name: str
    size: int
    sha256: str


def fetch(file: File, folder: pathlib.Path, *, timeout: float = 20.0, show_progress: bool = False) -> pathlib.Path:
    """Fetches a file into `folder`, or finds it there, and verifies it. What is incomplete is kept as `NAME.part`.

    Raises:
      DownloadError: host not reachable, file not found, interrupted (the next call resumes), or wrong checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.exists():
        _verify(file, target)
        return target
    if not part.exists() or part.stat().st_size < file.size:
        _receive(file, part, timeout, show_progress)
    _verify(file, part)
    os.replace(part, target)
    return target


def _receive(file: File, part: pathlib.Path, timeout: float, show_progress: bool) -> None:
    """Appends to `part` what it lacks of the file."""
    remedy = "fetch it by other means and give it with --source"
    try:
        with _open(file, part.stat().st_size if part.exists() else 0, timeout) as response:
            resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
            with open(part, "ab" if resumed else "wb") as output:
                _copy(response, output, file, show_progress)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()  # it is longer than the server's file: the next call starts over
        raise DownloadError(f"{file.url}: the server answers {error.code} {error.reason}; {remedy}") from error
    except urllib.error.URLError as error:
        raise DownloadError(f"{file.url} can't be reached ({error.reason}); {remedy}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{file.url}: interrupted ({error}); run the command again to resume") from error
    if part.stat().st_size < file.size:
        raise DownloadError(
            f"{file.url}: interrupted after {part.stat().st_size} of {file.size} bytes; run the command again to resume"
        )


def _open(file: File, offset: int, timeout: float) -> http.client.HTTPResponse:
    """The response from `offset` on; a server that knows no ranges answers 200, with the whole file."""
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    return urllib.request.urlopen(urllib.request.Request(file.url, headers=headers), timeout=timeout)


def _copy(response: http.client.HTTPResponse, output: BinaryIO, file: File, show_progress: bool) -> None:
    with tqdm(
        desc=file.name,
        total=file.size,
        initial=output.tell(),
        unit="B",
        unit_scale=True,
        disable=not show_progress,
    ) as progress:
        # One byte more than expected is enough for the checksum to fail, and an endless answer ends.
        while output.tell() <= file.size and (chunk := response.read(_CHUNK)):
            output.write(chunk)
            progress.update(len(chunk))


def _verify(file: File, path: pathlib.Path) -> None:
    """Removes a file that is not the expected one."""
    with open(path, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        path.unlink()
        raise DownloadError(
            f"{file.url}: sha256 expected {file.sha256}, found {found}; the file was removed: "
            "run the command again, or fetch it by other means and give it with --source"
        )
