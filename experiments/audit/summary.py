"""Writes an audit as sentences and tables; `record` is what `run.build_record` returns, and `audit.json` holds."""

import numpy as np

from experiments.reporting import writers

WORST = 15  # classes that are listed at once
FAIR = 0.02  # a mass that is nearer than this to the share of the input is called fair
BY_CHANCE = "by chance: the ECE that a calibrated model would show on so few examples"
_NEGLIGIBLE = 1e-6  # nats, of which no percentage is taken

# Sentences.


def headline(record) -> str:
    """Returns the audit in words: the first input, and the examples of its last group."""
    input_set = record["inputs"][0]
    model = input_set["models"][0]
    sentences = [
        _mass_sentence(record, input_set, model),
        *_tail_sentences(record, model),
        _class_sentence(record, model),
        _divergence_sentence(record, input_set),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _classes_of(group_name):
    return (
        f"classes of {group_name}"
        if group_name.startswith("group ")
        else f"{group_name} classes"
    )


def _mass_sentence(record, input_set, model):
    share = input_set["share"]
    plain, *soft = record["temperatures"]
    mass = model["mass"][plain]
    by_excess = sorted(mass, key=lambda name: mass[name] - share[name])
    least, most = by_excess[0], by_excess[-1]
    if max(mass[most] - share[most], share[least] - mass[least]) < FAIR:
        return f"On {input_set['title']}, {model['name']} gives every group its share of mass, to within {FAIR}."
    sentence = (
        f"On {input_set['title']}, {model['name']} gives {_classes_of(most)} {mass[most]:.2f} of its mass where "
        f"{share[most]:.2f} is fair, and {_classes_of(least)} {mass[least]:.2f} where {share[least]:.2f} is"
    )
    if soft:
        softened = model["mass"][soft[0]]
        sentence += f"; at temperature {soft[0]}, as a student is taught, {softened[most]:.2f} and {softened[least]:.2f}"
    return f"{sentence}."


def _tail_sentences(record, model):
    name = record["groups"]["names"][-1]
    tail = model["groups"][name]
    if not tail["examples"]:
        return
    if tail["loss"] > _NEGLIGIBLE:
        part = f"{100 * tail['inter'] / tail['loss']:.0f} % of the loss on {_classes_of(name)}"
        yield f"{part} is about the group, the rest about the class within it."
    yield (
        f"On {_classes_of(name)} it is {tail['confidence']:.0f} % confident on average, and right in "
        f"{tail['accuracy']:.0f} %."
    )


def _class_sentence(record, model):
    classes = model["classes"]
    order = _by_loss(classes)
    if not order or mass_ratio(classes, order[0]) > 1 - FAIR:
        return ""
    worst = order[0]
    names = record["class_names"]
    return (
        f"Class {names[worst]} gives away most: it gets {mass_ratio(classes, worst):.2f} of the mass that is its due, "
        f"and its own examples give {classes['to_mass'][worst]:.2f} to class {names[classes['to'][worst]]}."
    )


def _divergence_sentence(record, input_set):
    if "divergence" not in input_set:
        return ""
    temperature = record["temperatures"][-1]
    parts = input_set["divergence"][temperature]["all"]
    first, second = (model["name"] for model in input_set["models"])
    percent = ""
    if parts["kl"] > _NEGLIGIBLE:
        percent = (
            f", {100 * parts['inter'] / parts['kl']:.0f} % of it between the groups"
        )
    return f"At temperature {temperature} the KL from {first} to {second} is {parts['kl']:.3f}{percent}."


def notes(record) -> str:
    """Returns what was audited, and where the groups come from."""
    groups = record["groups"]
    sizes = [
        f"{name} ({groups['assignment'].count(g)})"
        for g, name in enumerate(groups["names"])
    ]
    sentences = [
        f"{input_set['title'].capitalize()}: {input_set['is']}."
        for input_set in record["inputs"]
    ]
    sentences.append(
        f"Groups of classes by training images of each, {record['counts_from']}: {', '.join(sizes)}."
    )
    return " ".join(sentences)


def mass_ratio(classes, c) -> float:
    """Returns the mass of class c over its share of the examples, "mass ÷ due"."""
    return classes["mass"][c] / classes["share"][c]


def _by_loss(classes):
    """Returns the classes with examples, sorted by how much mass they lose; the largest loss first."""
    lost = np.subtract(classes["share"], classes["mass"])
    return [int(c) for c in np.argsort(-lost, kind="stable") if classes["examples"][c]]


# Tables.


def mass_table(record) -> writers.Table:
    """Returns the mass of each group, beside the shares of the input and of the training images."""
    names = record["groups"]["names"]
    rows = []
    for input_set in record["inputs"]:
        title = input_set["title"]
        rows.append(
            [
                title,
                writers.Cell("true share", quiet=True),
                *_mass_cells(input_set["share"], names, True),
            ]
        )
        for model in input_set["models"]:
            for temperature, mass in model["mass"].items():
                rows.append(
                    [
                        title,
                        f"{model['name']}, τ = {temperature}",
                        *_mass_cells(mass, names),
                    ]
                )
    share = writers.Cell("share", quiet=True)
    rows.append(
        ["training images", share, *_mass_cells(record["training"], names, True)]
    )
    return writers.Table(["input", "mass of", *names], rows, left=2)


def _mass_cells(mass, names, quiet=False):
    return [writers.Cell(f"{mass[name]:.3f}", quiet=quiet) for name in names]


def _group_table(record, header, columns) -> writers.Table:
    """Returns a row for each model and group of the first input, and for all; "–" where there is no example."""
    models = record["inputs"][0]["models"]
    several = len(models) > 1
    rows = []
    for model in models:
        for name, group in model["groups"].items():
            cells = columns(group) if group["examples"] else ["–"] * len(header)
            rows.append(
                [
                    *([model["name"]] if several else []),
                    name,
                    f"{group['examples']:,}",
                    *cells,
                ]
            )
    words = ["model", "true class in"] if several else ["true class in"]
    return writers.Table([*words, "examples", *header], rows, left=len(words))


def loss_table(record) -> writers.Table:
    """Returns the cross-entropy by group, with its parts for the wrong group and for the wrong class."""

    def columns(group):
        percent = (
            f"{100 * group['inter'] / group['loss']:.0f} %"
            if group["loss"] > _NEGLIGIBLE
            else "–"
        )
        return [*(f"{group[key]:.3f}" for key in ("loss", "inter", "intra")), percent]

    return _group_table(
        record,
        ["loss", "group (inter)", "class in it (intra)", "about the group"],
        columns,
    )


def calibration_table(record) -> writers.Table:
    """Returns confidence and accuracy by group, and the calibration error beside what chance alone would give."""

    def columns(group):
        over = f"{group['confidence'] - group['accuracy']:+.1f}".replace("-", "−")
        accuracy, confidence, ece, ece_by_chance = (
            f"{group[key]:.1f}"
            for key in ("accuracy", "confidence", "ece", "ece_by_chance")
        )
        return [accuracy, confidence, over, ece, ece_by_chance]

    return _group_table(
        record, ["accuracy %", "confidence %", "over", "ECE", "by chance"], columns
    )


def divergence_title(record) -> str:
    """Returns what `divergence_table` shows."""
    first, second = (model["name"] for model in record["inputs"][0]["models"])
    return f"KL from {first} to {second} in nats, between groups (inter) and within each (intra · its mass)"


def divergence_table(record) -> writers.Table:
    """Returns the KL between the two models by group of the true class, in inter and intra parts."""
    names = record["groups"]["names"]
    rows = []
    for temperature, by_group in record["inputs"][0]["divergence"].items():
        for name in [*names, "all"]:
            cells = ["–"] * (2 + len(names))
            parts = by_group[name]
            if parts:
                values = [
                    parts["kl"],
                    parts["inter"],
                    *(parts["intra"][group] for group in names),
                ]
                cells = [f"{value:.4f}" for value in values]
            rows.append([f"τ = {temperature}", name, *cells])
    header = ["", "true class in", "KL", "inter", *(f"intra {name}" for name in names)]
    return writers.Table(header, rows, left=2)


def confusions(record) -> dict:
    """Returns {title: percent of each group's predictions or mass by group}; None for a group without examples."""
    plain = record["temperatures"][0]
    matrices = {}
    for model in record["inputs"][0]["models"]:
        mass = model["mass_by_group"][plain]
        matrices[f"predictions of {model['name']}"] = model["between"]
        matrices[f"mass of {model['name']}"] = [
            row and [100 * value for value in row] for row in mass
        ]
    return matrices


def confusion_table(record) -> writers.Table:
    """Returns where the predictions and the mass of each group's examples go, in percent."""
    names = record["groups"]["names"]
    rows = []
    for title, matrix in confusions(record).items():
        for name, row in zip(names, matrix):
            rows.append(
                [
                    title,
                    name,
                    *([f"{value:.1f}" for value in row] if row else ["–"] * len(names)),
                ]
            )
    return writers.Table(["percent of", "true class in", *names], rows, left=2)


def class_table(record, most: int | None = None) -> writers.Table:
    """Returns the first model's classes, those first that lose most mass; all of them, or so many."""
    classes = record["inputs"][0]["models"][0]["classes"]
    names = record["groups"]["names"]
    order = _by_loss(classes)
    if most is None:
        order += [c for c, examples in enumerate(classes["examples"]) if not examples]
    rows = []
    for c in order[:most]:
        group = names[record["groups"]["assignment"][c]]
        counts = [f"{record['class_counts'][c]:,g}", f"{classes['examples'][c]:,}"]
        cells = (
            _class_cells(record, classes, c) if classes["examples"][c] else ["–"] * 6
        )
        rows.append([record["class_names"][c], group, *counts, *cells])
    header = ["class", "group", "trained on", "examples", "right %", "predicted ÷ due", "mass ÷ due", "own mass",
              "next class", "group with most"]  # fmt: skip
    return writers.Table(header, rows, left=2)


def _class_cells(record, classes, c):
    to_groups = classes["to_groups"][c]
    group = int(np.argmax(to_groups))
    return [
        f"{classes['recall'][c]:.0f}",
        f"{classes['predicted'][c] / classes['share'][c]:.2f}",
        f"{mass_ratio(classes, c):.2f}",
        f"{classes['own'][c]:.2f}",
        writers.Cell(
            f"→ {record['class_names'][classes['to'][c]]}",
            f"{classes['to_mass'][c]:.2f}",
        ),
        writers.Cell(record["groups"]["names"][group], f"{to_groups[group]:.2f}"),
    ]


def console(record) -> str:
    """Returns the audit for a terminal."""
    tables = {
        "Group mass": mass_table(record),
        "Loss in nats: wrong group, or wrong class within it": loss_table(record),
    }
    if "divergence" in record["inputs"][0]:
        tables[divergence_title(record)] = divergence_table(record)
    tables[f"Calibration by group ({BY_CHANCE})"] = calibration_table(record)
    tables["Confusion between groups"] = confusion_table(record)
    worst = class_table(record, WORST)
    tables[f"The {len(worst.rows)} classes that give away most"] = worst
    parts = [f"{title}\n{writers.as_text(table)}" for title, table in tables.items()]
    return "\n\n".join(
        [f"{record['name']}\n{headline(record)}\n{notes(record)}", *parts]
    )
