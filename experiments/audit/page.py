"""Writes an audit as a page; `record` is what `run.build_record` returns."""

import numpy as np
from markupsafe import Markup

from experiments.audit import summary
from experiments.reporting import figures, page

SMALL = 10  # examples in a bin, below which its accuracy says little
_SHARES, _INTER, _INTRA = 7, 6, 4  # indices of colours

# Figures.


@figures.styled
def split_bars(title, parts, label, longest_bar):
    """Draws {name: (inter, intra)} as bars of two parts; `label` says what they measure."""
    names = list(parts)
    rows = range(len(names))
    longest_name = max(len(name) for name in names)
    fig = figures.canvas(
        height=64 + 36 * len(names), left=min(110, 14 + 6 * longest_name), right=44
    )
    ax = fig.subplots()
    inter, intra = zip(*parts.values())
    ax.barh(rows, inter, height=0.56, color=figures.colour(_INTER))
    ax.barh(rows, intra, height=0.56, left=inter, color=figures.colour(_INTRA))
    digits = 2 if longest_bar >= 1 else 3
    for row, pair in enumerate(parts.values()):
        end = sum(pair)
        ax.annotate(
            f"{end:.{digits}f}",
            (end, row),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    ax.set(
        xlim=(0, max(longest_bar, 1e-3) * 1.05),
        ylim=(len(names) - 0.4, -0.6),
        title=title,
        xlabel=label,
    )
    ax.set_yticks(rows, names)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    numbers = ", ".join(f"{name} {a:.3g} + {b:.3g}" for name, (a, b) in parts.items())
    return figures.save(fig, f"{title}, {label}, between groups and within", numbers)


@figures.styled
def reliability(title, bins):
    """Draws the accuracy against the confidence of each bin, with its 95 % interval (Wilson), over the examples."""
    count, confidence, hits = np.array(bins)
    fig = figures.canvas(height=250)
    ax = fig.subplots()
    edges = np.arange(len(count)) / len(count)
    ax.bar(
        edges,
        0.3 * count / max(count.max(), 1),
        1 / len(count),
        align="edge",
        color=figures.QUIET,
        alpha=0.3,
    )
    ax.plot([0, 1], [0, 1], color=figures.QUIET, linestyle=figures.DASHED, linewidth=1)
    filled = count > 0
    n = count[filled]
    confidence = confidence[filled] / n
    accuracy = hits[filled] / n
    middle = (accuracy + 1.92 / n) / (1 + 3.84 / n)
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / n + 0.96 / n**2) / (1 + 3.84 / n)
    color = figures.colour(_SHARES)
    for chosen, alpha, face in ((n < SMALL, 0.45, "none"), (n >= SMALL, 1.0, color)):
        low, high = (middle - half)[chosen], (middle + half)[chosen]
        ax.vlines(
            confidence[chosen], low, high, color=color, alpha=0.6 * alpha, linewidth=1.2
        )
        ax.plot(
            confidence[chosen], accuracy[chosen], "o", clip_on=False, markersize=5.5, color=color, alpha=alpha,
            markeredgewidth=1.4, markerfacecolor=face,
        )  # fmt: skip
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ax.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="confidence")
    ax.set_xticks(quarters, [f"{t:g}" for t in quarters])
    ax.set_yticks(quarters, [f"{t:g}" for t in quarters])
    points = ", ".join(f"{c:.2f} {a:.2f}" for c, a in zip(confidence, accuracy))
    return figures.save(fig, title, f"accuracy against confidence, {points}")


