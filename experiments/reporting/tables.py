"""Tables and sentences about settings; the same `writers.Table` is written on a page, in a terminal and in a paper."""

import collections

from experiments.reporting import aggregate, writers
from experiments.reporting.aggregate import Setting
from experiments.reporting.statistics import BETTER, UNCLEAR, mean_std, paired
from experiments.reporting.writers import Cell, Table

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
# The columns that are compared between settings.
ACROSS = {"all classes": lambda setting: "all", "the tail": Setting.tail}
_MISSING = Cell("–", quiet=True)


# Tables.


def number(values, *, bold=False):
    """Returns the cell of a list of values: the mean, and ± the standard deviation where there are several."""
    mean, deviation, _ = mean_std(values)
    if mean is None:
        return _MISSING
    return Cell(f"{mean:.2f}", "" if deviation is None else f"± {deviation:.2f}", bold)


def mean_in_words(values):
    """Returns a mean and its deviation in percent, as "51.08 ± 0.20 %"."""
    cell = number(values)
    return " ".join(filter(None, (cell.text, cell.note, "%")))


def numbers(setting, columns):
    """Returns {label: [a cell for each column]} with the teacher first; the clear best of a column is bold."""
    best = {
        column: setting.clear_best(column, lower_is_better=column == "ece")
        for column in columns
    }
    cells = {}
    for method in setting.methods_with_teacher(first=True):
        cells[method.label] = [
            number(method.values(c).values(), bold=best[c] is method) for c in columns
        ]
    return cells


def columns(setting):
    """Returns the {title: column} of a setting's main table."""
    groups = {name: f"groups.{name}" for name in setting.group_names()}
    shots = {"many": "shots.many", "mid": "shots.medium", "few": "shots.few"}
    return {"all": "all"} | groups | shots | {"ECE": "ece"}


def accuracy_table(setting):
    """Returns the main table of a setting, with a row for each method."""
    shown = columns(setting)
    cells = numbers(setting, shown.values())
    rows = []
    for method in setting.methods_with_teacher(first=True):
        name = Cell(method.label, quiet=method.name == "teacher")
        rows.append([name, *cells[method.label], str(len(method.runs))])
    return Table(["method", *shown, "n"], rows)


def over_settings(settings):
    """Returns (title, table) pairs with a row for each method and a column for each of several settings."""
    if len(settings) < 2:
        return []
    pairs = []
    for name, column_of in ACROSS.items():
        cells = [numbers(setting, [column_of(setting)]) for setting in settings]
        labels = ["teacher"] * any("teacher" in column for column in cells)
        labels += [method.label for method in aggregate.all_methods(settings)]
        rows = []
        for label in labels:
            row = [
                column[label][0] if label in column else _MISSING for column in cells
            ]
            rows.append([Cell(label, quiet=label == "teacher"), *row])
        title = ": ".join(
            filter(None, (f"Accuracy on {name}", aggregate.common_title(settings)))
        )
        pairs.append(
            (title, Table(["method", *aggregate.distinctions(settings)], rows))
        )
    return pairs


def comparisons(setting):
    """Returns the (title, table) pairs of paired comparisons, on all classes and the tail; none for a single method."""
    if len(setting.methods) < 2:
        return []
    shown = {"all classes": "all", f"the {setting.tail_name()}": setting.tail()}
    return [
        (title, _comparison_table(setting, column))
        for title, column in shown.items()
        if setting.best(column)
    ]


def _comparison_table(setting, column):
    """Returns every method's comparison with ce and kd, and that of the best with every method."""
    references = [method for method in setting.methods if method.label in ("ce", "kd")]
    best = setting.best(column)
    rows = []
    for method in setting.methods:
        verdicts = [_verdict(method, reference, column) for reference in references]
        rows.append([method.label, *verdicts, _verdict(best, method, column)])
    header = [
        "method",
        *(f"against {method.label}" for method in references),
        f"{best.label} against it",
    ]
    return Table(header, rows, left=len(header))


