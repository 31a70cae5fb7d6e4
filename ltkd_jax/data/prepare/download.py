"""Downloads files whose checksum is known."""

import dataclasses
import http.client
import pathlib
import urllib.request

from tqdm import tqdm

from ltkd_jax import files

_READ_BYTES = 1 << 18  # of one read from the network
_REMEDY = (
    "run the command again, or fetch the file by other means and give it with --source"
)


class DownloadError(ValueError):
    """Raised for a file that cannot be downloaded; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """Describes a file on the network.

    Attributes:
      url: its address.
      name: its name on disk.
      size: in bytes.
      sha256: its checksum, in hexadecimal digits.
    """

    url: str
    name: str
    size: int
    sha256: str


def fetch(
    file: RemoteFile,
    folder: pathlib.Path,
    *,
    timeout: float = 20.0,
    show_progress: bool = False,
) -> pathlib.Path:
    """Downloads a file into a folder unless it is there, and verifies its checksum.

    An incomplete download stays as `NAME.part`, and the next call resumes it.

    Args:
      file: the file.
      folder: is made if it does not exist.
      timeout: of a connection without an answer, in seconds.
      show_progress: whether to show a bar on the standard error.

    Returns:
      The path of the file.

    Raises:
      DownloadError: the server does not answer, has no such file or breaks off, or the
        checksum is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final_path = folder / file.name
    path = final_path
    if not final_path.exists():
        path = folder / f"{file.name}.part"
        try:
            _download(file, path, timeout, show_progress)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"{file.url} cannot be downloaded ({error}): {_REMEDY}"
            ) from error
    digest = files.sha256(path)
    if digest != file.sha256:
        # Removed, since neither a resumed nor a repeated call could repair it.
        path.unlink()
        raise DownloadError(
            f"{file.url}: sha256 expected {file.sha256}, found {digest}; the file was "
            f"removed: {_REMEDY}"
        )
    return path.replace(final_path)


def _download(
    file: RemoteFile, part_path: pathlib.Path, timeout: float, show_progress: bool
) -> None:
    """Downloads the bytes of a file that `part_path` lacks, and appends them to it."""
    start = part_path.stat().st_size if part_path.exists() else 0
    if start >= file.size:
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(file.url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server does not support ranges, and sends the entire file
        bar = tqdm(
            desc=file.name,
            total=file.size,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        )
        with open(part_path, "ab" if start else "wb") as output, bar:
            # An answer that is too long, or never ends, is cut off after its excess
            # begins. The checksum then fails.
            while output.tell() <= file.size:
                block = response.read(_READ_BYTES)
                if not block:
                    break
                output.write(block)
                bar.update(len(block))
    size = part_path.stat().st_size
    if size < file.size:
        raise OSError(f"interrupted after {size} of {file.size} bytes")
