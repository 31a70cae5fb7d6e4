"""What an audit found, as sentences and tables.

`found` is what `audit.audit` returns, and what `audit.json` holds.
"""

import numpy as np

from experiments.reporting import writers

WORST = 15  # classes that are shown at once
FAIR = 0.02  # of the mass: what is nearer than this to the share of the input is called fair
BY_CHANCE = "by chance: the ECE that a calibrated model would show on so few examples"

# In words.


def headline(found) -> str:
    """The audit in plain words: of the first input, and of its last group."""
    shown = found["inputs"][0]
    first, last = shown["models"][0], found["groups"]["names"][-1]
    said = [_mass_said(found, shown, first)]
    tail = first["groups"][last]
    if tail["examples"]:
        if tail["loss"] > 1e-6:
            said.append(
                f"{100 * tail['inter'] / tail['loss']:.0f} % of the loss on {_these(last)} is about the group, the "
                "rest about the class within it."
            )
        said.append(
            f"On {_these(last)} it is {tail['confidence']:.0f} % confident on average, and right in "
            f"{tail['accuracy']:.0f} %."
        )
    said += [_class_said(found, first), *_against_said(found, shown)]
    return " ".join(filter(None, said))


def _these(name):
    return f"classes of {name}" if name.startswith("group ") else f"{name} classes"


def _mass_said(found, shown, model):
    fair, (plain, *soft) = shown["share"], found["temperatures"]
    mass = model["mass"][plain]
    off = sorted(mass, key=lambda name: mass[name] - fair[name])
    least, most = off[0], off[-1]
    if max(mass[most] - fair[most], fair[least] - mass[least]) < FAIR:
        return f"On {shown['title']}, {model['name']} gives every group its share of mass, to within {FAIR}."
    said = (
        f"On {shown['title']}, {model['name']} gives {_these(most)} {mass[most]:.2f} of its mass where "
        f"{fair[most]:.2f} is fair, and {_these(least)} {mass[least]:.2f} where {fair[least]:.2f} is"
    )
    if soft:
        taught = model["mass"][soft[0]]
        said += f"; at temperature {soft[0]}, as a student is taught, {taught[most]:.2f} and {taught[least]:.2f}"
    return f"{said}."


def _class_said(found, model):
    order = _by_loss(model["classes"])
    if not order or due(model["classes"], order[0]) > 1 - FAIR:
        return ""
    worst, classes = order[0], model["classes"]
    to, part = _name(found, classes["to"][worst]), classes["to_mass"][worst]
    return (
        f"Class {_name(found, worst)} gives away most: it gets {due(classes, worst):.2f} of the mass that is its due, "
        f"and its own examples give {part:.2f} to class {to}."
    )


def _against_said(found, shown):
    if not shown.get("divergence"):
        return
    temperature = found["temperatures"][-1]
    parts = shown["divergence"][temperature]["all"]
    names = [model["name"] for model in shown["models"]]
    part = f", {100 * parts['inter'] / parts['kl']:.0f} % of it between the groups" if parts["kl"] > 1e-6 else ""
    yield f"At temperature {temperature} the KL from {names[0]} to {names[1]} is {parts['kl']:.3f}{part}."


def notes(found) -> str:
    """What was audited, and where the groups come from."""
    sizes = [f"{name} ({found['groups']['assignment'].count(g)})" for g, name in enumerate(found["groups"]["names"])]
    told = [f"{shown['title'].capitalize()}: {shown['is']}." for shown in found["inputs"]]
    told.append(f"Groups of classes by training images of each, {found['counts_from']}: {', '.join(sizes)}.")
    return " ".join(told)


def _name(found, c):
    return found["class_names"][c]


def due(classes, c):
    return classes["mass"][c] / classes["share"][c]


def _by_loss(classes):
    """Classes with examples, by the mass that they lose of what is their due; the largest loss first."""
    lost = np.subtract(classes["share"], classes["mass"])
    return [int(c) for c in np.argsort(-lost, kind="stable") if classes["examples"][c]]


# Tables.


def mass_table(found) -> writers.Table:
    """The mass of each group, beside the shares of the input and of the training images."""
    names, rows = found["groups"]["names"], []
    for shown in found["inputs"]:
        rows.append(
            [shown["title"], writers.Cell("true share", quiet=True), *_cells(shown["share"], names, quiet=True)]
        )
        for model in shown["models"]:
            for temperature, mass in model["mass"].items():
                rows.append([shown["title"], f"{model['name']}, τ = {temperature}", *_cells(mass, names)])
    rows.append(["training images", writers.Cell("share", quiet=True), *_cells(found["training"], names, quiet=True)])
    return writers.Table(["input", "mass of", *names], rows, left=2)


def _cells(values, names, *, quiet=False):
    return [writers.Cell(f"{values[name]:.3f}", quiet=quiet) for name in names]


def _group_table(found, header, columns) -> writers.Table:
    """A row for each model and group of the first input, and for all; "–" where there is no example."""
    models, rows = found["inputs"][0]["models"], []
    several = len(models) > 1
    for model in models:
        for name, group in model["groups"].items():
            known = columns(group) if group["examples"] else ["–"] * len(header)
            rows.append([*([model["name"]] if several else []), name, f"{group['examples']:,}", *known])
    whose = ["model", "true class in"] if several else ["true class in"]
    return writers.Table([*whose, "examples", *header], rows, left=len(whose))


