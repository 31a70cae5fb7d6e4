"""Tests of statistics, of the grouping of runs, and of tables and sentences."""

import copy
import json
import math

import pytest
from helpers.fabricated import fabricate, runs_with, sweep

from experiments.reporting import aggregate, figures, statistics, tables


def labels(runs):
    """Returns the labels of the methods of the only setting."""
    (setting,) = aggregate.group_runs(runs)
    return [method.label for method in setting.methods]


def texts_by_label(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.cells()}


# Statistics.


def test_mean_std():
    # The sample variance is (4 + 1 + 9) / 2.
    expected = (3.0, pytest.approx(math.sqrt(7)), 3)
    assert statistics.mean_std([1.0, 2.0, 6.0]) == expected
    assert statistics.mean_std([5.0]) == (5.0, None, 1)
    assert statistics.mean_std([]) == (None, None, 0)


def test_compare_paired_margin():
    # The differences are 2, 3 and 7: mean 4, sample variance (4 + 1 + 9) / 2 = 7,
    # standard error sqrt(7 / 3) = 1.5275. The 97.5 % quantile of t with two degrees of
    # freedom is 4.3027 in the usual tables.
    difference = statistics.compare_paired(
        {0: 12.0, 1: 23.0, 2: 17.0}, {0: 10.0, 1: 20.0, 2: 10.0}
    )
    assert difference.mean == 4.0
    assert difference.num_pairs == 3
    assert difference.verdict == "not distinguishable"
    assert difference.margin == pytest.approx(4.3027 * 1.5275, abs=1e-3)


@pytest.mark.parametrize(
    "candidate, reference, verdict",
    [
        # Differences 1.0 and 1.1: mean 1.05 > 12.706 · 0.05.
        ({0: 10.0, 1: 11.1}, {0: 9.0, 1: 10.0}, "better"),
        ({0: 9.0, 1: 10.0}, {0: 10.0, 1: 11.1}, "worse"),
        # Differences 1.0 and 1.2: mean 1.1 < 12.706 · 0.1.
        ({0: 10.0, 1: 11.2}, {0: 9.0, 1: 10.0}, "not distinguishable"),
        # Three seeds with differences 1, 2 and 3: mean 2 < 4.303 · 0.577.
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0}, "not distinguishable"),
        # Equal differences.
        ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}, "better"),
        ({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}, "not distinguishable"),
        # One seed.
        ({0: 90.0}, {0: 10.0}, "not distinguishable"),
        # No shared seed.
        ({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0}, "not distinguishable"),
    ],
)
def test_compare_paired_verdict(candidate, reference, verdict):
    assert statistics.compare_paired(candidate, reference).verdict == verdict


def test_compare_paired_lower_is_better():
    seeds = {0: 5.0, 1: 6.0}, {0: 9.0, 1: 10.1}
    assert statistics.compare_paired(*seeds).verdict == "worse"
    difference = statistics.compare_paired(*seeds, lower_is_better=True)
    assert difference.verdict == "better"


def test_compare_paired_ignores_unshared_seeds():
    difference = statistics.compare_paired(
        {0: 1.0, 1: 5.0, 7: 99.0}, {1: 2.0, 0: 0.0, 8: -99.0}
    )
    assert (difference.num_pairs, difference.mean) == (2, 2.0)


# Grouping.


def test_group_runs_by_hyperparameters():
    runs = [fabricate("ltkd", seed) for seed in (0, 1)]
    for alpha in (16.0, 0.5, 2.0):
        run = fabricate("ltkd")
        run["config"]["method"]["alpha"] = alpha
        runs.append(run)
    (setting,) = aggregate.group_runs(runs)
    rows = [(method.label, len(method.runs)) for method in setting.methods]
    # The rows are in the order of the numbers.
    assert rows == [
        ("ltkd (alpha=0.5)", 1),
        ("ltkd (alpha=1)", 2),
        ("ltkd (alpha=2)", 1),
        ("ltkd (alpha=16)", 1),
    ]


def test_group_runs_counts_a_copy_once():
    run = fabricate("kd")
    moved = copy.deepcopy(run)
    moved["config"]["teacher"]["dir"] = "elsewhere"
    moved["config"]["eval_every"] = 1
    (setting,) = aggregate.group_runs([run, moved])
    assert [len(method.runs) for method in setting.methods] == [1]


def test_group_runs_separates_settings():
    other_split = fabricate("kd")
    other_split["seeds"]["split"] = 1
    longer = fabricate("kd", epochs=60)
    other_data = fabricate("kd", classes=100)
    runs = [fabricate("kd"), other_split, longer, other_data]
    assert len(aggregate.group_runs(runs)) == 4


def taught_by(checkpoint, content, method="kd", seed=0):
    """Returns a run with an external teacher."""
    run = fabricate(method, seed)
    run["config"]["teacher"]["checkpoint"] = checkpoint
    run["content"]["teacher"] = content
    return run


