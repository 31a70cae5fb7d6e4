"""What an audit found, as figures on a page; `found` as in `told`."""

import html

import numpy as np

from experiments.audit import summary
from experiments.reporting import figures, page, writers

SMALL = 10  # examples in a bin, below which its accuracy says little
_SHARES, _INTER, _INTRA = 7, 6, 4  # colours


# Figures.


@figures.styled
def split_bars(title, parts, label, longest_bar):
    """Draws {name: (inter, intra)} as bars of two parts; `label` says what they measure."""
    names, rows, ends = list(parts), range(len(parts)), [sum(pair) for pair in parts.values()]
    longest = max(len(name) for name in names)
    fig = figures.figure(height=64 + 36 * len(names), left=min(110, 14 + 6 * longest), right=44)
    ax = fig.subplots()
    inter, intra = zip(*parts.values())
    ax.barh(rows, inter, height=0.56, color=figures.colour(_INTER))
    ax.barh(rows, intra, height=0.56, left=inter, color=figures.colour(_INTRA))
    digits = 2 if longest_bar >= 1 else 3
    for row, end in enumerate(ends):
        ax.annotate(f"{end:.{digits}f}", (end, row), (5, 0), textcoords="offset points", va="center")
    ax.set(xlim=(0, max(longest_bar, 1e-3) * 1.05), ylim=(len(names) - 0.4, -0.6), title=title, xlabel=label)
    ax.set_yticks(rows, names)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    drawn = ", ".join(f"{name} {a:.3g} + {b:.3g}" for name, (a, b) in parts.items())
    return fig, f"{title}, {label}, between groups and within: {drawn}"


@figures.styled
def reliability(title, bins):
    """Draws the accuracy against the confidence of each bin, with its 95 % interval (Wilson), over the examples."""
    count, confidence, hits = np.array(bins)
    there = count > 0
    n, confidence, accuracy = count[there], confidence[there] / count[there], hits[there] / count[there]
    fig = figures.figure(height=250)
    ax = fig.subplots()
    edges = np.arange(len(count)) / len(count)
    ax.bar(edges, 0.3 * count / max(count.max(), 1), 1 / len(count), align="edge", color=figures.QUIET, alpha=0.3)
    ax.plot([0, 1], [0, 1], color=figures.QUIET, linestyle=figures.DASHED, linewidth=1)
    middle = (accuracy + 1.92 / n) / (1 + 3.84 / n)
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / n + 0.96 / n**2) / (1 + 3.84 / n)
    for few, alpha, face in ((n < SMALL, 0.45, "none"), (n >= SMALL, 1.0, None)):
        dots = {"markersize": 5.5, "color": figures.colour(_SHARES), "alpha": alpha, "markeredgewidth": 1.4}
        ax.vlines(confidence[few], (middle - half)[few], (middle + half)[few], color=figures.colour(_SHARES),
                  alpha=0.6 * alpha, linewidth=1.2)  # fmt: skip
        ax.plot(confidence[few], accuracy[few], "o", clip_on=False, **dots, **({"mfc": face} if face else {}))
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ax.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="confidence")
    ax.set_xticks(quarters, [f"{t:g}" for t in quarters])
    ax.set_yticks(quarters, [f"{t:g}" for t in quarters])
    points = ", ".join(f"{c:.2f} {a:.2f}" for c, a in zip(confidence, accuracy))
    return fig, f"{title}: accuracy against confidence, {points}"


