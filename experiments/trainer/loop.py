"""The one training loop, for teacher and student alike."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.config.validation import ConfigError
from experiments.trainer.interrupts import Stopped, StopRequest
from experiments.trainer.metrics_log import MetricsLog
from experiments.trainer.trainer import Trainer
from ltkd_jax import metrics
from ltkd_jax.training import hosts
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.state import TrainState

_GRID = 16  # points of an axis of the map from features to weights


class DivergedError(Exception):
    """A loss or a parameter is not finite; the last good checkpoint is untouched."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What the loop does beside the steps.

    Attributes:
      label: of the progress bar.
      eval_every, checkpoint_every: in epochs.
      on_record: called with each record of `metrics.jsonl` as it is written; on the primary process only.
    """

    label: str
    eval_every: int
    checkpoint_every: int
    on_record: Callable[[dict], None] = lambda _: None


def fit(
    trainer: Trainer,
    data,
    seed: int,
    workdir: pathlib.Path,
    stop: StopRequest,
    options: LoopOptions,
) -> tuple[TrainState, dict]:
    """Trains a network to its last step, from its newest checkpoint if there is one.

    Args:
      trainer: of the network.
      data: its `TrainData`, on the devices.
      seed: of initialisation, order and views.
      workdir: gets `metrics.jsonl` and `checkpoints/`.
      stop: asked between two calls of the compiled steps.
      options: of the loop.

    Returns:
      The final state, replicated, and a dict of timings.

    Raises:
      Stopped: after saving.
      DivergedError: before anything good is overwritten.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    log = MetricsLog(workdir / "metrics.jsonl", options.on_record)
    label = options.label
    step, state, clock = _resume(trainer, checkpoints, log, seed)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_progress_bar(trainer.total_steps, step, label))
        inputs_of_calls = stack.enter_context(
            contextlib.closing(trainer.inputs(seed, step))
        )
        for num_steps, inputs in inputs_of_calls:
            epoch = step // trainer.steps_per_epoch
            state = trainer.train_steps(step, state, data, inputs)
            # Without this the host would run ahead: signals would wait, and the bar would lie.
            jax.block_until_ready(state.step)
            if not clock.warm:
                bar.set_postfix_str("")
            clock.tick(num_steps)
            step += num_steps
            bar.update(num_steps)

            stop_reason = stop.reason_of_any()
            done = step == trainer.total_steps
            epoch_ends = done or step % trainer.steps_per_epoch == 0
            if epoch_ends or stop_reason:
                _check_finite(trainer, state, checkpoints, label)
            if epoch_ends:
                record = _epoch_record(trainer, state, step, options, bar)
                hosts.run_on_primary(lambda: log.write(record))
            checkpoint_due = epoch_ends and (
                done or (epoch + 1) % options.checkpoint_every == 0
            )
            if checkpoint_due or stop_reason:
                saved = trainer.parallel.unreplicate(state)
                hosts.run_on_primary(
                    lambda: checkpoints.save(step, saved, clock.as_dict())
                )
            if stop_reason and not done:
                raise Stopped(
                    f"{label}: stopped by {stop_reason} at step {step} of {trainer.total_steps}, and saved"
                )
    return state, clock.timing(trainer.recipe.batch_size)


