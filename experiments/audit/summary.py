"""Writes an audit as sentences and tables.

`record` is what `run.build_record` returns, and what `audit.json` holds.
"""

import numpy as np

from experiments.reporting import writers

# How many of the classes that lose most mass are listed.
NUM_LISTED = 15
# A mass is called fair if it is nearer than this to the share of the examples.
FAIR = 0.02
BY_CHANCE = "by chance: the ECE that a calibrated model would show on so few examples"
# Of a loss or KL below this, in nats, no percentage is computed.
_NEGLIGIBLE = 1e-6

# Sentences.


def headline(record) -> str:
    """Returns the audit in words.

    The sentences are about the first input, and mostly about the first model.
    """
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
    # Groups without names are called "group 0", "group 1", …
    if group_name.startswith("group "):
        return f"classes of {group_name}"
    return f"{group_name} classes"


def _mass_sentence(record, input_set, model):
    """Returns a sentence on which group gets too much mass, and which too little."""
    share = input_set["share"]
    plain_temperature, *other_temperatures = record["temperatures"]
    mass = model["mass"][plain_temperature]
    by_excess = sorted(mass, key=lambda name: mass[name] - share[name])
    least = by_excess[0]
    most = by_excess[-1]
    if max(mass[most] - share[most], share[least] - mass[least]) < FAIR:
        return (
            f"On {input_set['title']}, {model['name']} gives every group its share of "
            f"mass, to within {FAIR}."
        )
    sentence = (
        f"On {input_set['title']}, {model['name']} gives {_classes_of(most)} "
        f"{mass[most]:.2f} of its mass where {share[most]:.2f} is fair, and "
        f"{_classes_of(least)} {mass[least]:.2f} where {share[least]:.2f} is fair"
    )
    if other_temperatures:
        temperature = other_temperatures[0]
        softened = model["mass"][temperature]
        sentence += (
            f"; at the distillation temperature {temperature}, "
            f"{softened[most]:.2f} and {softened[least]:.2f}"
        )
    return f"{sentence}."


def _tail_sentences(record, model):
    """Yields sentences on the loss and the calibration on the last group."""
    name = record["groups"]["names"][-1]
    tail = model["groups"][name]
    if not tail["examples"]:
        return
    if tail["loss"] > _NEGLIGIBLE:
        percent = 100 * tail["inter"] / tail["loss"]
        yield (
            f"Of the loss on {_classes_of(name)}, {percent:.0f} % is about the group, "
            "and the rest about the class within it."
        )
    yield (
        f"On {_classes_of(name)} the mean confidence is {tail['confidence']:.0f} %, "
        f"and the accuracy {tail['accuracy']:.0f} %."
    )


def _class_sentence(record, model):
    """Returns a sentence on the class that loses most mass, "" if none does."""
    classes = model["classes"]
    order = _by_lost_mass(classes)
    if not order or mass_ratio(classes, order[0]) > 1 - FAIR:
        return ""
    worst = order[0]
    names = record["class_names"]
    return (
        f"Class {names[worst]} loses most: it gets {mass_ratio(classes, worst):.2f} "
        "times its share of the mass, and its own examples give "
        f"{classes['to_mass'][worst]:.2f} to class {names[classes['to'][worst]]}."
    )


def _divergence_sentence(record, input_set):
    """Returns a sentence on the KL between two models, "" for a single one."""
    if "divergence" not in input_set:
        return ""
    temperature = record["temperatures"][-1]
    divergence = input_set["divergence"][temperature]["all"]
    first, second = (model["name"] for model in input_set["models"])
    sentence = (
        f"At temperature {temperature} the KL from {first} to {second} is "
        f"{divergence['kl']:.3f}"
    )
    if divergence["kl"] > _NEGLIGIBLE:
        percent = 100 * divergence["inter"] / divergence["kl"]
        sentence += f", {percent:.0f} % of it between the groups"
    return f"{sentence}."


def notes(record) -> str:
    """Returns what was audited, and where the groups come from."""
    sentences = []
    for input_set in record["inputs"]:
        sentences.append(f"{input_set['title'].capitalize()}: {input_set['is']}.")
    groups = record["groups"]
    sizes = []
    for group, name in enumerate(groups["names"]):
        sizes.append(f"{name} ({groups['assignment'].count(group)})")
    sentences.append(
        f"Groups of classes by training images of each, {record['counts_from']}: "
        f"{', '.join(sizes)}."
    )
    return " ".join(sentences)


