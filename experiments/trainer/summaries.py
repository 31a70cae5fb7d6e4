"""The numbers of a training for `metrics.jsonl` and `results.json`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.trainer.trainer import Trainer
from ltkd_jax import metrics
from ltkd_jax.training.state import TrainState

_GRID_SIZE = 16  # points on each axis of the map from features to weights


def epoch_record(
    trainer: Trainer, state: TrainState, step: int, eval_every: int
) -> dict[str, Any]:
    """Returns the record of an epoch for `metrics.jsonl`.

    It has no time in it, so that a resumed run writes the same record.

    Args:
      trainer: of the network.
      state: replicated, at the end of the epoch.
      step: the number of steps that are done.
      eval_every: epochs between evaluations; the last epoch always has one.
    """
    sums = jax.device_get(trainer.parallel.unreplicate(state.sums))
    num_steps = int(sums.steps)
    num_examples = num_steps * trainer.recipe.batch_size
    epoch = step / trainer.steps_per_epoch
    terms = trainer.objective.names
    record: dict[str, Any] = {
        "step": step,
        "epoch": round(epoch, 4),
        "lr": float(trainer.schedule(step - 1)),
        "loss": float(sums.loss) / num_steps,
        "terms": dict(zip(terms, (sums.terms / num_steps).tolist())),
        "train_accuracy": 100 * float(sums.correct) / num_examples,
    }
    if trainer.loss_weighting is not None:
        learned = sums.learned
        record["outer_loss"] = float(learned.outer_loss) / num_steps
        record["weights"] = _means_by_group(
            trainer, learned.weights, learned.examples, terms
        )
    if step == trainer.total_steps or round(epoch) % eval_every == 0:
        for name, summary in evaluate_held_out(trainer, state.variables).items():
            if summary is not None:
                record[name] = {key: summary[key] for key in ("all", "groups")}
    return record


def evaluate_held_out(trainer: Trainer, variables: Any) -> dict[str, Any]:
    """Returns the accuracies on the test and the validation set, None for an empty one.

    Args:
      trainer: of the network.
      variables: of the network, replicated.
    """
    data = trainer.data
    summaries: dict[str, Any] = {}
    for name, images in (("test", data.test), ("validation", data.validation)):
        summaries[name] = None
        if len(images):
            summaries[name] = summarize(trainer, trainer.evaluate(variables, images))
    return summaries


def summarize(trainer: Trainer, sums: metrics.EvalSums) -> dict[str, Any]:
    """Returns the accuracies of `metrics.summarize` for the trainer's groups."""
    return metrics.summarize(sums, trainer.data.groups, trainer.data.shots)


def learned_weights(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """Returns a description of the weight net's final state, for `results.json`.

    Args:
      trainer: with learned weights.
      state: replicated.

    Returns:
      The mean weights and features of each group over the last epoch. With two
      features, also the weights on a grid of feature values: `map[term][i][j]` at
      `axes[0][i]` and `axes[1][j]`. Each axis goes from 0 to twice the cross-entropy of
      uniform predictions, or to twice the mean feature if that is larger.
    """
    assert trainer.spec.loss_weighting is not None
    state = jax.device_get(trainer.parallel.unreplicate(state))
    learned = state.sums.learned
    features = trainer.spec.loss_weighting.features
    terms = trainer.objective.names
    summary: dict[str, Any] = {
        "weights": _means_by_group(trainer, learned.weights, learned.examples, terms),
        "features": _means_by_group(
            trainer, learned.features, learned.examples, features
        ),
    }
    if len(features) == 2:
        mean_features = learned.features.sum(axis=0) / learned.examples.sum()
        summary |= _weight_map(trainer, state.meta.params, mean_features)
    return summary


def _weight_map(
    trainer: Trainer, meta_params: Any, mean_features: np.ndarray
) -> dict[str, Any]:
    """Returns the weights on a grid of two features; see `learned_weights`."""
    assert trainer.loss_weighting is not None
    uniform_entropy = np.log(trainer.data.num_classes)
    highest = 2 * np.maximum(mean_features.astype(np.float64), uniform_entropy)
    axes = np.linspace(0.0, highest, _GRID_SIZE, axis=-1)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = trainer.loss_weighting.compute_weights(
        meta_params, jnp.asarray(grid, jnp.float32)
    )
    weights_map = np.asarray(weights, np.float64).reshape(_GRID_SIZE, _GRID_SIZE, -1)
    weights_map = weights_map.round(4)
    return {
        "axes": axes.round(4).tolist(),
        "map": {
            term: weights_map[..., t].tolist()
            for t, term in enumerate(trainer.objective.names)
        },
    }


def _means_by_group(
    trainer: Trainer, sums: np.ndarray, num_examples: np.ndarray, names: Any
) -> dict[str, dict[str, float | None]]:
    """Returns `{name: {group: mean}}`; None for a group without an example.

    Args:
      trainer: for its groups.
      sums: `[G, len(names)]`, sums over the examples of each group.
      num_examples: `[G]`.
      names: of the columns.
    """
    means: dict[str, dict[str, float | None]] = {}
    for name, column in zip(names, sums.T):
        means[name] = {}
        for group, total, number in zip(
            trainer.data.groups.names, column, num_examples
        ):
            means[name][group] = float(total / number) if number else None
    return means
