"""The results page of the repository, results/README.md: published numbers beside ours, the search, the ablation."""

import pathlib
import re

from experiments.config.trees import flatten
from experiments.reporting import aggregate, load, report_page, tables
from experiments.reporting.statistics import mean_std
from experiments.reporting.writers import Cell, Table, as_markdown, escape_markdown

PUBLISHED = pathlib.Path(__file__).with_name("published.json")
_NOT_RUN = Cell("not run yet", quiet=True)
_GROUPS = ("head", "medium", "tail")


def write_results(folder, planned=()):
    """Writes README.md into a folder of result files and returns its path."""
    path = pathlib.Path(folder) / "README.md"
    path.write_text(
        render_results(load.find([folder]), load.read_json(PUBLISHED), planned),
        encoding="utf-8",
    )
    return path


def render_results(runs, published, planned=()):
    """Returns the page as Markdown.

    Args:
      runs: of `load.find`.
      published: the content of published.json.
      planned: runs that a queue holds, as dictionaries with the keys data, imbalance, teacher, student, method, epochs,
        set and group.
    """
    settings = aggregate.gather(_of_kind("table", runs))
    planned_rows = _of_kind("table", planned)
    entries = [*published["settings"], *planned_rows, *map(vars, settings)]
    parts = [_preamble(published)]
    for key in dict.fromkeys(map(_key, entries)):
        reference = next(
            (entry for entry in published["settings"] if _key(entry) == key), {}
        )
        run_settings = [setting for setting in settings if _key(vars(setting)) == key]
        parts += _section(
            key,
            run_settings,
            reference,
            [entry for entry in planned_rows if _key(entry) == key],
        )
    parts += _search(_of_kind("search", runs), _of_kind("search", planned))
    parts += _ablation(_of_kind("ablation", runs), _of_kind("ablation", planned))
    parts += _bias(settings, published["group_mass"])
    parts += _orientation(published["anchors"])
    return "\n\n".join(parts) + "\n"


def _of_kind(kind, entries):
    """Returns the runs, done or planned, whose group begins with "search" or "ablation"; all others are "table"."""
    return [entry for entry in entries if _kind(entry.get("group") or "") == kind]


def _kind(group):
    return next(
        (kind for kind in ("search", "ablation") if group.startswith(kind)), "table"
    )


def _key(entry):
    """Returns the (data set, imbalance, teacher, student) of a number, be it published, planned or measured."""
    name = re.sub("[^a-z0-9]", "", str(entry["data"]).lower())
    return name, float(entry["imbalance"]), entry["teacher"], entry["student"]


def _title(data, imbalance, teacher, student):
    return f"{data}, imbalance {imbalance:g}, {f'{teacher} → ' if teacher else ''}{student}"


def _preamble(published):
    marks = "\n".join(
        f"- **[{mark}]** {meaning}" for mark, meaning in published["marks"].items()
    )
    return f"""# Results

Written by `python -m experiments.report --results results/ --queue experiments/queues/*.json`; do not edit by hand.

Accuracies are top-1 on the balanced test set, in percent, of the last epoch: mean ± standard deviation over student
seeds. {tables.COLUMNS}

{tables.RULE}

{tables.RECONSTRUCTED} How sure a published number is:

{marks}"""


# A data set, an imbalance and a pair of models.


def _section(key, settings, reference, planned):
    """Returns a table for each setting that was run, and one for each length of training that is only planned."""
    published = reference.get("methods", {})
    data = settings[0].data if settings else reference.get("data", key[0])
    parts = [f"## {escape_markdown(_title(data, *key[1:]))}"]
    parts += (
        [f"Published: {reference['paper']}. {reference.get('note', '')}".rstrip()]
        if reference
        else []
    )
    missing = {}
    for entry in planned:
        missing.setdefault(entry["epochs"], set()).add(entry["method"])
    shown = [(setting.epochs, setting) for setting in settings]
    shown += [(epochs, None) for epochs in missing if epochs not in dict(shown)]
    shown = sorted(shown, key=_longest_first) or [(0, None)]
    # Published numbers stand in the table of the longest training, which is nearest to that of the papers.
    missing.setdefault(shown[0][0], set()).update(published)
    for i, (epochs, setting) in enumerate(shown):
        references = published if i == 0 else {}
        names = missing.pop(epochs, set())
        parts += [f"{epochs:g} epochs:"] if setting is None and len(shown) > 1 else []
        parts.append(as_markdown(_table(setting, references, names)))
        parts += (
            [*_distances(setting, references), *_below_table(setting)]
            if setting
            else []
        )
    return parts


