"""Groups runs so that they can be compared.

A `Method` is a row of a table: runs that differ in the seeds of the teacher and the
student only. A `Setting` holds the methods that may be compared with each other: those
with the same data, models, split and length of training. A run is the dictionary that
`load.load` returns.
"""

import collections
import dataclasses
import math
import re

from experiments.config import identity, spec
from experiments.config.trees import at, flatten
from experiments.reporting.statistics import BETTER, compare_paired, mean_std

# The order of rows; other methods follow by name.
METHOD_ORDER = (
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
)
SEED_KEYS = frozenset({"seed", "split_seed", "teacher_seed"})
_TITLE_KEYS = ("data", "imbalance", "models")
_SOURCES_OF_LOGITS = {
    "table": "table of all views",
    "network": "network in the step",
    "features": "network in the step",
}


# Methods and settings.


@dataclasses.dataclass
class Method:
    """Holds the runs of one method, which are one row of a table.

    Attributes:
      name: of the method, such as "ltkd".
      label: the name, and the hyperparameters that distinguish it from other rows.
      runs: {(teacher seed, student seed): run}.
    """

    name: str
    label: str
    runs: dict

    def values(self, column, split="test"):
        """Returns {seeds: value} of a column, of the runs that have a finite value.

        Args:
          column: dotted path in the results, such as "groups.tail".
          split: "test" or "validation".
        """
        values = {}
        for seeds, run in self.runs.items():
            value = at(run.get(split), column)
            if isinstance(value, (int, float)) and math.isfinite(value):
                values[seeds] = value
        return values

    def mean(self, column, split="test"):
        """Returns the mean of a column over the runs, None if none has a value."""
        return mean_std(self.values(column, split).values())[0]

    @property
    def sorted_runs(self):
        """Returns the runs, sorted by their seeds."""
        return [self.runs[seeds] for seeds in sorted(self.runs)]


@dataclasses.dataclass
class Setting:
    """Holds the methods that were run on the same data, models, split and length.

    Attributes:
      data: name of the data set.
      imbalance: largest over smallest class count.
      teacher: name of its model, or of a file of logits.
      student: name of its model.
      split_seed: seed of the draw of the training images.
      epochs: length of training.
      num_images: training images, 0 if not recorded.
      methods: list of `Method`, sorted.
      teacher_files: names of the files and runs that the teacher's variables come from,
        sorted; empty if the teacher was trained for it, or is a file of logits.
    """

    data: str
    imbalance: float
    teacher: str
    student: str
    split_seed: int
    epochs: int
    num_images: int
    methods: list
    teacher_files: list

    def title_parts(self):
        """Returns the phrases that a title may be made of, by name."""
        files = f" ({', '.join(self.teacher_files)})" if self.teacher_files else ""
        return {
            "data": self.data,
            "imbalance": f"imbalance {self.imbalance:g}",
            "models": f"{self.teacher}{files} → {self.student}",
            "epochs": f"{self.epochs:g} epochs",
            "split_seed": f"split seed {self.split_seed}",
            "num_images": f"{self.num_images:,} training images",
        }

    @property
    def title(self):
        """Returns the data set, the imbalance and the models."""
        parts = self.title_parts()
        return ", ".join(parts[key] for key in _TITLE_KEYS)

    @property
    def runs(self):
        """Returns all runs, sorted by method and seeds."""
        runs = []
        for method in self.methods:
            runs += method.sorted_runs
        return runs

    def teachers(self):
        """Returns the distinct teachers, {hash: the teacher's results}."""
        teachers = {}
        for run in self.runs:
            if run.get("teacher"):
                teachers[str(run["teacher"].get("hash"))] = run["teacher"]
        return dict(sorted(teachers.items()))

    def teacher_method(self):
        """Returns the teachers as a row of the table, None if none was evaluated."""
        runs = {}
        for i, teacher in enumerate(self.teachers().values()):
            if teacher.get("test"):
                # Earlier teachers have the masses in this place only.
                masses = {"group_mass": at(teacher, "group_mass.balanced")}
                runs[0, i] = {"test": masses | teacher["test"]}
        return Method("teacher", "teacher", runs) if runs else None

    def methods_with_teacher(self, *, teacher_first=False):
        """Returns the methods and the teacher's row, if any; it is last by default."""
        teacher = self.teacher_method()
        if teacher is None:
            return list(self.methods)
        if teacher_first:
            return [teacher, *self.methods]
        return [*self.methods, teacher]

    def group_names(self):
        """Returns the names of the class groups, the most frequent first."""
        names = {}
        for run in self.runs:
            names |= dict.fromkeys(run["test"].get("groups") or {})
        return list(names)

    def first_run_with(self, key):
        """Returns the first run that has a value at a key, {} if there is none."""
        return next((run for run in self.runs if run.get(key)), {})

    def group_shares(self):
        """Returns {group: share of the training images} and {group: share of classes}.

        Both are empty if no run has recorded its groups.
        """
        run = self.first_run_with("group_assignment")
        assignment = run.get("group_assignment") or []
        counts = run.get("class_counts") or []
        image_shares = {}
        class_shares = {}
        if counts and len(counts) == len(assignment):
            for group, name in enumerate(self.group_names()):
                members = [n for n, g in zip(counts, assignment) if g == group]
                image_shares[name] = sum(members) / sum(counts)
                class_shares[name] = len(members) / len(counts)
        return image_shares, class_shares

    def tail_column(self):
        """Returns the column of the least frequent group."""
        names = self.group_names()
        if "tail" in names or not names:
            return "groups.tail"
        return f"groups.{names[-1]}"

    def tail_name(self):
        """Returns the name of the least frequent group."""
        return self.tail_column().removeprefix("groups.")

    def note(self):
        """Returns in words what a mean is taken over, and on how many images."""
        num_seeds = max(len(method.runs) for method in self.methods)
        num_teachers = len(self.teachers())
        num_outer_images = 0
        for run in self.runs:
            num_outer_images = num_outer_images or run.get("outer_images") or 0
        note = (
            "Mean ± standard deviation over student seeds, one split"
            if num_seeds > 1
            else "One student seed, one split"
        )
        if num_teachers > 1:
            note += f", {num_teachers} teachers"
        note += f" (split seed {self.split_seed}); "
        if self.num_images:
            note += f"{self.num_images:,} training images, "
        if num_outer_images:
            note += f"{num_outer_images:,} balanced images for learned weights, "
        return f"{note}{self.epochs:g} epochs; the last epoch, in percent"

    def best(self, column, *, lower_is_better=False):
        """Returns the method with the best mean, None if no method has the column."""
        candidates = [method for method in self.methods if method.values(column)]
        sign = -1 if lower_is_better else 1
        return max(
            candidates, key=lambda method: sign * method.mean(column), default=None
        )

    def clear_best(self, column, *, lower_is_better=False):
        """Returns the best method if it is better than each other one, else None.

        `statistics.compare_paired` decides what counts as better.
        """
        best = self.best(column, lower_is_better=lower_is_better)
        others = [method for method in self.methods if method is not best]
        if best is None or not others:
            return None
        for method in others:
            difference = compare_paired(
                best.values(column),
                method.values(column),
                lower_is_better=lower_is_better,
            )
            if difference.verdict != BETTER:
                return None
        return best


