"""Tables and sentences about settings, for a page, a terminal or a paper."""

import collections

from experiments.reporting import aggregate, writers
from experiments.reporting.aggregate import Setting
from experiments.reporting.statistics import (
    BETTER,
    UNCLEAR,
    compare_paired,
    mean_std,
)
from experiments.reporting.writers import Cell, Table

VERDICT_NOTE = (
    "A method is called better than another only if the 95 % t interval of their mean "
    "difference, paired over the same student seeds, does not contain 0; the ± of a "
    "difference is half the length of that interval. It is 9.0 standard deviations of "
    "the differences with 2 seeds, 2.5 with 3 and 1.2 with 5. A table has many pairs, "
    "and one in 20 pairs of equal methods passes by chance."
)
COLUMNS_NOTE = (
    "Head, medium and tail are groups by rank; many, mid and few are the classes with "
    "more than 100, 20 to 100 and fewer than 20 training images. ECE: expected "
    "calibration error, lower is better. Bold: better than every other method."
)
OVER_SETTINGS_NOTE = (
    "In percent, mean ± standard deviation over student seeds. Bold: better than every "
    "other method of that setting. The tail: the group of classes with the fewest "
    "training images"
)
MASS_NOTE = (
    "The mass of a group: its mean predicted probability on the test images, in "
    "percent. If these are balanced, an unbiased model gives each group its share of "
    "the classes."
)
RECONSTRUCTED_NOTE = (
    "LTKD is reconstructed from descriptions; there is no official code."
)
# The columns by which settings are compared: {name: function of the setting}.
COMPARED_COLUMNS = {
    "all classes": lambda setting: "all",
    "the tail": Setting.tail_column,
}
_MISSING = Cell("–", quiet=True)


# Tables.


def mean_cell(values, *, bold=False):
    """Returns the cell with the mean of values and, of several, their deviation."""
    mean, deviation, _ = mean_std(values)
    if mean is None:
        return _MISSING
    note = "" if deviation is None else f"± {deviation:.2f}"
    return Cell(f"{mean:.2f}", note, bold)


def format_mean(values):
    """Returns the mean and the deviation of values as "51.08 ± 0.20 %"."""
    cell = mean_cell(values)
    return f"{cell.text} {cell.note} %" if cell.note else f"{cell.text} %"


def mean_cells(setting, columns):
    """Returns {label: [a cell for each column]}, the teacher first.

    A method that is clearly the best in a column is bold there.
    """
    best = {}
    for column in columns:
        # All columns but the calibration error are accuracies.
        best[column] = setting.clear_best(column, lower_is_better=column == "ece")
    cells = {}
    for method in setting.methods_with_teacher(teacher_first=True):
        cells[method.label] = [
            mean_cell(method.values(column).values(), bold=best[column] is method)
            for column in columns
        ]
    return cells


def columns(setting):
    """Returns {title: column} of a setting's main table."""
    groups = {name: f"groups.{name}" for name in setting.group_names()}
    shots = {"many": "shots.many", "mid": "shots.medium", "few": "shots.few"}
    return {"all": "all"} | groups | shots | {"ECE": "ece"}


def accuracy_table(setting):
    """Returns the main table of a setting, with a row for each method."""
    column_by_title = columns(setting)
    cells = mean_cells(setting, column_by_title.values())
    rows = []
    for method in setting.methods_with_teacher(teacher_first=True):
        label = Cell(method.label, quiet=method.name == "teacher")
        rows.append([label, *cells[method.label], str(len(method.runs))])
    return Table(["method", *column_by_title, "n"], rows)