def _verdict(candidate, reference, column):
    if candidate is reference:
        return _MISSING
    difference = paired(candidate.values(column), reference.values(column))
    if not difference.n:
        return Cell("no shared seed", quiet=True)
    spread = "" if difference.error is None else f" ± {difference.error:.2f}"
    text = f"{difference.mean:+.2f}{spread} {difference.verdict}".replace("-", "−")
    return Cell(text, f"n = {difference.n}", quiet=difference.verdict == UNCLEAR)


# Sentences.


def headline(setting):
    """Returns a sentence on which method is the most accurate, and which others it is better than."""
    best, tail, tail_name = setting.best("all"), setting.tail(), setting.tail_name()
    if best is None:
        return "No run has a test accuracy yet."
    on_tail = (
        "" if best.mean(tail) is None else f" ({tail_name} {best.mean(tail):.2f} %)"
    )
    text = f"{best.label} classifies {best.mean('all'):.2f} %{on_tail} of the balanced test set"
    if len(setting.methods) > 1:
        text += f", the highest of {len(setting.methods)} methods. {_comparison_in_words(setting, best)}"
        tail_best = setting.best(tail)
        if tail_best not in (None, best):
            text += f" On the {tail_name} the highest is {tail_best.label}, {tail_best.mean(tail):.2f} %."
    else:
        text += "." if len(best.runs) > 1 else ", with one seed."
    teacher = setting.teacher_method()
    if teacher and teacher.values("all"):
        on_tail = (
            ""
            if teacher.mean(tail) is None
            else f", {tail_name} {teacher.mean(tail):.2f} %"
        )
        text += f" The teacher: {teacher.mean('all'):.2f} %{on_tail}."
    return text


def _comparison_in_words(setting, best):
    differences = {}
    for method in setting.methods:
        if method is not best:
            differences[method.label] = paired(best.values("all"), method.values("all"))
    if all(difference.n < 2 for difference in differences.values()):
        return "With one seed per method, no difference can be told from chance."
    clear = [
        label
        for label, difference in differences.items()
        if difference.verdict == BETTER
    ]
    unclear = [label for label in differences if label not in clear]
    parts = [f"better than {_enumeration(clear)}"] if clear else []
    parts += [f"{UNCLEAR} from {_enumeration(unclear)}"] if unclear else []
    return f"Paired over student seeds it is {'; '.join(parts)}."


def _enumeration(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def overview(settings):
    """Returns a sentence on how often which method is the most accurate, over all classes and on the tail."""
    parts = []
    for name, column_of in ACROSS.items():
        best = [setting.best(column_of(setting)) for setting in settings]
        wins = collections.Counter(method.label for method in best if method)
        counts = [f"{label} in {n}" for label, n in wins.most_common()]
        parts += (
            [f"on {name}: {_enumeration(counts)} of {wins.total()} settings"]
            if counts
            else []
        )
    return f"Highest mean accuracy {'; '.join(parts)}." if parts else ""


def progress(run):
    """Returns how far an unfinished run has come, in words."""
    last = run["metrics"][-1] if run.get("metrics") else {}
    return f"epoch {last['epoch']}" if "epoch" in last else "nothing logged yet"


# A document.


def console(runs, form="text"):
    """Returns the tables of the runs in one of `writers.FORMS`: first all settings, then each, then unfinished runs."""
    settings, blocks = aggregate.gather(runs), []
    for title, table in over_settings(settings):
        blocks.append(
            writers.Block(
                table, title, *([] if blocks else [overview(settings), BETWEEN])
            )
        )
    for setting, title in zip(settings, aggregate.titles(settings)):
        blocks.append(
            writers.Block(
                accuracy_table(setting), title, headline(setting), setting.note()
            )
        )
        blocks += [
            writers.Block(table, words=f"Paired, {name}:")
            for name, table in comparisons(setting)
        ]
    for run in runs:
        if not run.get("finished", True):
            blocks.append(
                writers.Block(
                    None, words=f"unfinished: {run['source']} ({progress(run)})"
                )
            )
    return writers.document(blocks, form) if blocks else "no runs"
