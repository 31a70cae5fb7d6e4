"""A setting's figures: accuracy by class, the teacher's bias, confusion, training; as parts of a page."""

import numpy as np

from experiments.reporting import figures, tables


def sections(setting):
    """Returns the page's sections that hold figures; a section without data is empty."""
    found = figures.styles(setting.methods)
    return [
        _class_section(setting, found),
        _bias_section(setting),
        _confusion_section(setting),
        _training_section(setting, found),
    ]


def _mean_of(method, key):
    """Averages an array of the test results over a method's runs; None where no run has it."""
    found = [run["test"][key] for run in method.runs.values() if run["test"].get(key)]
    same = found and len({np.shape(array) for array in found}) == 1
    return np.mean(np.array(found, float), axis=0) if same else None


def _with_teacher(setting):
    return [*setting.methods, *filter(None, [setting.teacher_method()])]


# Accuracy by class.


def smooth(values):
    """Averages over neighbouring classes, by a Gaussian, where there are too many to read."""
    values = np.asarray(values, float)
    if len(values) < figures.MANY:
        return values
    distance = np.subtract.outer(np.arange(len(values)), np.arange(len(values)))
    weights = np.exp(-0.5 * (distance / (0.03 * len(values))) ** 2)
    return weights @ values / weights.sum(1)


def class_names(setting, classes):
    """Returns a name for each class: the data set's own, "class 17" where a result does not hold them."""
    recorded = next((run["class_names"] for run in setting.runs if len(run.get("class_names") or ()) == classes), None)
    names = map(str, recorded or range(classes))
    return [f"class {name}" if name.isdecimal() else name for name in names]


def _class_section(setting, found):
    run = next((run for run in setting.runs if run.get("class_counts")), {})
    counts = np.asarray(run.get("class_counts") or [], float)
    assignment = np.asarray(run.get("group_assignment") or [], int)
    order = np.argsort(-counts, kind="stable")
    groups = setting.group_names() if len(assignment) == len(counts) else []
    curves = {method.label: _mean_of(method, "per_class") for method in _with_teacher(setting)}
    curves = {label: v[order] for label, v in curves.items() if v is not None and len(v) == len(counts)}
    if not curves:
        return ""
    names = class_names(setting, len(counts))
    told = [f"{names[c]}, {counts[c]:,.0f} training image{'' if counts[c] == 1 else 's'}" for c in order]
    shared = counts[order], assignment[order] if groups else assignment, groups, told
    both = [by_class(curves, found, *shared, width=width) for width in (figures.DESK, figures.PHONE)]
    dots, what = "", "Means over student seeds."
    if len(counts) >= figures.MANY:
        drawn = "".join(one_by_class(label, v, found[label], *shared) for label, v in curves.items())
        dots = f'<figure class="panels">{drawn}</figure>'
        what = f"Curves are averages over neighbouring classes; dots are classes. {what}"
    return (
        f"<h3>Accuracy by class frequency</h3>{figures.key(curves, found)}"
        f'<figure><div class="wide">{both[0]}</div><div class="narrow">{both[1]}</div></figure>'
        f'<p class="small">{what} A pointer over a class shows its name and its numbers.</p>{dots}'
    )


@figures.styled
def by_class(curves, found, counts, assignment, groups, told, *, width=figures.DESK):
    """Draws the (smoothed) accuracy of every method by class, sorted by count, over the counts themselves."""
    fig = figures.figure(width, 350)
    ax, strip = fig.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
    for label, values in curves.items():
        index, dashes = found[label]
        dotted = {"marker": "o", "markersize": 4} if len(values) < figures.MANY else {}
        ax.plot(smooth(values), color=figures.colour(index), linestyle=dashes, **dotted)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("test accuracy, %")
    figures.mark_groups(ax, assignment, groups)
    edges = np.arange(len(counts) + 1) - 0.5
    strip.stairs(counts, edges, baseline=0.8, fill=True, color=figures.QUIET, alpha=0.45, linewidth=0)
    strip.set_yscale("log")
    strip.set_title("training images (log scale)", fontsize=11)
    strip.set_xlabel("class, the most frequent first")
    strip.set_xlim(-0.5, len(counts) - 0.5)
    figures.plain_log(strip)
    lines = [
        "\n".join([words, *(f"{label}  {values[c]:.1f} %" for label, values in curves.items())])
        for c, words in enumerate(told)
    ]
    # What is narrower than half a pixel cannot be pointed at.
    columns = [(c - 0.5, c + 0.5) for c in range(len(lines))]
    hovers = figures.areas(ax, columns, None, lines) if len(lines) < 2 * width else ()
    smoothed = " smoothed," if len(counts) >= figures.MANY else ""
    name = f"Test accuracy by class{'' if width == figures.DESK else ', narrow'}"
    described = f"{name}:{smoothed} the classes sorted by training images, {', '.join(curves)}"
    return fig, described, hovers, {label: found[label] for label in curves}


