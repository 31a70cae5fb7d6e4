"""The section of a report that compares settings.

It has tables, accuracy on the tail against accuracy on the head, and accuracy against
imbalance.
"""

import collections

import numpy as np
from matplotlib.transforms import Bbox

from experiments.reporting import aggregate, figures, page, tables
from experiments.reporting.statistics import mean_std

# Where the label of a point may be, in the order of preference: x and y offset in
# points, horizontal and vertical alignment.
_LABEL_POSITIONS = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 5, "left", "bottom"),
    (9, -5, "left", "top"),
    (-9, 5, "right", "bottom"),
    (-9, -5, "right", "top"),
)


def section(settings):
    """Returns the section of a page that compares several settings."""
    components: list = []
    overview = tables.overview(settings)
    if overview:
        components.append(page.Text(overview, "lead"))
    for title, table in tables.tables_over_settings(settings):
        components += [page.Heading(title), table]
    components.append(page.Text(f"{tables.OVER_SETTINGS_NOTE}."))
    components += tail_against_head(settings)
    components += _against_imbalance(settings)
    title = f"{len(settings)} settings side by side"
    return page.Section(title, components, "settings")


def _shared_legend(panels, styles, **options):
    """Returns the legend that the panels share, in the order of the styles."""
    labels = set().union(*(figure.legend.styles for figure in panels))
    shared = {label: style for label, style in styles.items() if label in labels}
    return figures.Legend(shared, **options)


# Tail against head.


def tail_against_head(settings):
    """Returns scatter plots of the accuracy on the tail against that on the head.

    There is a panel for each setting with two groups and two methods or more.
    """
    styles = figures.method_styles(aggregate.distinct_methods(settings))
    points = [_head_and_tail(setting) for setting in settings]
    titles = aggregate.short_titles(settings)
    panels = []
    for setting, setting_points, title in zip(settings, points, titles):
        if setting_points:
            limits = _shared_limits(setting.data, settings, points)
            names = setting.group_names()[0], setting.tail_name()
            panels.append(_draw_scatter(title, setting_points, styles, limits, names))
    if not panels:
        return []
    text = (
        "Each mark is a method: its mean accuracy on the most frequent and on the "
        "rarest group of classes. Bars: standard deviation over student seeds. Up and "
        "to the right is better."
    )
    legend = _shared_legend(panels, styles, markers=True)
    return [
        page.Heading("Tail against head"),
        page.Text(text),
        page.Panels(panels, legend),
    ]


def _head_and_tail(setting):
    """Returns {label: (accuracies on the head, on the tail)}.

    It is empty if there is only one group, or only one method with values.
    """
    group_names = setting.group_names()
    if len(group_names) < 2:
        return {}
    points = {}
    for method in setting.methods_with_teacher():
        head = list(method.values(f"groups.{group_names[0]}").values())
        tail = list(method.values(setting.tail_column()).values())
        if head and tail:
            points[method.label] = head, tail
    return points if len(points.keys() - {"teacher"}) > 1 else {}


def _shared_limits(data, settings, points):
    """Returns the limits of x and y that fit all settings of a data set.

    Panels of the same data have the same axes, so that the effect of the imbalance is
    visible.
    """
    accuracies = []
    for setting, setting_points in zip(settings, points):
        if setting.data == data:
            accuracies += setting_points.values()
    return [_limits(values) for values in zip(*accuracies)]


def _limits(values_of_methods):
    """Returns limits with room for the deviations, between −2 and 102."""
    means = np.array([np.mean(values) for values in values_of_methods])
    deviations = np.zeros(len(means))
    for i, values in enumerate(values_of_methods):
        if len(values) > 1:
            deviations[i] = np.std(values, ddof=1)
    low = np.min(means - deviations)
    high = np.max(means + deviations)
    margin = max(1.0, 0.12 * (high - low))
    return max(low - margin, -2.0), min(high + margin, 102.0)


@figures.styled
def _draw_scatter(title, points, styles, limits, group_names):
    """Draws each method as a point with bars.

    Args:
      title: what distinguishes the setting, "" if there is only one.
      points: {label: (accuracies on the head, on the tail)}.
      styles: {label: (colour index, dashes)}.
      limits: of x and y.
      group_names: of head and tail.
    """
    head_name, tail_name = group_names
    panel_title = f"{title}: {tail_name}, %" if title else f"{tail_name}, %"
    fig, ax = figures.panel(panel_title, height=270, left=44)
    ax.grid(axis="x")
    texts = []
    centres = {}
    bars = []
    for label, (head, tail) in points.items():
        x, x_deviation, num_runs = mean_std(head)
        y, y_deviation, _ = mean_std(tail)
        index, dashes = styles[label]
        marker = {
            "color": figures.colour(index),
            "markersize": 8,
            "elinewidth": 1.1,
            "markeredgewidth": 0,
        }
        ax.errorbar(x, y, y_deviation, x_deviation, figures.MARKERS[dashes], **marker)
        centres[label] = x, y
        dx = x_deviation or 0
        dy = y_deviation or 0
        bars += [(x - dx, y, x + dx, y), (x, y - dy, x, y + dy)]
        texts.append(
            f"{label}, {num_runs} run{'' if num_runs == 1 else 's'}\n"
            f"{head_name} {tables.format_mean(head)}\n"
            f"{tail_name} {tables.format_mean(tail)}"
        )
    ax.set(xlim=limits[0], ylim=limits[1], xlabel=f"{head_name}, %")
    _label_points(ax, centres, bars)
    name = f"Tail against head, {title}" if title else "Tail against head"
    xs, ys = zip(*centres.values())
    hovers = figures.hover_discs(ax, xs, ys, texts)
    legend = figures.Legend({label: styles[label] for label in points}, markers=True)
    description = ", ".join(points)
    return figures.to_figure(fig, name, description, hovers=hovers, legend=legend)


