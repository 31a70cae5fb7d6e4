"""Results as numbers: runs gathered by setting, methods compared over paired seeds, tables written.

A run is the dictionary that `report.load` returns. Runs that share everything but the seeds of the teacher and the
student are one `Method`; methods that may be compared with each other are one `Setting`. Every table of a report is a
`Table`, written by `as_text`, `as_markdown` or `as_html`, so that a number looks the same wherever it stands.
"""

import dataclasses
import html
import math
import re
import statistics

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
        pair = f"{self.teacher} → {self.student}" if self.teacher else self.student
        return f"{self.data}, imbalance {self.imbalance:g}, {pair}"

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
    return [Setting(*key, methods=_methods(settings[key])) for key in sorted(settings)]


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
    ratio = max(class_counts) / min(class_counts) if class_counts else 1.0
    return f"{data.get('name')} ({subset})", round(ratio, 1)


def logits_source(run):
    """Returns where a run's step had the teacher's logits from, in words; None where it needed none."""
    names = {"table": "table of all views", "network": "network in the step", "features": "network in the step"}
    return names.get(run.get("teacher_logits"))


def _methods(runs):
    named = {}
    for run in runs:
        named.setdefault(method_name(run["config"]), []).append(run)
    found = [method for name, same in named.items() for method in _variants(name, same)]
    return sorted(found, key=lambda method: (method_rank(method.name), natural(method.label)))


def natural(label):
    """A key that puts alpha=2 before alpha=16."""
    return tuple(float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label)))


def _variants(name, runs):
    """Splits the runs of one name where their configs differ in more than seeds; the label says in what."""
    configs = [_essential(run["config"]) for run in runs]
    # What a config leaves out is off in it.
    known = set.union(*(set(config) for config in configs))
    differing = sorted(key for key in known if len({config.get(key) for config in configs}) > 1)
    found = {}
    for run, config in zip(runs, configs):
        seeds = run["seeds"].get("teacher") or 0, run["seeds"].get("student") or 0
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


# Tables.


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: a text, what follows it in a quieter voice, and how it is marked."""

    text: str
    note: str = ""
    bold: bool = False
    quiet: bool = False


@dataclasses.dataclass
class Table:
    """A header and rows of cells (or plain strings); the first `left` columns are words, the others numbers."""

    header: list
    rows: list
    left: int = 1

    def cells(self):
        """Returns the rows with every entry a `Cell`."""
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]


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


# The one writer.


def as_text(table):
    """Writes a table for a terminal, in aligned columns."""
    columns = []
    for i, (title, *cells) in enumerate(zip(table.header, *table.cells())):
        side = "<" if i < table.left else ">"
        note = max((len(cell.note) + 1 for cell in cells if cell.note), default=0)
        lines = [title + " " * note, *(cell.text + f" {cell.note}".ljust(note)[:note] for cell in cells)]
        lines = [_printable(line) for line in lines]
        width = max(map(len, lines))
        columns.append([f"{line:{side}{width}}" for line in [lines[0], "─" * width, *lines[1:]]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in str(text))


def as_markdown(table):
    """Writes a table as Markdown."""
    lines = [[escape_markdown(title) for title in table.header]]
    lines.append(["---" if i < table.left else "---:" for i in range(len(table.header))])
    for row in table.cells():
        texts = [escape_markdown(f"{cell.text} {cell.note}") for cell in row]
        lines.append([f"**{text}**" if cell.bold else text for cell, text in zip(row, texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text):
    """Escapes what would end a cell or begin HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def as_html(table):
    """Writes a table as HTML, in a box in which it scrolls when it is wider than the page."""
    kinds = [' class="words"' if i < table.left else "" for i in range(len(table.header))]
    noted = [any(row[i].note for row in table.cells()) for i in range(len(table.header))]
    head = [f'<th scope="col"{kind}>{html.escape(title)}</th>' for kind, title in zip(kinds, table.header)]
    body = []
    for row in table.cells():
        cells = [_html_cell(cell, i, kinds[i], noted[i]) for i, cell in enumerate(row)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head, body = "".join(head), "\n".join(body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell, i, kind, noted):
    text = html.escape(cell.text.replace(" ± ", "\u00a0±\u00a0"))
    text = f"<b>{text}</b>" if cell.bold else f'<span class="quiet">{text}</span>' if cell.quiet else text
    # Every cell of a column with notes gets one, so that the decimal points stay under each other.
    note = f' <span class="note">{html.escape(cell.note)}</span>' if noted else ""
    return f'<th scope="row"{kind}>{text}{note}</th>' if i == 0 else f"<td{kind}>{text}{note}</td>"


def console(runs):
    """Writes every setting of the runs for a terminal: headline, table, comparisons; then what is unfinished."""
    parts = []
    for setting in gather(runs):
        said = [_printable(line) for line in (setting.title, headline(setting), f"({setting.note()})")]
        parts += [*said[:2], "", as_text(accuracy_table(setting)), said[2], ""]
        for title, table in comparisons(setting):
            parts += [f"Paired, {_printable(title)}:", as_text(table), ""]
    unfinished = [run for run in runs if not run.get("finished", True)]
    parts += [f"unfinished: {_printable(run['source'])} ({progress(run)})" for run in unfinished]
    return "\n".join(parts or ["no runs"]).rstrip()


def progress(run):
    """Says how far an unfinished run has come."""
    last = run["metrics"][-1] if run.get("metrics") else {}
    return f"epoch {last['epoch']}" if "epoch" in last else "nothing logged yet"
