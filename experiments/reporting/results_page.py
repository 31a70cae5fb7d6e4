"""The page of a folder of result files: its README.md.

It compares measured with published numbers, and has the search for hyperparameters and
the ablation.
"""

import collections
import pathlib
import re

from experiments.config import identity
from experiments.config.trees import flatten
from experiments.reporting import aggregate, load, tables
from experiments.reporting.statistics import mean_std
from experiments.reporting.writers import (
    Cell,
    Table,
    as_markdown,
    escape_markdown,
    format_duration,
    signed,
)
from ltkd_jax.methods import METHODS

PUBLISHED = pathlib.Path(__file__).with_name("published.json")
_NOT_RUN = Cell("not run yet", quiet=True)
_GROUPS = ("head", "medium", "tail")
# Without a value these do nothing, and are not listed.
_OFF_IF_EMPTY = ("method.warmup_epochs", "loss_weighting.scales")
# LTKD's paper sums the mass over a batch of this size.
_PUBLISHED_BATCH_SIZE = 64


def write_results(folder, planned=()):
    """Writes README.md into a folder of result files, and returns its path."""
    path = pathlib.Path(folder) / "README.md"
    runs = load.load_all([folder])
    text = render_results(runs, load.read_json(PUBLISHED), planned)
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def render_results(runs, published, planned=()):
    """Returns the page as Markdown.

    Args:
      runs: what `load.load_all` returns.
      published: the content of published.json.
      planned: runs of a queue, as dictionaries with the keys data, imbalance, teacher,
        student, method, epochs, identity, set, group and best_of.
    """
    settings = aggregate.group_runs(_of_kind("table", runs))
    planned_for_tables = _of_kind("table", planned)
    entries = [*published["settings"], *planned_for_tables, *map(vars, settings)]
    paragraphs = _preamble(published)
    # A dictionary keeps the order, and each key once.
    for key in dict.fromkeys(map(_setting_key, entries)):
        paragraphs += _section(
            key,
            _settings_with_key(settings, key),
            _first_with_key(published["settings"], key),
            [entry for entry in planned_for_tables if _setting_key(entry) == key],
        )
    paragraphs += _search(_of_kind("search", runs), _of_kind("search", planned))
    paragraphs += _ablation(_of_kind("ablation", runs), _of_kind("ablation", planned))
    paragraphs += _bias(settings, published["group_mass"])
    paragraphs += _other_published(published["anchors"])
    return "\n\n".join(paragraphs) + "\n"


def _of_kind(kind, entries):
    """Returns the runs, finished or planned, of a kind.

    A run is of the kind "search" or "ablation" if its group begins with that word. All
    others are of the kind "table".
    """
    return [entry for entry in entries if _kind(entry.get("group") or "") == kind]


def _kind(group):
    for kind in ("search", "ablation"):
        if group.startswith(kind):
            return kind
    return "table"


def _setting_key(entry):
    """Returns (data set, imbalance, teacher, student) of an entry.

    Published, planned and measured numbers that belong together have the same key,
    although the papers write "CIFAR-100", and the configs "cifar100".
    """
    data = re.sub("[^a-z0-9]", "", str(entry["data"]).lower())
    return data, float(entry["imbalance"]), entry["teacher"], entry["student"]


def _settings_with_key(settings, key):
    """Returns the settings with a key, with labels that tell their own rows apart."""
    runs = []
    for setting in settings:
        if _setting_key(vars(setting)) == key:
            runs += setting.runs
    return aggregate.group_runs(runs)


def _first_with_key(entries, key):
    for entry in entries:
        if _setting_key(entry) == key:
            return entry
    return {}


def _title(data, imbalance, teacher, student):
    models = f"{teacher} → {student}" if teacher else student
    return f"{data}, imbalance {imbalance:g}, {models}"


