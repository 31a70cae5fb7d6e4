"""The results page of the repository: published numbers beside ours, the search, and all else that was run."""

import pathlib
import re

from experiments import report
from experiments.reporting import tables, writers

PUBLISHED = pathlib.Path(__file__).with_name("published.json")
NOT_RUN = writers.Cell("not run yet", quiet=True)


def render_results(runs, published, planned=()):
    """Renders results/README.md: published numbers beside ours, the search, and all else that was run."""
    tabled = _of("table", planned)
    settings = tables.gather(_of("table", runs))
    wanted = {_cell(entry)[:4]: None for entry in published["settings"]}
    wanted |= {_cell(entry)[:4]: None for entry in tabled}
    wanted |= {_cell(vars(setting))[:4]: None for setting in settings}
    parts = [_preamble(published)]
    for pair in wanted:
        ours = [setting for setting in settings if _cell(vars(setting))[:4] == pair]
        theirs = next((entry for entry in published["settings"] if _cell(entry)[:4] == pair), {})
        here = [entry for entry in tabled if _cell(entry)[:4] == pair]
        names = {e["epochs"]: {other["method"] for other in here if other["epochs"] == e["epochs"]} for e in here}
        parts += _pair_section(pair, ours, theirs, names)
    parts += _search_section(_of("search", runs), _of("search", planned))
    parts += _ablation_section(_of("ablation", runs), _of("ablation", planned))
    parts += _bias(settings, published["group_mass"])
    parts += _anchors(published)
    return "\n\n".join(parts) + "\n"


def _of(kind, entries):
    """Runs, done or planned, whose group begins with "search" or "ablation"; all others make the tables."""

    def kind_of(entry):
        group = entry.get("group") or ""
        return next((known for known in ("search", "ablation") if group.startswith(known)), "table")

    return [entry for entry in entries if kind_of(entry) == kind]


def _cell(entry):
    """The (data set, imbalance, teacher, student, method) that a number belongs to, published, planned or run."""
    name = re.sub("[^a-z0-9]", "", str(entry["data"]).lower())
    return name, float(entry["imbalance"]), entry["teacher"], entry["student"], entry.get("method")


def planned_cells(path):
    """Returns what a queue file plans, as dictionaries with the keys of a cell, `set` and `group`."""
    from experiments.jobs import queue_entry

    found = []
    for entry in queue_entry.read_queue(path):
        config = queue_entry.resolve(entry)
        cell = {"data": config.data.name, "imbalance": config.data.imbalance}
        cell |= {"teacher": config.teacher.model, "student": config.student.model}
        cell |= {"method": tables.method_name(config.to_dict()), "epochs": config.train.epochs}
        found.append(cell | {"set": entry.set, "group": entry.group})
    return found


def _preamble(published):
    marks = "\n".join(f"- **[{mark}]** {meaning}" for mark, meaning in published["marks"].items())
    return f"""# Results

Written by `python -m experiments.report --results results/ --queue experiments/queues/*.json`; do not edit by hand.

Accuracies are top-1 on the balanced test set, in percent, of the last epoch: mean ± standard deviation over student
seeds. {tables.COLUMNS}

{tables.RULE}

{tables.RECONSTRUCTED} How sure a published number is:

{marks}"""


def _pair_section(pair, ours, theirs, planned):
    """One section: a table for each setting that was run, and one for each length of training that is only planned."""
    data, imbalance, teacher, student = pair
    data = ours[0].data if ours else theirs.get("data", data)
    title = f"## {data}, imbalance {imbalance:g}, {f'{teacher} → ' if teacher else ''}{student}"
    parts = [writers.escape_markdown(title)]
    parts += [f"Published: {theirs['paper']}. {theirs.get('note', '')}".rstrip()] if theirs else []
    ours = sorted(ours, key=lambda setting: (-setting.epochs, setting.split, setting.images))
    shown = [(setting.epochs, setting) for setting in ours]
    shown += [(epochs, None) for epochs in planned if epochs not in {setting.epochs for setting in ours}]
    shown = sorted(shown, key=lambda pair: -pair[0]) or [(0, None)]
    # What was published stands in the table of the longest training, the one nearest to the papers'.
    missing = {epochs: set(names) for epochs, names in planned.items()}
    missing.setdefault(shown[0][0], set()).update(theirs.get("methods", {}))
    for i, (epochs, setting) in enumerate(shown):
        published = theirs.get("methods", {}) if i == 0 else {}
        parts += [f"{epochs:g} epochs:"] if setting is None and len(shown) > 1 else []
        parts.append(writers.as_markdown(_side_by_side(setting, published, missing.pop(epochs, set()))))
        parts += [*_distances(setting, published), *_below_table(setting)] if setting else []
    return parts


