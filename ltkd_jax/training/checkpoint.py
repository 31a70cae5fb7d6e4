"""Checkpoints by Orbax, with what it lacks: a checksum, and a walk back to the newest one that is whole."""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ltkd_jax.files import reserve, write_text

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    A step counts once its checksum is written, after Orbax is done: a kill in between leaves the one before.

    Args:
      directory: made by the first save. Of several processes one alone may use it, see `hosts.run_on_primary`.
      keep: how many to keep; at least 2 leave one to fall back on.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        self._dir = pathlib.Path(directory).resolve()
        if self._dir.exists() and not self._dir.is_dir():
            raise NotADirectoryError(
                f"{self._dir} is a file where the folder of the checkpoints belongs: move it away"
            )
        self._keep = keep
        # By itself Orbax would wait for the other processes, of which none comes.
        alone = ocp.options.MultiprocessingOptions(
            active_processes={jax.process_index()},
            primary_host=jax.process_index(),
            barrier_sync_key_prefix="ltkd_jax",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        self._saver = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Saves a pytree of arrays, and `extra`, a dict for JSON, under a step. Returns when it is whole.

        Raises:
          OSError: it could not be written, for a full disk say. What was saved before is untouched.
        """
        self._forget(step)
        path = self._path(step)
        tree = jax.tree.map(np.asarray, jax.device_get(tree))
        try:
            _reserve(path, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
            self._saver.save(path / "state", tree)
            write_text(path / "extra.json", json.dumps(extra))
            write_text(self._checksum_path(step), _checksum(path))
        except Exception as error:  # Orbax raises whatever its storage raises
            self._forget(step)
            reason = ": ".join(str(error).strip().splitlines()[0].split(": ")[-2:])
            raise OSError(
                f"checkpoint {path} could not be written: {reason}; the last whole one is of step "
                f"{next(iter(self.steps()), 0)}: mend that, such as by room on the disk, and the same command goes on"
            ) from error
        for old in self.steps()[self._keep :]:
            self._forget(old)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint as (step, tree, extra); None if there is none.

        Args:
          like: a pytree of arrays, or of `jax.ShapeDtypeStruct`, that the checkpoint must match.

        Raises:
          ValueError: the checkpoint is whole, but of another structure or of other shapes.
        """
        for step in self.steps():
            path = self._path(step)
            if not self._is_whole(step):
                _log.warning(
                    "checkpoint %s is damaged or incomplete: passing it over for an older one",
                    path,
                )
                continue
            return (
                step,
                self._read(path, like),
                json.loads((path / "extra.json").read_text()),
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes what is newer than the step that a run goes on from: damaged ones must not count as the newest."""
        for newer in self.steps():
            if newer > step:
                self._forget(newer)

    def steps(self) -> list[int]:
        """Steps of which there is something on disk, newest first."""
        found = (
            p.name.removeprefix("step_") for p in self._dir.glob("step_*") if p.is_dir()
        )
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def _read(self, path: pathlib.Path, like: Any) -> Any:
        try:
            restored = self._saver.restore(
                path / "state",
                item=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like),
                restore_args=jax.tree.map(
                    lambda x: ocp.RestoreArgs(restore_type=np.ndarray), like
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {path} is of another model or optimizer: {error}"
            ) from error
        for (where, want), got in zip(
            jax.tree.leaves_with_path(like), jax.tree.leaves(restored), strict=True
        ):
            if tuple(want.shape) != got.shape or want.dtype != got.dtype:
                name = jax.tree_util.keystr(where)
                raise ValueError(
                    f"checkpoint {path}: {name} is {got.dtype}{list(got.shape)}, "
                    f"expected {want.dtype}{list(want.shape)}: it is of another model"
                )
        return restored

    def _is_whole(self, step: int) -> bool:
        path, checksum = self._path(step), self._checksum_path(step)
        return (
            path.is_dir()
            and checksum.is_file()
            and checksum.read_bytes() == _checksum(path).encode()
        )

    def _forget(self, step: int) -> None:
        # The checksum goes first, so that a half-removed checkpoint is never taken for a whole one.
        for path in (self._checksum_path(step), self._path(step)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> pathlib.Path:
        return self._dir / f"step_{step}"

    def _checksum_path(self, step: int) -> pathlib.Path:
        return self._dir / f"step_{step}.sha256"


def _reserve(path: pathlib.Path, size: int) -> None:
    """Meets a full disk in one system call: met by Orbax's threads it is a page of their tracebacks."""
    path.mkdir(parents=True)
    reserve(path / "room", size)
    (path / "room").unlink()


def _checksum(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
