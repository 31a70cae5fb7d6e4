"""The figures of one setting: accuracy by class, the teacher's bias, confusion, training."""

import numpy as np
from markupsafe import Markup

from experiments.config.trees import at
from experiments.reporting import figures, page


def parts(setting):
    """Returns the parts of a page that hold figures; those without data are left out."""
    styles = figures.styles(setting.methods)
    return [
        *_by_class(setting, styles),
        *_bias(setting),
        *_confusion(setting),
        *_training(setting, styles),
    ]


def mean_of(method, key):
    """Returns the mean of an array of the test results over a method's runs; None where no run has it."""
    arrays = [run["test"][key] for run in method.runs.values() if run["test"].get(key)]
    have_one_shape = len({np.shape(array) for array in arrays}) == 1
    return np.mean(np.array(arrays, float), axis=0) if have_one_shape else None


# Accuracy by class.


def _smooth(values):
    """Averages over neighbouring classes with Gaussian weights where there are too many to read."""
    values = np.asarray(values, float)
    if len(values) < figures.MANY:
        return values
    distance = np.subtract.outer(np.arange(len(values)), np.arange(len(values)))
    weights = np.exp(-0.5 * (distance / (0.03 * len(values))) ** 2)
    return weights @ values / weights.sum(1)


def _class_names(setting, classes):
    """Returns a name for each class: the data set's own, "class 17" where a result does not have them."""
    recorded = [
        run["class_names"]
        for run in setting.runs
        if len(run.get("class_names") or ()) == classes
    ]
    names = map(str, recorded[0] if recorded else range(classes))
    return [f"class {name}" if name.isdecimal() else name for name in names]


def _by_class(setting, styles):
    run = next((run for run in setting.runs if run.get("class_counts")), {})
    counts = np.asarray(run.get("class_counts") or [], float)
    assignment = np.asarray(run.get("group_assignment") or [], int)
    order = np.argsort(-counts, kind="stable")
    curves = {}
    for method in setting.methods_with_teacher():
        values = mean_of(method, "per_class")
        if values is not None and len(values) == len(counts):
            curves[method.label] = values[order]
    if not curves:
        return []
    groups = setting.group_names() if len(assignment) == len(counts) else []
    assignment = assignment[order] if groups else assignment
    names = _class_names(setting, len(counts))
    texts = [
        f"{names[c]}, {counts[c]:,.0f} training image{'' if counts[c] == 1 else 's'}"
        for c in order
    ]
    shared = counts[order], assignment, groups, texts
    legend = figures.Legend({label: styles[label] for label in curves})
    both = [
        _draw_classes(curves, legend, *shared, width=width)
        for width in (figures.DESK, figures.PHONE)
    ]
    text, dots = (
        "Means over student seeds. A pointer over a class shows its name and its numbers.",
        [],
    )
    if len(counts) >= figures.MANY:
        text = (
            f"Curves are averages over neighbouring classes; dots are classes. {text}"
        )
        dots = [
            page.Panels(
                [
                    _draw_dots(label, v, styles[label], *shared)
                    for label, v in curves.items()
                ]
            )
        ]
    return [
        page.Heading("Accuracy by class frequency"),
        page.ByWidth(both, legend),
        page.Text(text),
        *dots,
    ]


@figures.styled
def _draw_classes(curves, legend, counts, assignment, groups, texts, *, width):
    """Returns the (smoothed) accuracy of every method by class, sorted by count, over the counts themselves."""
    fig = figures.canvas(width, 350)
    ax, strip = fig.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
    for label, values in curves.items():
        index, dashes = legend.styles[label]
        marks = {"marker": "o", "markersize": 4} if len(values) < figures.MANY else {}
        ax.plot(_smooth(values), color=figures.colour(index), linestyle=dashes, **marks)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("test accuracy, %")
    figures.mark_groups(ax, assignment, groups)
    edges = np.arange(len(counts) + 1) - 0.5
    strip.stairs(
        counts,
        edges,
        baseline=0.8,
        fill=True,
        color=figures.QUIET,
        alpha=0.45,
        linewidth=0,
    )
    strip.set_yscale("log")
    strip.set_title("training images (log scale)", fontsize=11)
    strip.set_xlabel("class, the most frequent first")
    strip.set_xlim(-0.5, len(counts) - 0.5)
    figures.plain_log(strip)
    hovers = ()
    if (
        len(counts) < 2 * width
    ):  # a pointer cannot hit what is narrower than half a pixel
        columns = [(c - 0.5, c + 0.5) for c in range(len(counts))]
        numbers = [
            [f"{label}  {values[c]:.1f} %" for label, values in curves.items()]
            for c in range(len(counts))
        ]
        hovers = figures.areas(
            ax,
            columns,
            None,
            ["\n".join([text, *n]) for text, n in zip(texts, numbers)],
        )
    name = f"Test accuracy by class{'' if width == figures.DESK else ', narrow'}"
    smoothed = "smoothed, " if len(counts) >= figures.MANY else ""
    description = (
        f"{smoothed}the classes sorted by training images, {', '.join(curves)}"
    )
    return figures.save(fig, name, description, hovers=hovers, legend=legend)


