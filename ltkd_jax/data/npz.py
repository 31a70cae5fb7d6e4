"""Reads .npz files of plain arrays, without the pickles that they may hold."""

import pathlib
import zipfile
import zlib
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from ltkd_jax import files

# What NumPy raises for a broken archive. A RuntimeError is of an encrypted archive, or
# of an unsupported compression.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


class ArrayFile:
    """Reads an .npz file, which is opened for each array, and closed again.

    A subclass says what is in the file, and may raise an error of its own.

    Attributes:
      path: of the file.
      names: of its arrays.
      error: raised for anything that is wrong with the file.
      example: the arguments of the `np.savez` that writes such a file, for messages.

    Raises:
      ValueError: `error`: there is no such file, or it is no .npz file.
    """

    error: ClassVar[type[ValueError]] = ValueError
    example: ClassVar[str]

    def __init__(self, path: files.PathLike):
        self.path = pathlib.Path(path)
        try:
            with open(self.path, "rb") as file, NpzFile(file) as archive:
                self.names: tuple[str, ...] = tuple(archive.files)
        except _DAMAGED as error:
            raise self.error(
                f"{path} cannot be read as an .npz file ({error}); write one by "
                f'np.savez("{self.path.stem}.npz", {self.example})'
            ) from None

    def array(self, name: str) -> npt.NDArray[Any]:
        """Returns an array of the file.

        Raises:
          ValueError: `error`: the array holds Python objects, is damaged, or does not
            fit in memory.
        """
        try:
            with open(self.path, "rb") as file, NpzFile(file) as archive:
                return np.asarray(archive[name])
        except ValueError as error:
            # NumPy refuses to unpickle objects, since a pickle may run code.
            raise self.error(
                f"{self.path}: {name} is not a plain array ({error}); give numbers, or "
                "names as np.array(names, dtype=str)"
            ) from None
        except (MemoryError, *_DAMAGED) as error:
            raise self.error(
                f"{self.path}: {name} is damaged or too large ({error}): write the "
                "file again, with fewer examples if memory is short"
            ) from None
