"""The section of a report that compares settings: tables, tail against head, accuracy against imbalance."""

import collections

import numpy as np
from matplotlib.transforms import Bbox

from experiments.reporting import aggregate, figures, page, tables
from experiments.reporting.statistics import mean_std

_LABEL_OFFSETS = (
    (9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    (9, 5, "left", "bottom"), (9, -5, "left", "top"), (-9, 5, "right", "bottom"), (-9, -5, "right", "top"),
)  # fmt: skip


def section(settings):
    """Returns the section that compares several settings."""
    parts = (
        [page.Text(tables.overview(settings), "lead")]
        if tables.overview(settings)
        else []
    )
    for title, table in tables.over_settings(settings):
        parts += [page.Heading(title), table]
    parts.append(page.Text(f"{tables.BETWEEN}."))
    parts += [*tail_against_head(settings), *_against_imbalance(settings)]
    return page.Section(f"{len(settings)} settings side by side", parts, "settings")


def _legend(drawn, styles, **kwargs):
    """Returns the legend that the figures share, in the order of the styles."""
    labels = set().union(*(figure.legend.styles for figure in drawn))
    return figures.Legend(
        {label: style for label, style in styles.items() if label in labels}, **kwargs
    )


# Tail against head.


def tail_against_head(settings):
    """Returns scatter plots of the accuracies of the rarest against the most frequent group, a panel per setting."""
    styles = figures.styles(aggregate.all_methods(settings))
    points = [_points(setting) for setting in settings]
    panels = []
    for setting, own_points, title in zip(
        settings, points, aggregate.distinctions(settings)
    ):
        if own_points:
            # Settings of the same data have the same axes, so that the effect of the imbalance is visible.
            peers = [
                other
                for peer, other in zip(settings, points)
                if peer.data == setting.data
            ]
            limits = _limits([values for peer in peers for values in peer.values()])
            groups = setting.group_names()[0], setting.tail_name()
            panels.append(_scatter(title, own_points, styles, limits, groups))
    if not panels:
        return []
    text = (
        "A mark is a method: its mean accuracy on the most frequent and the rarest group of classes. Bars: standard "
        "deviation over student seeds. Up and to the right is better."
    )
    return [
        page.Heading("Tail against head"),
        page.Text(text),
        page.Panels(panels, _legend(panels, styles, marks=True)),
    ]


def _points(setting):
    """Returns {label: (accuracies on the head, on the tail)}; empty where fewer than two groups or methods have any."""
    groups = setting.group_names()
    points = {}
    for method in setting.methods_with_teacher() if len(groups) > 1 else []:
        head, tail = (
            list(method.values(column).values())
            for column in (f"groups.{groups[0]}", setting.tail())
        )
        if head and tail:
            points[method.label] = head, tail
    return points if len(points.keys() - {"teacher"}) > 1 else {}


def _limits(points):
    """Returns limits of both axes with room for the deviations, within 0 to 100 or a little more."""
    limits = []
    for values in zip(*points):
        means = np.array([np.mean(v) for v in values])
        deviations = np.array(
            [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        )
        low, high = np.min(means - deviations), np.max(means + deviations)
        margin = max(1.0, 0.12 * (high - low))
        limits.append((max(low - margin, -2.0), min(high + margin, 102.0)))
    return limits


@figures.styled
def _scatter(title, points, styles, limits, groups):
    fig, ax = figures.panel(
        f"{title}: {groups[1]}, %" if title else f"{groups[1]}, %", height=270, left=44
    )
    ax.grid(axis="x")
    texts, centres, boxes = [], {}, []
    for label, values in points.items():
        index, dashes = styles[label]
        (x, dx, n), (y, dy, _) = map(mean_std, values)
        mark = {
            "color": figures.colour(index),
            "markersize": 8,
            "elinewidth": 1.1,
            "markeredgewidth": 0,
        }
        ax.errorbar(x, y, dy, dx, figures.MARKS[dashes], **mark)
        centres[label] = x, y
        boxes += [
            (x - (dx or 0), y, x + (dx or 0), y),
            (x, y - (dy or 0), x, y + (dy or 0)),
        ]
        numbers = [
            f"{group} {tables.mean_in_words(v)}" for group, v in zip(groups, values)
        ]
        texts.append("\n".join([f"{label}, {n} run{'' if n == 1 else 's'}", *numbers]))
    ax.set(xlim=limits[0], ylim=limits[1], xlabel=f"{groups[0]}, %")
    _label_points(ax, centres, boxes)
    name = f"Tail against head, {title}" if title else "Tail against head"
    legend = figures.Legend({label: styles[label] for label in points}, marks=True)
    hovers = figures.spots(ax, *zip(*centres.values()), texts)
    return figures.save(fig, name, ", ".join(points), hovers=hovers, legend=legend)


def _label_points(ax, centres, boxes):
    """Writes labels beside their marks where nothing else is drawn; the legend has them all."""
    taken = [
        Bbox.from_extents(*corners).transformed(ax.transData).padded(2)
        for corners in boxes
    ]
    taken += [
        Bbox.from_extents(*point, *point).transformed(ax.transData).padded(6)
        for point in centres.values()
    ]
    (left, bottom), (right, top) = ax.bbox.get_points()
    frame = Bbox.from_extents(left, bottom, right + 10, top)
    for label, point in centres.items():
        for x, y, align, valign in _LABEL_OFFSETS:
            text = ax.annotate(
                label, point, (x, y), textcoords="offset points", ha=align, va=valign
            )
            box = text.get_window_extent().padded(2)
            is_inside = frame.contains(*box.min) and frame.contains(*box.max)
            if is_inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


# Accuracy against imbalance.


def _against_imbalance(settings):
    """Returns plots of accuracy against imbalance, where several settings differ in nothing else."""
    styles = figures.styles(aggregate.all_methods(settings))
    families = collections.defaultdict(dict)
    for setting in settings:
        n_max = setting.runs[0]["config"]["data"]["n_max"]
        family = (
            setting.data,
            setting.teacher,
            setting.student,
            setting.split,
            setting.epochs,
            n_max,
        )
        families[family].setdefault(setting.imbalance, setting)
    parts = []
    for members in families.values():
        if len(members) > 1:
            members = list(members.values())
            panels = _imbalance_panels(members, styles)
            parts += [
                page.Heading(aggregate.common_title(members), 4),
                page.Panels(panels, _legend(panels, styles)),
            ]
    note = page.Text("Means over student seeds; bars: standard deviation.")
    return [page.Heading("Accuracy against imbalance"), note, *parts] if parts else []


def _imbalance_panels(members, styles):
    panels = []
    for name, column_of in tables.ACROSS.items():
        series = collections.defaultdict(dict)
        for setting in members:
            for method in setting.methods_with_teacher():
                if values := list(method.values(column_of(setting)).values()):
                    series[method.label][setting.imbalance] = values
        if series:
            panels.append(
                over_imbalance(name, series, styles, aggregate.common_title(members))
            )
    return panels


@figures.styled
def over_imbalance(column_name, series, styles, common_title=""):
    """Returns the accuracies {label: {imbalance: [values]}} drawn against the imbalance."""
    fig, ax = figures.panel(f"accuracy on {column_name}, %", height=250)
    ax.set_xscale("log")
    points = []
    for label, by_imbalance in series.items():
        index, dashes = styles[label]
        imbalances = sorted(by_imbalance)
        means, deviations, _ = zip(
            *(mean_std(by_imbalance[imbalance]) for imbalance in imbalances)
        )
        line = {
            "color": figures.colour(index),
            "linestyle": dashes,
            "elinewidth": 1.1,
            "marker": "o",
            "markersize": 4,
        }
        ax.errorbar(
            imbalances, means, [deviation or 0.0 for deviation in deviations], **line
        )
        for imbalance, mean in zip(imbalances, means):
            numbers = f"{column_name} {tables.mean_in_words(by_imbalance[imbalance])}"
            points.append(
                (imbalance, mean, f"{label}, imbalance {imbalance:g}\n{numbers}")
            )
    ticks = sorted(set().union(*series.values()))
    ax.set(xlim=(ticks[0] / 1.25, ticks[-1] * 1.25), xlabel="imbalance (log scale)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    name = ", ".join(
        filter(None, (f"Accuracy on {column_name} against imbalance", common_title))
    )
    legend = figures.Legend({label: styles[label] for label in series})
    return figures.save(
        fig,
        name,
        ", ".join(series),
        hovers=figures.spots(ax, *zip(*points)),
        legend=legend,
    )
