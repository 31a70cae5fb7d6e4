"""The figures on one setting.

They show accuracy by class, bias, confusion between groups, and training.
"""

import dataclasses

import numpy as np
from markupsafe import Markup

from experiments.config.trees import at
from experiments.reporting import figures, page, tables


def components(setting):
    """Returns the figures of a page with their texts, as far as there are data."""
    styles = figures.method_styles(setting.methods)
    return [
        *_by_class(setting, styles),
        *_bias(setting),
        *_confusion(setting),
        *_training(setting, styles),
    ]


def mean_array(method, key):
    """Returns the mean of an array of the test results over a method's runs.

    It is None if no run has the array, or if the shapes differ.
    """
    arrays = [run["test"][key] for run in method.runs.values() if run["test"].get(key)]
    if len({np.shape(array) for array in arrays}) != 1:
        return None
    return np.mean(np.array(arrays, float), axis=0)


# Accuracy by class.

_MAX_NAMED_CLASSES = 15
_LETTER_WIDTH = 7  # in CSS pixels, about


@dataclasses.dataclass(frozen=True)
class _Classes:
    """Describes the classes of a figure, sorted by training images.

    Attributes:
      counts: `[C]`, training images.
      assignment: `[C]`, index of the group; empty if there are no groups.
      group_names: the most frequent first, empty if there are no groups.
      names: of the classes.
      texts: what a pointer over the class shows.
    """

    counts: np.ndarray
    assignment: np.ndarray
    group_names: list
    names: list
    texts: list


def _smooth(values):
    """Returns the average over neighbouring classes if there are too many to read.

    The weights are Gaussian, with a standard deviation of 3 % of the classes.
    """
    values = np.asarray(values, float)
    if len(values) < figures.MANY_CLASSES:
        return values
    classes = np.arange(len(values))
    distances = np.subtract.outer(classes, classes)
    weights = np.exp(-0.5 * (distances / (0.03 * len(values))) ** 2)
    return weights @ values / weights.sum(1)


def _class_names(setting, num_classes):
    """Returns a name for each class, such as "class 17" if the results have none."""
    names = [str(i) for i in range(num_classes)]
    for run in setting.runs:
        if len(run.get("class_names") or ()) == num_classes:
            names = [str(name) for name in run["class_names"]]
            break
    return [f"class {name}" if name.isdecimal() else name for name in names]


def _by_class(setting, styles):
    """Returns the figures of accuracy by class."""
    run = setting.first_run_with("class_counts")
    counts = np.asarray(run.get("class_counts") or [], float)
    order = np.argsort(-counts, kind="stable")
    curves = {}
    for method in setting.methods_with_teacher():
        accuracies = mean_array(method, "per_class")
        if accuracies is not None and len(accuracies) == len(counts):
            curves[method.label] = accuracies[order]
    if not curves:
        return []
    classes = _sorted_classes(setting, run, counts, order)
    legend = figures.Legend({label: styles[label] for label in curves})
    wide = _draw_classes(curves, legend, classes, width=figures.DESKTOP_WIDTH)
    narrow = _draw_classes(curves, legend, classes, width=figures.PHONE_WIDTH)
    text = "Means over student seeds. Point at a class to see its name and its values."
    dots = []
    if len(counts) >= figures.MANY_CLASSES:
        text = (
            f"Curves are averages over neighbouring classes; dots are classes. {text}"
        )
        panels = []
        for label, accuracies in curves.items():
            panels.append(_draw_dots(label, accuracies, styles[label], classes))
        dots.append(page.Panels(panels))
    return [
        page.Heading("Accuracy by class frequency"),
        page.ResponsiveFigure([wide, narrow], legend),
        page.Text(text),
        *dots,
    ]


def _sorted_classes(setting, run, counts, order):
    """Returns the `_Classes` of a setting, sorted by the indices `order`."""
    assignment = np.asarray(run.get("group_assignment") or [], int)
    group_names = []
    if len(assignment) == len(counts):
        group_names = setting.group_names()
    if group_names:
        assignment = assignment[order]
    names = _class_names(setting, len(counts))
    texts = []
    for c in order:
        plural = "" if counts[c] == 1 else "s"
        texts.append(f"{names[c]}, {counts[c]:,.0f} training image{plural}")
    sorted_names = [names[c] for c in order]
    return _Classes(counts[order], assignment, group_names, sorted_names, texts)