@figures.styled
def due_by_class(ratios, counts, assignment, names, told_of, *, width=figures.DESK):
    """Draws the mass that each class gets over what is its due, the classes sorted by training images."""
    fig = figures.figure(width, 300)
    ax = fig.subplots()
    x, told_of = np.arange(len(ratios)), [f"{words}\nmass ÷ due {ratio:.2f}" for words, ratio in zip(told_of, ratios)]
    ratios = np.maximum(ratios, 1e-4)
    ax.axhline(1, color=figures.QUIET, linewidth=1, linestyle=figures.DASHED)
    large = len(ratios) < figures.MANY
    ax.vlines(x, np.minimum(ratios, 1), np.maximum(ratios, 1), color=figures.colour(_SHARES), alpha=0.35,
              linewidth=4 if large else 1)  # fmt: skip
    ax.plot(x, ratios, "o", color=figures.colour(_SHARES), markersize=6 if large else 3.2, markeredgewidth=0)
    ax.set_yscale("log")
    ax.set(xlim=(-1, len(x)), ylim=(min(0.5, np.nanmin(ratios) * 0.8), max(2, np.nanmax(ratios) * 1.6)))
    figures.plain_log(ax)
    ax.set_title("mass ÷ due (log scale)")
    ticks = np.unique(np.linspace(0, len(x) - 1, 10 if width == figures.DESK else 5).round().astype(int))
    ax.set_xticks(ticks, [f"{counts[i]:,g}" for i in ticks])
    ax.set_xlabel("training images of the class")
    figures.mark_groups(ax, assignment, names)
    # What is narrower than half a pixel cannot be pointed at.
    hovers = figures.areas(ax, [(c - 0.5, c + 0.5) for c in x], None, told_of) if len(x) < 2 * width else ()
    name = f"Mass over due by class{'' if width == figures.DESK else ', narrow'}"
    return fig, f"{name}: what each gets over its share of the examples, sorted by training images", hovers


# The page.


def write(found, path) -> None:
    """Writes the audit as one page."""
    title = f"Bias audit: {found['name']}"
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="small">{html.escape(summary.notes(found))}</p>']
    body += [f'<p class="lead">{html.escape(summary.headline(found))}</p>']
    sections = (_mass, _loss, _divergence, _calibration, _classes, _between_groups)
    body += [section(found) for section in sections]
    page.write(path, title, body)


def _small(text):
    return f'<p class="small">{text}</p>'


def _mass(found):
    parts = []
    for shown in found["inputs"]:
        panels = []
        for model in shown["models"]:
            for temperature, mass in model["mass"].items():
                title = f"{_of(model, shown)}τ = {temperature}"
                panels.append(figures.group_mass(title, mass, shown["share"], found["training"]))
        parts.append(f'<h4>{html.escape(shown["title"])}</h4><figure class="panels">{"".join(panels)}</figure>')
    text = (
        "Bars: the mean probability that the model gives to each group. "
        f'<span style="color: {figures.css(6)}">❙</span> the true share of that input’s examples, which an unbiased '
        f'model would match. <span style="color: {figures.css(7)}">◇</span> the share of the training images. τ = 1 is '
        "the model as it is; at the other temperature it would teach a student."
    )
    return f"<h2>Group mass</h2>{_small(text)}{''.join(parts)}{writers.as_html(summary.mass_table(found))}"


def _of(model, shown):
    return f"{model['name']}, " if len(shown["models"]) > 1 else ""


def _loss(found):
    shown, panels = found["inputs"][0], []
    known = [{name: v for name, v in model["groups"].items() if v["examples"]} for model in shown["models"]]
    largest = max(group["loss"] for groups in known for group in groups.values())  # one scale for both models
    for model, groups in zip(shown["models"], known):
        parts = {name: (group["inter"], group["intra"]) for name, group in groups.items()}
        panels.append(split_bars(model["name"], parts, "cross-entropy, nats", largest))
    text = (
        "The loss of an example of class y in group G splits exactly: −log p(y) = −log p(G) − log p(y | G). The first "
        "part is what the wrong group costs (inter), the second the wrong class within it (intra). Means over the "
        f"examples of each group, on {html.escape(shown['title'])}."
    )
    figure = f'{_key("about the group", "about the class within it")}<figure class="panels">{"".join(panels)}</figure>'
    table = writers.as_html(summary.loss_table(found))
    return f"<h2>Wrong group, or wrong class within it</h2>{_small(text)}{figure}{table}"


def _key(inter, intra):
    return figures.key([inter, intra], {inter: (_INTER, figures.SOLID), intra: (_INTRA, figures.SOLID)})