def _distances(setting, published):
    """How far each method is from what was published of it: the mean over seeds less the published number."""
    found = []
    for method in setting.methods:
        theirs = published.get(method.name, {})
        told = [
            f"{name} {method.mean(column) - theirs[name][0]:+.2f}".replace("-", "−")
            for name, column in (("all", "all"), ("tail", "groups.tail"))
            if theirs.get(name) and method.values(column)
        ]
        found += [f"{method.label}: {', '.join(told)}"] if told else []
    return [f"Ours less the published, in points: {'; '.join(found)}."] if found else []


def _side_by_side(setting, theirs, missing):
    ours = tables.columns(setting) if setting else [(name, "") for name in ("all", "head", "medium", "tail")]
    paper = ("all", "tail") if any(theirs.values()) else ()
    header = ["method", *(f"published {column}" for column in paper), *(title for title, _ in ours), "n"]
    clear = setting.clear_best if setting else None
    best = {column: clear(column, lower_is_better=column == "ece") for _, column in ours} if setting else {}
    rows = {}
    for method in [*filter(None, [setting.teacher_method()]), *setting.methods] if setting else []:
        published = [_published(theirs.get(method.name, {}).get(column)) for column in paper]
        cells = [tables.number(method.values(c).values(), bold=best[c] is method) for _, c in ours]
        rows[_row_key(method.name, method.label)] = [method.label, *published, *cells, str(len(method.runs))]
        missing = missing - {method.name}
    for name in missing:
        published = [_published(theirs.get(name, {}).get(column)) for column in paper]
        rows[_row_key(name, name)] = [name, *published, *[NOT_RUN] * len(ours), "0"]
    return writers.Table(header, [rows[key] for key in sorted(rows)])


def _row_key(name, label):
    return (-1, "") if name == "teacher" else (*tables.method_rank(name), tables.natural(label))


def _published(entry):
    return f"{entry[0]:.2f} [{entry[1]}]" if entry else "?"