def mass_table(setting):
    """Returns a table of the mass on each group, None if no student has recorded it.

    See `MASS_NOTE`. The first row is that of an unbiased model.
    """
    group_names = setting.group_names()
    _, shares = setting.group_shares()
    rows = []
    for method in setting.methods_with_teacher(teacher_first=True):
        masses = [method.values(f"group_mass.{name}") for name in group_names]
        if any(masses):
            cells = []
            for values in masses:
                cells.append(mean_cell(100 * value for value in values.values()))
            label = Cell(method.label, quiet=method.name == "teacher")
            rows.append([label, *cells, str(len(masses[0]))])
    has_student = any(row[0].text != "teacher" for row in rows)
    if not has_student or not shares:
        return None
    unbiased = [mean_cell([100 * shares[name]]) for name in group_names]
    rows.insert(0, [Cell("unbiased", quiet=True), *unbiased, "–"])
    return Table(["method", *group_names, "n"], rows)


def tables_over_settings(settings):
    """Returns (title, table) pairs with a row for each method, a column per setting.

    A single setting has none.
    """
    if len(settings) < 2:
        return []
    common_title = aggregate.common_title(settings)
    header = ["method", *aggregate.short_titles(settings)]
    titled_tables = []
    for name, column_of in COMPARED_COLUMNS.items():
        title = f"Accuracy on {name}"
        if common_title:
            title += f": {common_title}"
        rows = _rows_over_settings(settings, column_of)
        titled_tables.append((title, Table(header, rows)))
    return titled_tables


def _rows_over_settings(settings, column_of):
    """Returns a row for the teacher, if any, and for each method."""
    cells = [mean_cells(setting, [column_of(setting)]) for setting in settings]
    labels = [method.label for method in aggregate.distinct_methods(settings)]
    if any("teacher" in cells_by_label for cells_by_label in cells):
        labels.insert(0, "teacher")
    rows = []
    for label in labels:
        row = [Cell(label, quiet=label == "teacher")]
        for cells_by_label in cells:
            (cell,) = cells_by_label.get(label, [_MISSING])
            row.append(cell)
        rows.append(row)
    return rows


def comparison_tables(setting):
    """Returns (name, table) pairs of paired comparisons, on all classes and the tail.

    A single method has none.
    """
    if len(setting.methods) < 2:
        return []
    column_by_name = {
        "all classes": "all",
        f"the {setting.tail_name()}": setting.tail_column(),
    }
    named_tables = []
    for name, column in column_by_name.items():
        if setting.best(column):
            named_tables.append((name, _comparison_table(setting, column)))
    return named_tables


def _comparison_table(setting, column):
    """Compares each method with ce and kd, and the best method with each."""
    references = [method for method in setting.methods if method.label in ("ce", "kd")]
    best = setting.best(column)
    rows = []
    for method in setting.methods:
        cells = [
            _comparison_cell(method, reference, column) for reference in references
        ]
        rows.append([method.label, *cells, _comparison_cell(best, method, column)])
    header = ["method"]
    header += [f"against {method.label}" for method in references]
    header.append(f"{best.label} against it")
    return Table(header, rows, num_text_columns=len(header))


def _comparison_cell(candidate, reference, column):
    if candidate is reference:
        return _MISSING
    difference = compare_paired(candidate.values(column), reference.values(column))
    if not difference.num_pairs:
        return Cell("no shared seed", quiet=True)
    text = writers.signed(difference.mean)
    if difference.margin is not None:
        text += f" ± {difference.margin:.2f}"
    text = f"{text} {difference.verdict}"
    is_unclear = difference.verdict == UNCLEAR
    return Cell(text, f"n = {difference.num_pairs}", quiet=is_unclear)


# Sentences.


