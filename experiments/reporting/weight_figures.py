"""The figures on learned weights: the weight of each term in each group, and the function that the weight net is."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.reporting import figures, page

_COLOURS, _MARKS = (2, 1, 6), "os^Dv"  # of groups, the most frequent first
_TEXT = (
    "Curves: the mean weight of each loss term over training, by the group of the example’s class, means over student "
    "seeds. Maps, of the first seed: the weight that the net at the end gives an example with these losses; the marks "
    "are the groups’ means in the last epoch."
)


def parts(setting):
    """Returns the parts of a page on learned weights; none where no method has them."""
    names, sections = setting.group_names(), []
    for method in setting.methods:
        learned = next(
            (
                run["loss_weighting"]
                for run in method.sorted_runs
                if run.get("loss_weighting")
            ),
            None,
        )
        sections += _of_method(method, learned, names) if learned else []
    return (
        [page.Heading("Learned weights"), page.Text(_TEXT), *sections]
        if sections
        else []
    )


def _of_method(method, learned, names):
    styles = {
        name: (_COLOURS[g % 3], figures.DASHES[g % 4]) for g, name in enumerate(names)
    }
    by_group = dict.fromkeys(names, method)
    curves = []
    for term in learned["weights"]:
        series = figures.curves(
            by_group, lambda name, record, term=term: _logged_weight(record, term, name)
        )
        curves += [figures.lines(f"weight of {term}", series, styles)] if series else []
    outer = figures.curves(
        {method.label: method}, lambda _, record: record.get("outer_loss")
    )
    curves += (
        [figures.lines("outer loss, on the outer set", outer, figures.styles([method]))]
        if outer
        else []
    )
    maps = [
        _draw_map(term, learned, np.array(values), names)
        for term, values in (learned.get("map") or {}).items()
    ]
    # The two grids share a legend.
    grids = [grid for grid in (curves, maps) if grid]
    legend = figures.Legend(styles)
    return [
        page.Heading(method.label, 4),
        *(page.Panels(grid, None if i else legend) for i, grid in enumerate(grids)),
    ]


def _logged_weight(record, term, name):
    return ((record.get("weights") or {}).get(term) or {}).get(name)


@figures.styled
def _draw_map(term, learned, values, names):
    """Returns a term's weight over the two features: the darker, the larger, with labelled lines of equal weight."""
    (x_name, x), (y_name, y) = zip(learned["features"], learned["axes"])
    extent = f"{values.min():.2f} to {values.max():.2f}"
    fig, ax = figures.panel(f"weight of {term}, {extent}", height=250, left=48)
    ax.grid(visible=False)
    levels = MaxNLocator(6).tick_values(values.min(), values.max())
    middles = (levels[:-1] + levels[1:]) / 2
    shades = [
        (figures.colour(7), float(np.clip(0.62 * middle, 0.02, 0.9)))
        for middle in middles
    ]
    ax.contourf(x, y, values.T, levels=levels, colors=shades)
    contours = ax.contour(
        x, y, values.T, levels=levels[1:-1], colors=figures.QUIET, linewidths=0.7
    )
    for label in ax.clabel(contours, fmt="%g", fontsize=11, colors=figures.INK):
        # A label near the border would lie on the numbers of the axis.
        inside = ax.transAxes.inverted().transform(
            ax.transData.transform(label.get_position())
        )
        label.set_visible(bool((inside > 0.1).all() and (inside < 0.9).all()))
    for g, name in enumerate(names):
        point = [learned["features"][feature].get(name) for feature in (x_name, y_name)]
        if None not in point:
            mark = {
                "color": figures.colour(_COLOURS[g % 3]),
                "markersize": 6,
                "clip_on": False,
            }
            ax.plot(
                *point,
                _MARKS[g % 5],
                markeredgecolor=figures.INK,
                markeredgewidth=0.8,
                **mark,
            )
    ax.set(xlabel=x_name.replace("_", " "), ylabel=y_name.replace("_", " "))
    return figures.save(fig, f"weight of {term} over {x_name} and {y_name}", extent)
