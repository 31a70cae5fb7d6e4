"""Tests of what the report says of several settings, of what its figures tell a pointer, and of the files beside it."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.fabricated import STRENGTH, Page, fabricate, metrics_of

from experiments import report
from experiments.reporting import comparison, figures, page, setting_figures, tables

SVG = "{http://www.w3.org/2000/svg}"


def sweep(imbalances=(10, 100), methods=("ce", "kd", "ltkd"), seeds=2, **extra):
    """Runs of every method at every imbalance; accuracies are told apart by method, imbalance and seed."""
    runs = []
    for imbalance in imbalances:
        for place, method in enumerate(methods):
            for seed in range(seeds):
                run = fabricate(method, seed, imbalance=imbalance, **extra) | {"source": "x", "finished": True}
                run["test"] |= {"all": 70.0 + place - 10 * (imbalance == 100) + seed / 4}
                run["test"]["groups"] = {"head": 80.0 - place, "medium": 60.0, "tail": 20.0 + 5 * place + seed / 2}
                runs.append(run)
    return runs


def written(runs, tmp_path, name="report"):
    report.write_page(runs, tmp_path / f"{name}.html")
    return (tmp_path / f"{name}.html").read_text(encoding="utf-8")


def told_by(svg):
    """The texts that a figure's places tell."""
    return [found.text for found in ElementTree.fromstring(svg).iter(f"{SVG}title")]


# Tables.


def test_a_column_per_setting_and_a_row_per_method():
    runs = sweep()
    (title, both), (on_tail, tail) = tables.over_settings(tables.gather(runs))
    assert title == "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4" and on_tail.startswith(
        "Accuracy on the tail"
    )
    assert both.header == tail.header == ["method", "imbalance 10", "imbalance 100"]
    rows = {row[0].text: [(cell.text, cell.note, cell.bold) for cell in row[1:]] for row in both.cells()}
    assert list(rows) == ["teacher", "ce", "kd", "ltkd"]
    # Of seeds 0 and 1: 72 and 72.25, whose deviation is 0.25 / √2; better than the others, whose difference is 1 and 2.
    assert rows["ltkd"] == [("72.12", "± 0.18", True), ("62.12", "± 0.18", True)]
    assert rows["ce"] == [("70.12", "± 0.18", False), ("60.12", "± 0.18", False)]
    assert [cell.text for cell in tail.cells()[-1][1:]] == ["30.25", "30.25"]


def test_one_setting_is_not_compared(tmp_path):
    runs = sweep((100,))
    assert tables.over_settings(tables.gather(runs)) == [] and comparison.section(tables.gather(runs)) == ""
    text = written(runs, tmp_path)
    assert "side by side" not in text and text.count("Tail against head</h3>") == 1
    assert "Tail against head" not in written(sweep((100,), ("kd",)), tmp_path)


def test_a_method_that_a_setting_lacks_is_a_dash():
    runs = [
        run for run in sweep() if (run["config"]["data"]["imbalance"], run["config"]["method"]["name"]) != (10, "kd")
    ]
    (_, table), _ = tables.over_settings(tables.gather(runs))
    assert [cell.text for cell in table.cells()[2]] == ["kd", "–", "61.12"]


def test_what_tells_rows_apart_in_one_setting_is_told_in_all():
    runs = sweep(methods=("ltkd",), seeds=1)
    other = json.loads(json.dumps(runs[0]))
    other["config"]["method"]["alpha"] = 4.0
    (_, table), _ = tables.over_settings(tables.gather([*runs, other]))
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.cells()}
    assert list(rows) == ["teacher", "ltkd (alpha=1)", "ltkd (alpha=4)"] and rows["ltkd (alpha=4)"][1] == "–"
    assert "–" not in rows["ltkd (alpha=1)"]


def test_settings_of_the_same_data_are_told_apart():
    runs = [fabricate("kd", epochs=240), fabricate("kd", epochs=60), fabricate("kd", classes=100)]
    settings = tables.gather([run | {"source": "x", "finished": True} for run in runs])
    assert tables.titles(settings) == [
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 60 epochs",
        "cifar10, imbalance 100, resnet32x4 → resnet8x4, 240 epochs",
        "cifar100, imbalance 100, resnet32x4 → resnet8x4",
    ]
    assert tables.apart(settings) == ["cifar10, 60 epochs", "cifar10, 240 epochs", "cifar100, 240 epochs"]
    assert report._anchors(["a b", "a, b", "c"]) == ["a-b", "a-b-1", "c"]
    assert tables.apart(settings[:1]) == [""]


