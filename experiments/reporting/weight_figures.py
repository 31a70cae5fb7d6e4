"""The report's section on learned weights: what each term weighed in each group, and what the weight net answers."""

import html

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.reporting import figures

_COLOURS, _MARKS = (2, 1, 6), "os^Dv"  # of groups, the most frequent first


def section(setting):
    """Returns the section as HTML; empty where no method has learned weights."""
    names = setting.group_names()
    methods = [method for method in setting.methods if _learned(method)]
    parts = [_method(method, names) for method in methods]
    if not any(parts):
        return ""
    return (
        '<h3>Learned weights</h3><p class="small">Curves: the mean weight of each loss term over training, by the '
        "group of the example’s class, means over student seeds. Maps, of the first seed: the weight that the "
        "net at the end gives an example with these losses; the marks are the groups’ means in the last epoch.</p>"
        + "".join(parts)
    )


def _learned(method):
    """The first seed's learned weights, None where they are static."""
    return next((run["weighting"] for _, run in sorted(method.runs.items()) if run.get("weighting")), None)


def _method(method, names):
    learned = _learned(method)
    styles = {name: (_COLOURS[g % 3], figures.DASHES[g % 4]) for g, name in enumerate(names)}
    curves = []
    for term in learned["weights"]:
        series = figures.logged(
            {name: figures.curve(method, lambda e, t=term, n=name: _logged_weight(e, t, n)) for name in names}
        )
        if series:
            curves.append(figures.lines(f"weight of {term}", series, styles))
    outer = figures.logged({method.label: figures.curve(method, lambda e: e.get("outer_loss"))})
    if outer:
        curves.append(figures.lines("outer loss, on the meta images", outer, figures.styles([method])))
    maps = [_map(term, learned, np.array(values), names) for term, values in (learned.get("map") or {}).items()]
    rows = "".join(f'<figure class="panels">{"".join(row)}</figure>' for row in (curves, maps) if row)
    return f"<h4>{html.escape(method.label)}</h4>{figures.key(names, styles)}{rows}"


def _logged_weight(entry, term, name):
    return ((entry.get("weights") or {}).get(term) or {}).get(name)


@figures.styled
def _map(term, learned, values, names):
    """Draws a term's weight over the two features: the darker, the larger it is, lines of equal weight labelled."""
    (x_name, x), (y_name, y) = zip(learned["features"], learned["axes"])
    title = f"weight of {term}, {values.min():.2f} to {values.max():.2f}"
    fig, ax = figures.panel(title, height=250, left=48)
    ax.grid(visible=False)
    levels = MaxNLocator(6).tick_values(values.min(), values.max())
    middles = (levels[:-1] + levels[1:]) / 2
    shades = [(figures.colour(7), float(np.clip(0.62 * middle, 0.02, 0.9))) for middle in middles]
    ax.contourf(x, y, values.T, levels=levels, colors=shades)
    drawn = ax.contour(x, y, values.T, levels=levels[1:-1], colors=figures.QUIET, linewidths=0.7)
    labels = ax.clabel(drawn, fmt="%g", fontsize=11, colors=figures.INK)
    for label in labels:  # one that the border cuts would lie on the axis's own numbers
        inside = ax.transAxes.inverted().transform(ax.transData.transform(label.get_position()))
        label.set_visible(bool((inside > 0.1).all() and (inside < 0.9).all()))
    for g, name in enumerate(names):
        point = [learned["features"][feature].get(name) for feature in (x_name, y_name)]
        if None not in point:
            ax.plot(*point, _MARKS[g % 5], color=figures.colour(_COLOURS[g % 3]), markersize=6, clip_on=False,
                    markeredgecolor=figures.INK, markeredgewidth=0.8)  # fmt: skip
    ax.set(xlabel=x_name.replace("_", " "), ylabel=y_name.replace("_", " "))
    return fig, f"weight of {term} over {x_name} and {y_name}: {values.min():.2f} to {values.max():.2f}"