def _below_table(setting):
    parts = [f"{setting.note()}.", writers.escape_markdown(tables.headline(setting))]
    for title, table in tables.comparisons(setting):
        parts += [f"Paired, {writers.escape_markdown(title)}:", writers.as_markdown(table)]
    rows, commands = [], []
    for method in setting.methods:
        runs = [method.runs[seeds] for seeds in sorted(method.runs)]
        columns = [[str(run.get(key) or "–") for run in runs] for key in ("device", "precision", "commit")]
        columns.append([tables.logits_source(run) or "–" for run in runs])
        unique = [", ".join(sorted(set(column))) for column in columns]
        times = [(run.get("timing") or {}).get("seconds") for run in runs]
        seconds, _, _ = tables.mean_std(time for time in times if time is not None)
        rows.append([method.label, *unique, report.duration(seconds)])
        commands += [" ".join((run.get("command") or "# not recorded").split()) for run in runs]
    header = ["method", "hardware", "precision", "commit", "teacher's logits", "wall time of a run"]
    table = writers.Table(header, rows, left=5)
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`+", "".join(commands))), default=0))
    return [*parts, writers.as_markdown(table), f"{fence}sh\n{chr(10).join(commands)}\n{fence}"]


def _search_section(runs, planned):
    if not (runs or planned):
        return []
    chosen, edges = [], {}
    for setting in tables.gather(runs):
        for name in dict.fromkeys(method.name for method in setting.methods):
            rivals = [m for m in setting.methods if m.name == name and m.values("all", "validation")]
            if rivals:
                best = max(rivals, key=lambda rival: rival.mean("all", "validation"))
                chosen.append((setting.title, best.label))
                edges[f"{setting.title}, {best.label}"] = _edges(best, rivals)
    header, rows = _variants(runs, planned, "validation")
    rows = [[*row, "chosen" if tuple(row[:2]) in chosen else ""] for row in rows]
    about = "Balanced accuracy on validation images taken from the training set; the test set chose nothing."
    parts = ["## The search", about, writers.as_markdown(writers.Table([*header, ""], rows, left=2))]
    widen = [f"- {name}: {'; '.join(found)}" for name, found in edges.items() if found]
    if widen:
        told = "The best value lies on the edge of what was tried, which is to be widened:"
        parts += [f"{told}\n\n{chr(10).join(widen)}"]
    return parts


def _ablation_section(runs, planned):
    if not (runs or planned):
        return []
    about = "The same methods with a part of them switched off; on the test set, the last epoch, as the tables above."
    header, rows = _variants(runs, planned, "test")
    return ["## The ablation", about, writers.as_markdown(writers.Table(header, rows, left=2))]


def _variants(runs, planned, part):
    """Header and rows of methods that differ in their hyperparameters, run or planned."""
    rows, done = [], [tables.flatten(run["config"]) for run in runs]
    shown = ["all", *(f"groups.{name}" for name in ("head", "medium", "tail"))]
    for setting in tables.gather(runs):
        for method in setting.methods:
            cells = [tables.number(method.values(column, part).values()) for column in shown]
            rows.append([setting.title, method.label, *cells, str(len(method.runs)), f"{setting.epochs:g}"])
    for entry in planned:
        if not any(_is_planned(entry, config) for config in done):
            data, imbalance, teacher, student, method = _cell(entry)
            chosen = [(key, v) for key, v in entry["set"].items() if key.startswith("method.")]
            told = ", ".join(f"{key.removeprefix('method.')}={v}" for key, v in chosen)
            title = f"{data}, imbalance {imbalance:g}, {teacher} → {student}"
            label = f"{method} ({told})" if told else method
            row = [title, label, *[NOT_RUN] * len(shown), "0", f"{entry['epochs']:g}"]
            rows += [row] if row not in rows else []  # once, for all seeds
    return ["setting", "method", "all", "head", "medium", "tail", "n", "epochs"], rows


def _edges(best, rivals):
    """Hyperparameters of the best of which only smaller, or only larger, values were tried."""

    def settings(method):
        return next(iter(method.runs.values()))["config"]["method"]

    found, tried = [], [settings(rival) for rival in rivals]
    for key, value in settings(best).items():
        values = sorted({other[key] for other in tried if isinstance(other.get(key), (int, float))})
        if len(values) > 1 and value and value in (values[0], values[-1]):  # below 0 there is nothing
            found.append(f"{key} = {value:g} of {', '.join(f'{v:g}' for v in values)}")
    return found


def _is_planned(entry, config):
    keys = ("data.name", "data.imbalance", "teacher.model", "student.model")
    own = dict(zip(("data", "imbalance", "teacher", "student"), (config.get(key) for key in keys)))
    same = own["imbalance"] is not None and _cell(own)[:4] == _cell(entry)[:4]
    same = same and config.get("method.name") == entry["method"]
    return same and all(str(config.get(key, v)) == str(v) for key, v in entry["set"].items())


def _bias(settings, published):
    """The teacher's mass per group as LTKD prints it, summed over a batch of 64."""
    names, rows = ("head", "medium", "tail"), []
    for kind in ("long_tailed", "balanced"):
        title = kind.replace("_", "-")
        rows.append(["LTKD's paper", title, *(_published(published[kind][name]) for name in names)])
        for setting in settings:
            for teacher in setting.teachers().values():
                mass = (teacher.get("group_mass") or {}).get(kind) or {}
                if set(names) <= mass.keys():
                    rows.append([setting.title, title, *(f"{64 * mass[name]:.2f}" for name in names)])
    table = writers.Table(["teacher of", "input", *names], rows, left=2)
    about = f"{published['about']}. Ours are the mean mass at temperature 1, times 64."
    return ["## The teacher's bias", about, writers.as_markdown(table)]


def _anchors(published):
    parts = ["## Numbers of others, for orientation"]
    for anchor in published["anchors"]:
        rows = [[name, str(v)] for name, v in anchor["all"].items()]
        table = writers.Table(["method", f"top-1 % [{anchor['mark']}]"], rows)
        parts += [f"{anchor['title']}:", writers.as_markdown(table)]
    return parts


def write_results(folder, queues=()):
    """Writes README.md into the results folder and returns its path."""
    published = report.read(PUBLISHED)
    planned = [cell for queue in queues for cell in planned_cells(queue)]
    target = pathlib.Path(folder) / "README.md"
    target.write_text(render_results(report.find([folder]), published, planned), encoding="utf-8")
    return target
