"""Trains from Python what `python -m experiments.main` trains from the command line."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from experiments import runtime
from experiments.config.load import load_config, set_values
from experiments.config.spec import resolve
from experiments.reporting import load, report_page
from experiments.trainer import run
from ltkd_jax import files, inference
from ltkd_jax.training import hosts


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """Holds a finished run.

    Attributes:
      workdir: its work directory.
      results: the content of `results.json`.
      report: the page of the run.
    """

    workdir: pathlib.Path
    results: dict[str, Any] = dataclasses.field(repr=False)
    report: pathlib.Path

    def classifier(self) -> inference.Classifier:
        """Returns the student by itself, see `ltkd_jax.inference`."""
        return inference.load(self.workdir)


def train(
    config: str | ml_collections.ConfigDict,
    workdir: str | os.PathLike[str] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    command: str = "",
    on_record: Callable[[dict], None] = lambda _: None,
) -> FinishedRun:
    """Trains a student, and its teacher first if there is none yet.

    The same call resumes an interrupted run, and returns a finished one at once. It
    sets jax's options as the command does, see `runtime.initialize`: call it before jax
    computes anything.

        finished = train("configs/digitslt.py:ltkd,smoke", values={"train.lr": 0.1})
        logits, labels = finished.classifier()(images)

    Args:
      config: "configs/x.py:argument", or the config that such a file returns.
      workdir: the work directory; runs/<what is trained> by default.
      values: of config keys, by dotted paths such as "train.lr".
      command: recorded in the results, to repeat the run.
      on_record: called with each record of `metrics.jsonl`, see `trainer.run.run`.

    Raises:
      ConfigError: a bad config, or data that do not fit it.
      StoppedError, DivergedError: see `trainer.run.run`.
    """
    runtime.initialize()

    def make_spec():
        resolved = load_config(config) if isinstance(config, str) else config
        resolved = ml_collections.ConfigDict(resolved.to_dict()).lock()
        set_values(resolved, values or {}, f"values={values}")
        return resolve(resolved)

    spec = hosts.run_on_all(make_spec)
    folder = pathlib.Path("runs") / spec.name
    if workdir is not None:
        folder = pathlib.Path(files.expand_user(workdir))
    results = run.run(spec, folder, command=command, on_record=on_record)
    report = folder / "report.html"
    if hosts.is_primary():
        report_page.write_report([load.load(folder)], report)
    return FinishedRun(folder, results, report)