@figures.styled
def _draw_classes(curves, legend, classes, *, width):
    """Draws the accuracy of every method by class, above the number of images.

    Args:
      curves: {label: accuracies `[C]`}, which are smoothed here.
      legend: of the methods.
      classes: `_Classes`.
      width: of the figure, in CSS pixels.
    """
    num_classes = len(classes.counts)
    is_smoothed = num_classes >= figures.MANY_CLASSES
    labels, label_height = _class_labels(classes.names, width)
    fig = figures.canvas(width, 350 + label_height, bottom=40 + label_height)
    ax, count_ax = fig.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
    for label, accuracies in curves.items():
        index, dashes = legend.styles[label]
        line = {"color": figures.colour(index), "linestyle": dashes}
        if not is_smoothed:
            line |= {"marker": "o", "markersize": 4}
        ax.plot(_smooth(accuracies), **line)
    # Above 100 there is room for the names of the groups.
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("test accuracy, %")
    figures.mark_groups(ax, classes.assignment, classes.group_names)
    _draw_counts(count_ax, classes.counts)
    if labels:
        rotation = 90 if label_height else 0
        count_ax.set_xticks(range(num_classes), labels, rotation=rotation)
    hovers = ()
    # A pointer cannot hit an area that is narrower than half a pixel.
    if num_classes < 2 * width:
        texts = []
        for c, text in enumerate(classes.texts):
            lines = [f"{label}  {curves[label][c]:.1f} %" for label in curves]
            texts.append("\n".join([text, *lines]))
        xs = [(c - 0.5, c + 0.5) for c in range(num_classes)]
        hovers = figures.hover_areas(ax, xs, None, texts)
    name = "Test accuracy by class"
    if width != figures.DESKTOP_WIDTH:
        name += ", narrow"
    smoothed = "smoothed, " if is_smoothed else ""
    description = (
        f"{smoothed}the classes sorted by training images, {', '.join(curves)}"
    )
    return figures.to_figure(fig, name, description, hovers=hovers, legend=legend)


def _draw_counts(ax, counts):
    """Draws the number of training images of each class as a staircase."""
    edges = np.arange(len(counts) + 1) - 0.5
    # Below 1, so that a class with one image is visible on the logarithmic axis.
    baseline = 0.8
    style = {"color": figures.QUIET, "alpha": 0.45, "linewidth": 0}
    ax.stairs(counts, edges, baseline=baseline, fill=True, **style)
    ax.set_yscale("log")
    ax.set_title("training images (log scale)", fontsize=11)
    ax.set_xlabel("class, the most frequent first")
    ax.set_xlim(-0.5, len(counts) - 0.5)
    figures.set_plain_log_ticks(ax)


def _class_labels(names, width):
    """Returns labels for the axis of classes, and the height of upright ones.

    There are none for many classes. The height is 0 if they fit side by side.

    Args:
      names: of the classes.
      width: of the axis, in CSS pixels.
    """
    if len(names) > _MAX_NAMED_CLASSES:
        return [], 0
    # The axis says already that a number is a class.
    labels = [name.removeprefix("class ") for name in names]
    labels = [label if len(label) <= 16 else f"{label[:15]}…" for label in labels]
    longest = _LETTER_WIDTH * max(len(label) for label in labels)
    return labels, longest if longest * len(labels) > width else 0


