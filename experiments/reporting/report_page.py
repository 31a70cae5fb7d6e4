"""The report on any number of runs: one page, with its figures and tables as files beside it."""

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
    """Writes a page about runs of `load.load` or `load.find`, one or many.

    The folder beside it, `report_files` for `report.html`, gets every figure as an SVG file, tables.md and tables.tex.
    """
    settings = aggregate.gather(runs)
    unfinished = [run for run in runs if not run.get("finished", True)]
    title, titles = title or _title(settings), aggregate.titles(settings)
    anchors = _anchors(titles)
    parts = [page.Heading(title, 1), page.Text(_size(settings, unfinished))]
    if len(settings) > 1:
        links = [("settings", "All settings side by side"), *zip(anchors, titles)]
        parts += [page.Contents(links), comparison.section(settings)]
    for setting, setting_title, anchor in zip(settings, titles, anchors):
        parts.append(
            page.Section(
                setting_title, _setting_parts(setting, alone=len(settings) == 1), anchor
            )
        )
    if unfinished:
        rows = [[run["source"], tables.progress(run)] for run in unfinished]
        parts.append(
            page.Section(
                "Unfinished runs", [writers.Table(["run", "progress"], rows, left=2)]
            )
        )
    if any("ltkd" in method.name for setting in settings for method in setting.methods):
        parts.append(page.Text(tables.RECONSTRUCTED))
    files = {
        "tables.md": tables.console(runs, "markdown"),
        "tables.tex": tables.console(runs, "latex"),
    }
    page.write(path, title, parts, files)


def duration(seconds):
    """Returns a wall time as "2 h 05 min" or "3 min 12 s"."""
    if not isinstance(seconds, (int, float)):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _anchors(titles):
    """Returns a distinct name for each section."""
    anchors = []
    for name in map(page.anchor, titles):
        anchors.append(name if name not in anchors else f"{name}-{len(anchors)}")
    return anchors


def _title(settings):
    labels = [method.label for setting in settings for method in setting.methods]
    if len(labels) == 1:
        return f"{labels[0]} on {settings[0].data}, imbalance {settings[0].imbalance:g}"
    data = sorted({setting.data for setting in settings})
    return (
        f"{len(set(labels))} methods on {', '.join(data)}"
        if labels
        else "No finished run"
    )


def _size(settings, unfinished):
    counts = {
        "finished run": sum(len(setting.runs) for setting in settings),
        "setting": len(settings),
    }
    counts |= {"unfinished run": len(unfinished)} if unfinished else {}
    return ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in counts.items())


def _setting_parts(setting, *, alone):
    parts = [
        page.Text(tables.headline(setting), "lead"),
        tables.accuracy_table(setting),
        page.Text(f"{setting.note()}. {tables.COLUMNS}"),
    ]
    comparisons = tables.comparisons(setting)
    if comparisons:
        parts += [page.Heading("What can be told apart"), page.Text(tables.RULE)]
        for name, table in comparisons:
            parts += [page.Text(f"On {name}:", "key"), table]
    if alone:  # else the comparison of all settings has it
        parts += comparison.tail_against_head([setting])
    return [
        *parts,
        *setting_figures.parts(setting),
        *weight_figures.parts(setting),
        *_how_it_was_run(setting),
    ]


def _how_it_was_run(setting):
    rows, commands, configs, sources, versions = [], [], [], {}, {}
    for method in setting.methods:
        runs = method.sorted_runs
        for run in runs:
            rows.append([method.label, *_circumstances(run)])
            commands.append(run.get("command") or "not recorded")
            for name, version in (run.get("versions") or {}).items():
                versions.setdefault(name, set()).add(version)
            if source := aggregate.logits_source(run):
                sources.setdefault(source, {})[method.label] = None
        config = json.dumps(
            runs[0]["config"], indent=1, sort_keys=True, ensure_ascii=False
        )
        configs.append(page.Details(method.label, [page.Code(config)]))
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
    packages = [
        f"{name} {', '.join(sorted(versions[name]))}" for name in sorted(versions)
    ]
    text = "; ".join(["Seeds: split / teacher / student", *packages])
    logits = "; ".join(
        f"{', '.join(labels)} from the {source}" for source, labels in sources.items()
    )
    return [
        page.Heading("How it was run"),
        writers.Table(header, rows, left=6),
        page.Text(f"{text}. Teacher’s logits: {logits}." if logits else f"{text}."),
        page.Details("Commands", [page.Code("\n".join(commands))]),
        page.Details("Full configs, of each method’s first seed", configs),
    ]


def _circumstances(run):
    seeds, timing = run["seeds"], run.get("timing") or {}
    cells = [
        str(run.get(key) or "–")
        for key in ("device", "precision", "commit", "config_hash")
    ]
    cells.append(
        " / ".join(str(seeds.get(key, "–")) for key in ("split", "teacher", "student"))
    )
    speed = timing.get("images_per_second")
    return [*cells, duration(timing.get("seconds")), f"{speed:,.0f}" if speed else "–"]