def loss_table(found) -> writers.Table:
    """The cross-entropy of each group's examples, in the part for the wrong group and that for the wrong class."""

    def columns(group):
        part = f"{100 * group['inter'] / group['loss']:.0f} %" if group["loss"] > 1e-6 else "–"
        return [*(f"{group[key]:.3f}" for key in ("loss", "inter", "intra")), part]

    return _group_table(found, ["loss", "group (inter)", "class in it (intra)", "about the group"], columns)


def calibration_table(found) -> writers.Table:
    """Confidence against accuracy by group, and the calibration error beside what chance alone would give."""

    def columns(group):
        over = f"{group['confidence'] - group['accuracy']:+.1f}".replace("-", "−")
        shown = [f"{group[key]:.1f}" for key in ("accuracy", "confidence")]
        return [*shown, over, *(f"{group[key]:.1f}" for key in ("ece", "ece_by_chance"))]

    return _group_table(found, ["accuracy %", "confidence %", "over", "ECE", "by chance"], columns)


def divergence_table(found) -> writers.Table:
    """The KL between the two models by group of the true class, in inter and intra parts."""
    names, rows = found["groups"]["names"], []
    for temperature, by_group in found["inputs"][0]["divergence"].items():
        for name in [*names, "all"]:
            parts = by_group[name]
            cells = ["–"] * (2 + len(names))
            if parts:
                cells = [f"{v:.4f}" for v in (parts["kl"], parts["inter"], *(parts["intra"][n] for n in names))]
            rows.append([f"τ = {temperature}", name, *cells])
    header = ["", "true class in", "KL", "inter", *(f"intra {name}" for name in names)]
    return writers.Table(header, rows, left=2)


def confusion_table(found) -> writers.Table:
    """Where the predictions and the mass of each group's examples go, in percent."""
    names, rows = found["groups"]["names"], []
    for model in found["inputs"][0]["models"]:
        for what, matrix in confusions(found, model).items():
            for name, row in zip(names, matrix):
                rows.append([what, name, *([f"{value:.1f}" for value in row] if row else ["–"] * len(names))])
    return writers.Table(["percent of", "true class in", *names], rows, left=2)


def confusions(found, model) -> dict:
    """{what: percent of each group's, by group}; None for a group without an example."""
    mass = model["mass_by_group"][found["temperatures"][0]]
    return {
        f"predictions of {model['name']}": model["between"],
        f"mass of {model['name']}": [row and [100 * value for value in row] for row in mass],
    }


def class_table(found, most: int | None = None) -> writers.Table:
    """The first model's classes, those first that give away the most of their due."""
    classes, names = found["inputs"][0]["models"][0]["classes"], found["groups"]["names"]
    order = _by_loss(classes)
    if most is None:
        order += [c for c, examples in enumerate(classes["examples"]) if not examples]
    rows = []
    for c in order[:most]:
        group = names[found["groups"]["assignment"][c]]
        told = [_name(found, c), group, f"{found['class_counts'][c]:,g}", f"{classes['examples'][c]:,}"]
        if not classes["examples"][c]:
            rows.append([*told, *["–"] * 6])
            continue
        to_groups = np.array(classes["to_groups"][c])
        to = int(to_groups.argmax())
        rows.append(
            [
                *told,
                f"{classes['recall'][c]:.0f}",
                f"{classes['predicted'][c] / classes['share'][c]:.2f}",
                f"{due(classes, c):.2f}",
                f"{classes['own'][c]:.2f}",
                writers.Cell(f"→ {_name(found, classes['to'][c])}", f"{classes['to_mass'][c]:.2f}"),
                writers.Cell(names[to], f"{to_groups[to]:.2f}"),
            ]
        )
    header = ["class", "group", "trained on", "examples", "right %", "predicted ÷ due", "mass ÷ due", "own mass",
              "next class", "group with most"]  # fmt: skip
    return writers.Table(header, rows, left=2)


def console(found) -> str:
    """The audit for a terminal."""
    parts = [found["name"], headline(found), notes(found), "", "Group mass", writers.as_text(mass_table(found))]
    parts += ["", "Loss in nats: wrong group, or wrong class within it", writers.as_text(loss_table(found))]
    if found["inputs"][0].get("divergence"):
        parts += ["", between(found), writers.as_text(divergence_table(found))]
    parts += ["", f"Calibration by group ({BY_CHANCE})", writers.as_text(calibration_table(found))]
    parts += ["", "Confusion between groups", writers.as_text(confusion_table(found))]
    worst = class_table(found, WORST)
    parts += ["", f"The {len(worst.rows)} classes that give away most", writers.as_text(worst)]
    return "\n".join(parts)


def between(found):
    names = [model["name"] for model in found["inputs"][0]["models"]]
    return f"KL from {names[0]} to {names[1]} in nats, between groups (inter) and within each (intra · its mass)"