def _preamble(published):
    """Returns the paragraphs that explain the numbers."""
    marks = []
    for mark, meaning in published["marks"].items():
        marks.append(f"- **[{mark}]** {meaning}")
    command = "python -m experiments.report --results=FOLDER --queue FILE…"
    accuracies = (
        "Accuracies are top-1 on the balanced test set, in percent, of the last epoch: "
        "mean ± standard deviation over student seeds."
    )
    return [
        "# Results",
        f"Written by `{command}`; do not edit by hand.",
        f"{accuracies} {tables.COLUMNS_NOTE}",
        tables.VERDICT_NOTE,
        f"{tables.RECONSTRUCTED_NOTE} How certain a published number is:",
        "\n".join(marks),
    ]


# A data set, an imbalance and a pair of models.


def _section(key, settings, reference, planned):
    """Returns the section of a pair of models on a data set and an imbalance.

    It has a table for each setting that was run, and one for each number of epochs that
    is only planned.

    Args:
      key: what `_setting_key` returns.
      settings: the settings that were run.
      reference: the entry of published.json, {} if there is none.
      planned: the runs that are planned.
    """
    title = _section_title(key, settings, reference, planned)
    paragraphs = [f"## {escape_markdown(title)}"]
    if reference:
        text = f"Published: {reference['paper']}. {reference.get('note', '')}"
        paragraphs.append(text.rstrip())
    # Methods that get a row even if they were not run, by the length of training.
    expected_by_epochs = {}
    for entry in planned:
        expected = expected_by_epochs.setdefault(entry["epochs"], set())
        expected.add(entry["method"])
    # A table is identified by (epochs, setting); the setting is None if only planned.
    table_keys = [(setting.epochs, setting) for setting in settings]
    lengths_of_runs = {setting.epochs for setting in settings}
    for epochs in expected_by_epochs:
        if epochs not in lengths_of_runs:
            table_keys.append((epochs, None))
    table_keys.sort(key=_longest_first)
    if not table_keys:
        # A table of the published numbers only.
        table_keys.append((0, None))
    # Published numbers are in the table of the longest training, which is nearest to
    # that of the papers.
    published = reference.get("methods", {})
    longest, _ = table_keys[0]
    expected_by_epochs.setdefault(longest, set()).update(published)
    for epochs, setting in table_keys:
        # Of several tables of the same length, the first gets the expected rows.
        expected = expected_by_epochs.pop(epochs, set())
        if setting is None and len(table_keys) > 1:
            paragraphs.append(f"{epochs:g} epochs:")
        paragraphs.append(as_markdown(_table(setting, published, expected)))
        if setting:
            paragraphs += _differences(setting, published)
            paragraphs += _below_table(setting)
        # The published numbers are in the first table only.
        published = {}
    return paragraphs


def _section_title(key, settings, reference, planned):
    """Returns the title of a section, see `_section`."""
    data, imbalance, teacher, student = key
    data = settings[0].data if settings else reference.get("data", data)
    names = [*reference.get("methods", {}), *(entry["method"] for entry in planned)]
    for setting in settings:
        names += [method.name for method in setting.methods]
    if not any(map(_needs_teacher, names)):
        teacher = None  # the config names one, but no method uses it
    return _title(data, imbalance, teacher, student)


def _needs_teacher(name):
    """Returns whether the row of a method has something from a teacher."""
    method = METHODS.get(name)
    return method is None or method.needs_teacher  # None: the teacher itself, or bikd


def _longest_first(table_key):
    epochs, setting = table_key
    if setting is None:
        return -epochs, ()
    return -epochs, (setting.split_seed, setting.num_images)


