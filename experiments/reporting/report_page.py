"""The report on any number of runs: a page, with its figures and tables as files."""

import json

from experiments.reporting import (
    aggregate,
    comparison,
    page,
    setting_figures,
    tables,
    weight_figures,
    writers,
)


def write_report(runs, path, title=None):
    """Writes a page about one or many runs.

    The folder beside it, `report_files` for `report.html`, gets every figure as an SVG
    file, and tables.md and tables.tex.

    Args:
      runs: what `load.load_all` returns.
      path: of the page.
      title: of the page, by default the methods and the data.
    """
    settings = aggregate.group_runs(runs)
    unfinished = [run for run in runs if not run.get("finished", True)]
    title = title or _title(settings)
    section_titles = aggregate.distinct_titles(settings)
    anchors = _distinct_anchors(section_titles)
    components = [page.Heading(title, 1), page.Text(_counts(settings, unfinished))]
    # A single setting needs no list of contents and no comparison.
    if len(settings) > 1:
        links = [("settings", "All settings side by side")]
        links += zip(anchors, section_titles)
        components += [page.Contents(links), comparison.section(settings)]
    for setting, section_title, anchor in zip(settings, section_titles, anchors):
        section = _setting_components(setting, is_alone=len(settings) == 1)
        components.append(page.Section(section_title, section, anchor))
    if unfinished:
        rows = [[run["source"], tables.progress(run)] for run in unfinished]
        table = writers.Table(["run", "progress"], rows, num_text_columns=2)
        components.append(page.Section("Unfinished runs", [table]))
    method_names = [m.name for m in aggregate.distinct_methods(settings)]
    if any("ltkd" in name for name in method_names):
        components.append(page.Text(tables.RECONSTRUCTED_NOTE))
    files = {
        "tables.md": tables.render(runs, "markdown"),
        "tables.tex": tables.render(runs, "latex"),
    }
    page.write(path, title, components, files)


def _distinct_anchors(titles):
    """Returns a distinct anchor for each section."""
    anchors = []
    # Titles that differ in punctuation only have the same anchor.
    for anchor in map(page.anchor, titles):
        is_new = anchor not in anchors
        anchors.append(anchor if is_new else f"{anchor}-{len(anchors)}")
    return anchors


def _title(settings):
    """Returns the methods and the data sets, as the title of a page."""
    labels = []
    for setting in settings:
        labels += [method.label for method in setting.methods]
    if not labels:
        return "No finished run"
    if len(labels) == 1:
        return f"{labels[0]} on {settings[0].data}, imbalance {settings[0].imbalance:g}"
    data_sets = sorted({setting.data for setting in settings})
    return f"{len(set(labels))} methods on {', '.join(data_sets)}"


def _counts(settings, unfinished):
    """Returns in words how many runs and settings there are."""
    counts = {
        "finished run": sum(len(setting.runs) for setting in settings),
        "setting": len(settings),
    }
    if unfinished:
        counts["unfinished run"] = len(unfinished)
    return ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in counts.items())


def _setting_components(setting, *, is_alone):
    """Returns the section of a setting.

    If it is the only one of the page, it also has the figure of the tail against the
    head, which the comparison of all settings has otherwise.
    """
    components = [
        page.Text(tables.headline(setting), "lead"),
        tables.accuracy_table(setting),
        page.Text(f"{setting.note()}. {tables.COLUMNS_NOTE}"),
    ]
    comparisons = tables.comparison_tables(setting)
    if comparisons:
        components.append(page.Heading("Which differences are clear"))
        components.append(page.Text(tables.VERDICT_NOTE))
        for name, table in comparisons:
            components += [page.Text(f"On {name}:", "key"), table]
    if is_alone:
        components += comparison.tail_against_head([setting])
    components += setting_figures.components(setting)
    components += weight_figures.components(setting)
    components += _provenance(setting)
    return components


def _provenance(setting):
    """Returns hardware, versions, commands and configs: what a repetition needs."""
    rows = []
    commands = []
    configs = []
    for method in setting.methods:
        for run in method.sorted_runs:
            rows.append([method.label, *_provenance_cells(run)])
            commands.append(run.get("command") or "not recorded")
        # The configs of a method's runs differ in the seeds only.
        config = method.sorted_runs[0]["config"]
        text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)
        configs.append(page.Details(method.label, [page.Code(text)]))
    header = [
        "method",
        "hardware",
        "precision",
        "commit",
        "config",
        "seeds",
        "wall time",
        "images/s",
    ]
    return [
        page.Heading("How it was run"),
        writers.Table(header, rows, num_text_columns=6),
        page.Text(_provenance_note(setting)),
        page.Details("Commands", [page.Code("\n".join(commands))]),
        page.Details("Full configs, of each method’s first seed", configs),
    ]


def _provenance_note(setting):
    """Returns what the seeds are, the versions, and where the logits came from."""
    versions = {}
    labels_by_source = {}
    for method in setting.methods:
        for run in method.sorted_runs:
            for package, version in (run.get("versions") or {}).items():
                versions.setdefault(package, set()).add(version)
            source = aggregate.logits_source(run)
            if source:
                # A dictionary keeps the order, and each label once.
                labels_by_source.setdefault(source, {})[method.label] = None
    phrases = ["Seeds: split / teacher / student"]
    for package in sorted(versions):
        phrases.append(f"{package} {', '.join(sorted(versions[package]))}")
    note = f"{'; '.join(phrases)}."
    sources = []
    for source, labels in labels_by_source.items():
        sources.append(f"{', '.join(labels)} from the {source}")
    if sources:
        note += f" Teacher’s logits: {'; '.join(sources)}."
    return note


def _provenance_cells(run):
    """Returns the cells of a run below hardware, precision, …, images/s."""
    keys = ("device", "precision", "commit", "config_hash")
    cells = [str(run.get(key) or "–") for key in keys]
    seeds = [run["seeds"].get(key) for key in ("split", "teacher", "student")]
    timing = run.get("timing") or {}
    speed = timing.get("images_per_second")
    return [
        *cells,
        # A teacher that the program did not train has no seed.
        " / ".join("–" if seed is None else str(seed) for seed in seeds),
        writers.format_duration(timing.get("seconds")),
        f"{speed:,.0f}" if speed else "–",
    ]
