"""The one training loop, for teacher and student alike."""

import contextlib
import json
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.trainer import build
from ltkd_jax import files, metrics
from ltkd_jax.training import hosts
from ltkd_jax.training.checkpoint import Checkpoints

_log = logging.getLogger(__name__)
_GRID = 16  # points of an axis of the map from features to weights


class Stopped(Exception):
    """The run was asked to stop, has saved, and resumes by the same command."""


class Diverged(Exception):
    """A loss or a parameter is not finite; the last good checkpoint is untouched."""


class StopRequest:
    """Set by SIGTERM, SIGINT or a deadline; the loop looks at it between chunks."""

    def __init__(self, deadline: float | None = None):
        self._deadline, self.signal = deadline, None

    @property
    def reason(self) -> str | None:
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time budget"
        return None

    def of_any(self) -> str | None:
        """The reason of the first process that has one: all stop at the same step."""
        return next(filter(None, hosts.gather(self.reason)), None)

    @contextlib.contextmanager
    def listening(self):
        """Catches the signals meanwhile; a second one ends the process at once."""

        def handle(number, frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def fit(
    program: build.Program, train_data, seed: int, workdir, stop: StopRequest, *, config, label: str,
    on_record: Callable[[dict], None] = lambda _: None,
):  # fmt: skip
    """Trains a network to its last step, from its newest checkpoint if there is one.

    Args:
      program: what to train.
      train_data: its `TrainData`, on the devices.
      seed: of initialisation, order and views.
      workdir: gets `metrics.jsonl` and `checkpoints/`.
      stop: asked between chunks.
      config: for `eval_every` and `checkpoint_every`, in epochs.
      label: of the progress bar.
      on_record: called with each record of `metrics.jsonl`, as it is written; in the first process only.

    Returns:
      The final state, replicated, and a dict of timings.

    Raises:
      Stopped: after saving.
      Diverged: before anything good is overwritten.
    """
    saved = Checkpoints(pathlib.Path(workdir) / "checkpoints")
    log = MetricsLog(pathlib.Path(workdir) / "metrics.jsonl", on_record)
    fresh = program.init(seed)

    def resume():
        found = saved.restore(jax.eval_shape(lambda: fresh))
        step = found[0] if found else 0
        saved.discard_after(step)
        log.keep_until(step, step // program.steps_per_epoch)
        return found

    found = hosts.first(resume)
    step, state, clock = found or (0, fresh, {"seconds": 0.0, "first_call_seconds": 0.0})
    clock = Clock(**clock)
    state = program.parallel.replicate(state)
    bar = tqdm.tqdm(
        total=program.total_steps,
        initial=step,
        desc=label,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20,
        disable=not hosts.is_first(),
    )
    bar.set_postfix_str("compiling the step")
    with bar, contextlib.closing(program.chunks(seed, step)) as chunks:
        for count, rows in chunks:
            epoch = step // program.steps_per_epoch
            state = program.chunk(step, state, train_data, rows)
            jax.block_until_ready(state.step)  # a signal is heard, and the bar is true
            if not clock.warm:
                bar.set_postfix_str("")
            clock.tick(count)
            step += count
            bar.update(count)
            done, stopping = step == program.total_steps, stop.of_any()
            epoch_ends = done or step % program.steps_per_epoch == 0
            if epoch_ends:
                _check_finite(program, state, saved, label)
                record = _record(program, state, step, config, bar)
                hosts.first(lambda: log.write(record))  # noqa: B023
            due = epoch_ends and (done or (epoch + 1) % config.checkpoint_every == 0)
            if due or stopping:
                _check_finite(program, state, saved, label)
                hosts.first(lambda: saved.save(step, program.parallel.first(state), clock.as_dict()))  # noqa: B023
            if stopping and not done:
                raise Stopped(f"{label}: stopped by {stopping} at step {step} of {program.total_steps}, and saved")
    return state, clock.timing(program.recipe.batch_size)


class Clock:
    """Wall time of a run's steps and evaluations; the first call, which compiles, is kept apart."""

    def __init__(self, seconds: float, first_call_seconds: float):
        self._seconds, self._first_call = seconds, first_call_seconds
        self._start, self._warm_since, self._warm_steps = time.monotonic(), None, 0

    @property
    def warm(self) -> bool:
        """Whether the first call is over."""
        return self._warm_since is not None

    def tick(self, steps: int) -> None:
        now = time.monotonic()
        if self._warm_since is None:
            self._warm_since = now
            self._first_call += now - self._start
        else:
            self._warm_steps += steps

    def as_dict(self) -> dict:
        return {
            "seconds": self._seconds + time.monotonic() - self._start,
            "first_call_seconds": self._first_call,
        }

    def timing(self, batch_size: int) -> dict:
        """For `results.json`; images per second of what ran after the first call, evaluation included."""
        rate = batch_size * self._warm_steps / (time.monotonic() - self._warm_since) if self._warm_steps else None
        return {**self.as_dict(), "images_per_second": rate}


def _check_finite(program, state, saved, label):
    sums = program.parallel.first(state.sums)
    bad_step = int(sums.bad_step)
    remedy = f"lower its learning rate; the last good checkpoint is step {next(iter(saved.steps()), 0)}"
    if bad_step >= 0:
        names = [name for name, bad in zip(program.objective.names, np.asarray(sums.bad_terms)) if bad]
        what = ", ".join(names) or "only their weighted sum"
        raise Diverged(f"{label}: the loss of step {bad_step} is not finite (terms: {what}): {remedy}")
    if program.weighting is not None and not np.isfinite(sums.learned.outer_loss):
        raise Diverged(f"{label}: the outer loss, that of the meta images, is not finite: {remedy}")
    kept = {name: getattr(state, name) for name in ("params", "batch_stats", "opt_state", "meta")}
    kept = program.parallel.first(kept)
    if not _all_finite(kept):
        bad = [jax.tree_util.keystr(where) for where, x in jax.tree.leaves_with_path(kept) if not np.isfinite(x).all()]
        step = int(program.parallel.first(state.step))
        raise Diverged(f"{label}: after step {step}, {bad[0]} and {len(bad) - 1} more are not finite: {remedy}")


@jax.jit
def _all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _record(program, state, step, config, bar):
    """One line of `metrics.jsonl`: no clock in it, so that a resumed run writes the same."""
    sums = jax.device_get(program.parallel.first(state.sums))
    steps = int(sums.steps)
    epoch = step / program.steps_per_epoch
    record = {
        "step": step,
        "epoch": round(epoch, 4),
        "lr": float(program.schedule(step - 1)),
        "loss": float(sums.loss) / steps,
        "terms": dict(zip(program.objective.names, (sums.terms / steps).tolist())),
        "train_accuracy": 100 * float(sums.correct) / (steps * program.recipe.batch_size),
    }
    if program.weighting is not None:
        record["outer_loss"] = float(sums.learned.outer_loss) / steps
        record["weights"] = _by_group(program, sums.learned.weights, sums.learned, program.objective.names)
    if step == program.total_steps or round(epoch) % config.eval_every == 0:
        for name in ("test", "validation"):
            if len(images := getattr(program.data, name)):
                summary = summarize(program, program.evaluate(state.variables, images))
                record[name] = {key: summary[key] for key in ("all", "groups")}
        tail = program.data.groups.names[-1]
        bar.set_postfix_str(f"test {record['test']['all']:.2f} %, {tail} {record['test']['groups'][tail]:.2f} %")
    return record


def _by_group(program, totals, learned, names):
    """{name: {group: mean}} of sums `[G, len(names)]`; None for a group without an example."""
    groups = program.data.groups.names
    return {
        name: {group: float(t / n) if n else None for group, t, n in zip(groups, column, learned.examples)}
        for name, column in zip(names, totals.T)
    }


def learned_weights(program, state, features) -> dict:
    """What the weight net of a final state does, for `results.json`.

    Args:
      program, state: of the run; the state replicated.
      features: names of the weight net's inputs.

    Returns:
      Mean weights and features by group over the last epoch; and, for two features, the weights over a grid from 0 to
      twice the cross-entropy of chance (or twice the mean, where that is more): `map[term][i][j]` at `axes[0][i]`,
      `axes[1][j]`.
    """
    state = jax.device_get(program.parallel.first(state))
    learned = state.sums.learned
    found = {
        "weights": _by_group(program, learned.weights, learned, program.objective.names),
        "features": _by_group(program, learned.features, learned, features),
    }
    if len(features) == 2:
        mean = learned.features.sum(axis=0) / learned.examples.sum()
        highest = 2 * np.maximum(mean.astype(np.float64), np.log(program.data.num_classes))
        axes = np.linspace(0.0, highest, _GRID, axis=-1)
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        weights = program.weighting.weights(state.meta.params, jnp.asarray(grid, jnp.float32))
        weights = np.asarray(weights, np.float64).reshape(_GRID, _GRID, -1).round(4)
        found["axes"] = axes.round(4).tolist()
        found["map"] = {name: weights[..., t].tolist() for t, name in enumerate(program.objective.names)}
    return found


def summarize(program, sums) -> dict:
    """`metrics.summarize` with the program's classes."""
    return metrics.summarize(sums, program.data.groups, program.data.shots)


class MetricsLog:
    """`metrics.jsonl`: a JSON line for each epoch, of which `on_record` is told too."""

    def __init__(self, path: pathlib.Path, on_record: Callable[[dict], None] = lambda _: None):
        self._path, self._on_record = path, on_record

    def keep_until(self, step: int, epochs: int) -> None:
        """Drops what an interrupted run logged after the checkpoint it resumes from, and what is no record.

        Of the epochs until that step one that is missing is told; the results do not need it.
        """
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        kept = [line for line in text.splitlines(keepends=True) if self._step(line) <= step]
        if len(kept) < epochs:
            _log.warning("%s has %d of the %d epochs until step %d", self._path, len(kept), epochs, step)
        files.write_text(self._path, "".join(kept))

    @staticmethod
    def _step(line):
        """The step of a line; infinity for one that is torn or no record."""
        try:
            step = json.loads(line)["step"] if line.endswith("\n") else None
        except (ValueError, KeyError, TypeError):
            step = None
        return step if isinstance(step, int) else float("inf")

    def write(self, record: dict) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self._on_record(record)