def _table(setting, published, expected):
    """Returns the table of a setting, with published numbers beside the measured ones.

    Args:
      setting: the setting, or None if it was not run yet.
      published: {method: {"all": entry, "tail": entry}}.
      expected: names of methods that get a row even if they were not run.
    """
    if setting:
        columns = tables.columns(setting)
        cells = tables.mean_cells(setting, columns.values())
        methods = setting.methods_with_teacher(teacher_first=True)
    else:
        columns = dict.fromkeys(("all", *_GROUPS))
        cells = {}
        methods = []
    for name in expected - {method.name for method in methods}:
        methods.append(aggregate.Method(name, name, {}))
    published_columns = ("all", "tail") if any(published.values()) else ()
    rows = []
    for method in sorted(methods, key=_row_key):
        references = published.get(method.name, {})
        row = [method.label]
        row += [_published_text(references.get(name)) for name in published_columns]
        row += cells.get(method.label, [_NOT_RUN] * len(columns))
        rows.append([*row, str(len(method.runs))])
    published_header = [f"published {name}" for name in published_columns]
    return Table(["method", *published_header, *columns, "n"], rows)


def _row_key(method):
    return method.name != "teacher", aggregate.sort_key(method)


def _published_text(entry):
    """Returns an entry as a text; "?" for None.

    [number, mark] becomes "51.08 [S]", and [lowest, highest, mark] "43.00–45.10 [S]".
    """
    if not entry:
        return "?"
    *numbers, mark = entry
    return f"{'–'.join(f'{number:.2f}' for number in numbers)} [{mark}]"


def _differences(setting, published):
    """Returns a sentence on the measured means minus the published numbers."""
    clauses = []
    for method in setting.methods:
        differences = []
        for name, column in (("all", "all"), ("tail", "groups.tail")):
            entry = published.get(method.name, {}).get(name)
            if entry and method.values(column):
                *numbers, _ = entry
                texts = [signed(method.mean(column) - number) for number in numbers]
                differences.append(f"{name} {' and '.join(texts)}")
        if differences:
            clauses.append(f"{method.label}: {', '.join(differences)}")
    if not clauses:
        return []
    text = escape_markdown("; ".join(clauses))
    return [f"Measured minus published, in percentage points: {text}."]


def _below_table(setting):
    """Returns the paragraphs below the table of a setting.

    These are notes, paired comparisons, the mass on each group, and the
    hyperparameters, hardware and commands of the runs.
    """
    paragraphs = [f"{setting.note()}.", escape_markdown(tables.headline(setting))]
    for name, table in tables.comparison_tables(setting):
        paragraphs += [f"Paired, {escape_markdown(name)}:", as_markdown(table)]
    masses = tables.mass_table(setting)
    if masses:
        paragraphs += [tables.MASS_NOTE, as_markdown(masses)]
    hyperparameters = _hyperparameter_rows(setting)
    if hyperparameters:
        header = ["method", "hyperparameters"]
        paragraphs.append(
            as_markdown(Table(header, hyperparameters, num_text_columns=2))
        )
    rows = []
    for method in setting.methods:
        rows += _circumstances(method)
    header = [
        "method",
        "hardware",
        "precision",
        "commit",
        "teacher's logits",
        "seeds",
        "wall time of a run",
    ]
    paragraphs.append(as_markdown(Table(header, rows, num_text_columns=6)))
    paragraphs.append(_commands(setting.runs))
    return paragraphs


def _hyperparameter_rows(setting):
    """Returns a row of hyperparameters for each method that has any."""
    rows = []
    for method in setting.methods:
        assignments = {"method": [], "loss_weighting": []}
        for key, value in _hyperparameters(method).items():
            section, _, name = key.partition(".")
            if key not in _OFF_IF_EMPTY or value:
                text = aggregate.format_assignment(name, value)
                assignments[section].append(text)
        texts = [", ".join(assignments["method"])]
        if assignments["loss_weighting"]:
            texts.append(f"loss_weighting: {', '.join(assignments['loss_weighting'])}")
        if any(texts):
            rows.append([method.label, "; ".join(filter(None, texts))])
    return rows


