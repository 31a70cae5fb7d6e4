"""Writes an audit as a page; `record` is what `run.build_record` returns."""

import numpy as np
from markupsafe import Markup

from experiments.audit import summary
from experiments.reporting import figures, page, writers

# With fewer examples than this, the accuracy of a bin says little.
FEW_EXAMPLES = 10
# Indices of colours.
_POINT_COLOUR = 7
_INTER_COLOUR = 6
_INTRA_COLOUR = 4

# Figures.


@figures.styled
def draw_split_bars(title, pairs, label, longest_bar):
    """Draws bars of two pieces.

    Args:
      title: of the panel.
      pairs: {name: (inter, intra)}.
      label: what the bars measure.
      longest_bar: length of the longest bar that the axis must have room for.
    """
    names = list(pairs)
    rows = range(len(names))
    longest_name = max(len(name) for name in names)
    left = min(110, 14 + 6 * longest_name)
    fig = figures.canvas(height=64 + 36 * len(names), left=left, right=44)
    ax = fig.subplots()
    inter, intra = zip(*pairs.values())
    ax.barh(rows, inter, height=0.56, color=figures.colour(_INTER_COLOUR))
    ax.barh(rows, intra, height=0.56, left=inter, color=figures.colour(_INTRA_COLOUR))
    digits = 2 if longest_bar >= 1 else 3
    for row, pair in enumerate(pairs.values()):
        total = sum(pair)
        ax.annotate(
            f"{total:.{digits}f}",
            (total, row),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    ax.set(
        xlim=(0, max(longest_bar, 1e-3) * 1.05),
        # The first bar is at the top.
        ylim=(len(names) - 0.4, -0.6),
        title=title,
        xlabel=label,
    )
    ax.set_yticks(rows, names)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    name = f"{title}, {label}, between groups and within"
    description = ", ".join(f"{n} {a:.3g} + {b:.3g}" for n, (a, b) in pairs.items())
    return figures.to_figure(fig, name, description)


def _wilson_interval(accuracy, n):
    """Returns the bounds of the 95 % Wilson interval of an accuracy over n examples."""
    # z = 1.96, z² = 3.84, z² / 2 = 1.92, z² / 4 = 0.96
    middle = (accuracy + 1.92 / n) / (1 + 3.84 / n)
    half_width = 1.96 * np.sqrt(accuracy * (1 - accuracy) / n + 0.96 / n**2)
    half_width = half_width / (1 + 3.84 / n)
    return middle - half_width, middle + half_width


@figures.styled
def draw_reliability(title, bins):
    """Draws the accuracy against the confidence of each bin.

    Each point has its 95 % interval. Bars show how many examples each bin has.

    Args:
      title: of the panel.
      bins: three lists with a value for each bin: number of examples, sum of their
        confidences, number of correct predictions.
    """
    count, confidence, correct = np.array(bins)
    fig = figures.canvas(height=250)
    ax = fig.subplots()
    edges = np.arange(len(count)) / len(count)
    # The bars are in the lowest 30 % of the axes, whatever the number of examples.
    bar_heights = 0.3 * count / max(count.max(), 1)
    bar = {"align": "edge", "color": figures.QUIET, "alpha": 0.3}
    ax.bar(edges, bar_heights, 1 / len(count), **bar)
    ax.plot([0, 1], [0, 1], color=figures.QUIET, linestyle=figures.DASHED, linewidth=1)
    filled = count > 0
    n = count[filled]
    confidence = confidence[filled] / n
    accuracy = correct[filled] / n
    low, high = _wilson_interval(accuracy, n)
    color = figures.colour(_POINT_COLOUR)
    # Points of few examples are pale and hollow.
    few = n < FEW_EXAMPLES
    for selected, alpha, face in ((few, 0.45, "none"), (~few, 1.0, color)):
        x = confidence[selected]
        line = {"color": color, "alpha": 0.6 * alpha, "linewidth": 1.2}
        ax.vlines(x, low[selected], high[selected], **line)
        marker = {
            "clip_on": False,
            "markersize": 5.5,
            "color": color,
            "alpha": alpha,
            "markeredgewidth": 1.4,
            "markerfacecolor": face,
        }
        ax.plot(x, accuracy[selected], "o", **marker)
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ax.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="confidence")
    ax.set_xticks(quarters, [f"{quarter:g}" for quarter in quarters])
    ax.set_yticks(quarters, [f"{quarter:g}" for quarter in quarters])
    points = ", ".join(f"{c:.2f} {a:.2f}" for c, a in zip(confidence, accuracy))
    return figures.to_figure(fig, title, f"accuracy against confidence, {points}")


