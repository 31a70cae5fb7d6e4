"""The page's section that sets settings side by side: tables, tail against head, accuracy against imbalance."""

import collections
import html

import numpy as np

from experiments.reporting import figures, tables, writers


def section(settings):
    """Returns the comparison of several settings as HTML; empty for one, or none."""
    if len(settings) < 2:
        return ""
    shown = "".join(
        f"<h3>{html.escape(title)}</h3>{writers.as_html(table)}" for title, table in tables.over_settings(settings)
    )
    told = tables.overview(settings)
    return "\n".join(
        [
            f'<section id="settings"><h2>{len(settings)} settings side by side</h2>',
            *[f'<p class="lead">{html.escape(told)}</p>'] * bool(told),
            f'{shown}<p class="small">{tables.BETWEEN}.</p>',
            tail_against_head(settings),
            _against_imbalance(settings),
            "</section>",
        ]
    )


def _styles(settings):
    """The styles of all settings' methods, so that each has one wherever it is."""
    methods = {method.label: method for setting in settings for method in setting.methods}
    methods = sorted(
        methods.values(), key=lambda method: (tables.method_rank(method.name), tables.natural(method.label))
    )
    return figures.styles(methods)


def _all_methods(setting):
    return [*setting.methods, *filter(None, [setting.teacher_method()])]


def _told(values):
    """Writes a mean and its deviation: "51.08 ± 0.20 %"."""
    cell = tables.number(values)
    return f"{cell.text} {cell.note} %".replace("  ", " ")


# Tail against head.


def tail_against_head(settings):
    """Returns the plots of the accuracies of the rarest against the most frequent group, a panel per setting."""
    found, panels, labels = _styles(settings), [], {}
    points = [_points(setting) for setting in settings]
    for setting, own, title in zip(settings, points, tables.apart(settings)):
        # Settings of the same data have the same axes: what the imbalance does is then seen.
        same = [other for peer, other in zip(settings, points) if peer.data == setting.data]
        limits = _limits([p for other in same for p in other.values()])
        if own:
            head, tail = setting.group_names()[0], setting.tail().split(".")[-1]
            panels.append(_scatter(title, own, found, limits, (head, tail)))
            labels |= own
    if not panels:
        return ""
    labels = [label for label in found if label in labels]
    return (
        '<h3>Tail against head</h3><p class="small">A mark is a method: its mean accuracy on the most frequent and the '
        "rarest group of classes. Bars: standard deviation over student seeds. Up and to the right is better.</p>"
        f'{figures.key(labels, found, marks=True)}<figure class="panels">{"".join(panels)}</figure>'
    )


def _points(setting):
    """{label: (accuracies on the head, on the tail)}; empty where fewer than two groups or methods have them."""
    groups = setting.group_names()
    columns = [f"groups.{groups[0]}", setting.tail()] if len(groups) > 1 else []
    methods = _all_methods(setting) if columns else []
    found = {m.label: [list(m.values(column).values()) for column in columns] for m in methods}
    found = {label: both for label, both in found.items() if all(both)}
    return found if len(found.keys() - {"teacher"}) > 1 else {}


