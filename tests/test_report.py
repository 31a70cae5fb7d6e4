"""Tests of the report on fabricated runs: the statistics against numbers worked out by hand, then what is written."""

import json
import math
import random

NAMES = ("head", "medium", "tail")
STRENGTH = {"ce": (70, 30, 2), "kd": (72, 28, 3), "dkd": (71, 36, 6), "ltkd": (66, 44, 20), "ltkd_bs": (62, 47, 24)}


def assignment_of(classes):
    """Head, medium and tail by rank, for classes that are sorted already."""
    return [0 if c < round(0.33 * classes) else 1 if c < round(0.67 * classes) else 2 for c in range(classes)]


def tested(levels, classes, rng, *, shots=True):
    """A `test` entry whose classes scatter about a level for each group."""
    groups = assignment_of(classes)
    per_class = [min(100, max(0, levels[g] + rng.gauss(0, 9))) for g in groups]
    of = lambda g: [v for v, group in zip(per_class, groups) if group == g]  # noqa: E731
    means = {name: sum(of(g)) / len(of(g)) for g, name in enumerate(NAMES)}
    confusion = [[levels[g] + (100 - levels[g]) * (0.6, 0.3, 0.1)[k] if g == k else 0 for k in range(3)] for g in range(3)]
    for g in range(3):
        rest = 100 - confusion[g][g]
        others = [k for k in range(3) if k != g]
        confusion[g][others[0]], confusion[g][others[1]] = 0.7 * rest, 0.3 * rest
    return {
        "all": sum(per_class) / classes,
        "per_class": per_class,
        "groups": means,
        "shots": {"many": means["head"], "medium": means["medium"], "few": means["tail"]}
        if shots
        else {"many": means["head"], "medium": None, "few": None},
        "ece": 12.3 + rng.gauss(0, 1),
        "confusion": confusion,
    }


def fabricate(method="ltkd", seed=0, *, classes=10, teacher=True, shots=True, epochs=240, **extra):
    """A finished run's results, with the same shape as those of a real one."""
    rng = random.Random(f"{method}{seed}{classes}")
    n_max = 500 if classes > 10 else 5000
    counts = [int(n_max * 0.01 ** (c / (classes - 1))) for c in range(classes)]
    hyper = {"name": method, "temperature": 4.0, "alpha": 1.0}
    balanced = {"head": 0.65, "medium": 0.29, "tail": 0.06}
    return {
        "config_hash": f"{abs(hash((method, classes))) % 10**8:08x}",
        "config": {
            "method": hyper,
            "data": {"name": f"cifar{classes}", "imbalance": 100.0, "n_max": n_max, "validation_per_class": 0},
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
        "test": tested(STRENGTH.get(method, (65, 40, 12)), classes, rng, shots=shots),
        "group_assignment": assignment_of(classes),
        "teacher": {
            "hash": "7e4c4e70",
            "test": tested((71, 33, 8), classes, random.Random(1), shots=shots),
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
