"""Results as numbers: runs gathered by setting, methods compared over paired seeds, tables written.

A run is the dictionary that `report.load` returns. Runs that share everything but the seeds of the teacher and the
student are one `Method`; methods that may be compared with each other are one `Setting`. Every table of a report is a
`Table` (experiments/reporting/writers.py), so that a number looks the same wherever it stands.
"""

import collections
import dataclasses
import math
import re
import statistics

from experiments.reporting.writers import Block, Cell, Table, document

ORDER = "ce balanced_softmax logit_adjusted kd dkd reviewkd wsl dive bkd ltkd ltkd_bs bikd".split()
BETTER, WORSE, UNCLEAR = "better", "worse", "not distinguishable"
RULE = (
    "A method is called better than another only if, paired over the same student seeds, the mean difference exceeds "
    "twice its standard error; the ± of a difference is that standard error. This is a rule of thumb: two equal "
    "methods would pass it, one way or the other, in 30 % of cases with 2 seeds, 18 % with 3 and 12 % with 5."
)
COLUMNS = (
    "Head, medium and tail are groups by rank; many, mid and few are the classes with more than 100, 20 to 100 and "
    "fewer than 20 training images. ECE: expected calibration error, lower is better. Bold: better than every other "
    "method."
)
BETWEEN = (
    "In percent, mean ± standard deviation over student seeds. Bold: better than every other method of that setting. "
    "The tail: the group of classes with the fewest training images"
)
RECONSTRUCTED = "LTKD is reconstructed from descriptions; there is no official code."
# Parts of a config that do not change what is learned: two runs that differ in these only are the same method.
_INCIDENTAL = set("seed seeds dir path cache checkpoint table parallel call eval every smoke workdir log".split())


# Statistics.


def mean_std(values):
    """Returns (mean, sample standard deviation, n); what too few values do not have is None."""
    values = list(values)
    if not values:
        return None, None, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, its standard error (None for a single pair), the number of pairs, the verdict."""

    mean: float | None
    error: float | None
    n: int
    verdict: str


def paired(ours, theirs, *, lower_is_better=False):
    """Compares two {seed: value} dictionaries over the seeds that both have."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, deviation, n = mean_std(differences)
    if deviation is None:
        return Difference(mean, None, n, UNCLEAR)
    error = deviation / math.sqrt(n)
    if not abs(mean) > 2 * error:
        return Difference(mean, error, n, UNCLEAR)
    return Difference(mean, error, n, BETTER if (mean < 0) == lower_is_better else WORSE)


# Runs, gathered.


def value(result, column):
    """Looks up a dotted column ("groups.tail") in a `test` or `validation` dictionary; None where it has none."""
    for part in column.split("."):
        result = result.get(part) if isinstance(result, dict) else None
    return result if isinstance(result, (int, float)) else None


@dataclasses.dataclass
class Method:
    """One row: the runs of a method that differ in their seeds only, by (teacher seed, student seed)."""

    name: str
    label: str
    runs: dict

    def values(self, column, part="test"):
        """Returns {seeds: value} of the runs that have a finite value."""
        found = {seeds: value(run.get(part), column) for seeds, run in self.runs.items()}
        return {seeds: v for seeds, v in found.items() if v is not None and math.isfinite(v)}

    def mean(self, column, part="test"):
        """Returns the mean over the runs, None without a value."""
        return mean_std(self.values(column, part).values())[0]