@figures.styled
def one_by_class(label, values, style, counts, assignment, groups, told):
    """Draws one method's accuracy of every class as dots, with the smoothed curve through them."""
    fig, ax = figures.panel(label)
    x, shade = np.arange(len(values)), figures.colour(style[0])
    ax.plot(x, smooth(values), color=shade, linestyle=style[1])
    ax.set(ylim=(0, 115), xlim=(-1, len(values)), yticks=range(0, 101, 25))
    ticks = np.unique(np.linspace(0, len(counts) - 1, 5).round().astype(int))
    ax.set_xticks(ticks, [f"{counts[i]:g}" for i in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, assignment, groups)
    dots = figures.dots(ax, x, values, [f"{label}  {values[c]:.1f} %\n{told[c]}" for c in x], style[0])
    return fig, f"Test accuracy by class, {label}: dots are classes, sorted by training images", dots


# The teacher's bias, and what is taken for what.


def _shares(run, names):
    """Returns each group's share of a run's training images and of its classes, {} where that is not recorded."""
    assignment, counts = run.get("group_assignment") or [], run.get("class_counts") or []
    if not counts or len(assignment) != len(counts):
        return {}, {}
    belongs = [[g == assigned for assigned in assignment] for g in range(len(names))]
    images = {name: float(np.dot(mask, counts) / sum(counts)) for name, mask in zip(names, belongs)}
    return images, {name: float(np.mean(mask)) for name, mask in zip(names, belongs)}


def _bias_section(setting):
    names = setting.group_names()
    run = next((run for run in setting.runs if run.get("group_assignment")), {})
    training, classes = _shares(run, names)
    panels, teachers = [], list(setting.teachers().values())
    for number, teacher in enumerate(teachers, 1):
        which = f", teacher {number}" if len(teachers) > 1 else ""
        for kind, fair in (("long_tailed", training), ("balanced", classes)):
            mass = (teacher.get("group_mass") or {}).get(kind) or {}
            if fair and set(names) <= mass.keys():
                title = f"{kind.replace('_', '-')} input{which}"
                panels.append(figures.group_mass(title, {name: mass[name] for name in names}, fair, training))
    if not panels:
        return ""
    tick, diamond = f'<span style="color: {figures.css(6)}">❙</span>', f'<span style="color: {figures.css(7)}">◇</span>'
    return (
        '<h3>The teacher’s bias</h3><p class="small">Bars: the teacher’s mean probability mass on each group. '
        f"{tick} the true share of that input’s images, which an unbiased teacher would match. "
        f"{diamond} the share of the training images.</p>"
        f'<figure class="panels">{"".join(panels)}</figure>'
    )


def _confusion_section(setting):
    names, maps = setting.group_names(), []
    for method in _with_teacher(setting):
        matrix = _mean_of(method, "confusion")
        if matrix is not None and matrix.shape == (len(names), len(names)):
            maps.append(figures.heat_map(method.label, matrix, names))
    if not maps:
        return ""
    return (
        '<h3>Confusion between groups</h3><p class="small">Rows: the group of the true class. Columns: the group '
        f'of the predicted class, in percent of the row.</p><div class="maps">{"".join(maps)}</div>'
    )


# Training.


def _terms_panel(method, style):
    """Draws the loss terms of one method, each with its own dashes and a key below."""
    entries = [entry for run in method.runs.values() for entry in run.get("metrics") or []]
    names = sorted({name for entry in entries for name in entry.get("terms") or {}})
    series = figures.logged({n: figures.curve(method, lambda e, n=n: (e.get("terms") or {}).get(n)) for n in names})
    if not series:
        return ""
    dashes = {name: (style[0], figures.DASHES[i % len(figures.DASHES)]) for i, name in enumerate(series)}
    drawn = figures.lines(f"loss terms, {method.label}", series, dashes, log=True)
    return f"<div>{drawn}{figures.key(series, dashes)}</div>"


def _training_section(setting, found):
    shown = {"all classes": "all", "head": "groups.head", setting.tail().split(".")[-1]: setting.tail()}
    picks = {
        f"test accuracy, {title}, %": lambda e, column=column: tables.value(e.get("test"), column)
        for title, column in shown.items()
    }
    picks["training accuracy, %"] = lambda e: e.get("train_accuracy")
    panels = []
    for title, pick in picks.items():
        series = figures.logged({method.label: figures.curve(method, pick) for method in setting.methods})
        panels += [figures.lines(title, series, found)] if series else []
    panels += [_terms_panel(method, found[method.label]) for method in setting.methods]
    if not any(panels):
        return ""
    shared = figures.key([method.label for method in setting.methods], found)
    return f'<h3>Training</h3>{shared}<figure class="panels">{"".join(panels)}</figure>'
