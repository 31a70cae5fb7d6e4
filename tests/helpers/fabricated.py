"""Fabricated results with the structure of real ones, and a parser of pages."""

import html.parser
import json
import math
import random

from configs import common

GROUP_NAMES = ("head", "medium", "tail")
# Typical accuracies of head, medium and tail.
ACCURACIES = {
    "ce": (70, 30, 2),
    "kd": (72, 28, 3),
    "dkd": (71, 36, 6),
    "ltkd": (66, 44, 20),
    "ltkd_bs": (62, 47, 24),
}


def _assignment(num_classes):
    """Returns the group of each class; the classes are sorted by count."""
    head_end = round(0.33 * num_classes)
    medium_end = round(0.67 * num_classes)
    groups = [0] * head_end + [1] * (medium_end - head_end)
    return groups + [2] * (num_classes - medium_end)


def _evaluation(levels, num_classes, rng, *, shots=True):
    """Returns a `test` entry, with class accuracies around a level of each group."""
    assignment = _assignment(num_classes)
    per_class = []
    for group in assignment:
        per_class.append(min(100, max(0, levels[group] + rng.gauss(0, 9))))
    means = {}
    for group, name in enumerate(GROUP_NAMES):
        members = [v for v, g in zip(per_class, assignment) if g == group]
        means[name] = sum(members) / len(members)
    confusion = [[0.5 * (100 - level)] * 3 for level in levels]
    for group, level in enumerate(levels):
        confusion[group][group] = level
    few = means["tail"] if shots else None
    return {
        "all": sum(per_class) / num_classes,
        "per_class": per_class,
        "groups": means,
        "shots": {"many": means["head"], "medium": few, "few": few},
        "ece": 12.3 + rng.gauss(0, 1),
        "confusion": confusion,
        "group_mass": dict(zip(GROUP_NAMES, (0.5, 0.3, 0.2))),
    }


def _config(data, imbalance, method):
    config = common.base(
        data, teacher="resnet32x4", student="resnet8x4", imbalance=float(imbalance)
    )
    config = json.loads(config.to_json())
    config["method"] = {"name": method, "temperature": 4.0, "alpha": 1.0}
    return config


def _teacher(classes, shots):
    """Returns a teacher's results."""
    return {
        "hash": "7e4c4e70",
        "test": _evaluation((71, 33, 8), classes, random.Random(1), shots=shots),
        "group_mass": {
            "long_tailed": dict(zip(GROUP_NAMES, (0.8, 0.17, 0.03))),
            "balanced": dict(zip(GROUP_NAMES, (0.65, 0.29, 0.06))),
        },
    }


def fabricate(
    method="ltkd",
    seed=0,
    *,
    classes=10,
    imbalance=100,
    teacher=True,
    shots=True,
    epochs=240,
    **extra,
):
    """Returns a finished run.

    Args:
      method: its name.
      seed: of the student.
      classes: how many there are.
      imbalance: of the class counts.
      teacher: whether it has the results of a teacher.
      shots: whether the few-shot accuracies are numbers; else they are None.
      epochs: length of training.
      **extra: other entries of the results.
    """
    rng = random.Random(f"{method}{seed}{classes}")
    config = _config(f"cifar{classes}", imbalance, method)
    config["seed"] = seed
    n_max = 500 if classes > 10 else 5000
    config["data"]["n_max"] = n_max
    config["train"]["epochs"] = epochs
    counts = [int(n_max * imbalance ** (-c / (classes - 1))) for c in range(classes)]
    levels = ACCURACIES.get(method, (65, 40, 12))
    command_config = f"configs/cifar{classes}lt.py:{method},seed={seed}"
    return {
        "config_hash": f"{method}-{classes}-{seed}",
        "config": config,
        "content": dict.fromkeys(("teacher", "subset", "data")),
        "seeds": {"split": 0, "teacher": 0, "student": seed},
        "train_images": sum(counts),
        "class_counts": counts,
        "epochs": epochs,
        "test": _evaluation(levels, classes, rng, shots=shots),
        "group_assignment": _assignment(classes),
        "teacher": _teacher(classes, shots) if teacher else None,
        "validation": None,
        "timing": {
            "seconds": 4321.0,
            "images_per_second": 5123.0,
            "compile_seconds": 31.0,
        },
        "device": "NVIDIA H100",
        "precision": "tf32",
        "versions": {"jax": "0.10.2"},
        "commit": "abc1234",
        "command": f"python -m experiments.main --config={command_config}",
        "source": f"{method}-s{seed}",
        "finished": True,
        "metrics": [],
        **extra,
    }