def _divergence(found):
    panels = []
    for temperature, by_group in (found["inputs"][0].get("divergence") or {}).items():
        parts = {name: (v["inter"], sum(v["intra"].values())) for name, v in by_group.items() if v}
        panels.append(split_bars(f"τ = {temperature}", parts, "KL, nats", max(map(sum, parts.values()))))
    if not panels:
        return ""
    text = (
        f"{html.escape(summary.between(found))}. KL = inter + Σ intra, exactly; it is the loss by which the first "
        "would teach the second, without the factor τ²."
    )
    figure = f'{_key("between the groups", "within them")}<figure class="panels">{"".join(panels)}</figure>'
    table = writers.as_html(summary.divergence_table(found))
    return f"<h2>Between the two models</h2>{_small(text)}{figure}{table}"


def _calibration(found):
    panels = []
    for model in found["inputs"][0]["models"]:
        for name in found["groups"]["names"]:
            group = model["groups"][name]
            if group["examples"]:
                panels.append(reliability(f"{_of(model, found['inputs'][0])}{name}", group["bins"]))
    text = (
        "Dots: the accuracy of the predictions of one confidence, with a 95 % interval; below the diagonal the model "
        f"is over-confident. Hollow: fewer than {SMALL} examples, which say little. Bars: how the examples are spread. "
        "The groups are those of the true class, which a user of the model does not know."
    )
    rest = (
        "Over: mean confidence less accuracy, in points. ECE: expected calibration error in 15 bins of the same width, "
        f"in points; {summary.BY_CHANCE}, so an ECE of about that is no sign of a fault."
    )
    figure = f'<figure class="panels">{"".join(panels)}</figure>'
    table = writers.as_html(summary.calibration_table(found))
    return f"<h2>Calibration by group</h2>{_small(text)}{figure}{table}{_small(rest)}"


def _classes(found):
    classes = found["inputs"][0]["models"][0]["classes"]
    counts, assignment = np.array(found["class_counts"]), np.array(found["groups"]["assignment"])
    order = np.argsort(-counts, kind="stable")
    order = order[np.argsort(assignment[order], kind="stable")]
    ratios = np.array([summary.due(classes, c) if classes["examples"][c] else np.nan for c in order])
    told_of = [f"{found['class_names'][c]}, {counts[c]:,g} training images" for c in order]
    drawn = [
        due_by_class(ratios, counts[order], assignment[order], found["groups"]["names"], told_of, width=width)
        for width in (figures.DESK, figures.PHONE)
    ]
    text = (
        "Due: the class’s share of the examples. Mass ÷ due: the probability that it gets over all examples, over "
        "that; below 1 the model gives it away. Predicted ÷ due: the same of its predictions. Own mass: what its own "
        "examples give to it; next class: where most of the rest goes. Sorted by the mass that is lost."
    )
    full = ""
    if len(classes["examples"]) > summary.WORST:
        number = len(classes["examples"])
        full = (
            f"<details><summary>All {number:,} classes</summary>{writers.as_html(summary.class_table(found))}</details>"
        )
    figure = f'<figure><div class="wide">{drawn[0]}</div><div class="narrow">{drawn[1]}</div></figure>'
    name = html.escape(found["inputs"][0]["models"][0]["name"])
    table = writers.as_html(summary.class_table(found, summary.WORST))
    return f"<h2>Which classes {name} gives away</h2>{_small(text)}{figure}{table}{full}"


def _between_groups(found):
    names, models = found["groups"]["names"], found["inputs"][0]["models"]
    matrices = {what: matrix for model in models for what, matrix in summary.confusions(found, model).items()}
    if all(all(matrix) for matrix in matrices.values()):
        maps = "".join(figures.heat_map(what, matrix, names) for what, matrix in matrices.items())
        shown = f'<div class="maps">{maps}</div>'
    else:  # a group has no example
        shown = writers.as_html(summary.confusion_table(found))
    text = "Rows: the group of the true class. Columns: where its predictions, and its mass, go; percent of the row."
    return f"<h2>Confusion between groups</h2>{_small(text)}{shown}"
