"""Tests of statistics against numbers worked out by hand, of the grouping of runs, and of tables and sentences."""

import copy
import json
import math

import pytest
from helpers.fabricated import fabricate, runs_of, sweep

from experiments.reporting import aggregate, figures, statistics, tables


def labels(runs):
    """Returns the labels of the methods of the only setting."""
    (setting,) = aggregate.gather(runs)
    return [method.label for method in setting.methods]


def rows_of(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.cells()}


# Statistics.


def test_mean_std():
    assert statistics.mean_std([1.0, 2.0, 6.0]) == (
        3.0,
        pytest.approx(math.sqrt(7)),
        3,
    )  # (4 + 1 + 9) / 2
    assert statistics.mean_std([5.0]) == (5.0, None, 1)
    assert statistics.mean_std([]) == (None, None, 0)


def test_paired_standard_error():
    # Differences 2, 3, 7: mean 4, sample variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3) = 1.5275.
    difference = statistics.paired(
        {0: 12.0, 1: 23.0, 2: 17.0}, {0: 10.0, 1: 20.0, 2: 10.0}
    )
    assert (difference.mean, difference.n, difference.verdict) == (4.0, 3, "better")
    assert difference.error == pytest.approx(1.5275, abs=1e-4)


@pytest.mark.parametrize(
    "candidate, reference, verdict",
    [
        ({0: 10.0, 1: 12.0}, {0: 9.0, 1: 10.0}, "better"),  # 1, 2: mean 1.5 > 2 · 0.5
        ({0: 9.0, 1: 10.0}, {0: 10.0, 1: 12.0}, "worse"),
        (
            {0: 11.0, 1: 13.0},
            {0: 10.0, 1: 10.0},
            "not distinguishable",
        ),  # 1, 3: mean 2 = 2 · 1, not above
        ({0: 50.0, 1: 10.0}, {0: 40.0, 1: 15.0}, "not distinguishable"),
        ({0: 90.0}, {0: 10.0}, "not distinguishable"),  # one seed
        ({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0}, "not distinguishable"),  # no shared seed
    ],
)
def test_verdict(candidate, reference, verdict):
    assert statistics.paired(candidate, reference).verdict == verdict


def test_verdict_lower_is_better():
    candidate, reference = {0: 5.0, 1: 6.0}, {0: 9.0, 1: 9.5}
    assert statistics.paired(candidate, reference).verdict == "worse"
    assert (
        statistics.paired(candidate, reference, lower_is_better=True).verdict
        == "better"
    )


def test_paired_ignores_seeds_of_only_one():
    difference = statistics.paired(
        {0: 1.0, 1: 5.0, 7: 99.0}, {1: 2.0, 0: 0.0, 8: -99.0}
    )
    assert (difference.n, difference.mean) == (2, 2.0)


# Grouping.


def test_gather_seeds_and_hyperparameters():
    runs = [fabricate("ltkd", seed) for seed in (0, 1)] + [
        fabricate("ltkd") for _ in range(3)
    ]
    for run, alpha in zip(runs[2:], (16.0, 0.5, 2.0)):
        run["config"]["method"]["alpha"] = alpha
    (setting,) = aggregate.gather(runs)
    methods = {method.label: len(method.runs) for method in setting.methods}
    # The rows are in the order of the numbers.
    assert list(methods.items()) == [
        (f"ltkd (alpha={a})", n) for a, n in (("0.5", 1), ("1", 2), ("2", 1), ("16", 1))
    ]


def test_gather_same_run_twice():
    run = fabricate("kd")
    moved = copy.deepcopy(run)
    moved["config"]["teacher"]["dir"] = "elsewhere"
    moved["config"]["eval_every"] = 1
    (setting,) = aggregate.gather([run, moved])
    assert [len(method.runs) for method in setting.methods] == [1]


def test_gather_splits_lengths_and_data():
    split = fabricate("kd")
    split["seeds"]["split"] = 1
    assert (
        len(
            aggregate.gather(
                [
                    fabricate("kd"),
                    split,
                    fabricate("kd", epochs=60),
                    fabricate("kd", classes=100),
                ]
            )
        )
        == 4
    )


def test_gather_subsets():
    drawn, whole, listed = (
        fabricate("kd"),
        fabricate("kd", class_counts=[40, 30, 16]),
        fabricate("kd"),
    )
    whole["config"]["data"]["subset"], listed["config"]["data"]["subset"] = (
        "all",
        "lists/long_tail.txt",
    )
    listed["content"]["subset"] = "0123456789ab"
    assert {setting.title for setting in aggregate.gather([drawn, whole, listed])} == {
        "cifar10, imbalance 100, resnet32x4 → resnet8x4",
        "cifar10 (all), imbalance 2.5, resnet32x4 → resnet8x4",
        "cifar10 (list 0123456789ab), imbalance 100, resnet32x4 → resnet8x4",
    }


def test_label_names_what_is_on():
    plain, cutout = fabricate("kd"), fabricate("kd")
    cutout["config"]["augment"] = {"policy": "none", "cutout": 16, "mixup": 0.0}
    assert labels([plain, cutout]) == ["kd", "kd (cutout=16)"]