def test_console_sets_settings_side_by_side_in_every_form():
    runs = sweep()
    text, markdown, latex = (tables.console(runs, form) for form in ("text", "markdown", "latex"))
    assert text.startswith(
        "Accuracy on all classes: cifar10, resnet32x4 → resnet8x4\nHighest mean accuracy on all classes: "
    )
    assert "ltkd in 2 of 2 settings; on the tail: ltkd in 2 of 2 settings." in text
    assert "| ltkd | **72.12 ± 0.18** | **62.12 ± 0.18** |" in markdown
    assert r"ltkd & \textbf{72.12} $\pm$ 0.18 & \textbf{62.12} $\pm$ 0.18 \\" in latex
    assert "imbalance 10," in text.split("Accuracy on the tail")[1]


@pytest.mark.parametrize("form, start", [("text", "Accuracy on"), ("markdown", "## Acc"), ("latex", r"% needs \use")])
def test_the_command_prints_tables_alone(form, start, tmp_path, capsys):
    for i, run in enumerate(sweep(methods=("ce",), seeds=1)):
        (tmp_path / f"{i}.json").write_text(json.dumps(run))
    report.main([str(tmp_path), f"--table={form}", "--out", str(tmp_path / "page.html")])
    out, err = capsys.readouterr()
    assert out.startswith(start) and "page.html" not in out and "page.html" in err
    written = {"markdown": "tables.md", "latex": "tables.tex"}.get(form)
    assert written is None or (tmp_path / "page_files" / written).read_text() == out


# Figures across settings.


def test_marks_and_lines_tell_their_numbers(tmp_path):
    text = written(sweep(), tmp_path)
    files = {path.name: path.read_text() for path in (tmp_path / "report_files").glob("settings_*.svg")}
    assert sorted(files) == [
        "settings_accuracy-on-all-classes-against-imbalance-cifar10-resnet32x4-resnet8x4.svg",
        "settings_accuracy-on-the-tail-against-imbalance-cifar10-resnet32x4-resnet8x4.svg",
        "settings_tail-against-head-imbalance-10.svg",
        "settings_tail-against-head-imbalance-100.svg",
    ]
    lines, tail, scatter, _ = (told_by(files[name]) for name in sorted(files))
    assert (
        "ltkd, imbalance 100\nall classes 62.12 ± 0.18 %" in lines and len(lines) == 8
    )  # of 3 methods and the teacher
    assert "kd, imbalance 10\nthe tail 25.25 ± 0.35 %" in tail
    assert "ltkd, 2 runs\nhead 78.00 ± 0.00 %\ntail 30.25 ± 0.35 %" in scatter and len(scatter) == 4
    assert "ltkd, imbalance 100\nall classes 62.12 ± 0.18 %" in text


def test_places_of_hovers_are_those_of_the_marks():
    """The discs that tell stand where Matplotlib drew the marks, on a logarithmic axis too."""
    (setting,) = tables.gather(sweep((100,)))
    root = ElementTree.fromstring(figures.FIGURE.search(comparison.tail_against_head([setting]))[0])
    marks = [(float(m.get("x")), float(m.get("y"))) for m in root.iter(f"{SVG}use")]
    discs = [(float(d.get("cx")), float(d.get("cy"))) for d in root.iter(f"{SVG}circle")]
    assert len(discs) == 4 and set(discs) <= set(marks)
    series = {"kd": {10.0: [50.0], 100.0: [30.0], 200.0: [20.0]}}
    drawn = comparison._over_imbalance("all classes", series, {"kd": (1, figures.SOLID)}, "")
    root = ElementTree.fromstring(drawn)
    marks = {(float(m.get("x")), float(m.get("y"))) for m in root.iter(f"{SVG}use")}
    discs = [(float(d.get("cx")), float(d.get("cy"))) for d in root.iter(f"{SVG}circle")]
    assert len(discs) == 3 and set(discs) <= marks


def test_imbalances_of_different_data_are_not_joined():
    runs = [*sweep((10, 100)), *sweep((50,), classes=100)]
    lines = [label for label in Page(comparison.section(tables.gather(runs))).labels if "against imbalance" in label]
    assert len(lines) == 2 and all("cifar10, " in label for label in lines)
    assert "against imbalance" not in comparison.section(tables.gather([*sweep((10,)), *sweep((50,), classes=100)]))


# What a class is called.


def test_classes_are_named_with_their_numbers(tmp_path):
    names = [f"<species & {c}>" for c in range(10)]
    runs = [run | {"class_names": names} for run in sweep((100,), ("ce", "ltkd"))]
    for run in runs:  # the most frequent class is the last
        run["class_counts"], run["group_assignment"] = run["class_counts"][::-1], run["group_assignment"][::-1]
    written(runs, tmp_path)
    (path,) = (tmp_path / "report_files").glob("*_test-accuracy-by-class.svg")
    told = told_by(path.read_text())
    (setting,) = tables.gather(runs)
    means = {method.label: setting_figures._mean_of(method, "per_class") for method in setting.methods}
    assert len(told) == 10
    assert told[0].startswith(
        f"<species & 9>, 5,000 training images\nce  {means['ce'][9]:.1f} %\nltkd  {means['ltkd'][9]:.1f} %"
    )
    assert told[9].startswith("<species & 0>, 50 training images\n") and "\nteacher  " in told[9]