@figures.styled
def draw_mass_ratios(ratios, counts, assignment, group_names, labels, *, width):
    """Draws the mass of each class over its share of the examples.

    Args:
      ratios: `[C]`, NaN for classes without examples.
      counts: `[C]`, training images; the classes are sorted by group and count.
      assignment: `[C]`, index of the group.
      group_names: of the groups.
      labels: of the classes, shown under the pointer.
      width: of the figure, in CSS pixels.
    """
    is_wide = width == figures.DESKTOP_WIDTH
    fig = figures.canvas(width, 300)
    ax = fig.subplots()
    x = np.arange(len(ratios))
    texts = []
    for label, ratio in zip(labels, ratios):
        texts.append(f"{label}\nmass ÷ share {ratio:.2f}")
    # The axis is logarithmic, so zero is not on it.
    ratios = np.maximum(ratios, 1e-4)
    has_few_classes = len(ratios) < figures.MANY_CLASSES
    color = figures.colour(_POINT_COLOUR)
    ax.axhline(1, color=figures.QUIET, linewidth=1, linestyle=figures.DASHED)
    line = {"color": color, "alpha": 0.35, "linewidth": 4 if has_few_classes else 1}
    ax.vlines(x, np.minimum(ratios, 1), np.maximum(ratios, 1), **line)
    marker = {"markersize": 6 if has_few_classes else 3.2, "markeredgewidth": 0}
    ax.plot(x, ratios, "o", color=color, **marker)
    ax.set_yscale("log")
    low = min(0.5, np.nanmin(ratios) * 0.8)
    high = max(2, np.nanmax(ratios) * 1.6)
    ax.set(xlim=(-1, len(x)), ylim=(low, high))
    figures.set_plain_log_ticks(ax)
    ax.set_title("mass ÷ share (log scale)")
    ticks = np.linspace(0, len(x) - 1, 10 if is_wide else 5).round().astype(int)
    ticks = np.unique(ticks)
    ax.set_xticks(ticks, [f"{counts[tick]:,g}" for tick in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, assignment, group_names)
    hovers = ()
    # A pointer cannot hit an area that is narrower than half a pixel.
    if len(x) < 2 * width:
        xs = [(c - 0.5, c + 0.5) for c in x]
        hovers = figures.hover_areas(ax, xs, None, texts)
    name = "Mass over share by class"
    if not is_wide:
        name += ", narrow"
    description = (
        "the mass of each class over its share of the examples, sorted by training "
        "images"
    )
    return figures.to_figure(fig, name, description, hovers=hovers)


# Sections.


def write(record, path) -> None:
    """Writes the audit as a page."""
    title = f"Bias audit: {record['name']}"
    components = [
        page.Heading(title, 1),
        page.Text(summary.notes(record)),
        page.Text(summary.headline(record), "lead"),
        _mass_section(record),
        _loss_section(record),
    ]
    if "divergence" in record["inputs"][0]:
        components.append(_divergence_section(record))
    components += [
        _calibration_section(record),
        _class_section(record),
        _confusion_section(record),
    ]
    page.write(path, title, components)


def _split_panels(panels, inter, intra):
    """Returns the panels of `draw_split_bars`, with a legend that names the pieces."""
    styles = {
        inter: (_INTER_COLOUR, figures.SOLID),
        intra: (_INTRA_COLOUR, figures.SOLID),
    }
    return page.Panels(panels, figures.Legend(styles))


def _title_prefix(model, input_set):
    """Returns the name of one of two models; a single one needs no name."""
    return f"{model['name']}, " if len(input_set["models"]) > 1 else ""


def _mass_section(record):
    """Returns the section on the mass that each group gets."""
    text = Markup(
        "Bars: the mean probability that the model gives to each group. {} the true "
        "share of that input’s examples, which an unbiased model would match. {} the "
        "share of the training images. τ = 1 is the model as it is; the other "
        "temperature is that of distillation."
    ).format(figures.TRUE_SHARE_SYMBOL, figures.TRAINING_SHARE_SYMBOL)
    components: list = [page.Text(text)]
    for input_set in record["inputs"]:
        panels = []
        for model in input_set["models"]:
            prefix = _title_prefix(model, input_set)
            for temperature, mass in model["mass"].items():
                panels.append(
                    figures.draw_group_mass(
                        f"{prefix}τ = {temperature}",
                        mass,
                        input_set["share"],
                        record["training"],
                    )
                )
        components += [page.Heading(input_set["title"], 4), page.Panels(panels)]
    components.append(summary.mass_table(record))
    return page.Section("Group mass", components)


def _loss_section(record):
    """Returns the section on the two pieces of the cross-entropy."""
    input_set = record["inputs"][0]
    pairs_by_model = {}
    for model in input_set["models"]:
        pairs = {}
        for name, group in model["groups"].items():
            if group["examples"]:
                pairs[name] = group["inter"], group["intra"]
        pairs_by_model[model["name"]] = pairs
    # The panels of two models have the same scale.
    longest_bar = max(_longest_bar(pairs) for pairs in pairs_by_model.values())
    panels = []
    for name, pairs in pairs_by_model.items():
        panels.append(draw_split_bars(name, pairs, "cross-entropy, nats", longest_bar))
    text = (
        "The loss of an example of class y in group G is a sum of two terms: "
        "−log p(y) = −log p(G) − log p(y | G). The first is the cost of the wrong "
        "group (inter), the second that of the wrong class within it (intra). Means "
        f"over the examples of each group, on {input_set['title']}."
    )
    components = [
        page.Text(text),
        _split_panels(panels, "about the group", "about the class within it"),
        summary.loss_table(record),
    ]
    return page.Section("Wrong group, or wrong class within it", components)


def _longest_bar(pairs):
    return max(sum(pair) for pair in pairs.values())


def _divergence_section(record):
    """Returns the section on the KL between two models."""
    panels = []
    for temperature, by_group in record["inputs"][0]["divergence"].items():
        pairs = {}
        for name, divergence in by_group.items():
            if divergence:
                pairs[name] = divergence["inter"], sum(divergence["intra"].values())
        title = f"τ = {temperature}"
        panels.append(draw_split_bars(title, pairs, "KL, nats", _longest_bar(pairs)))
    text = (
        f"{summary.divergence_title(record)}. KL = inter + Σ intra, exactly; without "
        "the factor τ², it is the loss by which the first model would teach the second."
    )
    components = [
        page.Text(text),
        _split_panels(panels, "between the groups", "within them"),
        summary.divergence_table(record),
    ]
    return page.Section("Between the two models", components)


def _calibration_section(record):
    """Returns the section on confidence and accuracy."""
    input_set = record["inputs"][0]
    panels = []
    for model in input_set["models"]:
        prefix = _title_prefix(model, input_set)
        for name in record["groups"]["names"]:
            group = model["groups"][name]
            if group["examples"]:
                panels.append(draw_reliability(f"{prefix}{name}", group["bins"]))
    text = (
        "Dots: the accuracy of the predictions in a bin of confidence, with a 95 % "
        "interval; below the diagonal the model is over-confident. Hollow dots: fewer "
        f"than {FEW_EXAMPLES} examples, which say little. Bars: the distribution of "
        "the examples. The groups are those of the true class, which a user of the "
        "model does not know."
    )
    note = (
        "Over: mean confidence minus accuracy, in percentage points. ECE: expected "
        "calibration error in 15 bins of equal width, in percentage points; "
        f"{summary.BY_CHANCE}, so an ECE of about that is no sign of a fault."
    )
    components = [
        page.Text(text),
        page.Panels(panels),
        summary.calibration_table(record),
        page.Text(note),
    ]
    return page.Section("Calibration by group", components)


def _class_section(record):
    """Returns the section on which classes of the first model lose mass."""
    model = record["inputs"][0]["models"][0]
    classes = model["classes"]
    counts = np.array(record["class_counts"])
    assignment = np.array(record["groups"]["assignment"])
    # By group, and within a group by count.
    order = np.lexsort((-counts, assignment))
    ratios = np.full(len(order), np.nan)
    labels = []
    for i, c in enumerate(order):
        if classes["examples"][c]:
            ratios[i] = summary.mass_ratio(classes, c)
        labels.append(f"{record['class_names'][c]}, {counts[c]:,g} training images")
    data = {
        "ratios": ratios,
        "counts": counts[order],
        "assignment": assignment[order],
        "group_names": record["groups"]["names"],
        "labels": labels,
    }
    wide = draw_mass_ratios(**data, width=figures.DESKTOP_WIDTH)
    narrow = draw_mass_ratios(**data, width=figures.PHONE_WIDTH)
    text = (
        "Share: the class’s share of the examples. Mass ÷ share: the mean probability "
        "that the class gets over all examples, divided by its share; below 1 the "
        "class loses mass. Predicted ÷ share: the same for its share of the "
        "predictions. Own mass: what its own examples give to it; largest other class: "
        "the one that gets most of the rest. Sorted by the mass that is lost."
    )
    components = [
        page.Text(text),
        page.ResponsiveFigure([wide, narrow]),
        summary.class_table(record, summary.NUM_LISTED),
    ]
    if len(order) > summary.NUM_LISTED:
        table = summary.class_table(record)
        components.append(page.Details(f"All {len(order):,} classes", [table]))
    return page.Section(f"Which classes {model['name']} takes mass from", components)


def _confusion_section(record):
    """Returns the section on where predictions and mass go."""
    text = (
        "Rows: the group of the true class. Columns: where its predictions, and its "
        "mass, go; in percent of the row."
    )
    matrices = summary.confusion_matrices(record)
    is_complete = all(None not in matrix for matrix in matrices.values())
    component: page.HeatMaps | writers.Table
    if is_complete:
        component = page.HeatMaps(matrices, record["groups"]["names"])
    else:
        # A group without examples has no row, which only a table can show.
        component = summary.confusion_table(record)
    return page.Section("Confusion between groups", [page.Text(text), component])