def sort_key(method):
    """Returns a key that sorts by `METHOD_ORDER`, and alpha=2 before alpha=16."""
    if method.name in METHOD_ORDER:
        position = (METHOD_ORDER.index(method.name), "")
    else:
        position = (len(METHOD_ORDER), method.name)
    # `re.split` with a group returns text and numbers in turns: a number is compared
    # as a number, and always with a number.
    label = re.split(r"(\d+(?:\.\d+)?)", method.label)
    label[1::2] = map(float, label[1::2])
    return *position, tuple(label)


def distinct_methods(settings):
    """Returns one method of each label in the settings, sorted."""
    methods = {}
    for setting in settings:
        methods |= {method.label: method for method in setting.methods}
    return sorted(methods.values(), key=sort_key)


# Grouping.


def group_runs(runs):
    """Returns the settings of all finished runs, sorted.

    Two copies of a run count as one.
    """
    runs_by_setting = collections.defaultdict(list)
    for run in _with_identity([run for run in runs if run.get("finished", True)]):
        runs_by_setting[_setting_key(run)].append(run)
    # A key that distinguishes two rows in one setting is part of the label in all
    # settings, so that a label means the same method everywhere.
    label_keys = collections.defaultdict(set)
    for setting_runs in runs_by_setting.values():
        for name, method_runs in _by_method_name(setting_runs).items():
            label_keys[name] |= _differing_keys(method_runs)
    settings = []
    for key in sorted(runs_by_setting):
        methods = _methods(runs_by_setting[key], label_keys)
        files = _teacher_files(runs_by_setting[key])
        settings.append(Setting(*key, methods=methods, teacher_files=files))  # type: ignore[misc]
    return settings


def _with_identity(runs):
    """Returns copies of the runs with the key `identity`: what the result depends on.

    In it, the name of an external teacher replaces the hash of its content. If two
    teachers have one name, both have the hash behind it.
    """
    externals = [identity.external_teacher(run) for run in runs]
    names = {}  # by content
    for external in externals:
        if external:
            names.setdefault(external.content, external.name)
    occurrences = collections.Counter(names.values())
    runs_with_identity = []
    for run, external in zip(runs, externals):
        tree = identity.recorded_identity(run)
        if external:
            name = names[external.content]
            if occurrences[name] > 1:
                name = f"{name} {external.content}"
            tree["teacher"][external.key] = name
        runs_with_identity.append(run | {"identity": tree})
    return runs_with_identity


def _teacher_files(runs):
    """Returns the names of the files and runs that teachers' variables come from."""
    files = {run["identity"]["teacher"].get("variables") for run in runs}
    return sorted(files - {None})


