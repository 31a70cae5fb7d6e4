"""The training loop, which is the same for teacher and student."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.config.validation import ConfigError
from experiments.trainer import summaries
from experiments.trainer.interrupts import StoppedError, StopRequest
from experiments.trainer.metrics_log import MetricsLog
from experiments.trainer.trainer import Trainer
from ltkd_jax.training import hosts
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.state import TrainState
from ltkd_jax.training.steps import TrainData

_log = logging.getLogger(__name__)


class DivergedError(Exception):
    """Reports a loss or a parameter that is not finite.

    It is raised before such a state is saved, so every checkpoint is finite.
    """


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Holds what the loop does besides training.

    Attributes:
      label: of the progress bar and in messages.
      eval_every: epochs between evaluations.
      checkpoint_every: epochs between checkpoints.
      on_record: called with each record of `metrics.jsonl` when it is written, on the
        primary process only.
    """

    label: str
    eval_every: int
    checkpoint_every: int
    on_record: Callable[[dict], None] = lambda _: None


def fit(
    trainer: Trainer,
    data: TrainData,
    seed: int,
    workdir: pathlib.Path,
    stop: StopRequest,
    options: LoopOptions,
) -> tuple[TrainState, dict]:
    """Trains a network to its last step, starting from its newest intact checkpoint.

    Args:
      trainer: of the network.
      data: from `trainer.device_data`.
      seed: of the initialisation, and of the order and augmentation of images.
      workdir: the folder for `metrics.jsonl` and `checkpoints/`.
      stop: checked after each call of the compiled steps.
      options: what the loop does besides training.

    Returns:
      The final state, replicated, and the timing for `results.json`.

    Raises:
      StoppedError: `stop` asked for it; the state has been saved.
      DivergedError: a value is not finite; the state has not been saved.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    log = MetricsLog(workdir / "metrics.jsonl", options.on_record)
    label = options.label
    step, state, clock = _resume(trainer, checkpoints, log, seed)
    if step < trainer.total_steps and hosts.is_primary():
        _warn_of_large_batch(trainer, label)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_progress_bar(trainer.total_steps, step, label))
        calls = stack.enter_context(contextlib.closing(trainer.inputs(seed, step)))
        for num_steps, inputs in calls:
            state = trainer.train_steps(step, state, data, inputs)
            # JAX returns before the device is done. Without waiting, the host would
            # start many calls in advance: it would react late to a signal, and the
            # progress bar would count steps that are not done.
            jax.block_until_ready(state.step)
            if not clock.warm:
                # This was the first call, which compiled the step.
                bar.set_postfix_str("")
            clock.count_call(num_steps)
            step += num_steps
            bar.update(num_steps)

            done = step == trainer.total_steps
            stop_reason = stop.any_reason()
            epoch_ends = done or step % trainer.steps_per_epoch == 0
            if epoch_ends or stop_reason:
                _check_finite(trainer, state, checkpoints, label)
            if epoch_ends:
                record = summaries.epoch_record(
                    trainer, state, step, options.eval_every
                )
                _show_test_accuracy(bar, trainer, record)
                hosts.run_on_primary(functools.partial(log.write, record))
            if stop_reason or _checkpoint_is_due(trainer, step, options):
                save = functools.partial(
                    checkpoints.save,
                    step,
                    trainer.parallel.unreplicate(state),
                    clock.as_dict(),
                )
                hosts.run_on_primary(save)
            if stop_reason and not done:
                raise StoppedError(
                    f"{label}: stopped by {stop_reason} at step {step} of "
                    f"{trainer.total_steps}, and saved"
                )
    return state, clock.timing(trainer.recipe.batch_size)


def _warn_of_large_batch(trainer: Trainer, label: str) -> None:
    """Logs a warning if each step takes every image more than once."""
    batch_size = trainer.recipe.batch_size
    num_images = len(trainer.data.train)
    if batch_size > num_images:
        _log.warning(
            "%s: train.batch_size=%d is larger than the training set of %d images: an "
            "epoch is one step, which takes each image about %.3g times; lower it",
            label,
            batch_size,
            num_images,
            batch_size / num_images,
        )


def _resume(
    trainer: Trainer, checkpoints: Checkpoints, log: MetricsLog, seed: int
) -> tuple[int, TrainState, "Clock"]:
    """Returns the step, the replicated state and the clock to start from.

    They come from the newest intact checkpoint, or start a new run. Everything that was
    written after that checkpoint is removed, since the run will write it again.
    """
    initial_state = trainer.init(seed)
    template = jax.eval_shape(lambda: initial_state)

    def restore() -> tuple[int, TrainState, dict] | None:
        try:
            checkpoint = checkpoints.restore(template)
        except ValueError as error:  # a checkpoint of another model
            raise ConfigError(str(error)) from error
        step = checkpoint[0] if checkpoint else 0
        checkpoints.discard_after(step)
        log.truncate(step, step // trainer.steps_per_epoch)
        return checkpoint

    checkpoint = hosts.run_on_primary(restore)
    if checkpoint is None:
        clock = Clock(seconds=0.0, first_call_seconds=0.0)
        return 0, trainer.parallel.replicate(initial_state), clock
    step, state, elapsed = checkpoint
    return step, trainer.parallel.replicate(state), Clock(**elapsed)


def _checkpoint_is_due(trainer: Trainer, step: int, options: LoopOptions) -> bool:
    epoch, steps_into_epoch = divmod(step, trainer.steps_per_epoch)
    return step == trainer.total_steps or (
        steps_into_epoch == 0 and epoch % options.checkpoint_every == 0
    )


def _progress_bar(total_steps: int, step: int, label: str) -> Any:
    bar = tqdm.tqdm(
        total=total_steps,
        initial=step,
        desc=label,
        unit="step",
        dynamic_ncols=True,
        # In a log file each update is a new line, so there are few.
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=not hosts.is_primary(),
    )
    bar.set_postfix_str("compiling the step")
    return bar


class Clock:
    """Measures the wall time of a run's steps and evaluations.

    The time until the end of the first call, which includes compilation, is also
    recorded by itself.

    Args:
      seconds: measured before the run was resumed.
      first_call_seconds: the part of `seconds` until the end of first calls.
    """

    def __init__(self, seconds: float, first_call_seconds: float):
        self._seconds = seconds
        self._first_call_seconds = first_call_seconds
        self._start = time.monotonic()
        self._warm_since: float | None = None
        self._warm_steps = 0

    @property
    def warm(self) -> bool:
        """Returns whether the first call has ended."""
        return self._warm_since is not None

    def count_call(self, steps: int) -> None:
        """Counts the steps of a call that has just ended."""
        if self._warm_since is None:
            self._warm_since = time.monotonic()
            self._first_call_seconds += self._warm_since - self._start
        else:
            self._warm_steps += steps

    def as_dict(self) -> dict[str, float]:
        """Returns the arguments of a clock that continues this one."""
        return {
            "seconds": self._seconds + time.monotonic() - self._start,
            "first_call_seconds": self._first_call_seconds,
        }

    def timing(self, batch_size: int) -> dict[str, float | None]:
        """Returns the timing for `results.json`.

        Images per second are measured after the first call, including evaluation; None
        if there was only one call.
        """
        rate = None
        if self._warm_since is not None and self._warm_steps:
            seconds = time.monotonic() - self._warm_since
            rate = batch_size * self._warm_steps / seconds
        return {**self.as_dict(), "images_per_second": rate}


def _check_finite(
    trainer: Trainer, state: TrainState, checkpoints: Checkpoints, label: str
) -> None:
    """Raises DivergedError unless losses, parameters and optimizer state are finite."""
    problem = _nonfinite_value(trainer, state)
    if problem is None:
        return
    last_step = next(iter(checkpoints.steps()), None)
    if last_step is None:
        last_checkpoint = "there is no checkpoint yet"
    else:
        last_checkpoint = f"the last checkpoint is of step {last_step}"
    raise DivergedError(
        f"{label}: {problem}: lower its learning rate; {last_checkpoint}"
    )


def _nonfinite_value(trainer: Trainer, state: TrainState) -> str | None:
    """Returns which value of a state is not finite, or None if all are."""
    # The device records the first step with a bad loss, so that the host need not fetch
    # the loss of every step.
    sums = trainer.parallel.unreplicate(state.sums)
    bad_step = int(sums.bad_step)
    if bad_step >= 0:
        is_bad = np.asarray(sums.bad_terms)
        bad_terms = [name for name, bad in zip(trainer.objective.names, is_bad) if bad]
        terms = ", ".join(bad_terms) or "only their weighted sum"
        return f"the loss of step {bad_step} is not finite (terms: {terms})"
    if trainer.loss_weighting is not None and not np.isfinite(sums.learned.outer_loss):
        return "the outer loss, that of the outer set, is not finite"

    arrays = {
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "meta": state.meta,
    }
    arrays = trainer.parallel.unreplicate(arrays)
    # If all is well, only one scalar is copied from the device.
    if _all_finite(arrays):
        return None
    bad_paths = []
    for path, leaf in jax.tree.leaves_with_path(arrays):
        if not np.isfinite(leaf).all():
            bad_paths.append(jax.tree_util.keystr(path))
    step = int(trainer.parallel.unreplicate(state.step))
    return (
        f"after step {step}, {bad_paths[0]} is not finite "
        f"({len(bad_paths)} such arrays)"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _show_test_accuracy(bar: Any, trainer: Trainer, record: dict[str, Any]) -> None:
    """Shows the accuracy of a record in the progress bar, if the epoch has one."""
    test = record.get("test")
    if test is None:
        return
    tail = trainer.data.groups.names[-1]
    bar.set_postfix_str(
        f"test {test['all']:.2f} %, {tail} {test['groups'][tail]:.2f} %"
    )