@pytest.mark.parametrize(
    "checkpoint, content, models",
    [
        ("a/means.npz", "0123456789ab", "means.npz → resnet8x4"),
        ("a/b.msgpack", "0123456789ab", "resnet32x4 (b.msgpack) → resnet8x4"),
        ("runs/mine/", "run 0123456789ab", "resnet32x4 (mine) → resnet8x4"),
        ("runs/mine/model.msgpack", "0123456789ab", "resnet32x4 (mine) → resnet8x4"),
        # It was trained by this config.
        ("runs/teachers/ab", "ab", "resnet32x4 → resnet8x4"),
    ],
)
def test_teacher_is_named(checkpoint, content, models):
    runs = [taught_by(checkpoint, content, seed=seed) for seed in (0, 1)]
    (setting,) = aggregate.group_runs(runs)
    assert setting.title == f"cifar10, imbalance 100, {models}"
    assert [method.label for method in setting.methods] == ["kd"]


def test_teachers_of_one_model():
    """They are in one setting with methods that need none; labels name the files."""
    runs = [
        taught_by("a.msgpack", "0a"),
        taught_by("runs/b", "run 0b"),
        # The same as the second.
        taught_by("copy/b/model.msgpack", "0b", seed=1),
        fabricate("ce"),
    ]
    (setting,) = aggregate.group_runs(runs)
    assert setting.title.endswith("resnet32x4 (a.msgpack, b) → resnet8x4")
    rows = [(method.label, len(method.runs)) for method in setting.methods]
    assert rows == [
        ("ce", 1),
        ("kd (teacher.variables=a.msgpack)", 1),
        ("kd (teacher.variables=b)", 2),
    ]


def test_teachers_of_one_name():
    runs = [taught_by("a/t.npz", "0a"), taught_by("b/t.npz", "0b")]
    titles = [setting.title for setting in aggregate.group_runs(runs)]
    assert [title.split(", ")[2].split(" → ")[0] for title in titles] == [
        "t.npz 0a",
        "t.npz 0b",
    ]


def test_group_runs_subsets():
    drawn = fabricate("kd")
    complete = fabricate("kd", class_counts=[40, 30, 16])
    complete["config"]["data"]["subset"] = "all"
    listed = fabricate("kd")
    listed["config"]["data"]["subset"] = "lists/long_tail.txt"
    listed["content"]["subset"] = "0123456789ab"
    settings = aggregate.group_runs([drawn, complete, listed])
    assert {setting.title for setting in settings} == {
        "cifar10, imbalance 100, resnet32x4 → resnet8x4",
        "cifar10 (all), imbalance 2.5, resnet32x4 → resnet8x4",
        "cifar10 (list 0123456789ab), imbalance 100, resnet32x4 → resnet8x4",
    }


def test_label_omits_what_is_off():
    plain = fabricate("kd")
    cutout = fabricate("kd")
    cutout["config"]["augment"] = {"policy": "none", "cutout": 16, "mixup": 0.0}
    assert labels([plain, cutout]) == ["kd", "kd (cutout=16)"]


def test_note_of_seeds_and_teachers():
    runs = runs_with({"kd": [40.0, 41.0]})
    (setting,) = aggregate.group_runs(runs)
    assert "student seeds, one split (split seed 0)" in setting.note()
    runs[0]["teacher"]["hash"] = "another"
    (setting,) = aggregate.group_runs(runs)
    assert "2 teachers" in setting.note()


def test_distinct_titles():
    settings = aggregate.group_runs(
        [
            fabricate("kd", epochs=240),
            fabricate("kd", epochs=60),
            fabricate("kd", classes=100),
        ]
    )
    assert aggregate.distinct_titles(settings) == [
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 60 epochs",
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 240 epochs",
        "cifar100, imbalance 100, resnet32x4 → resnet8x4",
    ]
    assert aggregate.short_titles(settings) == [
        "cifar10, 60 epochs",
        "cifar10, 240 epochs",
        "cifar100, 240 epochs",
    ]
    assert aggregate.short_titles(settings[:1]) == [""]


def test_distinct_styles():
    methods = [aggregate.Method(name, name, {}) for name in aggregate.METHOD_ORDER]
    methods.append(aggregate.Method("ltkd", "ltkd (alpha=4)", {}))
    # Names of the same sum, which picks the style of a method that is not built in.
    methods += [aggregate.Method(name, name, {}) for name in ("mine", "mnie", "kd2")]
    methods.append(aggregate.Method("mine", "mine (alpha=4)", {}))
    styles = figures.method_styles(methods)
    assert len({str(style) for style in styles.values()}) == len(styles)


# Tables and sentences.