def test_note_names_seeds_split_and_teachers():
    runs = runs_of({"kd": [40.0, 41.0]})
    assert "student seeds, one split (split seed 0)" in aggregate.gather(runs)[0].note()
    runs[0]["teacher"]["hash"] = "another"
    assert "2 teachers" in aggregate.gather(runs)[0].note()


def test_titles_are_distinct():
    settings = aggregate.gather(
        [
            fabricate("kd", epochs=240),
            fabricate("kd", epochs=60),
            fabricate("kd", classes=100),
        ]
    )
    assert aggregate.titles(settings) == [
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 60 epochs",
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 240 epochs",
        "cifar100, imbalance 100, resnet32x4 → resnet8x4",
    ]
    assert aggregate.distinctions(settings) == [
        "cifar10, 60 epochs",
        "cifar10, 240 epochs",
        "cifar100, 240 epochs",
    ]
    assert aggregate.distinctions(settings[:1]) == [""]


def test_styles_are_distinct():
    methods = [aggregate.Method(name, name, {}) for name in aggregate.ORDER]
    styles = figures.styles([*methods, aggregate.Method("ltkd", "ltkd (alpha=4)", {})])
    assert len({str(style) for style in styles.values()}) == len(styles)


# Tables and sentences.


def test_console_has_deviations_and_verdicts():
    text = tables.console(
        runs_of(
            {
                "ce": [30.0, 32.0, 31.0],
                "kd": [31.0, 31.5, 31.2],
                "ltkd": [40.0, 43.0, 41.0],
            }
        )
    )
    assert "41.33 ± 1.53" in text and "31.00 ± 1.00" in text
    assert "better than ce and kd" in text  # ltkd, by about 10
    assert (
        "+0.23 ± 0.43 not distinguishable n = 3" in text
    )  # kd against ce: 1, −0.5, 0.2


def test_console_of_one_seed():
    text = tables.console(runs_of({"ce": [30.0], "ltkd": [60.0]}))
    assert "no difference can be told from chance" in text
    assert "+30.00 not distinguishable n = 1" in text
    assert "±" not in text


@pytest.mark.parametrize(
    "accuracies, bold",
    [
        ({"ce": [30.0, 31.0], "ltkd": [40.0, 41.5]}, ["ltkd"]),
        ({"ce": [30.0, 40.0], "ltkd": [40.0, 31.0]}, []),
        ({"ltkd": [40.0, 41.0]}, []),
    ],
)
def test_bold_only_where_clear(accuracies, bold):
    (setting,) = aggregate.gather(runs_of(accuracies))
    assert [
        row[0].text for row in tables.accuracy_table(setting).cells() if row[1].bold
    ] == bold


def test_table_over_settings():
    (title, table), (tail_title, tail_table) = tables.over_settings(
        aggregate.gather(sweep())
    )
    assert title == "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4"
    assert tail_title.startswith("Accuracy on the tail")
    assert (
        table.header == tail_table.header == ["method", "imbalance 10", "imbalance 100"]
    )
    rows = {
        row[0].text: [(cell.text, cell.note, cell.bold) for cell in row[1:]]
        for row in table.cells()
    }
    assert list(rows) == ["teacher", "ce", "kd", "ltkd"]
    # Of 72 and 72.25, whose deviation is 0.25 / √2; better than the others, whose difference is 1 and 2.
    assert rows["ltkd"] == [("72.12", "± 0.18", True), ("62.12", "± 0.18", True)]
    assert rows["ce"] == [("70.12", "± 0.18", False), ("60.12", "± 0.18", False)]
    assert rows_of(tail_table)["ltkd"] == ["30.25", "30.25"]
    assert tables.over_settings(aggregate.gather(sweep((100,)))) == []


def test_table_over_settings_missing_method():
    runs = [
        run
        for run in sweep()
        if not (
            run["config"]["data"]["imbalance"] == 10 and "kd-" in run["config_hash"]
        )
    ]
    other = json.loads(json.dumps(runs[0]))  # a variant of ce, in one setting only
    other["config"]["method"]["alpha"] = 4.0
    (_, table), _ = tables.over_settings(aggregate.gather([*runs, other]))
    rows = rows_of(table)
    assert rows["kd"] == ["–", "61.12"] and rows["ce (alpha=4)"][1] == "–"
    assert "–" not in rows["ce (alpha=1)"]  # in both settings by the same label


def test_console_over_settings_in_every_form():
    text, markdown, latex = (
        tables.console(sweep(), form) for form in ("text", "markdown", "latex")
    )
    assert text.startswith(
        "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4\nHighest mean accuracy"
    )
    assert "ltkd in 2 of 2 settings; on the tail: ltkd in 2 of 2 settings." in text
    assert "| ltkd | **72.12 ± 0.18** | **62.12 ± 0.18** |" in markdown
    assert r"ltkd & \textbf{72.12} $\pm$ 0.18 & \textbf{62.12} $\pm$ 0.18 \\" in latex