def fabricate_learned(seed=0, **extra):
    """Returns a finished run of BiKD, with weights that are larger for the tail."""
    weights = {
        "ce": dict(zip(GROUP_NAMES, (0.2, 0.4, 0.8))),
        "kd": dict(zip(GROUP_NAMES, (0.2, 0.4, 0.6))),
    }
    weight_map = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]
    loss_weighting = {
        "weights": weights,
        "features": {
            "student_ce": dict(zip(GROUP_NAMES, (0.1, 0.5, None))),
            "teacher_ce": dict(zip(GROUP_NAMES, (0.2, 0.9, 1.5))),
        },
        "axes": [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]],
        "map": {"ce": weight_map, "kd": weight_map},
    }
    metrics = [{"step": e, "epoch": float(e), "weights": weights} for e in range(1, 13)]
    run = fabricate(
        "kd", seed, loss_weighting=loss_weighting, outer_images=1000, metrics=metrics
    )
    run["config"]["loss_weighting"] = {"name": "bilevel", "update_every": 5}
    return run | extra


def logged_metrics(run, epochs=240):
    """Returns the records of a run, with test accuracies every tenth epoch."""
    records = []
    for epoch in range(1, epochs + 1):
        progress = 1 - math.exp(-3 * epoch / epochs)
        record = {
            "step": 170 * epoch,
            "epoch": epoch,
            "lr": 0.05,
            "loss": 4 - 3 * progress,
            "train_accuracy": 95 * progress,
        }
        record["terms"] = {
            "ce": 4.0 - 3 * progress,
            "inter": 0.8 - 0.7 * progress,
            "intra": 2.2 - 1.2 * progress,
        }
        if epoch % 10 == 0:
            test = run["test"]
            groups = {name: value * progress for name, value in test["groups"].items()}
            record["test"] = {"all": test["all"] * progress, "groups": groups}
        records.append(record)
    return records


def runs_with(accuracies, **extra):
    """Returns runs with given accuracies, {method: [a value for each seed]}."""
    runs = []
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = fabricate(method, seed, **extra)
            groups = dict.fromkeys(GROUP_NAMES, accuracy)
            run["test"] |= {"all": accuracy, "groups": groups}
            runs.append(run)
    return runs


def sweep(imbalances=(10, 100), methods=("ce", "kd", "ltkd"), seeds=2, **extra):
    """Returns runs whose accuracies differ by method, imbalance and seed."""
    runs = []
    for imbalance in imbalances:
        for rank, method in enumerate(methods):
            for seed in range(seeds):
                run = fabricate(method, seed, imbalance=imbalance, **extra)
                run["test"]["all"] = 70.0 + rank - 10 * (imbalance == 100) + seed / 4
                run["test"]["groups"] = {
                    "head": 80.0 - rank,
                    "medium": 60.0,
                    "tail": 20.0 + 5 * rank + seed / 2,
                }
                runs.append(run)
    return runs


def save(folder, run, epochs=24):
    """Writes a run as a work directory, and returns the folder."""
    folder.mkdir(parents=True)
    unsaved = ("source", "finished", "metrics")
    results = {key: value for key, value in run.items() if key not in unsaved}
    (folder / "results.json").write_text(json.dumps(results))
    records = run["metrics"] or logged_metrics(run, epochs)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


class ParsedPage(html.parser.HTMLParser):
    """Parses a page, and checks that its elements nest.

    Attributes:
      tags: of all elements.
      ids: of all elements that have one.
      labels: of the figures.
    """

    VOID = {"meta", "br", "hr", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.ids = []
        self.labels = []
        self._open_tags = []
        self._texts = []
        self.feed(text)
        self.close()
        assert not self._open_tags

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self._open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if attributes.get("role") == "img":
            self.labels.append(attributes["aria-label"])

    def handle_endtag(self, tag):
        assert self._open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open_tags:
            self._texts.append(data)

    @property
    def text(self):
        """Returns the text of the page."""
        return "".join(self._texts).replace("\u00a0", " ")