@figures.styled
def _draw_dots(label, values, style, counts, assignment, groups, texts):
    """Returns one method's accuracy of every class as dots, with the smoothed curve through them."""
    fig, ax = figures.panel(label)
    index, dashes = style
    classes = np.arange(len(values))
    ax.plot(classes, _smooth(values), color=figures.colour(index), linestyle=dashes)
    ax.set(ylim=(0, 115), xlim=(-1, len(values)), yticks=range(0, 101, 25))
    ticks = np.unique(np.linspace(0, len(counts) - 1, 5).round().astype(int))
    ax.set_xticks(ticks, [f"{counts[tick]:g}" for tick in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, assignment, groups)
    dots = figures.dots(
        ax,
        classes,
        values,
        [f"{label}  {v:.1f} %\n{text}" for v, text in zip(values, texts)],
        index,
    )
    description = "dots are classes, sorted by training images"
    return figures.save(
        fig, f"Test accuracy by class, {label}", description, hovers=dots
    )


# The teacher's bias, and confusion.


def _shares(run, names):
    """Returns each group's share of a run's training images and of its classes; empty where that is not recorded."""
    assignment, counts = (
        np.array(run.get("group_assignment") or []),
        np.array(run.get("class_counts") or []),
    )
    images, classes = {}, {}
    if len(counts) and len(counts) == len(assignment):
        for group, name in enumerate(names):
            images[name] = float(counts[assignment == group].sum() / counts.sum())
            classes[name] = float(np.mean(assignment == group))
    return images, classes


def _bias(setting):
    names = setting.group_names()
    run = next((run for run in setting.runs if run.get("group_assignment")), {})
    training, classes = _shares(run, names)
    panels, teachers = [], list(setting.teachers().values())
    for number, teacher in enumerate(teachers, 1):
        suffix = f", teacher {number}" if len(teachers) > 1 else ""
        for kind, fair in (("long_tailed", training), ("balanced", classes)):
            mass = (teacher.get("group_mass") or {}).get(kind) or {}
            if fair and set(names) <= mass.keys():
                title = f"{kind.replace('_', '-')} input{suffix}"
                panels.append(
                    figures.group_mass(
                        title, {name: mass[name] for name in names}, fair, training
                    )
                )
    if not panels:
        return []
    text = Markup(
        "Bars: the teacher’s mean probability mass on each group. {} the true share of that input’s images, which an "
        "unbiased teacher would match. {} the share of the training images."
    ).format(figures.symbol("❙", 6), figures.symbol("◇", 7))
    return [page.Heading("The teacher’s bias"), page.Text(text), page.Panels(panels)]


def _confusion(setting):
    names, matrices = setting.group_names(), {}
    for method in setting.methods_with_teacher():
        matrix = mean_of(method, "confusion")
        if matrix is not None and matrix.shape == (len(names), len(names)):
            matrices[method.label] = matrix
    if not matrices:
        return []
    text = "Rows: the group of the true class. Columns: the group of the predicted class, in percent of the row."
    return [
        page.Heading("Confusion between groups"),
        page.Text(text),
        page.HeatMaps(matrices, names),
    ]


# Training.


def _training(setting, styles):
    methods = {method.label: method for method in setting.methods}
    columns = {
        "all classes": "all",
        "head": "groups.head",
        setting.tail_name(): setting.tail(),
    }
    panels = []
    for name, column in columns.items():
        series = figures.curves(
            methods, lambda _, record, column=column: at(record, f"test.{column}")
        )
        panels += (
            [figures.lines(f"test accuracy, {name}, %", series, styles)]
            if series
            else []
        )
    series = figures.curves(methods, lambda _, record: record.get("train_accuracy"))
    panels += [figures.lines("training accuracy, %", series, styles)] if series else []
    for method in setting.methods:
        panels += _terms(method, styles[method.label])
    if not panels:
        return []
    legend = figures.Legend({label: styles[label] for label in methods})
    return [page.Heading("Training"), page.Panels(panels, legend)]


def _terms(method, style):
    """Returns the loss terms of one method, each with its own dashes."""
    records = [
        record for run in method.runs.values() for record in run.get("metrics") or []
    ]
    names = sorted({name for record in records for name in record.get("terms") or {}})
    series = figures.curves(
        dict.fromkeys(names, method), lambda name, record: at(record, f"terms.{name}")
    )
    if not series:
        return []
    styles = {
        name: (style[0], figures.DASHES[i % len(figures.DASHES)])
        for i, name in enumerate(series)
    }
    return [
        figures.lines(
            f"loss terms, {method.label}", series, styles, log=True, legend_below=True
        )
    ]