@dataclasses.dataclass
class Setting:
    """The methods that can be compared: one data set, imbalance, pair of models, split and length of training."""

    data: str
    imbalance: float
    teacher: str
    student: str
    split: int
    epochs: int
    images: int
    methods: list

    @property
    def title(self):
        """The setting in one line, without what `note` says."""
        return ", ".join(list(self.parts().values())[:3])

    def parts(self):
        """What the setting is, in the words of a title."""
        return {
            "data": self.data,
            "imbalance": f"imbalance {self.imbalance:g}",
            "models": f"{self.teacher} → {self.student}" if self.teacher else self.student,
            "epochs": f"{self.epochs:g} epochs",
            "split": f"split seed {self.split}",
            "images": f"{self.images:,} training images",
        }

    @property
    def runs(self):
        """All runs, in the order of the methods and the seeds."""
        return [method.runs[seeds] for method in self.methods for seeds in sorted(method.runs)]

    def teachers(self):
        """Returns the distinct teachers, {hash: teacher}."""
        found = {str(run["teacher"].get("hash")): run["teacher"] for run in self.runs if run.get("teacher")}
        return dict(sorted(found.items()))

    def teacher_method(self):
        """Returns the teachers as a row of the table (one run per distinct teacher), or None."""
        runs = {(0, i): {"test": t["test"]} for i, t in enumerate(self.teachers().values()) if t.get("test")}
        return Method("teacher", "teacher", runs) if runs else None

    def group_names(self):
        """Returns the names of the class groups, the most frequent first."""
        return list(dict.fromkeys(name for run in self.runs for name in run["test"].get("groups") or {}))

    def tail(self):
        """Returns the column of the least frequent group."""
        names = self.group_names()
        return "groups.tail" if "tail" in names or not names else f"groups.{names[-1]}"

    def note(self):
        """Says what the ± is over, and what was trained on."""
        n = max(len(method.runs) for method in self.methods)
        several = len(self.teachers()) > 1
        over = f"one split, {len(self.teachers())} teachers" if several else "one split"
        spread = f"Mean ± standard deviation over student seeds, {over}" if n > 1 else f"One student seed, {over}"
        images = f"{self.images:,} training images, " if self.images else ""
        meta = next((run["meta_images"] for run in self.runs if run.get("meta_images")), 0)
        images += f"for learned weights {meta:,} balanced ones beside them, " if meta else ""
        return f"{spread} (split seed {self.split}); {images}{self.epochs:g} epochs; the last epoch, in percent"

    def best(self, column, *, lower_is_better=False):
        """Returns the method with the best mean, None where no method has the column."""
        known = [method for method in self.methods if method.values(column)]
        sign = -1 if lower_is_better else 1
        return max(known, key=lambda method: sign * method.mean(column), default=None)

    def clear_best(self, column, *, lower_is_better=False):
        """Returns the best method if it is better than each of the others, else None."""
        best = self.best(column, lower_is_better=lower_is_better)
        others = [method for method in self.methods if method is not best]
        if best is None or not others:
            return None
        ours = best.values(column)
        found = [paired(ours, other.values(column), lower_is_better=lower_is_better) for other in others]
        return best if all(difference.verdict == BETTER for difference in found) else None


def method_name(config):
    """Returns the name of a config's method; terms whose weights are learned are named after BiKD."""
    name = str((config.get("method") or {}).get("name", "?"))
    if (config.get("weighting") or {}).get("name") != "bilevel":
        return name
    return "bikd" if name == "kd" else f"bikd over {name}"