def _setting_key(run):
    """Returns the fields of the run's `Setting`, but methods and teachers' files."""
    config = run["identity"]
    data, imbalance = _data_and_imbalance(config["data"], run.get("class_counts"))
    return (
        data,
        imbalance,
        config["teacher"]["model"],
        config["student"]["model"],
        run["seeds"].get("split") or 0,
        run.get("epochs") or 0,
        run.get("train_images") or 0,
    )


def _data_and_imbalance(data, class_counts):
    """Returns the data set's name, with its subset if any, and the imbalance.

    The imbalance of a subset is not in the config; it is computed from the counts.
    """
    if "subset" not in data:
        return data["name"], float(data["imbalance"])
    imbalance = 1.0
    if class_counts:
        imbalance = max(class_counts) / max(min(class_counts), 1)
    return f"{data['name']} ({data['subset']})", round(imbalance, 1)


def _by_method_name(runs):
    runs_by_name = collections.defaultdict(list)
    for run in runs:
        runs_by_name[spec.method_label(run["config"])].append(run)
    return runs_by_name


def _methods(runs, label_keys):
    methods = []
    for name, method_runs in _by_method_name(runs).items():
        methods += _variants(name, method_runs, sorted(label_keys[name]))
    return sorted(methods, key=sort_key)


def _differing_keys(runs):
    """Returns the config keys, other than seeds, in which the runs differ."""
    configs = [_flat_config(run) for run in runs]
    differing = set()
    for key in set().union(*configs):
        # A key that a config lacks has the value None.
        values = {config.get(key) for config in configs}
        if len(values) > 1:
            differing.add(key)
    return differing


def _flat_config(run):
    """Returns {key: text} of the config keys that affect a result, without seeds."""
    config = flatten(run["identity"])
    return {key: str(value) for key, value in config.items() if key not in SEED_KEYS}


def _variants(name, runs, label_keys):
    """Returns a method for each combination of values that the runs have at the keys.

    The label of a method names its values.
    """
    runs_by_values = collections.defaultdict(dict)
    for run in runs:
        config = _flat_config(run)
        values = tuple(config.get(key) for key in label_keys)
        seeds = run["seeds"].get("teacher") or 0, run["seeds"].get("student") or 0
        runs_by_seeds = runs_by_values[values]
        copy = runs_by_seeds.get(seeds)
        # Of two copies of a run, the one with training curves is kept: a work
        # directory has them, and a result file does not.
        if copy is None or (run.get("metrics") and not copy.get("metrics")):
            runs_by_seeds[seeds] = run
    methods = []
    for values, runs_by_seeds in runs_by_values.items():
        parts = map(_label_part, label_keys, values)
        suffix = ", ".join(part for part in parts if part)
        label = f"{name} ({suffix})" if suffix else name
        methods.append(Method(name, label, runs_by_seeds))
    return methods


def _label_part(key, value):
    """Returns "key=value" for a label, or "" for an augmentation that is off."""
    if value is None:
        return ""
    if key.startswith("augment.") and value in ("none", "0", "0.0"):
        return ""
    name = key.removeprefix("method.").removeprefix("augment.")
    return format_assignment(name, value)


def format_assignment(name, value):
    """Returns "name=value"; 4.0 becomes 4."""
    text = str(value)
    if re.fullmatch(r"-?\d+\.\d+", text):
        short = f"{float(text):g}"
        text = short if float(short) == float(text) else text
    return f"{name}={text}"


# Titles.


def short_titles(settings):
    """Returns for each setting what distinguishes it from the others.

    That is the data, the imbalance and the models, as far as they differ, and more only
    where these are not enough.
    """
    parts_of_settings = [setting.title_parts() for setting in settings]
    titles: list[tuple[str, ...]] = [()] * len(settings)
    for key in parts_of_settings[0]:
        values = [parts[key] for parts in parts_of_settings]
        differs = len(set(values)) > 1
        is_needed = key in _TITLE_KEYS or len(set(titles)) < len(titles)
        if differs and is_needed:
            titles = [(*title, value) for title, value in zip(titles, values)]
    return [", ".join(title) for title in titles]


def common_title(settings):
    """Returns the data, imbalance and models that all settings have in common."""
    parts_of_settings = [setting.title_parts() for setting in settings]
    common = []
    for key in _TITLE_KEYS:
        values = [parts[key] for parts in parts_of_settings]
        if len(set(values)) == 1:
            common.append(values[0])
    return ", ".join(common)


def distinct_titles(settings):
    """Returns a title for each setting.

    To equal titles the length, split or number of images is added.
    """
    settings_by_title = collections.defaultdict(list)
    for setting in settings:
        settings_by_title[setting.title].append(setting)
    # Settings are not hashable, so their ids are the keys.
    suffixes = {}
    for same_title in settings_by_title.values():
        suffixes |= zip(map(id, same_title), short_titles(same_title))
    titles = []
    for setting in settings:
        suffix = suffixes[id(setting)]
        titles.append(f"{setting.title}, {suffix}" if suffix else setting.title)
    return titles


def logits_source(run):
    """Returns in words where the teacher's logits came from, None if none were used."""
    return _SOURCES_OF_LOGITS.get(run.get("teacher_logits"))
