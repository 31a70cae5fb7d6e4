"""Runs grouped for comparison.

Runs that differ in the seeds of the teacher and the student only are one `Method`. Methods that may be compared with
each other are one `Setting`. A run is the dictionary that `load.load` returns.
"""

import collections
import dataclasses
import math
import re

from experiments.config import identity, spec
from experiments.config.trees import at, flatten
from experiments.reporting.statistics import BETTER, mean_std, paired

ORDER = [
    "ce",
    "balanced_softmax",
    "logit_adjusted",
    "kd",
    "dkd",
    "reviewkd",
    "wsl",
    "dive",
    "bkd",
    "ltkd",
    "ltkd_bs",
    "bikd",
]
_SEEDS = ("seed", "split_seed", "teacher_seed")
_TITLE_PARTS = ("data", "imbalance", "models")


# Methods and settings.


@dataclasses.dataclass
class Method:
    """A row of a table: the runs of a method by (teacher seed, student seed)."""

    name: str
    label: str
    runs: dict

    def values(self, column, part="test"):
        """Returns {seeds: value} of the runs that have a finite value."""
        values = {seeds: at(run.get(part), column) for seeds, run in self.runs.items()}
        return {
            seeds: v
            for seeds, v in values.items()
            if isinstance(v, (int, float)) and math.isfinite(v)
        }

    def mean(self, column, part="test"):
        """Returns the mean over the runs, None without a value."""
        return mean_std(self.values(column, part).values())[0]

    @property
    def sorted_runs(self):
        """The runs in the order of their seeds."""
        return [self.runs[seeds] for seeds in sorted(self.runs)]


@dataclasses.dataclass
class Setting:
    """Methods on the same data set, imbalance, pair of models, split and length of training."""

    data: str
    imbalance: float
    teacher: str
    student: str
    split: int
    epochs: int
    images: int
    methods: list

    def parts(self):
        """Returns the parts of a title, by name."""
        return {
            "data": self.data,
            "imbalance": f"imbalance {self.imbalance:g}",
            "models": f"{self.teacher} → {self.student}",
            "epochs": f"{self.epochs:g} epochs",
            "split": f"split seed {self.split}",
            "images": f"{self.images:,} training images",
        }

    @property
    def title(self):
        """The data set, the imbalance and the models."""
        parts = self.parts()
        return ", ".join(parts[key] for key in _TITLE_PARTS)

    @property
    def runs(self):
        """All runs, in the order of the methods and the seeds."""
        return [run for method in self.methods for run in method.sorted_runs]

    def teachers(self):
        """Returns the distinct teachers, {hash: teacher}."""
        teachers = {
            str(run["teacher"].get("hash")): run["teacher"]
            for run in self.runs
            if run.get("teacher")
        }
        return dict(sorted(teachers.items()))

    def teacher_method(self):
        """Returns the teachers as a row of the table, with a run for each distinct teacher, or None."""
        runs = {
            (0, i): {"test": t["test"]}
            for i, t in enumerate(self.teachers().values())
            if t.get("test")
        }
        return Method("teacher", "teacher", runs) if runs else None

    def methods_with_teacher(self, *, first=False):
        """Returns the methods and the teacher's row, if there is one, which comes last unless it is to be first."""
        teachers = [self.teacher_method()] if self.teacher_method() else []
        return [*teachers, *self.methods] if first else [*self.methods, *teachers]

    def group_names(self):
        """Returns the names of the class groups, the most frequent first."""
        return list(
            dict.fromkeys(
                name for run in self.runs for name in run["test"].get("groups") or {}
            )
        )

    def tail(self):
        """Returns the column of the least frequent group."""
        names = self.group_names()
        return "groups.tail" if "tail" in names or not names else f"groups.{names[-1]}"

    def tail_name(self):
        """Returns the name of the least frequent group."""
        return self.tail().removeprefix("groups.")

    def note(self):
        """Describes what a mean and a deviation are over, and the training images."""
        n = max(len(method.runs) for method in self.methods)
        teachers = len(self.teachers())
        over = f"one split, {teachers} teachers" if teachers > 1 else "one split"
        spread = (
            f"Mean ± standard deviation over student seeds, {over}"
            if n > 1
            else f"One student seed, {over}"
        )
        images = f"{self.images:,} training images, " if self.images else ""
        outer = next(
            (run["outer_images"] for run in self.runs if run.get("outer_images")), 0
        )
        images += (
            f"for learned weights {outer:,} balanced ones beside them, "
            if outer
            else ""
        )
        return f"{spread} (split seed {self.split}); {images}{self.epochs:g} epochs; the last epoch, in percent"

    def best(self, column, *, lower_is_better=False):
        """Returns the method with the best mean, None where no method has the column."""
        candidates = [method for method in self.methods if method.values(column)]
        sign = -1 if lower_is_better else 1
        return max(
            candidates, key=lambda method: sign * method.mean(column), default=None
        )

    def clear_best(self, column, *, lower_is_better=False):
        """Returns the best method if it is better than each of the others, else None."""
        best = self.best(column, lower_is_better=lower_is_better)
        others = [method for method in self.methods if method is not best]
        if best is None or not others:
            return None
        values = best.values(column)
        differences = [
            paired(values, other.values(column), lower_is_better=lower_is_better)
            for other in others
        ]
        return (
            best
            if all(difference.verdict == BETTER for difference in differences)
            else None
        )