def flatten(config, prefix=""):
    """Turns a nested config into {"train.epochs": 240, …}."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    return {k: v for name, inner in config.items() for k, v in flatten(inner, f"{prefix}{name}.").items()}


def gather(runs):
    """Gathers finished runs into settings, sorted; a run that is given twice counts once."""
    settings = {}
    for run in runs:
        if run.get("finished", True):
            settings.setdefault(_setting_key(run), []).append(run)
    # A method without a teacher stands beside those with one, whatever the teacher.
    for key in [key for key in settings if not key[2]]:
        hosts = [other for other in settings if other[2] and other[:2] + other[3:] == key[:2] + key[3:]]
        for host in hosts:
            settings[host] += settings[key]
        if hosts:
            del settings[key]
    # What tells the rows of a name apart in one setting is told in all of them: the same row has the same label.
    differing = collections.defaultdict(set)
    for same in settings.values():
        for name, variants in _named(same).items():
            differing[name] |= _differing(variants)
    return [Setting(*key, methods=_methods(settings[key], differing)) for key in sorted(settings)]


def _setting_key(run):
    config = run["config"]
    data, teacher, student = (config.get(name) or {} for name in ("data", "teacher", "student"))
    models = str(teacher.get("model") or ""), str(student.get("model"))
    sizes = run["seeds"].get("split") or 0, run.get("epochs") or 0, run.get("train_images") or 0
    return *data_setting(data, run.get("class_counts")), *models, *sizes


def data_setting(data, class_counts=None):
    """Returns a data set's name, with the subset where that was not drawn by imbalance, and the imbalance there is."""
    subset = data.get("subset") or "exponential"
    if subset == "exponential":
        return str(data.get("name")), float(data.get("imbalance") or 1)
    ratio = max(class_counts) / max(min(class_counts), 1) if class_counts else 1.0
    return f"{data.get('name')} ({subset})", round(ratio, 1)


def logits_source(run):
    """Returns where a run's step had the teacher's logits from, in words; None where it needed none."""
    names = {"table": "table of all views", "network": "network in the step", "features": "network in the step"}
    return names.get(run.get("teacher_logits"))


def _named(runs):
    named = {}
    for run in runs:
        named.setdefault(method_name(run["config"]), []).append(run)
    return named


def _methods(runs, differing):
    found = [method for name, same in _named(runs).items() for method in _variants(name, same, differing[name])]
    return sorted(found, key=lambda method: (method_rank(method.name), natural(method.label)))


def natural(label):
    """A key that puts alpha=2 before alpha=16."""
    return tuple(float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label)))


def _differing(runs):
    """The keys in which the configs of a method's runs differ, beside seeds; what a config leaves out is off in it."""
    configs = [_essential(run["config"]) for run in runs]
    return {key for key in set().union(*configs) if len({config.get(key) for config in configs}) > 1}


def _variants(name, runs, differing):
    """Splits the runs of one name where their configs differ in more than seeds; the label says in what."""
    differing, found = sorted(differing), {}
    for run in runs:
        config, seeds = _essential(run["config"]), (run["seeds"].get("teacher") or 0, run["seeds"].get("student") or 0)
        found.setdefault(tuple(config.get(key) for key in differing), {}).setdefault(seeds, run)
    for values, by_seeds in found.items():
        told = ", ".join(
            f"{key.removeprefix('method.').removeprefix('augment.')}={_plain(v)}"
            for key, v in zip(differing, values)
            if v is not None and not (key.startswith("augment.") and v in ("none", "0", "0.0"))
        )
        yield Method(name, f"{name} ({told})" if told else name, by_seeds)


def _essential(config):
    return {key: str(v) for key, v in flatten(config).items() if not _INCIDENTAL & set(re.split(r"[._]", key))}


def _plain(text):
    return f"{float(text):g}" if re.fullmatch(r"-?\d+\.\d+", text) else text


def method_rank(name):
    """Returns the place of a method in every table: the known ones as listed above, then by name."""
    return (ORDER.index(name), "") if name in ORDER else (len(ORDER), name)


def apart(settings):
    """Returns what tells each setting from the others: data, imbalance, models, and more only where those do not."""
    parts = [setting.parts() for setting in settings]
    told = [[] for _ in settings]
    for key in parts[0]:
        unclear = len(set(map(tuple, told))) < len(told)
        if len({found[key] for found in parts}) > 1 and (key in ("data", "imbalance", "models") or unclear):
            told = [[*words, found[key]] for words, found in zip(told, parts)]
    return [", ".join(words) for words in told]


def common(settings):
    """Returns the data, imbalance and models that all settings have in common, in words."""
    parts = [list(setting.parts().values())[:3] for setting in settings]
    return ", ".join(first for first, *others in zip(*parts) if {first} == {first, *others})