def _resume(trainer, checkpoints, log, seed):
    """Returns step, replicated state and clock of the newest intact checkpoint, or of a fresh start."""
    fresh = trainer.init(seed)

    def restore():
        try:
            restored = checkpoints.restore(jax.eval_shape(lambda: fresh))
        except ValueError as error:  # of another model
            raise ConfigError(str(error)) from error
        step = restored[0] if restored else 0
        checkpoints.discard_after(step)
        log.truncate(step, step // trainer.steps_per_epoch)
        return restored

    step, state, elapsed = hosts.run_on_primary(restore) or (
        0,
        fresh,
        {"seconds": 0.0, "first_call_seconds": 0.0},
    )
    return step, trainer.parallel.replicate(state), Clock(**elapsed)


def _progress_bar(total_steps, step, label):
    bar = tqdm.tqdm(
        total=total_steps,
        initial=step,
        desc=label,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=not hosts.is_primary(),
    )
    bar.set_postfix_str("compiling the step")
    return bar


class Clock:
    """Wall time of a run's steps and evaluations; the first call, which compiles, is kept apart."""

    def __init__(self, seconds: float, first_call_seconds: float):
        self._seconds = seconds
        self._first_call = first_call_seconds
        self._start = time.monotonic()
        self._warm_since = None
        self._warm_steps = 0

    @property
    def warm(self) -> bool:
        """Whether the first call is over."""
        return self._warm_since is not None

    def tick(self, steps: int) -> None:
        """Counts the steps of a call that has just ended."""
        now = time.monotonic()
        if self._warm_since is None:
            self._warm_since = now
            self._first_call += now - self._start
        else:
            self._warm_steps += steps

    def as_dict(self) -> dict:
        """Returns what a checkpoint keeps."""
        return {
            "seconds": self._seconds + time.monotonic() - self._start,
            "first_call_seconds": self._first_call,
        }

    def timing(self, batch_size: int) -> dict:
        """Returns the timing for `results.json`; images per second after the first call, evaluation included."""
        rate = (
            batch_size * self._warm_steps / (time.monotonic() - self._warm_since)
            if self._warm_steps
            else None
        )
        return {**self.as_dict(), "images_per_second": rate}


def _check_finite(trainer, state, checkpoints, label):
    """Raises DivergedError unless losses, parameters and the optimizer's state are finite."""
    sums = trainer.parallel.unreplicate(state.sums)
    bad_step = int(sums.bad_step)
    last_step = next(iter(checkpoints.steps()), None)
    last = (
        "there is no checkpoint yet"
        if last_step is None
        else f"the last checkpoint is of step {last_step}"
    )
    remedy = f"lower its learning rate; {last}"
    if bad_step >= 0:
        bad_terms = [
            name
            for name, bad in zip(trainer.objective.names, np.asarray(sums.bad_terms))
            if bad
        ]
        terms = ", ".join(bad_terms) or "only their weighted sum"
        raise DivergedError(
            f"{label}: the loss of step {bad_step} is not finite (terms: {terms}): {remedy}"
        )
    if trainer.loss_weighting is not None and not np.isfinite(sums.learned.outer_loss):
        raise DivergedError(
            f"{label}: the outer loss, that of the outer set, is not finite: {remedy}"
        )
    saved = {
        name: getattr(state, name)
        for name in ("params", "batch_stats", "opt_state", "meta")
    }
    saved = trainer.parallel.unreplicate(saved)
    if not _all_finite(saved):
        leaves = jax.tree.leaves_with_path(saved)
        bad = [
            jax.tree_util.keystr(path)
            for path, leaf in leaves
            if not np.isfinite(leaf).all()
        ]
        step = int(trainer.parallel.unreplicate(state.step))
        raise DivergedError(
            f"{label}: after step {step}, {bad[0]} is not finite ({len(bad)} such arrays): {remedy}"
        )


@jax.jit
def _all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _epoch_record(trainer, state, step, options, bar):
    """Returns one line of `metrics.jsonl`: no clock in it, so that a resumed run writes the same."""
    sums = jax.device_get(trainer.parallel.unreplicate(state.sums))
    num_steps = int(sums.steps)
    epoch = step / trainer.steps_per_epoch
    names = trainer.objective.names
    record = {
        "step": step,
        "epoch": round(epoch, 4),
        "lr": float(trainer.schedule(step - 1)),
        "loss": float(sums.loss) / num_steps,
        "terms": dict(zip(names, (sums.terms / num_steps).tolist())),
        "train_accuracy": 100
        * float(sums.correct)
        / (num_steps * trainer.recipe.batch_size),
    }
    if trainer.loss_weighting is not None:
        learned = sums.learned
        record["outer_loss"] = float(learned.outer_loss) / num_steps
        record["weights"] = _means_by_group(
            trainer, learned.weights, learned.examples, names
        )
    if step == trainer.total_steps or round(epoch) % options.eval_every == 0:
        for name in ("test", "validation"):
            images = getattr(trainer.data, name)
            if len(images):
                summary = summarize(trainer, trainer.evaluate(state.variables, images))
                record[name] = {key: summary[key] for key in ("all", "groups")}
        tail = trainer.data.groups.names[-1]
        test = record["test"]
        bar.set_postfix_str(
            f"test {test['all']:.2f} %, {tail} {test['groups'][tail]:.2f} %"
        )
    return record


def _means_by_group(trainer, totals, examples, names):
    """Returns {name: {group: mean}} of sums `[G, len(names)]`; None for a group without an example."""
    means = {}
    for name, column in zip(names, totals.T):
        by_group = zip(trainer.data.groups.names, column, examples)
        means[name] = {
            group: float(total / n) if n else None for group, total, n in by_group
        }
    return means


def learned_weights(trainer: Trainer, state: TrainState) -> dict:
    """Returns what the weight net of a final state does, for `results.json`.

    Args:
      trainer: with learned weights.
      state: replicated.

    Returns:
      Mean weights and features by group over the last epoch; and, for two features, the weights over a grid from 0 to
      twice the cross-entropy of chance (or twice the mean, where that is more): `map[term][i][j]` at `axes[0][i]`,
      `axes[1][j]`.
    """
    state = jax.device_get(trainer.parallel.unreplicate(state))
    learned = state.sums.learned
    features = trainer.spec.loss_weighting.features
    terms = trainer.objective.names
    summary = {
        "weights": _means_by_group(trainer, learned.weights, learned.examples, terms),
        "features": _means_by_group(
            trainer, learned.features, learned.examples, features
        ),
    }
    if len(features) == 2:
        mean = learned.features.sum(axis=0) / learned.examples.sum()
        highest = 2 * np.maximum(
            mean.astype(np.float64), np.log(trainer.data.num_classes)
        )
        axes = np.linspace(0.0, highest, _GRID, axis=-1)
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        weights = trainer.loss_weighting.compute_weights(
            state.meta.params, jnp.asarray(grid, jnp.float32)
        )
        weights = np.asarray(weights, np.float64).reshape(_GRID, _GRID, -1).round(4)
        summary["axes"] = axes.round(4).tolist()
        summary["map"] = {
            name: weights[..., t].tolist() for t, name in enumerate(terms)
        }
    return summary


def summarize(trainer: Trainer, sums: metrics.EvalSums) -> dict:
    """Returns `metrics.summarize` with the trainer's classes."""
    return metrics.summarize(sums, trainer.data.groups, trainer.data.shots)