def headline(setting):
    """Returns sentences on the most accurate method, and on what it is better than."""
    best = setting.best("all")
    if best is None:
        return "No run has a test accuracy yet."
    tail = setting.tail_column()
    tail_name = setting.tail_name()
    best_tail = best.mean(tail)
    text = f"{best.label} classifies {best.mean('all'):.2f} %"
    if best_tail is not None:
        text += f" ({tail_name} {best_tail:.2f} %)"
    text += " of the test set"
    if len(setting.methods) > 1:
        text += f", the highest of {len(setting.methods)} methods. "
        text += _comparison_in_words(setting, best)
        tail_method = setting.best(tail)
        if tail_method not in (None, best):
            text += f" On the {tail_name} the highest is {tail_method.label}, "
            text += f"{tail_method.mean(tail):.2f} %."
    else:
        text += "." if len(best.runs) > 1 else ", with one seed."
    return text + _teacher_in_words(setting)


def _teacher_in_words(setting):
    """Returns a sentence on the teacher's accuracy, "" if it was not evaluated."""
    teacher = setting.teacher_method()
    if teacher is None or not teacher.values("all"):
        return ""
    text = f" The teacher: {teacher.mean('all'):.2f} %"
    tail_mean = teacher.mean(setting.tail_column())
    if tail_mean is not None:
        text += f", {setting.tail_name()} {tail_mean:.2f} %"
    return f"{text}."


def _comparison_in_words(setting, best):
    differences = {}
    for method in setting.methods:
        if method is not best:
            differences[method.label] = compare_paired(
                best.values("all"), method.values("all")
            )
    if all(difference.num_pairs < 2 for difference in differences.values()):
        return (
            "It shares at most one seed with any other, so no difference can be "
            "distinguished from chance."
        )
    better_than = []
    unclear = []
    for label, difference in differences.items():
        if difference.verdict == BETTER:
            better_than.append(label)
        else:
            unclear.append(label)
    verdicts = []
    if better_than:
        verdicts.append(f"better than {_enumerate(better_than)}")
    if unclear:
        verdicts.append(f"{UNCLEAR} from {_enumerate(unclear)}")
    return f"Paired over student seeds it is {'; '.join(verdicts)}."


def _enumerate(words):
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def overview(settings):
    """Returns a sentence on how often each method is the best, "" without a value.

    A setting with one method compares nothing, so it is not counted.
    """
    settings = [setting for setting in settings if len(setting.methods) > 1]
    clauses = []
    for name, column_of in COMPARED_COLUMNS.items():
        best = [setting.best(column_of(setting)) for setting in settings]
        # A setting without a value has no best method.
        wins = collections.Counter(method.label for method in best if method)
        if wins:
            counts = [f"{label} in {n}" for label, n in wins.most_common()]
            total = f"{wins.total()} setting{'' if wins.total() == 1 else 's'}"
            clauses.append(f"on {name}: {_enumerate(counts)} of {total}")
    return f"Highest mean accuracy {'; '.join(clauses)}." if clauses else ""


def progress(run):
    """Returns how far an unfinished run has come, in words."""
    last_record = run["metrics"][-1] if run.get("metrics") else {}
    if "epoch" in last_record:
        return f"epoch {last_record['epoch']}"
    return "nothing logged yet"


# A document.


def render(runs, output_format="text"):
    """Returns all tables of the runs in one of `writers.FORMATS`.

    The tables over all settings are first, then those of each setting, then the
    unfinished runs.
    """
    settings = aggregate.group_runs(runs)
    blocks = []
    for title, table in tables_over_settings(settings):
        # The first table has the remarks on both.
        remarks = [] if blocks else [overview(settings), OVER_SETTINGS_NOTE]
        blocks.append(writers.Block(table, title, *remarks))
    for setting, title in zip(settings, aggregate.distinct_titles(settings)):
        table = accuracy_table(setting)
        block = writers.Block(table, title, headline(setting), setting.note())
        blocks.append(block)
        for name, comparison in comparison_tables(setting):
            blocks.append(writers.Block(comparison, text=f"Paired, {name}:"))
    for run in runs:
        if not run.get("finished", True):
            text = f"unfinished: {run['source']} ({progress(run)})"
            blocks.append(writers.Block(None, text=text))
    return writers.document(blocks, output_format) if blocks else "no runs"
