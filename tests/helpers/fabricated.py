"""Fabricated results with the shape of real ones, and a parser of pages."""

import html.parser
import json
import math
import random

from configs import common

NAMES = ("head", "medium", "tail")
STRENGTH = {
    "ce": (70, 30, 2),
    "kd": (72, 28, 3),
    "dkd": (71, 36, 6),
    "ltkd": (66, 44, 20),
    "ltkd_bs": (62, 47, 24),
}


def _assignment(classes):
    """Returns the groups of classes that are sorted by count."""
    return [
        0 if c < round(0.33 * classes) else 1 if c < round(0.67 * classes) else 2
        for c in range(classes)
    ]


def _measured(levels, classes, rng, *, shots=True):
    """Returns a `test` entry whose classes scatter about a level for each group."""
    groups = _assignment(classes)
    per_class = [min(100, max(0, levels[g] + rng.gauss(0, 9))) for g in groups]
    means = {}
    for g, name in enumerate(NAMES):
        members = [v for v, group in zip(per_class, groups) if group == g]
        means[name] = sum(members) / len(members)
    confusion = [[0.5 * (100 - level)] * 3 for level in levels]
    for g, level in enumerate(levels):
        confusion[g][g] = level
    return {
        "all": sum(per_class) / classes,
        "per_class": per_class,
        "groups": means,
        "shots": {"many": means["head"]}
        | dict.fromkeys(("medium", "few"), means["tail"] if shots else None),
        "ece": 12.3 + rng.gauss(0, 1),
        "confusion": confusion,
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
    """Returns a finished run."""
    rng = random.Random(f"{method}{seed}{classes}")
    n_max = 500 if classes > 10 else 5000
    counts = [int(n_max * imbalance ** (-c / (classes - 1))) for c in range(classes)]
    config = common.base(
        f"cifar{classes}",
        teacher="resnet32x4",
        student="resnet8x4",
        imbalance=float(imbalance),
    )
    config = json.loads(config.to_json())
    config["seed"], config["data"]["n_max"], config["train"]["epochs"] = (
        seed,
        n_max,
        epochs,
    )
    config["method"] = {"name": method, "temperature": 4.0, "alpha": 1.0}
    mass = {
        "long_tailed": dict(zip(NAMES, (0.8, 0.17, 0.03))),
        "balanced": dict(zip(NAMES, (0.65, 0.29, 0.06))),
    }
    test = _measured((71, 33, 8), classes, random.Random(1), shots=shots)
    return {
        "config_hash": f"{method}-{classes}-{seed}",
        "config": config,
        "content": dict.fromkeys(("teacher", "subset", "data")),
        "seeds": {"split": 0, "teacher": 0, "student": seed},
        "train_images": sum(counts),
        "class_counts": counts,
        "epochs": epochs,
        "test": _measured(
            STRENGTH.get(method, (65, 40, 12)), classes, rng, shots=shots
        ),
        "group_assignment": _assignment(classes),
        "teacher": {"hash": "7e4c4e70", "test": test, "group_mass": mass}
        if teacher
        else None,
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
        "command": f"python -m experiments.main --config=configs/cifar{classes}lt.py:{method},seed={seed}",
        "source": f"{method}-s{seed}",
        "finished": True,
        "metrics": [],
        **extra,
    }


def metrics_of(run, epochs=240):
    """Returns what a run of this length could have logged, with test accuracies every tenth epoch."""
    records = []
    for epoch in range(1, epochs + 1):
        done = 1 - math.exp(-3 * epoch / epochs)
        record = {
            "step": 170 * epoch,
            "epoch": epoch,
            "lr": 0.05,
            "loss": 4 - 3 * done,
            "train_accuracy": 95 * done,
        }
        record["terms"] = {
            "ce": 4.0 - 3 * done,
            "inter": 0.8 - 0.7 * done,
            "intra": 2.2 - 1.2 * done,
        }
        if epoch % 10 == 0:
            groups = {name: v * done for name, v in run["test"]["groups"].items()}
            record["test"] = {"all": run["test"]["all"] * done, "groups": groups}
        records.append(record)
    return records


def runs_of(accuracies, **extra):
    """Returns runs of methods with accuracies over all classes, {method: [a value for each seed]}."""
    runs = []
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = fabricate(method, seed, **extra)
            run["test"] |= {"all": accuracy, "groups": dict.fromkeys(NAMES, accuracy)}
            runs.append(run)
    return runs


def sweep(imbalances=(10, 100), methods=("ce", "kd", "ltkd"), seeds=2, **extra):
    """Returns runs of every method at every imbalance, whose accuracies differ by method, imbalance and seed."""
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


def learned(seed=0, **extra):
    """Returns a finished BiKD run: weights that rise for the tail, over twelve epochs, and a map."""
    weights = {
        term: dict(zip(NAMES, (0.2, 0.4, level)))
        for term, level in (("ce", 0.8), ("kd", 0.6))
    }
    loss_weighting = {
        "weights": weights,
        "features": {
            "student_ce": dict(zip(NAMES, (0.1, 0.5, None))),
            "teacher_ce": dict(zip(NAMES, (0.2, 0.9, 1.5))),
        },
        "axes": [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]],
        "map": {
            term: [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]
            for term in weights
        },
    }
    metrics = [{"step": e, "epoch": float(e), "weights": weights} for e in range(1, 13)]
    run = fabricate(
        "kd", seed, loss_weighting=loss_weighting, outer_images=1000, metrics=metrics
    )
    run["config"]["loss_weighting"] = {"name": "bilevel", "update_every": 5}
    return run | extra


def save(folder, run, epochs=24):
    """Writes a fabricated run as a work directory."""
    folder.mkdir(parents=True)
    results = {
        key: value
        for key, value in run.items()
        if key not in ("source", "finished", "metrics")
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        json.dumps(record) + "\n"
        for record in run["metrics"] or metrics_of(run, epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


class Page(html.parser.HTMLParser):
    """Parses a page, checks that its elements nest, and keeps its text, its tags, and the labels of its figures."""

    VOID = {"meta", "br", "hr", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.labels, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.labels += (
            [attributes["aria-label"]] if attributes.get("role") == "img" else []
        )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words).replace("\u00a0", " ")
