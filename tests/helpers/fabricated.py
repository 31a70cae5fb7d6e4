"""Fabricated results with the shape of real ones, and a parser of pages."""

import html.parser
import json
import math
import random

NAMES = ("head", "medium", "tail")


STRENGTH = {"ce": (70, 30, 2), "kd": (72, 28, 3), "dkd": (71, 36, 6), "ltkd": (66, 44, 20), "ltkd_bs": (62, 47, 24)}


def assignment_of(classes):
    """Head, medium and tail by rank, for classes that are sorted already."""
    return [0 if c < round(0.33 * classes) else 1 if c < round(0.67 * classes) else 2 for c in range(classes)]


def measured(levels, classes, rng, *, shots=True):
    """A `test` entry whose classes scatter about a level for each group."""
    groups = assignment_of(classes)
    per_class = [min(100, max(0, levels[g] + rng.gauss(0, 9))) for g in groups]
    means = {}
    for g, name in enumerate(NAMES):
        members = [v for v, group in zip(per_class, groups) if group == g]
        means[name] = sum(members) / len(members)
    confusion = [[levels[g] + 0.3 * (100 - levels[g]) if g == k else 0.0 for k in range(3)] for g in range(3)]
    for g, row in enumerate(confusion):
        near, far = (k for k in range(3) if k != g)
        row[near], row[far] = 0.7 * (100 - row[g]), 0.3 * (100 - row[g])
    return {
        "all": sum(per_class) / classes,
        "per_class": per_class,
        "groups": means,
        "shots": {
            "many": means["head"],
            "medium": means["medium"] if shots else None,
            "few": means["tail"] if shots else None,
        },
        "ece": 12.3 + rng.gauss(0, 1),
        "confusion": confusion,
    }


def fabricate(method="ltkd", seed=0, *, classes=10, imbalance=100, teacher=True, shots=True, epochs=240, **extra):
    """A finished run's results, with the same shape as those of a real one."""
    rng = random.Random(f"{method}{seed}{classes}")
    n_max = 500 if classes > 10 else 5000
    counts = [int(n_max * imbalance ** (-c / (classes - 1))) for c in range(classes)]
    hyper = {"name": method, "temperature": 4.0, "alpha": 1.0}
    balanced = {"head": 0.65, "medium": 0.29, "tail": 0.06}
    return {
        "config_hash": f"{method}-{classes}-{seed}",
        "config": {
            "method": hyper,
            "data": {
                "name": f"cifar{classes}",
                "imbalance": float(imbalance),
                "n_max": n_max,
                "validation_per_class": 0,
            },
            "teacher": {"model": "resnet32x4", "cache": "runs/teachers"},
            "student": {"model": "resnet8x4"},
            "train": {"epochs": epochs, "batch_size": 64, "learning_rate": 0.05},
            "groups": {"fractions": [0.33, 0.34, 0.33]},
            "seed": seed,
        },
        "seeds": {"split": 0, "teacher": 0, "student": seed},
        "train_images": sum(counts),
        "class_counts": counts,
        "epochs": epochs,
        "test": measured(STRENGTH.get(method, (65, 40, 12)), classes, rng, shots=shots),
        "group_assignment": assignment_of(classes),
        "teacher": {
            "hash": "7e4c4e70",
            "test": measured((71, 33, 8), classes, random.Random(1), shots=shots),
            "group_mass": {"long_tailed": {"head": 0.80, "medium": 0.17, "tail": 0.03}, "balanced": balanced},
        }
        if teacher
        else None,
        "validation": None,
        "timing": {"seconds": 4321.0, "images_per_second": 5123.0, "compile_seconds": 31.0},
        "device": "NVIDIA H100",
        "precision": "tf32",
        "versions": {"jax": "0.10.2"},
        "commit": "abc1234",
        "command": f"python -m experiments.main --config=configs/cifar{classes}lt.py:{method},seed={seed}",
    } | extra


def metrics_of(run, epochs=240):
    """What a run of this length could have logged, the test accuracies every tenth epoch."""
    lines = []
    for epoch in range(1, epochs + 1):
        done = 1 - math.exp(-3 * epoch / epochs)
        entry = {"step": 170 * epoch, "epoch": epoch, "lr": 0.05, "loss": 4 - 3 * done, "train_accuracy": 95 * done}
        entry["terms"] = {"ce": 4.0 - 3 * done, "inter": 0.8 - 0.7 * done, "intra": 2.2 - 1.2 * done}
        if epoch % 10 == 0:
            groups = {name: v * done for name, v in run["test"]["groups"].items()}
            entry["test"] = {"all": run["test"]["all"] * done, "groups": groups}
        lines.append(entry)
    return lines


def save(folder, run, epochs=24):
    """Writes a fabricated run as a work directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run["config"]))
    (folder / "results.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_of(run, epochs)))
    return folder


def comparison(numbers, **extra):
    """Runs of methods with given accuracies over all classes, {method: [a value a seed]}."""
    runs = []
    for method, values in numbers.items():
        for seed, number in enumerate(values):
            run = fabricate(method, seed, **extra)
            run["test"] = run["test"] | {"all": number, "groups": {name: number for name in NAMES}}
            runs.append(run | {"source": f"{method}-s{seed}", "finished": True, "metrics": []})
    return runs


class Page(html.parser.HTMLParser):
    """Parses a page, checks that its elements nest, and keeps its text, its figures and its tags."""

    VOID = {"meta", "br", "hr", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.labels, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.labels += [attributes.get("aria-label")] if attributes.get("role") == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words).replace("\u00a0", " ")


def learned(seed=0, **extra):
    """A finished BiKD run: weights that rise for the tail, over twelve epochs, and a map."""
    axes = [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]
    weights = {term: dict(zip(NAMES, (0.2, 0.4, level))) for term, level in (("ce", 0.8), ("kd", 0.6))}
    told = {
        "weights": weights,
        "features": {"student_ce": dict(zip(NAMES, (0.1, 0.5, None))), "teacher_ce": dict(zip(NAMES, (0.2, 0.9, 1.5)))},
        "axes": axes,
        "map": {term: [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]] for term in weights},
    }
    metrics = [{"step": e, "epoch": float(e), "weights": weights} for e in range(1, 13)]
    run = fabricate("kd", seed, weighting=told, meta_images=1000, metrics=metrics, source=f"bikd{seed}", finished=True)
    run["config"]["weighting"] = {"name": "bilevel", "every": 5}
    return run | extra