def test_render_has_deviations_and_verdicts():
    runs = runs_with(
        {
            "ce": [30.0, 32.0, 31.0],
            "kd": [31.0, 31.5, 31.2],
            "ltkd": [40.0, 43.0, 41.0],
        }
    )
    text = tables.render(runs)
    assert "41.33 ± 1.53" in text
    assert "31.00 ± 1.00" in text
    # ltkd, by about 10.
    assert "better than ce and kd" in text
    # kd against ce: 1, −0.5 and 0.2.
    assert "+0.23 ± 1.86 not distinguishable n = 3" in text


def test_render_one_seed():
    text = tables.render(runs_with({"ce": [30.0], "ltkd": [60.0]}))
    assert "no difference can be distinguished from chance" in text
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
    (setting,) = aggregate.group_runs(runs_with(accuracies))
    table = tables.accuracy_table(setting)
    assert [row[0].text for row in table.cells() if row[1].bold] == bold


def test_mass_table():
    runs = [fabricate("kd", seed) for seed in range(2)]
    runs[1]["test"]["group_mass"] = {"head": 0.7, "medium": 0.2, "tail": 0.1}
    # A run of an earlier version did not record it.
    runs.append(fabricate("ce"))
    del runs[2]["test"]["group_mass"]
    # The teacher's is the one that earlier versions recorded, too.
    for run in runs:
        del run["teacher"]["test"]["group_mass"]
    (setting,) = aggregate.group_runs(runs)
    table = tables.mass_table(setting)
    assert table.header == ["method", "head", "medium", "tail", "n"]
    assert texts_by_label(table) == {
        "unbiased": ["30.00", "40.00", "30.00", "–"],
        "teacher": ["65.00", "29.00", "6.00", "1"],
        "kd": ["60.00", "25.00", "15.00", "2"],
    }


def test_mass_table_without_masses():
    run = fabricate("ce")
    del run["test"]["group_mass"]
    (setting,) = aggregate.group_runs([run])
    assert tables.mass_table(setting) is None


def test_tables_over_settings():
    settings = aggregate.group_runs(sweep())
    (title, table), (tail_title, tail_table) = tables.tables_over_settings(settings)
    assert title == "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4"
    assert tail_title.startswith("Accuracy on the tail")
    assert table.header == ["method", "imbalance 10", "imbalance 100"]
    assert tail_table.header == table.header
    rows = {}
    for label, *cells in table.cells():
        rows[label.text] = [(cell.text, cell.note, cell.bold) for cell in cells]
    assert list(rows) == ["teacher", "ce", "kd", "ltkd"]
    # Of 72 and 72.25, whose deviation is 0.25 / √2. It is better than the others, by
    # 1 and 2.
    assert rows["ltkd"] == [("72.12", "± 0.18", True), ("62.12", "± 0.18", True)]
    assert rows["ce"] == [("70.12", "± 0.18", False), ("60.12", "± 0.18", False)]
    assert texts_by_label(tail_table)["ltkd"] == ["30.25", "30.25"]
    one_setting = aggregate.group_runs(sweep((100,)))
    assert tables.tables_over_settings(one_setting) == []


def test_tables_over_settings_missing_method():
    runs = []
    for run in sweep():
        is_kd = "kd-" in run["config_hash"]
        if not (is_kd and run["config"]["data"]["imbalance"] == 10):
            runs.append(run)
    # A variant of ce, in one setting only.
    variant = json.loads(json.dumps(runs[0]))
    variant["config"]["method"]["alpha"] = 4.0
    settings = aggregate.group_runs([*runs, variant])
    (_, table), _ = tables.tables_over_settings(settings)
    rows = texts_by_label(table)
    assert rows["kd"] == ["–", "61.12"]
    assert rows["ce (alpha=4)"][1] == "–"
    # The label is the same in both settings.
    assert "–" not in rows["ce (alpha=1)"]


def test_setting_with_one_method_has_no_best():
    runs = []
    for run in sweep():
        imbalance = run["config"]["data"]["imbalance"]
        if imbalance != 10 or run["config"]["method"]["name"] == "kd":
            runs.append(run)
    sentence = tables.overview(aggregate.group_runs(runs))
    assert sentence.count(" ltkd in 1 of 1 setting") == 2
    only_kd = [run for run in runs if run["config"]["method"]["name"] == "kd"]
    assert tables.overview(aggregate.group_runs(only_kd)) == ""


def test_render_over_settings_in_every_format():
    text, markdown, latex = (
        tables.render(sweep(), name) for name in ("text", "markdown", "latex")
    )
    assert text.startswith(
        "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4\n"
        "Highest mean accuracy"
    )
    assert "ltkd in 2 of 2 settings; on the tail: ltkd in 2 of 2 settings." in text
    assert "| ltkd | **72.12 ± 0.18** | **62.12 ± 0.18** |" in markdown
    assert r"ltkd & \textbf{72.12} $\pm$ 0.18 & \textbf{62.12} $\pm$ 0.18 \\" in latex