@pytest.mark.parametrize("names, first", [(None, "class 0"), (["7", "8"] * 50, "class 7"), (["ant"], "class 0")])
def test_classes_without_names_are_numbered(names, first, tmp_path):
    runs = [run | {"class_names": names} for run in sweep((100,), ("ce",), classes=100)]
    written(runs, tmp_path)
    (path,) = (tmp_path / "report_files").glob("*_test-accuracy-by-class-ce.svg")
    told = told_by(path.read_text())
    assert len(told) == 100 and re.fullmatch(rf"ce  \d+\.\d %\n{first}, 500 training images", told[0])


def test_bars_and_maps_tell_their_numbers(tmp_path):
    text = written(sweep((100,), ("ce",)), tmp_path)
    (path,) = (tmp_path / "report_files").glob("*_mass-by-group-balanced-input.svg")
    assert "head: mass 0.650, true share 0.300" in told_by(path.read_text())[0]
    assert re.search(r'title="ce: [\d.]+ % of head taken for medium"', text)


# The files beside a page.


def test_figures_are_files_that_stand_alone(tmp_path):
    runs = [run | {"metrics": metrics_of(run, 12)} for run in sweep(methods=("ce", "ltkd"), seeds=1, classes=100)]
    text = written(runs, tmp_path)
    files = list((tmp_path / "report_files").glob("*.svg"))
    assert len(files) == len(Page(text).labels) > 20
    for path in files:
        content = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(content)
        assert root.tag == f"{SVG}svg" and float(root.get("width")) >= 300 and float(root.get("height")) >= 150
        assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}" and "Helvetica" in root.get(
            "font-family"
        )
        assert "var(" not in content and "#0100" not in content and re.fullmatch(r"[\w.-]+\.svg", path.name)
        # Each link goes to what is in the file.
        ids = {element.get("id") for element in root.iter()}
        assert {link[1:] for link in re.findall(r'(?:href="|url\()(#\w+)', content)} <= ids
    (by_class,) = (tmp_path / "report_files").glob("*imbalance-10-*_test-accuracy-by-class.svg")
    root = ElementTree.parse(by_class).getroot()
    (key,) = (group for group in root.iter(f"{SVG}g") if group.get("class") == "key")
    assert [found.text for found in key.iter(f"{SVG}text")] == ["ce", "ltkd", "teacher"]
    lowest = max(float(found.get("y")) for found in key.iter(f"{SVG}text"))
    assert 350 < lowest < float(root.get("height"))
    assert 'class="key" data-' not in text  # the page has its keys as HTML


def test_control_characters_do_not_break_a_file(tmp_path):
    runs = sweep((100,), ("ce",))
    for run in runs:
        run["class_names"] = [f"\x1b[31m{c}\x00" for c in range(10)]
    written(runs, tmp_path)
    for path in (tmp_path / "report_files").glob("*.svg"):
        ElementTree.parse(path)


def test_stale_figures_go_and_those_of_others_stay(tmp_path):
    written(sweep(methods=("ce", "kd"), seeds=1), tmp_path)
    folder = tmp_path / "report_files"
    (folder / "mine.svg").write_text("<svg/>")
    (folder / "notes.txt").write_text("mine")
    before = {path.name for path in folder.iterdir()}
    assert any(name.startswith("settings_") for name in before)
    written(sweep((100,), ("ce", "kd"), 1), tmp_path)
    after = {path.name for path in folder.iterdir()}
    assert {"mine.svg", "notes.txt", "tables.md", "tables.tex"} <= after
    assert after - before == {"cifar10-imbalance-100-resnet32x4-resnet8x4_tail-against-head.svg"}
    assert not any(name.startswith("settings_") or "imbalance-10-" in name for name in after)
    # A page without a figure has no folder of its own.
    page.write(tmp_path / "plain.html", "Plain", ["<h1>Plain</h1>"])
    assert not (tmp_path / "plain_files").exists() and "Written beside" not in (tmp_path / "plain.html").read_text()


@pytest.mark.slow
def test_a_page_of_a_hundred_or_a_thousand_classes_is_light(tmp_path):
    for classes, limit in ((100, 500_000), (1000, 1_500_000)):
        runs = [fabricate(method, classes=classes) for method in [*STRENGTH, "bikd"]]
        runs = [run | {"source": "x", "finished": True, "metrics": metrics_of(run)} for run in runs]
        for run in runs:
            run["class_names"] = [f"some species {c}" for c in range(classes)]
        assert len(written(runs, tmp_path).encode()) < limit
