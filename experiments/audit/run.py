"""Runs an audit: from files to a record of its numbers, `audit.json`, and a page."""

import json
import pathlib

import numpy as np
import tqdm

from experiments.audit import inputs, page
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
    """Audits a model, writes the page and the record beside it, and returns the record, see `build_record`.

    Args:
      path, compare: the model, and a second one such as its student; see `inputs.read`.
      counts, imbalance: see `inputs.class_counts`.
      fractions: of the classes, that are groups; by default the model's own.
      temperature: of distillation.
      data_dir, subset: see `inputs.read`.
      save: file to which the model's logits are written.
      output: the page; the record has the same name and ends in .json.

    Raises:
      ValueError: what is wrong with the input, and the remedy.
      OSError: a file cannot be written.
    """
    output = _check_writable("--output", output, ".html")
    record_path = output.with_suffix(".json")
    _check_replaceable(record_path)
    if save:
        save = _check_writable("--save", save, ".npz")
    model = inputs.read(path, data_dir=data_dir, subset=subset)
    compared = (
        inputs.read(compare, data_dir=data_dir, subset=subset) if compare else None
    )
    class_counts, counts_origin = inputs.class_counts(model, counts, imbalance)
    groups = _groups(class_counts, fractions or model.fractions)
    if save:
        by_class = {
            "class_counts": model.class_counts,
            "class_names": model.class_names,
        }
        logits.save(save, model.test, model.train, **by_class)
    record = build_record(
        model, compared, class_counts, counts_origin, groups, temperature
    )
    page.write(record, output)
    files.write_text(record_path, json.dumps(record, allow_nan=False))
    return record


def build_record(
    model: inputs.Model,
    compared: inputs.Model | None,
    class_counts: np.ndarray,
    counts_origin: str,
    groups: ClassGroups,
    temperature: float,
) -> dict:
    """Returns the numbers of an audit, for JSON.

    "inputs" holds for test and training input: "title", "is" (what it is, in words), "share", "models" (for each model
    its name and `bias.audit`) and, with a second model, "divergence".

    Raises:
      AuditError: a second model on other examples.
    """
    models = [model] if compared is None else [model, compared]
    names = [part.name for part in models]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    assignment = np.asarray(groups.assignment)
    training_share = (
        np.bincount(assignment, class_counts, minlength=groups.num_groups)
        / class_counts.sum()
    )
    class_names = (
        range(len(class_counts)) if model.class_names is None else model.class_names
    )
    temperatures = tuple(dict.fromkeys((1.0, temperature)))
    input_sets = []
    for part, title in (("test", _test_title(model.test)), ("train", "training input")):
        examples = getattr(model, part)
        if examples is not None:
            other = None if compared is None else getattr(compared, part)
            numbers = _audit_input(examples, other, names, groups, temperatures)
            input_sets.append({"title": title, **numbers})
    return {
        "name": " → ".join(names),
        "sources": [part.source for part in models],
        "class_names": [
            name.decode() if isinstance(name, bytes) else str(name)
            for name in class_names
        ],
        "class_counts": class_counts.tolist(),
        "counts_from": counts_origin,
        "groups": {"names": list(groups.names), "assignment": assignment.tolist()},
        "training": dict(zip(groups.names, training_share.tolist())),
        "temperatures": [f"{t:g}" for t in temperatures],
        "inputs": input_sets,
    }


def _test_title(examples):
    counts = np.bincount(examples.labels, minlength=examples.num_classes)
    return "balanced input" if counts.max() <= 1.1 * counts.min() else "this input"


def _describe(examples):
    counts = np.bincount(examples.labels, minlength=examples.num_classes)
    low, high = counts.min(), counts.max()
    each = (
        f"{low:,} of each class"
        if low == high
        else f"{low:,} to {high:,} of each class"
    )
    missing = f"; {(counts == 0).sum()} classes have none" if low == 0 else ""
    return f"{len(examples):,} examples of {len(counts):,} classes, {each}{missing}"


def _audit_input(examples, compared, names, groups, temperatures):
    total = len(examples) if compared is None else len(examples) + len(compared)
    with tqdm.tqdm(
        total=total, desc="audit", unit="example", delay=2, dynamic_ncols=True
    ) as bar:
        options = {"temperatures": temperatures, "on_block": bar.update}
        try:
            results = [bias.audit(examples, groups, student=compared, **options)]
        except ValueError as error:
            if compared is None:
                raise
            raise inputs.AuditError(f"--compare: {error}") from None
        divergence = results[0].pop("divergence", None)
        if compared is not None:
            results.append(bias.audit(compared, groups, **options))
    models = [{"name": name, **result} for name, result in zip(names, results)]
    numbers = {
        "is": _describe(examples),
        "share": results[0]["share"],
        "models": models,
    }
    return numbers if divergence is None else {**numbers, "divergence": divergence}


def _check_writable(option, path, suffix):
    """Returns a path to write to; checked before the work."""
    path = pathlib.Path(path)
    if path.suffix != suffix or not path.parent.is_dir():
        raise inputs.AuditError(
            f"{option}={path} must be a file in an existing folder, its name ending in {suffix}"
        )
    return path


def _check_replaceable(path):
    """Refuses to write over what is no audit, such as a run's results."""
    if path.exists() and "counts_from" not in path.read_text(errors="replace"):
        raise inputs.AuditError(
            f"{path} exists and is no audit's: give another --output"
        )


def _groups(class_counts, fractions):
    try:
        return ClassGroups.from_counts(class_counts, fractions=fractions)
    except ValueError as error:
        raise inputs.AuditError(
            f"--groups={','.join(f'{f:g}' for f in fractions)}: {error}"
        ) from None
