"""The figures on learned weights.

They show the mean weight of each loss term in each group of classes over training, and
the weight net as a function of its two features.
"""

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.reporting import figures, page

# Of groups, the most frequent first.
_GROUP_COLOURS = (2, 1, 6)
_GROUP_MARKERS = "os^Dv"
_TEXT = (
    "Curves: the mean weight of each loss term over training, by the group of the "
    "example’s class, averaged over student seeds. Maps, for the first seed: the "
    "weight that the trained net gives an example with these losses; marks are the "
    "groups’ means in the last epoch."
)


def components(setting):
    """Returns the components of a page on learned weights, empty if there are none."""
    group_names = setting.group_names()
    method_components = []
    for method in setting.methods:
        summary = _weighting_summary(method)
        if summary:
            method_components += _method_components(method, summary, group_names)
    if not method_components:
        return []
    return [page.Heading("Learned weights"), page.Text(_TEXT), *method_components]


def _weighting_summary(method):
    """Returns `loss_weighting` of the results of the first run that has it."""
    for run in method.sorted_runs:
        if run.get("loss_weighting"):
            return run["loss_weighting"]
    return None


def _method_components(method, summary, group_names):
    """Returns a heading, and the curves and maps of one method."""
    styles = {}
    for group, name in enumerate(group_names):
        dashes = figures.DASHES[group % len(figures.DASHES)]
        styles[name] = _group_colour(group), dashes
    curves = _weight_curves(method, summary["weights"], styles)
    maps = []
    for term, values in (summary.get("map") or {}).items():
        maps.append(_draw_map(term, summary, np.array(values), group_names))
    components: list = [page.Heading(method.label, 4)]
    # The legend is above the first grid, and is for both.
    legend: figures.Legend | None = figures.Legend(styles)
    for grid in (curves, maps):
        if grid:
            components.append(page.Panels(grid, legend))
            legend = None
    return components


def _group_colour(group):
    return _GROUP_COLOURS[group % len(_GROUP_COLOURS)]


def _weight_curves(method, terms, styles):
    """Returns a figure of each term's weight by group, and one of the outer loss."""
    # `mean_curves` draws a curve for each label: here for each group of one method.
    method_by_group = dict.fromkeys(styles, method)
    curves = []
    for term in terms:

        def weight_of(group_name, record, term=term):
            weights = (record.get("weights") or {}).get(term) or {}
            return weights.get(group_name)

        series = figures.mean_curves(method_by_group, weight_of)
        if series:
            curves.append(figures.draw_lines(f"weight of {term}", series, styles))
    series = figures.mean_curves(
        {method.label: method}, lambda _, record: record.get("outer_loss")
    )
    if series:
        title = "outer loss, on the outer set"
        method_styles = figures.method_styles([method])
        curves.append(figures.draw_lines(title, series, method_styles))
    return curves


@figures.styled
def _draw_map(term, summary, weights, group_names):
    """Draws a term's weight over the two features, with labelled contour lines.

    The darker a region, the larger the weight.

    Args:
      term: name of the loss term.
      summary: `loss_weighting` of the results.
      weights: of the term, `[x, y]` over `summary["axes"]`.
      group_names: the most frequent first.
    """
    x_name, y_name = summary["features"]
    x, y = summary["axes"]
    extent = f"{weights.min():.2f} to {weights.max():.2f}"
    fig, ax = figures.panel(f"weight of {term}, {extent}", height=250, left=48)
    ax.grid(visible=False)
    levels = np.asarray(MaxNLocator(6).tick_values(weights.min(), weights.max()))
    middles = (levels[:-1] + levels[1:]) / 2
    shades = []
    for middle in middles:
        opacity = float(np.clip(0.62 * middle, 0.02, 0.9))
        shades.append((figures.colour(7), opacity))
    ax.contourf(x, y, weights.T, levels=levels, colors=shades)
    contours = ax.contour(
        x, y, weights.T, levels=levels[1:-1], colors=figures.QUIET, linewidths=0.7
    )
    for label in ax.clabel(contours, fmt="%g", fontsize=11, colors=figures.INK):
        # A label near the border would overlap the numbers of the axis.
        pixels = ax.transData.transform(label.get_position())
        position = ax.transAxes.inverted().transform(pixels)
        is_inside = (position > 0.1).all() and (position < 0.9).all()
        label.set_visible(bool(is_inside))
    for group, name in enumerate(group_names):
        point = [summary["features"][feature].get(name) for feature in (x_name, y_name)]
        # A group without an example has no mean.
        if None not in point:
            marker = {
                "color": figures.colour(_group_colour(group)),
                "markersize": 6,
                "markeredgecolor": figures.INK,
                "markeredgewidth": 0.8,
                "clip_on": False,
            }
            shape = _GROUP_MARKERS[group % len(_GROUP_MARKERS)]
            ax.plot(*point, shape, **marker)
    ax.set(xlabel=x_name.replace("_", " "), ylabel=y_name.replace("_", " "))
    return figures.to_figure(
        fig, f"weight of {term} over {x_name} and {y_name}", extent
    )