def rank(method):
    """Returns a sorting key that puts the methods of `ORDER` first, and alpha=2 before alpha=16."""
    place = (
        (ORDER.index(method.name), "")
        if method.name in ORDER
        else (len(ORDER), method.name)
    )
    parts = re.split(r"(\d+(?:\.\d+)?)", method.label)
    return *place, tuple(float(part) if i % 2 else part for i, part in enumerate(parts))


def all_methods(settings):
    """Returns a method of each label in the settings, sorted."""
    methods = {
        method.label: method for setting in settings for method in setting.methods
    }
    return sorted(methods.values(), key=rank)


# Grouping.


def gather(runs):
    """Returns the settings of all finished runs, sorted; a run that is given twice counts once."""
    settings = collections.defaultdict(list)
    for run in runs:
        if run.get("finished", True):
            settings[_setting_key(run)].append(run)
    # A key that distinguishes two methods in one setting is named in all: the same method has the same label.
    differing = collections.defaultdict(set)
    for setting_runs in settings.values():
        for name, same in _by_name(setting_runs).items():
            differing[name] |= _differing_keys(same)
    return [
        Setting(*key, methods=_methods(settings[key], differing))
        for key in sorted(settings)
    ]


def _setting_key(run):
    config = identity.recorded_identity(run)
    models = config["teacher"]["model"], config["student"]["model"]
    sizes = (
        run["seeds"].get("split") or 0,
        run.get("epochs") or 0,
        run.get("train_images") or 0,
    )
    return (
        *_data_and_imbalance(config["data"], run.get("class_counts")),
        *models,
        *sizes,
    )


def _data_and_imbalance(data, class_counts):
    """Returns the name of a data set, with the subset unless it was drawn by imbalance, and the imbalance."""
    if "subset" not in data:
        return data["name"], float(data["imbalance"])
    ratio = max(class_counts) / max(min(class_counts), 1) if class_counts else 1.0
    return f"{data['name']} ({data['subset']})", round(ratio, 1)


def _by_name(runs):
    runs_by_name = collections.defaultdict(list)
    for run in runs:
        runs_by_name[spec.method_label(run["config"])].append(run)
    return runs_by_name


def _methods(runs, differing):
    methods = []
    for name, same in _by_name(runs).items():
        methods += _variants(name, same, sorted(differing[name]))
    return sorted(methods, key=rank)


def _differing_keys(runs):
    """Returns the keys in which the results of one method's runs differ; a part that a config lacks is off in it."""
    configs = [_flat_identity(run) for run in runs]
    return {
        key
        for key in set().union(*configs)
        if len({config.get(key) for config in configs}) > 1
    }


def _flat_identity(run):
    return {
        key: str(v)
        for key, v in flatten(identity.recorded_identity(run)).items()
        if key not in _SEEDS
    }


def _variants(name, runs, keys):
    """Returns a method for each combination of the values that its runs have at the keys, which its label names."""
    variants = collections.defaultdict(dict)
    for run in runs:
        config = _flat_identity(run)
        seeds = run["seeds"].get("teacher") or 0, run["seeds"].get("student") or 0
        same_runs = variants[tuple(config.get(key) for key in keys)]
        # A work directory, which has training curves, is preferred to the result file of the same run.
        if seeds not in same_runs or (
            run.get("metrics") and not same_runs[seeds].get("metrics")
        ):
            same_runs[seeds] = run
    methods = []
    for values, runs_by_seeds in variants.items():
        chosen = ", ".join(filter(None, map(_assignment, keys, values)))
        methods.append(
            Method(name, f"{name} ({chosen})" if chosen else name, runs_by_seeds)
        )
    return methods


def _assignment(key, text):
    """Returns "key=value" for a label, nothing where the value is off."""
    if text is None or (key.startswith("augment.") and text in ("none", "0", "0.0")):
        return ""
    if re.fullmatch(r"-?\d+\.\d+", text):
        text = f"{float(text):g}"
    return f"{key.removeprefix('method.').removeprefix('augment.')}={text}"


# Titles.


def distinctions(settings):
    """Returns what distinguishes each setting: data, imbalance, models, and more only where those do not."""
    parts = [setting.parts() for setting in settings]
    words = [[] for _ in settings]
    for key in parts[0]:
        unclear = len(set(map(tuple, words))) < len(words)
        if len({part[key] for part in parts}) > 1 and (key in _TITLE_PARTS or unclear):
            words = [[*before, part[key]] for before, part in zip(words, parts)]
    return [", ".join(part) for part in words]


def common_title(settings):
    """Returns the data, imbalance and models that all settings have in common."""
    parts = [setting.parts() for setting in settings]
    return ", ".join(
        parts[0][key] for key in _TITLE_PARTS if len({part[key] for part in parts}) == 1
    )


def titles(settings):
    """Returns a title for each setting; equal ones have their length, split or images added."""
    alike = collections.defaultdict(list)
    for setting in settings:
        alike[setting.title].append(setting)
    suffixes = {}
    for group in alike.values():
        suffixes |= zip(map(id, group), distinctions(group))
    return [
        ", ".join(filter(None, (setting.title, suffixes[id(setting)])))
        for setting in settings
    ]


def logits_source(run):
    """Returns in words where the training step took the teacher's logits from; None where it needed none."""
    names = {
        "table": "table of all views",
        "network": "network in the step",
        "features": "network in the step",
    }
    return names.get(run.get("teacher_logits"))