@figures.styled
def _draw_dots(label, accuracies, style, classes):
    """Draws one method's accuracy of every class as dots, with the smoothed curve."""
    fig, ax = figures.panel(label)
    index, dashes = style
    xs = np.arange(len(accuracies))
    ax.plot(xs, _smooth(accuracies), color=figures.colour(index), linestyle=dashes)
    ax.set(ylim=(0, 115), xlim=(-1, len(accuracies)), yticks=range(0, 101, 25))
    ticks = np.linspace(0, len(accuracies) - 1, 5).round().astype(int)
    ticks = np.unique(ticks)
    ax.set_xticks(ticks, [f"{classes.counts[tick]:g}" for tick in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, classes.assignment, classes.group_names)
    texts = []
    for accuracy, text in zip(accuracies, classes.texts):
        texts.append(f"{label}  {accuracy:.1f} %\n{text}")
    dots = figures.dots(ax, xs, accuracies, texts, index)
    name = f"Test accuracy by class, {label}"
    description = "dots are classes, sorted by training images"
    return figures.to_figure(fig, name, description, hovers=dots)


# Bias.

_BIAS_NOTE = Markup(
    "Bars: the teacher’s mean probability mass on each group. {} the true share of "
    "that input’s images, which an unbiased teacher would match. {} the share of the "
    "training images."
).format(figures.TRUE_SHARE_SYMBOL, figures.TRAINING_SHARE_SYMBOL)


def _bias(setting):
    """Returns the mass on each group: figures for the teachers, and a table for all."""
    group_names = setting.group_names()
    image_shares, class_shares = setting.group_shares()
    # Of balanced images, a group has the share that it has of the classes.
    true_shares = {"long_tailed": image_shares, "balanced": class_shares}
    teachers = list(setting.teachers().values())
    panels = []
    for number, teacher in enumerate(teachers, 1):
        suffix = f", teacher {number}" if len(teachers) > 1 else ""
        for kind, true_share in true_shares.items():
            mass = (teacher.get("group_mass") or {}).get(kind) or {}
            if true_share and set(group_names) <= mass.keys():
                title = f"{kind.replace('_', '-')} input{suffix}"
                mass = {name: mass[name] for name in group_names}
                panels.append(
                    figures.draw_group_mass(title, mass, true_share, image_shares)
                )
    components: list = []
    if panels:
        components.append(page.Heading("The teacher’s bias"))
        components += [page.Text(_BIAS_NOTE), page.Panels(panels)]
    table = tables.mass_table(setting)
    if table:
        components.append(page.Heading("The bias of teacher and students"))
        components += [page.Text(tables.MASS_NOTE), table]
    return components


# Confusion.


def _confusion(setting):
    """Returns the confusion matrices between groups."""
    group_names = setting.group_names()
    matrices = {}
    for method in setting.methods_with_teacher():
        matrix = mean_array(method, "confusion")
        if matrix is not None and matrix.shape == (len(group_names), len(group_names)):
            matrices[method.label] = matrix
    if not matrices:
        return []
    text = (
        "Rows: the group of the true class. Columns: the group of the predicted class, "
        "in percent of the row."
    )
    return [
        page.Heading("Confusion between groups"),
        page.Text(text),
        page.HeatMaps(matrices, group_names),
    ]


# Training.


def _training(setting, styles):
    """Returns the figures of accuracies and loss terms over the epochs."""
    methods = {method.label: method for method in setting.methods}
    record_keys = {
        "test accuracy, all classes, %": "test.all",
        "test accuracy, head, %": "test.groups.head",
        f"test accuracy, {setting.tail_name()}, %": f"test.{setting.tail_column()}",
        "training accuracy, %": "train_accuracy",
    }
    panels = []
    for title, key in record_keys.items():
        series = figures.mean_curves(
            methods, lambda _, record, key=key: at(record, key)
        )
        if series:
            panels.append(figures.draw_lines(title, series, styles))
    for method in setting.methods:
        panels += _loss_terms(method, styles[method.label])
    if not panels:
        return []
    legend = figures.Legend({label: styles[label] for label in methods})
    return [page.Heading("Training"), page.Panels(panels, legend)]


def _loss_terms(method, style):
    """Returns the figure of one method's loss terms, which differ in their dashes."""
    names = set()
    for record in figures.logged_records(method):
        names |= (record.get("terms") or {}).keys()
    # `mean_curves` draws a curve for each label: here for each term of one method.
    method_by_term = dict.fromkeys(sorted(names), method)
    series = figures.mean_curves(
        method_by_term, lambda name, record: at(record, f"terms.{name}")
    )
    if not series:
        return []
    colour_index, _ = style
    styles = {}
    for i, name in enumerate(series):
        styles[name] = colour_index, figures.DASHES[i % len(figures.DASHES)]
    title = f"loss terms, {method.label}"
    return [figures.draw_lines(title, series, styles, log=True, legend_below=True)]
