"""How biased is a model towards the classes that it saw often? From its logits, whatever trained it.

    python -m experiments.audit --logits=teacher.npz [--against=student.npz]
    python -m experiments.audit --checkpoint=runs/teachers/HASH [--save=teacher.npz]

FILE.npz holds `logits` [N, C] and `labels` [N], on balanced input at best; and, where there are, `class_counts` [C],
training images by class, `class_names` [C], `train_logits` and `train_labels` (ltkd_jax/data/logits.py):

    np.savez("teacher.npz", logits=logits, labels=labels, class_counts=counts)

It prints tables and writes audit.html and audit.json: the mass on head, medium and tail classes; how much of the loss
is about the group and how much about the class within it; calibration by group; which classes are given away.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import tqdm

from experiments import runtime
from experiments.audit import inputs, page, summary
from ltkd_jax import bias, files
from ltkd_jax.data import logits
from ltkd_jax.groups import ClassGroups

# The audit.


def audit(
    model: inputs.Model, against: inputs.Model | None, counts, counts_from: str, groups, temperature: float
) -> dict:
    """What an audit finds, for JSON; see `bias.summarize`.

    Raises:
      LogitsError: as `Logits.blocks`.
      given.AuditError: a second model of other examples.
    """
    names = _different([m.name for m in (model, against) if m])
    assignment = np.asarray(groups.assignment)
    shares = np.bincount(assignment, counts, minlength=groups.num_groups) / counts.sum()
    class_names = model.class_names if model.class_names is not None else range(len(counts))
    temperatures = tuple(dict.fromkeys((1.0, temperature)))
    audited = []
    for part in ("test", "train"):
        mine, theirs = getattr(model, part), getattr(against, part, None)
        if mine is not None:
            title = "training input" if part == "train" else _title(mine)
            audited.append({"title": title, **_audited(mine, theirs, names, groups, temperatures)})
    return {
        "name": " → ".join(names),
        "sources": [m.source for m in (model, against) if m],
        "class_names": [name.decode() if isinstance(name, bytes) else str(name) for name in class_names],
        "class_counts": [float(count) for count in counts],
        "counts_from": counts_from,
        "groups": {"names": list(groups.names), "assignment": assignment.tolist()},
        "training": {name: float(share) for name, share in zip(groups.names, shares)},
        "temperatures": [f"{t:g}" for t in temperatures],
        "inputs": audited,
    }


def _different(names):
    return names if len(set(names)) == len(names) else [f"{name} ({i + 1})" for i, name in enumerate(names)]


def _title(examples):
    present = np.bincount(examples.labels, minlength=examples.num_classes)
    return "balanced input" if present.max() <= 1.1 * present.min() else "this input"


def _is(examples):
    present = np.bincount(examples.labels, minlength=examples.num_classes)
    low, high = present.min(), present.max()
    each = f"{low:,} of each class" if low == high else f"{low:,} to {high:,} of each class"
    missing = f"; {(present == 0).sum()} classes have none" if low == 0 else ""
    return f"{len(examples):,} examples of {len(present):,} classes, {each}{missing}"


def _audited(mine, theirs, names, groups, temperatures):
    if theirs is not None:
        _check_same(mine, theirs)
    both, found = [mine] if theirs is None else [mine, theirs], []
    with tqdm.tqdm(total=len(both) * len(mine), desc="audit", unit="example", delay=2, dynamic_ncols=True) as bar:
        sums = [bias.measure(mine, groups, temperatures, theirs, bar.update)]
        if theirs is not None:
            sums.append(bias.measure(theirs, groups, temperatures, None, bar.update))
    found = [{"name": name, **bias.summarize(of)} for name, of in zip(names, sums)]
    split = {"divergence": bias.divergence(sums[0])} if theirs is not None else {}
    return {"is": _is(mine), "share": found[0]["share"], "models": found, **split}


def _check_same(mine, theirs):
    if (len(mine), mine.num_classes) != (len(theirs), theirs.num_classes):
        raise inputs.AuditError(
            f"{theirs.where} has {len(theirs)} examples of {theirs.num_classes} classes, {mine.where} {len(mine)} of "
            f"{mine.num_classes}: --against must be a second model's logits of the same examples"
        )
    different = np.flatnonzero(mine.labels != theirs.labels)
    if different.size:
        row = different[0]
        raise inputs.AuditError(
            f"row {row} has label {theirs.labels[row]} in {theirs.where} and {mine.labels[row]} in {mine.where} "
            f"({different.size} rows differ): --against must hold the same examples in the same order"
        )


# The command.


def _fractions(text):
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions of the classes, such as 0.33,0.34,0.33") from None


def _temperature(text):
    try:
        if 1e-3 <= float(text) <= 1e3:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0.001 to 1000")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--logits", metavar="FILE.npz", help="logits and labels of any model")
    what.add_argument("--checkpoint", metavar="FOLDER", help="a teacher's folder, or the work directory of a run")
    parser.add_argument("--against", metavar="PATH", help="a second model, its student say, as either of these")
    parser.add_argument("--counts", metavar="FILE", help="training images of each class: .json, .npy or text")
    parser.add_argument("--imbalance", metavar="GAMMA[,N_MAX]", help="or exponential ones, in the order of classes")
    parser.add_argument("--groups", type=_fractions, metavar="FRACTIONS",
                        help="of the classes, the most frequent first; default: 0.33,0.34,0.33")  # fmt: skip
    parser.add_argument("--temperature", type=_temperature, default=4.0, help="of distillation; default: 4")
    parser.add_argument("--data_dir", default="", help="of the checkpoint's data set")
    parser.add_argument("--subset", default="", metavar="LIST", help="of its training images, if it had one")
    parser.add_argument("--save", metavar="FILE.npz", help="write the checkpoint's logits, as --logits reads them")
    parser.add_argument("--out", default="audit.html", help="the page, with a .json beside it; default: audit.html")
    return parser


def main(argv=None):
    parser = _parser()
    options = parser.parse_args(argv)
    if options.save and not options.checkpoint:
        parser.error("--save writes the logits of a --checkpoint")
    if options.counts is not None and options.imbalance is not None:
        parser.error("give either --counts or --imbalance")
    runtime.initialize()
    try:
        out = _writable("--out", options.out, ".html")
        _spare(out.with_suffix(".json"))
        save = _writable("--save", options.save, ".npz") if options.save else None
        where = dict(data_dir=options.data_dir, subset=options.subset)
        model = inputs.read(options.checkpoint or options.logits, **where)
        against = inputs.read(options.against, **where) if options.against else None
        counts, known_from = inputs.class_counts(model, options.counts, options.imbalance)
        groups = _groups(counts, options.groups or model.fractions)
        if save:
            named = dict(class_counts=model.class_counts, class_names=model.class_names)
            logits.save(save, model.test, model.train, **named)
        found = audit(model, against, counts, known_from, groups, options.temperature)
        numbers = json.dumps(found, allow_nan=False)
        page.write(found, out)
        files.write_text(out.with_suffix(".json"), numbers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{summary.console(found)}\n\n{out}   {out.with_suffix('.json')}")


def _writable(option, path, suffix):
    """A path to write to, checked before the work."""
    path = pathlib.Path(path)
    if path.suffix != suffix or not path.parent.is_dir():
        raise inputs.AuditError(
            f"{option}={path} must be a file in a folder that is there, its name ending in {suffix}"
        )
    return path


def _spare(path):
    """Refuses to write over what is no audit, such as a run's results."""
    if path.exists() and "counts_from" not in path.read_text(errors="replace"):
        raise inputs.AuditError(f"{path} is there and no audit's: give another --out")


def _groups(counts, fractions):
    try:
        return ClassGroups.from_counts(counts, fractions=fractions)
    except ValueError as error:
        raise inputs.AuditError(f"--groups={','.join(f'{f:g}' for f in fractions)}: {error}") from None


if __name__ == "__main__":
    main()