def _limits(points):
    """Limits of both axes, with room for the deviations, within 0 to 100 but for a little."""
    found = []
    for values in zip(*points):
        middle, spread = [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        low, high = np.min(np.subtract(middle, spread)), np.max(np.add(middle, spread))
        room = max(1.0, 0.12 * (high - low))
        found.append((max(low - room, -2.0), min(high + room, 102.0)))
    return found


@figures.styled
def _scatter(title, points, found, limits, groups):
    fig, ax = figures.panel(f"{title}: {groups[1]}, %" if title else f"{groups[1]}, %", height=270, left=44)
    ax.grid(axis="x")
    told, drawn = {}, []
    for label, both in points.items():
        index, dashes = found[label]
        (x, dx, n), (y, dy, _) = (tables.mean_std(values) for values in both)
        shade = figures.colour(index)
        ax.errorbar(x, y, dy, dx, figures.MARKS[dashes], color=shade, markersize=8, elinewidth=1.1, markeredgewidth=0)
        drawn += [(x - (dx or 0), y, x + (dx or 0), y), (x, y - (dy or 0), x, y + (dy or 0))]
        seeds = f"{n} run{'' if n == 1 else 's'}"
        numbers = "".join(f"\n{group} {_told(values)}" for group, values in zip(groups, both))
        told[label] = (x, y, f"{label}, {seeds}{numbers}")
    ax.set(xlim=limits[0], ylim=limits[1], xlabel=f"{groups[0]}, %")
    _label_points(ax, {label: (x, y) for label, (x, y, _) in told.items()}, np.array(drawn))
    described = f"Tail against head{f', {title}' if title else ''}: {', '.join(points)}"
    return fig, described, figures.spots(ax, *zip(*told.values())), {label: found[label] for label in points}, True


def _label_points(ax, points, drawn):
    """Writes labels beside their marks where there is room beside what was drawn; the key has them all."""
    at = {label: ax.transData.transform(point) for label, point in points.items()}
    corners = ax.transData.transform(drawn.reshape(-1, 2)).reshape(-1, 4)
    taken = [*(corners + (-2, -2, 2, 2)), *((x - 6, y - 6, x + 6, y + 6) for x, y in at.values())]
    box = ax.get_window_extent()
    for label, (x, y) in at.items():
        width, height = 6.6 * len(label), 12
        places = [(x + 9, y - 6), (x - 9 - width, y - 6), (x - width / 2, y + 8), (x - width / 2, y - 20),
                  (x + 6, y + 5), (x + 6, y - 17), (x - 6 - width, y + 5), (x - 6 - width, y - 17)]  # fmt: skip
        for left, bottom in places:
            own = left, bottom, left + width, bottom + height
            inside = left > box.x0 and own[2] < box.x1 + 10 and bottom > box.y0 and own[3] < box.y1
            if inside and not any(_meet(own, other) for other in taken):
                side, across = ("left", left) if left > x else ("right", own[2]) if own[2] < x else ("center", x)
                ax.text(*ax.transData.inverted().transform((across, bottom + 2)), label, ha=side, va="baseline")
                taken.append(own)
                break


def _meet(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Accuracy against imbalance.


def _against_imbalance(settings):
    """Returns plots of accuracy against imbalance, where several settings differ in nothing else."""
    found, families = _styles(settings), collections.defaultdict(dict)
    for setting in settings:
        config = setting.runs[0]["config"].get("data") or {}
        family = setting.data, setting.teacher, setting.student, setting.split, setting.epochs, config.get("n_max")
        families[family].setdefault(setting.imbalance, setting)
    parts = []
    for members in families.values():
        if len(members) > 1:
            panels, labels = _imbalance_panels(list(members.values()), found)
            name = html.escape(tables.common(list(members.values())))
            parts.append(f'<h4>{name}</h4>{figures.key(labels, found)}<figure class="panels">{panels}</figure>')
    note = '<p class="small">Means over student seeds; bars: standard deviation.</p>'
    return f"<h3>Accuracy against imbalance</h3>{note}{''.join(parts)}" if parts else ""


def _imbalance_panels(members, found):
    drawn, labels = [], {}
    for told, column_of in tables.ACROSS.items():
        series = collections.defaultdict(dict)
        for setting in members:
            for method in _all_methods(setting):
                if values := list(method.values(column_of(setting)).values()):
                    series[method.label][setting.imbalance] = values
        if series:
            drawn.append(_over_imbalance(told, series, found, tables.common(members)))
            labels |= series
    return "".join(drawn), [label for label in found if label in labels]


@figures.styled
def _over_imbalance(told, series, found, common):
    fig, ax = figures.panel(f"accuracy on {told}, %", height=250)
    ax.set_xscale("log")
    places = sorted({imbalance for values in series.values() for imbalance in values})
    met = []
    for label, values in series.items():
        index, dashes = found[label]
        x, measured = zip(*sorted(values.items()))
        y, errors, _ = zip(*map(tables.mean_std, measured))
        errors = [error or 0.0 for error in errors]
        ax.errorbar(
            x, y, errors, color=figures.colour(index), linestyle=dashes, elinewidth=1.1, marker="o", markersize=4
        )
        words = (f"{label}, imbalance {imbalance:g}\n{told} {_told(v)}" for imbalance, v in zip(x, measured))
        met += zip(x, y, words)
    ax.set(xlim=(places[0] / 1.25, places[-1] * 1.25), xlabel="imbalance (log scale)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xticks(places, [f"{imbalance:g}" for imbalance in places])
    ax.minorticks_off()
    described = f"Accuracy on {told} against imbalance{f', {common}' if common else ''}: {', '.join(series)}"
    return fig, described, figures.spots(ax, *zip(*met)), {label: found[label] for label in series}