def titles(settings):
    """Returns a title for each setting; those that are the same but in length, split or images say so."""
    same = collections.defaultdict(list)
    for setting in settings:
        same[setting.title].append(setting)
    own = {id(s): words for alike in same.values() for s, words in zip(alike, apart(alike))}
    return [", ".join(filter(None, (setting.title, own[id(setting)]))) for setting in settings]


# What is said about a setting.


def headline(setting):
    """Says in plain words which method is the most accurate, and from which others it can be told."""
    best = setting.best("all")
    if best is None:
        return "No run has a test accuracy yet."
    tail = setting.tail()
    said = f"{_reaches(best, tail)} of the balanced test set"
    if len(setting.methods) > 1:
        said = f"{said}, the highest of {len(setting.methods)} methods. {_told_apart(setting, best)}"
        tail_best = setting.best(tail)
        if tail_best not in (None, best):
            said += f" On the {tail.split('.')[-1]} the highest is {tail_best.label}, {tail_best.mean(tail):.2f} %."
    else:
        said += "." if len(best.runs) > 1 else ", with one seed."
    teacher = setting.teacher_method()
    return f"{said} The teacher: {_numbers(teacher, tail)}." if teacher and teacher.values("all") else said


def _numbers(method, tail):
    told = f"{method.mean('all'):.2f} %"
    return told if method.mean(tail) is None else f"{told}, {tail.split('.')[-1]} {method.mean(tail):.2f} %"


def _reaches(method, tail):
    told = f"{method.label} classifies {method.mean('all'):.2f} %"
    return told if method.mean(tail) is None else f"{told} ({tail.split('.')[-1]} {method.mean(tail):.2f} %)"


def _told_apart(setting, best):
    others = [method for method in setting.methods if method is not best]
    ours = best.values("all")
    verdicts = {other.label: paired(ours, other.values("all")) for other in others}
    clear = [label for label, found in verdicts.items() if found.verdict == BETTER]
    unclear = [label for label, found in verdicts.items() if found.verdict != BETTER]
    if all(found.n < 2 for found in verdicts.values()):
        return "With one seed per method, no difference can be told from chance."
    parts = [f"better than {_listed(clear)}"] if clear else []
    parts += [f"{UNCLEAR} from {_listed(unclear)}"] if unclear else []
    return f"Paired over student seeds it is {'; '.join(parts)}."