def _hyperparameters(method):
    """Returns {config key: value} of the method and of learned weights, sorted."""
    config = flatten(method.sorted_runs[0]["identity"])
    return {key: config[key] for key in sorted(config) if _is_hyperparameter(key)}


def _is_hyperparameter(key):
    section, _, name = key.partition(".")
    return section in ("method", "loss_weighting") and name != "name"


def _circumstances(method):
    """Returns rows on how the runs of a method were executed, one for each hardware."""
    runs_by_device = collections.defaultdict(list)
    for run in method.sorted_runs:
        runs_by_device[str(run.get("device") or "–")].append(run)
    rows = []
    for device, runs in sorted(runs_by_device.items()):
        row = [method.label, device]
        for key in ("precision", "commit"):
            row.append(_join_distinct(str(run.get(key) or "–") for run in runs))
        row.append(_join_distinct(aggregate.logits_source(run) or "–" for run in runs))
        seeds = sorted(str(run["seeds"].get("student")) for run in runs)
        seconds = [(run.get("timing") or {}).get("seconds") for run in runs]
        mean_seconds, _, _ = mean_std(s for s in seconds if s is not None)
        duration = format_duration(mean_seconds)
        rows.append([*row, ", ".join(seeds), duration])
    return rows


def _join_distinct(texts):
    return ", ".join(sorted(set(texts)))


def _commands(runs):
    """Returns the commands of the runs as a block of code."""
    commands = []
    for run in runs:
        commands.append(" ".join((run.get("command") or "# not recorded").split()))
    text = "\n".join(commands)
    # The fence must be longer than any row of backticks inside.
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (3 + longest)
    return f"{fence}sh\n{text}\n{fence}"


# Methods with different hyperparameters.


def _search(runs, planned):
    """Returns the section on the search for hyperparameters."""
    if not (runs or planned):
        return []
    header, rows = _variant_rows(runs, planned, "validation")
    chosen = set()
    remarks = []
    for setting, best, candidates in _search_winners(runs):
        chosen.add((setting.title, best.label))
        edges = _values_at_edge(best, candidates)
        if edges:
            remark = f"{setting.title}, {best.label}: {'; '.join(edges)}"
            remarks.append(f"- {escape_markdown(remark)}")
    for row in rows:
        title, label = row[:2]
        row.append("chosen" if (title, label) in chosen else "")
    table = Table([*header, ""], rows, num_text_columns=2)
    about = (
        "Balanced accuracy on validation images taken from the training set; no choice "
        "was made on the test set."
    )
    paragraphs = ["## The search", about, as_markdown(table)]
    if remarks:
        paragraphs += [
            "The best value is at the edge of the range that was tried, which is to be "
            "widened:",
            "\n".join(remarks),
        ]
    return paragraphs


def _search_winners(runs):
    """Yields (setting, best method, all candidates) of each setting and method name.

    The best method has the highest accuracy on validation images.
    """
    for setting in aggregate.group_runs(runs):
        candidates_by_name = {}
        for method in setting.methods:
            if method.values("all", "validation"):
                candidates_by_name.setdefault(method.name, []).append(method)
        for candidates in candidates_by_name.values():
            best = max(candidates, key=lambda method: method.mean("all", "validation"))
            yield setting, best, candidates


def _values_at_edge(best, candidates):
    """Returns the best hyperparameters that are the lowest or highest that were tried.

    Each is a text such as "alpha = 4 of 1, 4".
    """
    edges = []
    for key, value in _hyperparameters(best).items():
        tried = [_hyperparameters(candidate).get(key) for candidate in candidates]
        values = sorted({v for v in tried if isinstance(v, (int, float))})
        # Zero is never reported, since nothing below it can be tried.
        if len(values) > 1 and value and value in (values[0], values[-1]):
            name = key.removeprefix("method.")
            edges.append(f"{name} = {value:g} of {', '.join(f'{v:g}' for v in values)}")
    return edges


