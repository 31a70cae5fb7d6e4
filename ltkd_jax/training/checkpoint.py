"""Checkpoints, stored by Orbax, with checksums and a fallback to an older one."""

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
    """Saves and restores the checkpoints of one run, of which it keeps the newest.

    The checkpoint of step n is the folder `step_n` and the file `step_n.sha256`. The
    checksum is written last, in one rename: without it, or if it does not match the
    folder, the checkpoint is not used. So if the process is killed while saving, the
    previous checkpoint is restored.

    Args:
      directory: created by the first save. Only one process may use it, see
        `hosts.run_on_primary`.
      keep: number of checkpoints to keep; with 2 or more there is one to fall back on.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        self._directory = pathlib.Path(directory).resolve()
        if self._directory.exists() and not self._directory.is_dir():
            raise NotADirectoryError(
                f"{self._directory} is a file, but the checkpoints need a folder of "
                "that name: move the file away"
            )
        self._keep = keep
        # By default, Orbax waits for all processes of `jax.distributed`; but only this
        # one calls it.
        this_process_only = ocp.options.MultiprocessingOptions(
            active_processes={jax.process_index()},
            primary_host=jax.process_index(),
            barrier_sync_key_prefix="ltkd_jax",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=this_process_only)
        self._checkpointer = ocp.Checkpointer(
            handler, multiprocessing_options=this_process_only
        )

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Saves a checkpoint, and returns when it is complete.

        An earlier checkpoint of the same step is replaced; older ones beyond the number
        to keep are deleted.

        Args:
          step: under which it is saved.
          tree: a pytree of arrays.
          extra: other values, stored as JSON.

        Raises:
          OSError: it could not be written, for example because the disk is full. The
            checkpoints of other steps are unchanged.
        """
        self._delete(step)
        path = self._path(step)
        # As NumPy arrays they have no sharding, so that a run on another number of
        # devices can restore them.
        tree = jax.tree.map(np.asarray, jax.device_get(tree))
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        try:
            path.mkdir(parents=True)
            _check_disk_space(path, num_bytes)
            self._checkpointer.save(path / "state", tree)
            write_text(path / "extra.json", json.dumps(extra))
            # From this rename on, the checkpoint counts.
            write_text(self._checksum_path(step), _checksum(path))
        except Exception as error:  # Orbax raises whatever its storage raises
            self._delete(step)
            # The last two parts of a long message name the cause.
            first_line = str(error).strip().splitlines()[0]
            reason = ": ".join(first_line.split(": ")[-2:])
            last_step = next(iter(self.steps()), 0)
            raise OSError(
                f"checkpoint {path} could not be written: {reason}; the last one is of "
                f"step {last_step}: remove the cause, for example free disk space, and "
                "rerun the command to resume"
            ) from error
        for old_step in self.steps()[self._keep :]:
            self._delete(old_step)

    def restore(self, target: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns the newest intact checkpoint, (step, tree, extra), or None.

        Damaged or incomplete ones are skipped, with a warning in the log.

        Args:
          target: a pytree of arrays or of `jax.ShapeDtypeStruct`, with the structure,
            shapes and dtypes that the checkpoint must have.

        Raises:
          ValueError: the checkpoint is intact, but does not match `target`.
        """
        for step in self.steps():
            path = self._path(step)
            if self._is_intact(step):
                tree = self._read_tree(path, target)
                extra = json.loads((path / "extra.json").read_text())
                return step, tree, extra
            _log.warning(
                "checkpoint %s is damaged or incomplete: trying an older one", path
            )
        return None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which `restore` has skipped.

        Otherwise they would count among the newest ones to keep.

        Args:
          step: from which the run resumes.
        """
        for later_step in self.steps():
            if later_step > step:
                self._delete(later_step)

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, intact or not, newest first."""
        steps = []
        for path in self._directory.glob("step_*"):
            number = path.name.removeprefix("step_")
            if path.is_dir() and number.isdecimal():
                steps.append(int(number))
        return sorted(steps, reverse=True)

    def _read_tree(self, path: pathlib.Path, target: Any) -> Any:
        """Returns the pytree of a checkpoint, in NumPy arrays that match `target`."""
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target
        )
        try:
            tree = self._checkpointer.restore(
                path / "state", item=template, restore_args=restore_args
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {path} is of another model or optimizer: {error}"
            ) from error
        # Orbax compares the structure, but returns arrays of any shape.
        target_leaves = jax.tree.leaves_with_path(target)
        for (key_path, expected), leaf in zip(
            target_leaves, jax.tree.leaves(tree), strict=True
        ):
            if leaf.shape != tuple(expected.shape) or leaf.dtype != expected.dtype:
                raise ValueError(
                    f"checkpoint {path} is of another model: "
                    f"{jax.tree_util.keystr(key_path)} is "
                    f"{leaf.dtype}{list(leaf.shape)}, expected "
                    f"{expected.dtype}{list(expected.shape)}"
                )
        return tree

    def _is_intact(self, step: int) -> bool:
        """Returns whether the checkpoint has the content that was saved."""
        path = self._path(step)
        checksum_path = self._checksum_path(step)
        if not path.is_dir() or not checksum_path.is_file():
            return False
        # As bytes, since a damaged file need not be text.
        return checksum_path.read_bytes() == _checksum(path).encode()

    def _delete(self, step: int) -> None:
        """Deletes the checkpoint of a step, or what there is of it."""
        # The checksum first: a half-deleted checkpoint must not have one.
        for path in (self._checksum_path(step), self._path(step)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"step_{step}"

    def _checksum_path(self, step: int) -> pathlib.Path:
        return self._directory / f"step_{step}.sha256"


def _check_disk_space(folder: pathlib.Path, num_bytes: int) -> None:
    """Raises OSError if the disk has no room for so many bytes.

    Without this check, Orbax would report a full disk by pages of tracebacks from its
    threads.
    """
    placeholder = folder / "room"
    reserve(placeholder, num_bytes)
    placeholder.unlink()


def _checksum(folder: pathlib.Path) -> str:
    """Returns the SHA-256 over names, sizes and content of all files in a folder."""
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        # With the size in front, no byte can pass for one of the next file.
        header = f"{file.relative_to(folder)}\0{file.stat().st_size}\0"
        digest.update(header.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