def _longest_first(entry):
    epochs, setting = entry
    return -epochs, (setting.split, setting.images) if setting else ()


def _table(setting, published, missing):
    """Returns the methods of a setting, or of none, and those that are not run yet, beside published numbers."""
    columns = tables.columns(setting) if setting else dict.fromkeys(("all", *_GROUPS))
    cells = tables.numbers(setting, columns.values()) if setting else {}
    methods = setting.methods_with_teacher(first=True) if setting else []
    names = missing - {method.name for method in methods}
    methods = [*methods, *(aggregate.Method(name, name, {}) for name in names)]
    shown = ("all", "tail") if any(published.values()) else ()
    rows = []
    for method in sorted(methods, key=_row_rank):
        references = [
            _published(published.get(method.name, {}).get(column)) for column in shown
        ]
        own = cells.get(method.label, [_NOT_RUN] * len(columns))
        rows.append([method.label, *references, *own, str(len(method.runs))])
    return Table(
        ["method", *(f"published {column}" for column in shown), *columns, "n"], rows
    )


def _row_rank(method):
    return method.name != "teacher", aggregate.rank(method)


def _published(entry):
    return f"{entry[0]:.2f} [{entry[1]}]" if entry else "?"


def _distances(setting, published):
    """Returns a sentence on the mean of each method less the published number."""
    parts = []
    for method in setting.methods:
        distances = []
        for name, column in (("all", "all"), ("tail", "groups.tail")):
            reference = published.get(method.name, {}).get(name)
            if reference and method.values(column):
                distances.append(
                    f"{name} {method.mean(column) - reference[0]:+.2f}".replace(
                        "-", "−"
                    )
                )
        parts += [f"{method.label}: {', '.join(distances)}"] if distances else []
    return [f"Ours less the published, in points: {'; '.join(parts)}."] if parts else []


def _below_table(setting):
    parts = [f"{setting.note()}.", escape_markdown(tables.headline(setting))]
    for title, table in tables.comparisons(setting):
        parts += [f"Paired, {escape_markdown(title)}:", as_markdown(table)]
    rows = []
    for method in setting.methods:
        runs = method.sorted_runs
        columns = [
            [str(run.get(key) or "–") for run in runs]
            for key in ("device", "precision", "commit")
        ]
        columns.append([aggregate.logits_source(run) or "–" for run in runs])
        seconds = [(run.get("timing") or {}).get("seconds") for run in runs]
        mean_seconds, _, _ = mean_std(time for time in seconds if time is not None)
        distinct = [", ".join(sorted(set(column))) for column in columns]
        rows.append([method.label, *distinct, report_page.duration(mean_seconds)])
    header = [
        "method",
        "hardware",
        "precision",
        "commit",
        "teacher's logits",
        "wall time of a run",
    ]
    return [*parts, as_markdown(Table(header, rows, left=5)), _commands(setting.runs)]


def _commands(runs):
    commands = "\n".join(
        " ".join((run.get("command") or "# not recorded").split()) for run in runs
    )
    fence = "`" * (3 + max(map(len, re.findall("`+", commands)), default=0))
    return f"{fence}sh\n{commands}\n{fence}"


# Methods with different hyperparameters.


def _search(runs, planned):
    if not (runs or planned):
        return []
    header, rows = _variants(runs, planned, "validation")
    chosen, edges = {}, []
    for setting in aggregate.gather(runs):
        for name in dict.fromkeys(method.name for method in setting.methods):
            candidates = [
                m
                for m in setting.methods
                if m.name == name and m.values("all", "validation")
            ]
            if candidates:
                best = max(
                    candidates, key=lambda method: method.mean("all", "validation")
                )
                chosen[setting.title, best.label] = "chosen"
                at_edge = "; ".join(_at_edge(best, candidates))
                edges += (
                    [f"- {setting.title}, {best.label}: {at_edge}"] if at_edge else []
                )
    table = Table(
        [*header, ""],
        [[*row, chosen.get((row[0], row[1]), "")] for row in rows],
        left=2,
    )
    about = "Balanced accuracy on validation images taken from the training set; the test set chose nothing."
    parts = ["## The search", about, as_markdown(table)]
    if edges:
        parts += [
            "The best value lies on the edge of what was tried, which is to be widened:",
            "\n".join(edges),
        ]
    return parts