def mass_ratio(classes, c) -> float:
    """Returns the mass of class c over its share of the examples."""
    return classes["mass"][c] / classes["share"][c]


def _by_lost_mass(classes):
    """Returns the classes that have examples, those that lose most mass first."""
    # Stable: classes that lose the same mass keep the order of their indices.
    lost = np.subtract(classes["share"], classes["mass"])
    order = np.argsort(-lost, kind="stable")
    return [int(c) for c in order if classes["examples"][c]]


# Tables.


def mass_table(record) -> writers.Table:
    """Returns the table of the mass of each group, beside the true shares."""
    names = record["groups"]["names"]
    rows = []
    for input_set in record["inputs"]:
        title = input_set["title"]
        true_share = writers.Cell("true share", quiet=True)
        cells = _mass_cells(input_set["share"], names, quiet=True)
        rows.append([title, true_share, *cells])
        for model in input_set["models"]:
            for temperature, mass in model["mass"].items():
                label = f"{model['name']}, τ = {temperature}"
                rows.append([title, label, *_mass_cells(mass, names)])
    share = writers.Cell("share", quiet=True)
    cells = _mass_cells(record["training"], names, quiet=True)
    rows.append(["training images", share, *cells])
    return writers.Table(["input", "mass of", *names], rows, num_text_columns=2)


def _mass_cells(mass, names, quiet=False):
    return [writers.Cell(f"{mass[name]:.3f}", quiet=quiet) for name in names]


def _group_table(record, header, cells_of) -> writers.Table:
    """Returns a table with a row for each model and group of the first input.

    Args:
      record: the audit.
      header: of the columns with numbers.
      cells_of: a function that returns the cells of a group's numbers. It is not called
        for a group without examples, whose cells are "–".
    """
    models = record["inputs"][0]["models"]
    text_header = ["true class in"]
    if len(models) > 1:
        text_header.insert(0, "model")
    rows = []
    for model in models:
        for name, group in model["groups"].items():
            row = [model["name"]] if len(models) > 1 else []
            row += [name, f"{group['examples']:,}"]
            row += cells_of(group) if group["examples"] else ["–"] * len(header)
            rows.append(row)
    return writers.Table(
        [*text_header, "examples", *header], rows, num_text_columns=len(text_header)
    )


def loss_table(record) -> writers.Table:
    """Returns the table of cross-entropy by group, split by `losses.group_kl`."""

    def cells_of(group):
        percent = "–"
        if group["loss"] > _NEGLIGIBLE:
            percent = f"{100 * group['inter'] / group['loss']:.0f} %"
        return [*(f"{group[key]:.3f}" for key in ("loss", "inter", "intra")), percent]

    header = ["loss", "group (inter)", "class in it (intra)", "about the group"]
    return _group_table(record, header, cells_of)


def calibration_table(record) -> writers.Table:
    """Returns the table of confidence, accuracy and calibration error by group."""

    def cells_of(group):
        over = writers.signed(group["confidence"] - group["accuracy"], decimals=1)
        return [
            f"{group['accuracy']:.1f}",
            f"{group['confidence']:.1f}",
            over,
            f"{group['ece']:.1f}",
            f"{group['ece_by_chance']:.1f}",
        ]

    header = ["accuracy %", "confidence %", "over", "ECE", "by chance"]
    return _group_table(record, header, cells_of)


def divergence_title(record) -> str:
    """Returns the title of `divergence_table`."""
    first, second = (model["name"] for model in record["inputs"][0]["models"])
    return (
        f"KL from {first} to {second} in nats, between groups (inter) and within each "
        "(intra · its mass)"
    )