def _label_points(ax, centres, bars):
    """Writes a label beside each point that has room for one.

    The positions are tried in turn; the first at which the label is inside the figure
    and overlaps no point, bar or other label is used. A label without such a position
    is left out, since the legend has it too.

    Args:
      ax: axes with final limits.
      centres: {label: (x, y)}.
      bars: (left, bottom, right, top) of the error bars.
    """
    obstacles = []
    for corners in bars:
        box = Bbox.from_extents(*corners).transformed(ax.transData)
        obstacles.append(box.padded(2))
    for centre in centres.values():
        box = Bbox.from_extents(*centre, *centre).transformed(ax.transData)
        obstacles.append(box.padded(6))
    (left, bottom), (right, top) = ax.bbox.get_points()
    # Labels may reach into the margin on the right.
    frame = Bbox.from_extents(left, bottom, right + 10, top)
    for label, centre in centres.items():
        for x, y, horizontal, vertical in _LABEL_POSITIONS:
            # Matplotlib knows the size of a text only once it is in the figure.
            text = ax.annotate(
                label,
                centre,
                (x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
            )
            box = text.get_window_extent().padded(2)
            is_inside = frame.contains(*box.min) and frame.contains(*box.max)
            if is_inside and not box.count_overlaps(obstacles):
                obstacles.append(box)
                break
            text.remove()


# Accuracy against imbalance.


def _against_imbalance(settings):
    """Returns plots of accuracy against imbalance.

    There is a group of plots for each family of settings that differ in nothing else.
    """
    styles = figures.method_styles(aggregate.distinct_methods(settings))
    families = collections.defaultdict(dict)
    for setting in settings:
        family = families[_family_key(setting)]
        # Of several settings of the same imbalance, the first is drawn.
        family.setdefault(setting.imbalance, setting)
    components: list = []
    for family in families.values():
        if len(family) > 1:
            members = list(family.values())
            panels = _imbalance_panels(members, styles)
            components.append(page.Heading(aggregate.common_title(members), 4))
            components.append(page.Panels(panels, _shared_legend(panels, styles)))
    if not components:
        return []
    note = page.Text("Means over student seeds; bars: standard deviation.")
    return [page.Heading("Accuracy against imbalance"), note, *components]


def _family_key(setting):
    """Returns all that distinguishes settings, without the imbalance.

    The number of images follows from the imbalance and `n_max`.
    """
    return (
        setting.data,
        setting.teacher,
        setting.student,
        setting.split_seed,
        setting.epochs,
        setting.runs[0]["config"]["data"]["n_max"],
    )


def _imbalance_panels(settings, styles):
    """Returns a panel for each of the compared columns that has values."""
    common_title = aggregate.common_title(settings)
    panels = []
    for name, column_of in tables.COMPARED_COLUMNS.items():
        accuracies = collections.defaultdict(dict)
        for setting in settings:
            column = column_of(setting)
            for method in setting.methods_with_teacher():
                values = list(method.values(column).values())
                if values:
                    accuracies[method.label][setting.imbalance] = values
        if accuracies:
            panels.append(draw_over_imbalance(name, accuracies, styles, common_title))
    return panels


@figures.styled
def draw_over_imbalance(column_name, accuracies, styles, common_title=""):
    """Draws accuracies against the imbalance, a curve for each method.

    Args:
      column_name: such as "all classes".
      accuracies: {label: {imbalance: [a value for each run]}}.
      styles: {label: (colour index, dashes)}.
      common_title: what the settings have in common, for the figure's name.
    """
    fig, ax = figures.panel(f"accuracy on {column_name}, %", height=250)
    ax.set_xscale("log")
    points = []
    for label, values_by_imbalance in accuracies.items():
        imbalances = sorted(values_by_imbalance)
        means = []
        deviations = []
        for imbalance in imbalances:
            values = values_by_imbalance[imbalance]
            mean, deviation, _ = mean_std(values)
            means.append(mean)
            deviations.append(deviation or 0.0)
            text = (
                f"{label}, imbalance {imbalance:g}\n"
                f"{column_name} {tables.format_mean(values)}"
            )
            points.append((imbalance, mean, text))
        index, dashes = styles[label]
        line = {
            "color": figures.colour(index),
            "linestyle": dashes,
            "elinewidth": 1.1,
            "marker": "o",
            "markersize": 4,
        }
        ax.errorbar(imbalances, means, deviations, **line)
    # The imbalances that were run are the ticks, since a logarithmic axis would only
    # label powers of ten.
    ticks = sorted(set().union(*accuracies.values()))
    ax.set(xlim=(ticks[0] / 1.25, ticks[-1] * 1.25), xlabel="imbalance (log scale)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    name = f"Accuracy on {column_name} against imbalance"
    if common_title:
        name += f", {common_title}"
    hovers = figures.hover_discs(ax, *zip(*points))
    legend = figures.Legend({label: styles[label] for label in accuracies})
    description = ", ".join(accuracies)
    return figures.to_figure(fig, name, description, hovers=hovers, legend=legend)
