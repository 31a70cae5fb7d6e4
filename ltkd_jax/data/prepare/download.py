"""Downloads files whose checksum is known."""

import dataclasses
import http.client
import pathlib
import urllib.request

from tqdm import tqdm

from ltkd_jax import files

_CHUNK = 1 << 18
_REMEDY = (
    "run the command again, or fetch the file by other means and give it with --source"
)


class DownloadError(ValueError):
    """A file cannot be downloaded; the message says what to do instead."""


@dataclasses.dataclass(frozen=True)
class File:
    """Describes a file on the network by its address, its name, its size in bytes and its SHA-256."""

    url: str
    name: str
    size: int
    sha256: str


def fetch(
    file: File,
    folder: pathlib.Path,
    *,
    timeout: float = 20.0,
    show_progress: bool = False,
) -> pathlib.Path:
    """Downloads a file into a folder, unless it is there, verifies it and returns its path.

    An incomplete download is kept as `NAME.part`, and the next call resumes it.

    Raises:
      DownloadError: the server does not answer, has no such file or breaks off, or the checksum is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = target = folder / file.name
    if not target.exists():
        path = folder / f"{file.name}.part"
        try:
            _download(file, path, timeout, show_progress)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"{file.url} cannot be downloaded ({error}): {_REMEDY}"
            ) from error
    digest = files.sha256(path)
    if digest != file.sha256:
        path.unlink()
        raise DownloadError(
            f"{file.url}: sha256 expected {file.sha256}, found {digest}; the file was removed: {_REMEDY}"
        )
    return path.replace(target)


def _download(
    file: File, part: pathlib.Path, timeout: float, show_progress: bool
) -> None:
    """Appends to `part` what it lacks of the file."""
    start = part.stat().st_size if part.exists() else 0
    if start >= file.size:
        return
    request = urllib.request.Request(
        file.url, headers={"Range": f"bytes={start}-"} if start else {}
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server does not know ranges and sends the whole file
        with (
            open(part, "ab" if start else "wb") as output,
            tqdm(
                desc=file.name,
                total=file.size,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=not show_progress,
            ) as bar,
        ):
            # One byte more than expected is enough for the checksum to fail, and an endless answer ends.
            while output.tell() <= file.size and (chunk := response.read(_CHUNK)):
                output.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < file.size:
        raise OSError(f"interrupted after {part.stat().st_size} of {file.size} bytes")
