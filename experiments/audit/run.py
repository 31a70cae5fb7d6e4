"""Runs an audit: from files to a record of its numbers, `audit.json`, and a page."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np
import tqdm

from experiments.audit import inputs, page
from experiments.trainer.dataset import group_classes
from ltkd_jax import bias, files
from ltkd_jax.data import logits
from ltkd_jax.groups import ClassGroups


def run(
    path,
    *,
    compare: str | None = None,
    counts: str | None = None,
    imbalance: str | None = None,
    fractions: tuple[float, ...] | None = None,
    temperature: float = 4.0,
    data_dir: str = "",
    subset: str = "",
    save: str | None = None,
    output: str = "audit.html",
) -> dict:
    """Audits a model, writes the page and the record, and returns the record.

    Args:
      path: the model, see `inputs.read`.
      compare: a second model, such as its student.
      counts: see `inputs.class_counts`.
      imbalance: see `inputs.class_counts`.
      fractions: of the classes, that are groups; by default the model's own.
      temperature: of distillation.
      data_dir: see `inputs.read`.
      subset: see `inputs.read`.
      save: file to which the model's logits are written.
      output: the page; the record has the same name and ends in .json.

    Returns:
      What `build_record` returns.

    Raises:
      ValueError: the input is wrong; the message says how to correct it.
      OSError: a file cannot be written.
    """
    # Reading and evaluation take long, so the outputs are checked first.
    page_path = _check_writable("--output", output, ".html")
    record_path = page_path.with_suffix(".json")
    _check_replaceable(record_path)
    if save:
        save = _check_writable("--save", save, ".npz")
    model = inputs.read(path, data_dir=data_dir, subset=subset)
    second = None
    if compare:
        second = inputs.read(compare, data_dir=data_dir, subset=subset)
    class_counts, counts_origin = inputs.class_counts(model, counts, imbalance)
    groups = _groups(class_counts, fractions or model.fractions)
    if save:
        logits.save(
            save,
            model.test,
            model.train,
            class_counts=model.class_counts,
            class_names=model.class_names,
        )
    record = build_record(
        model, second, class_counts, counts_origin, groups, temperature
    )
    page.write(record, page_path)
    # NaN is not JSON; what has no example is None.
    files.write_text(record_path, json.dumps(record, allow_nan=False))
    return record


def build_record(
    model: inputs.Model,
    second: inputs.Model | None,
    class_counts: np.ndarray,
    counts_origin: str,
    groups: ClassGroups,
    temperature: float,
) -> dict:
    """Returns the numbers of an audit, for JSON.

    "inputs" has an entry for the test input, and one for the training input if there is
    one, with the keys "title", "is" (a description), "share", "models" (the name of
    each model and what `bias.audit` returns) and, with a second model, "divergence".

    Args:
      model: the model.
      second: a second model, or None.
      class_counts: `[C]`, training images of each class.
      counts_origin: in words, where they come from.
      groups: of the classes.
      temperature: of distillation.

    Raises:
      AuditError: the second model has other examples.
    """
    models = [model] if second is None else [model, second]
    names = [m.name for m in models]
    # Two files may have the same name in different folders.
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    assignment = np.asarray(groups.assignment)
    group_counts = np.bincount(assignment, class_counts, minlength=groups.num_groups)
    training_share = group_counts / class_counts.sum()
    class_names: Iterable = range(len(class_counts))
    if model.class_names is not None:
        class_names = model.class_names
    # A dictionary keeps each temperature once.
    temperatures = tuple(dict.fromkeys((1.0, temperature)))
    return {
        "name": " → ".join(names),
        "sources": [m.source for m in models],
        "class_names": [str(name) for name in class_names],
        "class_counts": class_counts.tolist(),
        "counts_from": counts_origin,
        "groups": {"names": list(groups.names), "assignment": assignment.tolist()},
        "training": dict(zip(groups.names, training_share.tolist())),
        "temperatures": [f"{t:g}" for t in temperatures],
        "inputs": _input_sets(model, second, names, groups, temperatures),
    }


def _input_sets(model, second, names, groups, temperatures):
    """Returns "inputs", see `build_record`."""
    titles = {"test": _test_title(model.test), "train": "training input"}
    input_sets = []
    for split, title in titles.items():
        examples = getattr(model, split)
        if examples is None:
            continue
        second_examples = None if second is None else getattr(second, split)
        numbers = _audit_input(examples, second_examples, names, groups, temperatures)
        input_sets.append({"title": title, **numbers})
    return input_sets


def _test_title(examples):
    counts = np.bincount(examples.labels, minlength=examples.num_classes)
    return "balanced input" if counts.max() <= 1.1 * counts.min() else "this input"


def _describe(examples):
    """Returns in words how many examples there are, and how many of each class."""
    counts = np.bincount(examples.labels, minlength=examples.num_classes)
    low = counts.min()
    high = counts.max()
    per_class = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    text = f"{len(examples):,} examples of {len(counts):,} classes, "
    text += f"{per_class} of each class"
    if low == 0:
        text += f"; {(counts == 0).sum()} classes have none"
    return text


def _audit_input(examples, second_examples, names, groups, temperatures):
    """Returns an entry of "inputs" without its title, see `build_record`."""
    num_examples = len(examples)
    if second_examples is not None:
        num_examples += len(second_examples)
    progress_bar = tqdm.tqdm(
        total=num_examples, desc="audit", unit="example", delay=2, dynamic_ncols=True
    )
    with progress_bar:
        options = {"temperatures": temperatures, "on_block": progress_bar.update}
        try:
            results = [bias.audit(examples, groups, student=second_examples, **options)]
        except ValueError as error:
            if second_examples is None:
                raise
            raise inputs.AuditError(f"--compare: {error}") from None
        # The divergence is of both models, and so not part of the first one's entry.
        divergence = results[0].pop("divergence", None)
        if second_examples is not None:
            results.append(bias.audit(second_examples, groups, **options))
    models = [{"name": name, **result} for name, result in zip(names, results)]
    numbers = {
        "is": _describe(examples),
        "share": results[0]["share"],
        "models": models,
    }
    if divergence is not None:
        numbers["divergence"] = divergence
    return numbers


def _check_writable(option, path, suffix):
    """Returns a path to write to; raises AuditError if that is not possible."""
    path = pathlib.Path(path)
    if path.suffix != suffix or not path.parent.is_dir():
        raise inputs.AuditError(
            f"{option}={path} must be a file in an existing folder, its name ending in "
            f"{suffix}"
        )
    return path


def _check_replaceable(path):
    """Refuses to overwrite a file that is not an audit's, such as a run's results."""
    if path.exists() and "counts_from" not in path.read_text(
        encoding="utf-8", errors="replace"
    ):
        raise inputs.AuditError(
            f"{path} exists and is no audit's: give another --output"
        )


def _groups(class_counts, fractions):
    try:
        return group_classes(class_counts, fractions)
    except ValueError as error:
        text = ",".join(f"{fraction:g}" for fraction in fractions)
        raise inputs.AuditError(f"--groups={text}: {error}") from None