def _ablation(runs, planned):
    """Returns the section on methods with a part switched off."""
    if not (runs or planned):
        return []
    about = (
        "The same methods with a part of them switched off; on the test set, at the "
        "last epoch, as in the tables above."
    )
    header, rows = _variant_rows(runs, planned, "test")
    table = Table(header, rows, num_text_columns=2)
    return ["## The ablation", about, as_markdown(table)]


def _variant_rows(runs, planned, split):
    """Returns the header and rows of methods with different hyperparameters.

    Args:
      runs: finished runs.
      planned: planned runs; those that are not finished get a row too.
      split: "test" or "validation".
    """
    columns = ["all", *(f"groups.{name}" for name in _GROUPS)]
    rows = []
    for setting in aggregate.group_runs(runs):
        for method in setting.methods:
            row = [setting.title, method.label]
            for column in columns:
                row.append(tables.mean_cell(method.values(column, split).values()))
            rows.append([*row, str(len(method.runs)), f"{setting.epochs:g}"])
    for entry in planned:
        if any(_is_run_of(entry, run) for run in runs):
            continue
        row = [
            _title(*_setting_key(entry)),
            _planned_label(entry),
            *[_NOT_RUN] * len(columns),
            "0",
            f"{entry['epochs']:g}",
        ]
        # The seeds of one method have one row.
        if row not in rows:
            rows.append(row)
    return ["setting", "method", "all", *_GROUPS, "n", "epochs"], rows


def _planned_label(entry):
    """Returns the method of a planned run, with the hyperparameters that it sets."""
    assignments = []
    for key, value in sorted(entry["set"].items()):
        if _is_hyperparameter(key):
            name = key.removeprefix("method.")
            assignments.append(aggregate.format_assignment(name, value))
    if not assignments:
        return entry["method"]
    return f"{entry['method']} ({', '.join(assignments)})"


def _is_run_of(entry, run):
    """Returns whether a run is the planned one, or one that differs in its seeds."""
    planned = entry["identity"]
    measured = flatten(identity.recorded_identity(run))
    keys = (planned.keys() | measured.keys()) - aggregate.SEED_KEYS
    if entry["best_of"]:
        # Its other hyperparameters are those of a run that is not known here.
        keys = {
            key for key in keys if key in entry["set"] or not _is_hyperparameter(key)
        }
    return all(planned.get(key) == measured.get(key) for key in keys)


# The teacher's bias, and other published numbers.


def _bias(settings, published):
    """Returns the section on the teacher's mass per group.

    As in LTKD's paper, the mass is summed over a batch.
    """
    rows = []
    for kind in ("long_tailed", "balanced"):
        title = kind.replace("_", "-")
        texts = [_published_text(published[kind][name]) for name in _GROUPS]
        rows.append(["LTKD's paper", title, *texts])
        for setting in settings:
            for teacher in setting.teachers().values():
                mass = (teacher.get("group_mass") or {}).get(kind) or {}
                if set(_GROUPS) <= mass.keys():
                    sums = [_PUBLISHED_BATCH_SIZE * mass[name] for name in _GROUPS]
                    texts = [f"{batch_mass:.2f}" for batch_mass in sums]
                    rows.append([setting.title, title, *texts])
    about = (
        f"{published['about']}. Measured numbers are the mean mass at temperature 1, "
        f"times {_PUBLISHED_BATCH_SIZE}."
    )
    table = Table(["teacher of", "input", *_GROUPS], rows, num_text_columns=2)
    return ["## The teacher's bias", about, as_markdown(table)]


def _other_published(anchors):
    """Returns the section on published numbers of other methods, for comparison."""
    paragraphs = ["## Other published numbers, for comparison"]
    for anchor in anchors:
        header = ["method", f"top-1 % [{anchor['mark']}]"]
        table = Table(header, list(anchor["all"].items()))
        paragraphs += [f"{anchor['title']}:", as_markdown(table)]
    return paragraphs