def _ablation(runs, planned):
    if not (runs or planned):
        return []
    about = "The same methods with a part of them switched off; on the test set, the last epoch, as the tables above."
    header, rows = _variants(runs, planned, "test")
    return ["## The ablation", about, as_markdown(Table(header, rows, left=2))]


def _variants(runs, planned, part):
    """Returns header and rows of methods with different hyperparameters, run or planned."""
    columns = ["all", *(f"groups.{name}" for name in _GROUPS)]
    rows = []
    for setting in aggregate.gather(runs):
        for method in setting.methods:
            cells = [
                tables.number(method.values(column, part).values())
                for column in columns
            ]
            rows.append(
                [
                    setting.title,
                    method.label,
                    *cells,
                    str(len(method.runs)),
                    f"{setting.epochs:g}",
                ]
            )
    configs = [flatten(run["config"]) for run in runs]
    for entry in planned:
        if not any(_is_run_of(entry, config) for config in configs):
            chosen = {
                key: v for key, v in entry["set"].items() if key.startswith("method.")
            }
            values = ", ".join(
                f"{key.removeprefix('method.')}={v}" for key, v in chosen.items()
            )
            label = f"{entry['method']} ({values})" if values else entry["method"]
            row = [
                _title(*_key(entry)),
                label,
                *[_NOT_RUN] * len(columns),
                "0",
                f"{entry['epochs']:g}",
            ]
            rows += [row] if row not in rows else []  # one row for all seeds
    return ["setting", "method", "all", *_GROUPS, "n", "epochs"], rows


def _is_run_of(entry, config):
    """Returns whether a flat config is that of a planned run."""
    keys = {
        "data": "data.name",
        "imbalance": "data.imbalance",
        "teacher": "teacher.model",
        "student": "student.model",
    }
    own = {name: config.get(key) for name, key in keys.items()}
    if (
        own["imbalance"] is None
        or _key(own) != _key(entry)
        or config.get("method.name") != entry["method"]
    ):
        return False
    return all(str(config.get(key, v)) == str(v) for key, v in entry["set"].items())


def _at_edge(best, candidates):
    """Returns the hyperparameters of the best for which only smaller, or only larger, values were tried."""
    tried = [candidate.sorted_runs[0]["config"]["method"] for candidate in candidates]
    edges = []
    for key, value in best.sorted_runs[0]["config"]["method"].items():
        values = sorted(
            {other[key] for other in tried if isinstance(other.get(key), (int, float))}
        )
        if (
            len(values) > 1 and value and value in (values[0], values[-1])
        ):  # nothing lies below 0
            edges.append(f"{key} = {value:g} of {', '.join(f'{v:g}' for v in values)}")
    return edges


# The teacher's bias, and numbers for orientation.


def _bias(settings, published):
    """Returns the table of the teacher's mass per group, summed over a batch of 64, as LTKD's paper has it."""
    rows = []
    for kind in ("long_tailed", "balanced"):
        title = kind.replace("_", "-")
        rows.append(
            [
                "LTKD's paper",
                title,
                *(_published(published[kind][name]) for name in _GROUPS),
            ]
        )
        for setting in settings:
            for teacher in setting.teachers().values():
                mass = (teacher.get("group_mass") or {}).get(kind) or {}
                if set(_GROUPS) <= mass.keys():
                    rows.append(
                        [
                            setting.title,
                            title,
                            *(f"{64 * mass[name]:.2f}" for name in _GROUPS),
                        ]
                    )
    about = f"{published['about']}. Ours are the mean mass at temperature 1, times 64."
    return [
        "## The teacher's bias",
        about,
        as_markdown(Table(["teacher of", "input", *_GROUPS], rows, left=2)),
    ]


def _orientation(anchors):
    parts = ["## Numbers of others, for orientation"]
    for anchor in anchors:
        table = Table(
            ["method", f"top-1 % [{anchor['mark']}]"], list(anchor["all"].items())
        )
        parts += [f"{anchor['title']}:", as_markdown(table)]
    return parts