def _listed(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


ACROSS = {"all classes": lambda setting: "all", "the tail": Setting.tail}  # what settings are set side by side in


def overview(settings):
    """Says how often which method is the most accurate, over all classes and on the tail."""
    said = []
    for told, column_of in ACROSS.items():
        best = collections.Counter(best.label for s in settings if (best := s.best(column_of(s))))
        names = [f"{label} in {n}" for label, n in best.most_common()]
        said += [f"on {told}: {_listed(names)} of {sum(best.values())} settings"] if names else []
    return f"Highest mean accuracy {'; '.join(said)}." if said else ""


# Tables.


def number(values, *, bold=False):
    """Returns the cell of a list of values: the mean, and ± the standard deviation where there are several."""
    mean, deviation, _ = mean_std(values)
    if mean is None:
        return Cell("–", quiet=True)
    return Cell(f"{mean:.2f}", "" if deviation is None else f"± {deviation:.2f}", bold)


def columns(setting):
    """Returns the (title, column) pairs of a setting's main table."""
    shots = (("many", "shots.many"), ("mid", "shots.medium"), ("few", "shots.few"))
    groups = [(name, f"groups.{name}") for name in setting.group_names()]
    return [("all", "all"), *groups, *shots, ("ECE", "ece")]


def accuracy_table(setting):
    """Builds the main table: a row per method, the teacher first; the clear best of a column is bold."""
    shown = columns(setting)
    clear = {column: setting.clear_best(column, lower_is_better=column == "ece") for _, column in shown}
    rows = []
    for method in filter(None, [setting.teacher_method(), *setting.methods]):
        cells = [number(method.values(column).values(), bold=clear[column] is method) for _, column in shown]
        rows.append([Cell(method.label, quiet=method.name == "teacher"), *cells, str(len(method.runs))])
    return Table(["method", *(title for title, _ in shown), "n"], rows)


def over_settings(settings):
    """Returns (title, table) pairs with a row per method and a column per setting; empty for a single setting."""
    if len(settings) < 2:
        return []
    labels = {method.label: method for setting in settings for method in setting.methods}
    labels = sorted(labels, key=lambda label: (method_rank(labels[label].name), natural(label)))
    found = []
    for told, column_of in ACROSS.items():
        shown = [_cells(setting, column_of(setting)) for setting in settings]
        names = ["teacher"] * any("teacher" in cells for cells in shown) + labels
        missing = Cell("–", quiet=True)
        rows = [[Cell(name, quiet=name == "teacher"), *(c.get(name, missing) for c in shown)] for name in names]
        title = ": ".join(filter(None, (f"Accuracy on {told}", common(settings))))
        found.append((title, Table(["method", *apart(settings)], rows)))
    return found


def _cells(setting, column):
    """The cells of a column, by the label of the method; the clear best is bold."""
    clear = setting.clear_best(column)
    methods = filter(None, [setting.teacher_method(), *setting.methods])
    return {m.label: number(m.values(column).values(), bold=m is clear) for m in methods}


def comparison_table(setting, column):
    """Builds the paired comparisons of one column: every method against ce and kd, and the best against each."""
    references = [method for method in setting.methods if method.label in ("ce", "kd")]
    best = setting.best(column)
    header = ["method", *(f"against {method.label}" for method in references)]
    rows = []
    for method in setting.methods:
        pairs = [(method, reference) for reference in references] + [(best, method)]
        rows.append([method.label, *(_verdict(*pair, column) for pair in pairs)])
    return Table([*header, f"{best.label} against it" if best else "best against it"], rows, left=len(header) + 1)


def _verdict(ours, theirs, column):
    if ours is theirs or ours is None:
        return Cell("–", quiet=True)
    found = paired(ours.values(column), theirs.values(column))
    if not found.n:
        return Cell("no shared seed", quiet=True)
    spread = "" if found.error is None else f" ± {found.error:.2f}"
    return Cell(
        f"{found.mean:+.2f}{spread} {found.verdict}".replace("-", "−"), f"n = {found.n}", quiet=found.verdict == UNCLEAR
    )


def comparisons(setting):
    """Returns the (title, table) pairs of paired comparisons: all classes and the tail; empty for a single method."""
    if len(setting.methods) < 2:
        return []
    shown = [("all classes", "all"), (f"the {setting.tail().split('.')[-1]}", setting.tail())]
    return [(title, comparison_table(setting, column)) for title, column in shown if setting.best(column)]


# A document.


def console(runs, form="text"):
    """Writes the tables of the runs in one of `writers.FORMS`: settings side by side, then each, then what is left."""
    settings, blocks = gather(runs), []
    for part, (title, table) in enumerate(over_settings(settings)):
        words = "" if part else overview(settings)
        blocks.append(Block(table, title, words, "" if part else BETWEEN))
    for setting, title in zip(settings, titles(settings)):
        blocks.append(Block(accuracy_table(setting), title, headline(setting), setting.note()))
        blocks += [Block(table, "", f"Paired, {told}:") for told, table in comparisons(setting)]
    unfinished = [run for run in runs if not run.get("finished", True)]
    blocks += [Block(None, "", f"unfinished: {run['source']} ({progress(run)})") for run in unfinished]
    return document(blocks, form) if blocks else "no runs"


def progress(run):
    """Says how far an unfinished run has come."""
    last = run["metrics"][-1] if run.get("metrics") else {}
    return f"epoch {last['epoch']}" if "epoch" in last else "nothing logged yet"