def divergence_table(record) -> writers.Table:
    """Returns the table of the KL between two models, by group of the true class."""
    names = record["groups"]["names"]
    rows = []
    for temperature, by_group in record["inputs"][0]["divergence"].items():
        for name in [*names, "all"]:
            divergence = by_group[name]
            cells = ["–"] * (2 + len(names))
            if divergence:
                intra = [divergence["intra"][group] for group in names]
                values = [divergence["kl"], divergence["inter"], *intra]
                cells = [f"{value:.4f}" for value in values]
            rows.append([f"τ = {temperature}", name, *cells])
    header = ["", "true class in", "KL", "inter", *(f"intra {name}" for name in names)]
    return writers.Table(header, rows, num_text_columns=2)


def confusion_matrices(record) -> dict:
    """Returns {title: matrix of percent} of each model's predictions and mass.

    A row is the group of the true class, and None if it has no examples.
    """
    plain_temperature = record["temperatures"][0]
    matrices = {}
    for model in record["inputs"][0]["models"]:
        mass = model["mass_by_group"][plain_temperature]
        matrices[f"predictions of {model['name']}"] = model["between"]
        matrices[f"mass of {model['name']}"] = [_percent(row) for row in mass]
    return matrices


def _percent(row):
    return None if row is None else [100 * value for value in row]


def confusion_table(record) -> writers.Table:
    """Returns the table of `confusion_matrices`."""
    names = record["groups"]["names"]
    rows = []
    for title, matrix in confusion_matrices(record).items():
        for name, row in zip(names, matrix):
            cells = [f"{value:.1f}" for value in row] if row else ["–"] * len(names)
            rows.append([title, name, *cells])
    header = ["percent of", "true class in", *names]
    return writers.Table(header, rows, num_text_columns=2)


def class_table(record, limit: int | None = None) -> writers.Table:
    """Returns the table of the first model's classes.

    Those that lose most mass are first, and those without examples last.

    Args:
      record: the audit.
      limit: how many classes are listed, all of them by default. With a limit, classes
        without examples are left out.
    """
    classes = record["inputs"][0]["models"][0]["classes"]
    group_names = record["groups"]["names"]
    order = _by_lost_mass(classes)
    if limit is None:
        order += [c for c, number in enumerate(classes["examples"]) if not number]
    rows = []
    for c in order[:limit]:
        group = group_names[record["groups"]["assignment"][c]]
        row = [
            record["class_names"][c],
            group,
            f"{record['class_counts'][c]:,g}",
            f"{classes['examples'][c]:,}",
        ]
        has_examples = classes["examples"][c] > 0
        # `_class_cells` returns six cells.
        row += _class_cells(record, classes, c) if has_examples else ["–"] * 6
        rows.append(row)
    header = [
        "class",
        "group",
        "training images",
        "examples",
        "recall %",
        "predicted ÷ share",
        "mass ÷ share",
        "own mass",
        "largest other class",
        "group with most",
    ]
    return writers.Table(header, rows, num_text_columns=2)


def _class_cells(record, classes, c):
    """Returns the cells of a class from "recall %" on."""
    other_class = record["class_names"][classes["to"][c]]
    to_groups = classes["to_groups"][c]
    group = int(np.argmax(to_groups))
    group_name = record["groups"]["names"][group]
    return [
        f"{classes['recall'][c]:.0f}",
        f"{classes['predicted'][c] / classes['share'][c]:.2f}",
        f"{mass_ratio(classes, c):.2f}",
        f"{classes['own'][c]:.2f}",
        writers.Cell(f"→ {other_class}", f"{classes['to_mass'][c]:.2f}"),
        writers.Cell(group_name, f"{to_groups[group]:.2f}"),
    ]


def as_text(record) -> str:
    """Returns the audit for a terminal."""
    tables = {
        "Group mass": mass_table(record),
        "Loss in nats: wrong group, or wrong class within it": loss_table(record),
    }
    if "divergence" in record["inputs"][0]:
        tables[divergence_title(record)] = divergence_table(record)
    tables[f"Calibration by group ({BY_CHANCE})"] = calibration_table(record)
    tables["Confusion between groups"] = confusion_table(record)
    classes = class_table(record, NUM_LISTED)
    tables[f"The {len(classes.rows)} classes that lose most mass"] = classes
    blocks = [f"{record['name']}\n{headline(record)}\n{notes(record)}"]
    for title, table in tables.items():
        blocks.append(f"{title}\n{writers.as_text(table)}")
    return "\n\n".join(blocks)