@figures.styled
def mass_ratios(ratios, counts, assignment, group_names, labels, *, width=figures.DESK):
    """Draws the mass that each class gets over what is its due, the classes sorted by training images."""
    fig = figures.canvas(width, 300)
    ax = fig.subplots()
    x = np.arange(len(ratios))
    hover_texts = [
        f"{label}\nmass ÷ due {ratio:.2f}" for label, ratio in zip(labels, ratios)
    ]
    ratios = np.maximum(ratios, 1e-4)
    large = len(ratios) < figures.MANY
    color = figures.colour(_SHARES)
    ax.axhline(1, color=figures.QUIET, linewidth=1, linestyle=figures.DASHED)
    ax.vlines(
        x,
        np.minimum(ratios, 1),
        np.maximum(ratios, 1),
        color=color,
        alpha=0.35,
        linewidth=4 if large else 1,
    )
    ax.plot(
        x, ratios, "o", color=color, markersize=6 if large else 3.2, markeredgewidth=0
    )
    ax.set_yscale("log")
    ax.set(
        xlim=(-1, len(x)),
        ylim=(min(0.5, np.nanmin(ratios) * 0.8), max(2, np.nanmax(ratios) * 1.6)),
    )
    figures.plain_log(ax)
    ax.set_title("mass ÷ due (log scale)")
    ticks = np.unique(
        np.linspace(0, len(x) - 1, 10 if width == figures.DESK else 5)
        .round()
        .astype(int)
    )
    ax.set_xticks(ticks, [f"{counts[i]:,g}" for i in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, assignment, group_names)
    # An area narrower than half a pixel cannot be pointed at.
    hovers = (
        figures.areas(ax, [(c - 0.5, c + 0.5) for c in x], None, hover_texts)
        if len(x) < 2 * width
        else ()
    )
    name = f"Mass over due by class{'' if width == figures.DESK else ', narrow'}"
    description = (
        "what each gets over its share of the examples, sorted by training images"
    )
    return figures.save(fig, name, description, hovers=hovers)


# Sections.


def write(record, path) -> None:
    """Writes the audit as one page."""
    title = f"Bias audit: {record['name']}"
    heading = [
        page.Heading(title, 1),
        page.Text(summary.notes(record)),
        page.Text(summary.headline(record), "lead"),
    ]
    sections = [
        _mass(record),
        _loss(record),
        _calibration(record),
        _classes(record),
        _confusion(record),
    ]
    if "divergence" in record["inputs"][0]:
        sections.insert(2, _divergence(record))
    page.write(path, title, heading + sections)


def _split_panels(panels, inter, intra):
    """Returns `split_bars` below a legend that names their parts."""
    return page.Panels(
        panels,
        figures.Legend(
            {inter: (_INTER, figures.SOLID), intra: (_INTRA, figures.SOLID)}
        ),
    )


def _title_prefix(model, input_set):
    return f"{model['name']}, " if len(input_set["models"]) > 1 else ""


def _mass(record):
    text = Markup(
        "Bars: the mean probability that the model gives to each group. {} the true share of that input’s examples, "
        "which an unbiased model would match. {} the share of the training images. τ = 1 is the model as it is; at the "
        "other temperature it would teach a student."
    ).format(figures.symbol("❙", 6), figures.symbol("◇", 7))
    parts = [page.Text(text)]
    for input_set in record["inputs"]:
        panels = []
        for model in input_set["models"]:
            for temperature, mass in model["mass"].items():
                title = f"{_title_prefix(model, input_set)}τ = {temperature}"
                panels.append(
                    figures.group_mass(
                        title, mass, input_set["share"], record["training"]
                    )
                )
        parts += [page.Heading(input_set["title"], 4), page.Panels(panels)]
    return page.Section("Group mass", [*parts, summary.mass_table(record)])


def _loss(record):
    input_set = record["inputs"][0]
    parts_by_model = {}
    for model in input_set["models"]:
        groups = {
            name: group for name, group in model["groups"].items() if group["examples"]
        }
        parts_by_model[model["name"]] = {
            name: (group["inter"], group["intra"]) for name, group in groups.items()
        }
    # Both models have one scale.
    largest = max(
        sum(pair) for parts in parts_by_model.values() for pair in parts.values()
    )
    panels = [
        split_bars(name, parts, "cross-entropy, nats", largest)
        for name, parts in parts_by_model.items()
    ]
    text = (
        "The loss of an example of class y in group G splits exactly: −log p(y) = −log p(G) − log p(y | G). The first "
        "part is what the wrong group costs (inter), the second the wrong class within it (intra). Means over the "
        f"examples of each group, on {input_set['title']}."
    )
    bars = _split_panels(panels, "about the group", "about the class within it")
    parts = [page.Text(text), bars, summary.loss_table(record)]
    return page.Section("Wrong group, or wrong class within it", parts)


def _divergence(record):
    panels = []
    for temperature, by_group in record["inputs"][0]["divergence"].items():
        parts = {
            name: (kl["inter"], sum(kl["intra"].values()))
            for name, kl in by_group.items()
            if kl
        }
        panels.append(
            split_bars(
                f"τ = {temperature}", parts, "KL, nats", max(map(sum, parts.values()))
            )
        )
    text = (
        f"{summary.divergence_title(record)}. KL = inter + Σ intra, exactly; it is the loss by which the first would "
        "teach the second, without the factor τ²."
    )
    bars = _split_panels(panels, "between the groups", "within them")
    return page.Section(
        "Between the two models",
        [page.Text(text), bars, summary.divergence_table(record)],
    )


def _calibration(record):
    input_set = record["inputs"][0]
    panels = []
    for model in input_set["models"]:
        for name in record["groups"]["names"]:
            group = model["groups"][name]
            if group["examples"]:
                panels.append(
                    reliability(
                        f"{_title_prefix(model, input_set)}{name}", group["bins"]
                    )
                )
    text = (
        "Dots: the accuracy of the predictions of one confidence, with a 95 % interval; below the diagonal the model "
        f"is over-confident. Hollow: fewer than {SMALL} examples, which say little. Bars: how the examples are spread. "
        "The groups are those of the true class, which a user of the model does not know."
    )
    note = (
        "Over: mean confidence less accuracy, in points. ECE: expected calibration error in 15 bins of the same width, "
        f"in points; {summary.BY_CHANCE}, so an ECE of about that is no sign of a fault."
    )
    parts = [
        page.Text(text),
        page.Panels(panels),
        summary.calibration_table(record),
        page.Text(note),
    ]
    return page.Section("Calibration by group", parts)


def _classes(record):
    model = record["inputs"][0]["models"][0]
    classes = model["classes"]
    counts = np.array(record["class_counts"])
    assignment = np.array(record["groups"]["assignment"])
    order = np.lexsort((-counts, assignment))
    ratios = np.array(
        [
            summary.mass_ratio(classes, c) if classes["examples"][c] else np.nan
            for c in order
        ]
    )
    labels = [
        f"{record['class_names'][c]}, {counts[c]:,g} training images" for c in order
    ]
    both = [
        mass_ratios(
            ratios,
            counts[order],
            assignment[order],
            record["groups"]["names"],
            labels,
            width=width,
        )
        for width in (figures.DESK, figures.PHONE)
    ]
    text = (
        "Due: the class’s share of the examples. Mass ÷ due: the probability that it gets over all examples, over "
        "that; below 1 the model gives it away. Predicted ÷ due: the same of its predictions. Own mass: what its own "
        "examples give to it; next class: where most of the rest goes. Sorted by the mass that is lost."
    )
    parts = [
        page.Text(text),
        page.ByWidth(both),
        summary.class_table(record, summary.WORST),
    ]
    if len(order) > summary.WORST:
        parts.append(
            page.Details(f"All {len(order):,} classes", [summary.class_table(record)])
        )
    return page.Section(f"Which classes {model['name']} gives away", parts)


def _confusion(record):
    text = "Rows: the group of the true class. Columns: where its predictions, and its mass, go; percent of the row."
    matrices = summary.confusions(record)
    if all(all(matrix) for matrix in matrices.values()):
        shown = page.HeatMaps(matrices, record["groups"]["names"])
    else:
        # A group has no example, so that its row is missing.
        shown = summary.confusion_table(record)
    return page.Section("Confusion between groups", [page.Text(text), shown])
