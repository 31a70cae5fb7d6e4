"""Tests of reports on fabricated runs: loading, the page, its files, results."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.fabricated import (
    ACCURACIES,
    GROUP_NAMES,
    ParsedPage,
    fabricate,
    fabricate_learned,
    logged_metrics,
    runs_with,
    save,
    sweep,
)

from experiments import report
from experiments.config.load import load_config
from experiments.reporting import (
    aggregate,
    comparison,
    figures,
    load,
    page,
    report_page,
    results_page,
    setting_figures,
    tables,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("x")</script>&$\\frac|`var(--x)\x1b[31m'


def write(runs, folder):
    """Writes a page, which must parse, and returns its text."""
    report_page.write_report(runs, folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    ParsedPage(text)
    return text


def hover_texts(folder, pattern):
    """Returns what a pointer shows in the only figure whose file fits a pattern."""
    (path,) = (folder / "report_files").glob(pattern)
    return [title.text for title in ElementTree.parse(path).iter(f"{SVG}title")]


def figure_files(folder, pattern="*.svg"):
    return sorted(path.name for path in (folder / "report_files").glob(pattern))


# Loading.


def test_load_work_directory_and_file(tmp_path):
    run = fabricate("ltkd")
    loaded = load.load(save(tmp_path / "run", run))
    assert loaded["finished"]
    assert loaded["source"] == "run"
    assert len(loaded["metrics"]) == 24
    (tmp_path / "bare.json").write_text(json.dumps(run))
    (tmp_path / "unrelated.json").write_text('{"speed": 1}')
    assert load.load(tmp_path / "bare.json")["test"] == run["test"]
    assert len(load.load_all([tmp_path])) == 2


def test_unfinished_run(tmp_path):
    save(tmp_path / "done", fabricate("ltkd"))
    unfinished = save(tmp_path / "going", fabricate("kd"))
    (unfinished / "results.json").unlink()
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "epo')  # cut short
    runs = load.load_all([tmp_path])
    assert sorted(run["finished"] for run in runs) == [False, True]
    assert "unfinished: going (epoch 24)" in tables.render(runs)
    assert "Unfinished runs" in write(runs, tmp_path)


def results_without(*path):
    """Returns the text of a result file that lacks a key."""
    results = fabricate()
    parent = results
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return json.dumps(results)


def results_with_teacher(checkpoint):
    """Returns the text of a result file with an external teacher that has no hash."""
    results = fabricate()
    results["config"]["teacher"]["checkpoint"] = checkpoint
    return json.dumps(results)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{not json", "not readable as JSON"),
        ("[]", "config"),
        ("{}", "config"),
        (results_without("config", "data"), "config.data"),
        (results_without("content"), "content"),
        (results_with_teacher("a.msgpack"), "'content'"),
        (results_without("test", "all"), "test accuracy"),
        (json.dumps(fabricate(class_counts=[0, 0])), "'class_counts'"),
        (json.dumps(fabricate(class_counts="x")), "'class_counts'"),
        (json.dumps(fabricate(class_names=5)), "'class_names'"),
        (json.dumps(fabricate() | {"teacher": "x"}), "'teacher'"),
        (json.dumps(fabricate(seeds={"student": "a"})), "'seeds'"),
        (
            json.dumps(fabricate(config={"seed_split": 0})),
            "config.seed_split is now called config.split_seed",
        ),
        (
            json.dumps(fabricate(config={"weighting": {"every": 1}})),
            "config.loss_weighting.update_every",
        ),
    ],
)
def test_load_bad_result_file(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(load.ReportError, match=f"bad.json: .*{message}"):
        load.load(tmp_path / "bad.json")


def test_load_damaged_metrics_line(tmp_path):
    save(tmp_path / "run", fabricate())
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n{broken\n{}\n")
    with pytest.raises(load.ReportError, match="metrics.jsonl, line 2"):
        load.load(tmp_path / "run")


# The command.


@pytest.mark.parametrize(
    "output_format, start",
    [("text", "Accuracy on"), ("markdown", "## Acc"), ("latex", r"% needs \use")],
)
def test_command_output(output_format, start, tmp_path, capsys):
    for i, run in enumerate(sweep(methods=("ce",), seeds=1)):
        save(tmp_path / f"runs/{i}", run)
    path = tmp_path / "page.html"
    options = [f"--table={output_format}", f"--output={path}", "--title=A title"]
    report.main([str(tmp_path / "runs"), *options])
    out, err = capsys.readouterr()
    assert out.startswith(start)
    assert "page.html" not in out
    assert "page.html" in err
    assert "A title" in ParsedPage(path.read_text(encoding="utf-8")).text
    file = {"markdown": "tables.md", "latex": "tables.tex"}.get(output_format)
    assert file is None or (tmp_path / "page_files" / file).read_text() == out


def test_single_evaluation(tmp_path):
    """Its axes start at 0, and have no fractions of an epoch."""
    test = {"all": 0.0, "groups": {"tail": 0.0}}
    metrics = [{"step": 90, "epoch": 10.0, "test": test}]
    seeds = {"split": 0, "teacher": None, "student": 3}
    text = write([fabricate(metrics=metrics, seeds=seeds)], tmp_path)
    assert "0 / – / 3" in text
    (path,) = (tmp_path / "report_files").glob("*all-classes-over*.svg")
    labels = {label.text for label in ElementTree.parse(path).iter(f"{SVG}text")}
    assert {"0", "10", "0.0", "1.0"} <= labels, labels
    assert "9.6" not in labels


@pytest.mark.parametrize("classes, is_named", [(10, True), (16, False)])
def test_class_names_on_the_axis(tmp_path, classes, is_named):
    names = [f"a rather long name {c}" for c in range(classes)]
    text = write([fabricate(classes=classes, class_names=names)], tmp_path)
    assert ("a rather long n…" in text) is is_named


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "absent: no such file"),
        (["empty"], "no runs in empty"),
        (
            ["run", "--output=absent/page.html"],
            "--output=absent/page.*no folder absent",
        ),
        (["run", "--output=run"], "run"),
        (["--results=empty", "--queue=absent.json"], "absent.json"),
    ],
)
def test_command_error(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "run", fabricate())
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        report.main(arguments)


# The page.


@pytest.mark.parametrize(
    "classes, seeds, teacher, shots",
    [(10, 1, True, False), (100, 3, True, True), (10, 3, False, True)],
)
def test_page_has_all_numbers_and_figures(classes, seeds, teacher, shots, tmp_path):
    runs = []
    for method in ("ce", "ltkd"):
        for seed in range(seeds):
            run = fabricate(method, seed, classes=classes, teacher=teacher, shots=shots)
            runs.append(run | {"metrics": logged_metrics(run, 20)})
    html = write(runs, tmp_path)
    parsed = ParsedPage(html)
    text = parsed.text
    (setting,) = aggregate.group_runs(runs)
    for method in setting.methods:
        for column in tables.columns(setting).values():
            cell = tables.mean_cell(method.values(column).values())
            assert f"{cell.text} {cell.note}".strip() in text
            is_missing = not shots and column in ("shots.medium", "shots.few")
            assert (cell.text == "–") == is_missing
    for title in (
        "Accuracy by class frequency",
        "Confusion between groups",
        "Training",
        "How it was run",
    ):
        assert title in text
    assert ("The teacher’s bias" in text) == teacher
    num_figures = {
        "scatter": 1,
        "curves": 2,
        "dots": (2 + teacher) * (classes == 100),
        "bias": 2 * teacher,
        "training": 6,
    }
    assert len(parsed.labels) == sum(num_figures.values())
    assert all(parsed.labels)
    results_text = text.split("How it was run")[0].replace(tables.VERDICT_NOTE, "")
    assert ("±" in results_text) == (seeds > 1)
    assert "LTKD is reconstructed" in text
    assert "abc1234" in text
    assert "1 h 12 min" in text
    assert re.search(r'title="ce: [\d.]+ % of head predicted as medium"', html)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_page_size_and_dependencies(tmp_path):
    names = [f"some species {c}" for c in range(100)]
    runs = []
    for method in ACCURACIES:
        for seed in range(2):
            run = fabricate(method, seed, classes=100, class_names=names)
            runs.append(run | {"metrics": logged_metrics(run)})
    again = tmp_path / "again"
    again.mkdir()
    text = write(runs, tmp_path)
    assert text == write(runs, again)
    assert len(text.encode()) < 500_000
    for path in (tmp_path / "report_files").iterdir():
        assert path.read_bytes() == (again / "report_files" / path.name).read_bytes()
    assert "http" not in text.replace("http://www.w3.org/", "")
    assert "url(" not in text.replace("url(#", "")
    assert {"script", "link", "img"}.isdisjoint(ParsedPage(text).tags)
    # Every placeholder colour became a variable.
    assert "#0100" not in text
    assert "#0203" not in text


def test_escapes_hostile_strings(tmp_path):
    keys = ("source", "command", "device", "commit", "config_hash")
    run = fabricate("ltkd", classes=100, **dict.fromkeys(keys, HOSTILE))
    run["config"]["method"] |= {"name": HOSTILE, HOSTILE: HOSTILE}
    run["config"]["data"]["name"] = HOSTILE
    run["config"]["student"]["model"] = HOSTILE
    run["test"]["groups"] = {HOSTILE: 50.0, "medium": 40.0, "tail": 20.0}
    run["class_names"] = [HOSTILE] * 100
    records = logged_metrics(run, 3)
    run["metrics"] = [record | {"terms": {HOSTILE: 1.0}} for record in records]
    unfinished = {"source": HOSTILE, "finished": False, "metrics": []}
    report_page.write_report([run, unfinished], tmp_path / "report.html", title=HOSTILE)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = ParsedPage(html)
    assert "script" not in parsed.tags
    assert "<script" not in html
    assert parsed.text.count('<script>alert("x")</script>') > 10
    for path in (tmp_path / "report_files").glob("*.svg"):
        ElementTree.parse(path)
    markdown = results_page.render_results([run], published())
    assert "<script" not in markdown.split("```")[0]
    assert "\x1b" not in tables.render([unfinished])


def test_page_logit_source(tmp_path):
    runs = [
        fabricate("kd", teacher_logits="table"),
        fabricate("ltkd", teacher_logits="network"),
    ]
    sentence = (
        "Teacher’s logits: kd from the table of all views; ltkd from the network in "
        "the step."
    )
    assert sentence in write(runs, tmp_path)
    assert "network in the step" in results_page.render_results(runs, published())


def test_page_of_one_setting(tmp_path):
    text = write(sweep((100,), seeds=1), tmp_path)
    assert "side by side" not in text
    assert text.count("Tail against head</h3>") == 1
    assert "Tail against head" not in write(sweep((100,), ("kd",)), tmp_path)


# Learned weights.


def test_learned_weight_figures(tmp_path):
    text = write([fabricate_learned(0), fabricate_learned(1)], tmp_path)
    assert "weight of ce over the epochs: head, medium, tail" in text
    assert "weight of kd over student_ce and teacher_ce: 0.10 to 0.90" in text
    assert text.count("Learned weights") == 1
    assert ">bikd<" in text
    assert "1,000 balanced images for learned weights" in text


@pytest.mark.parametrize(
    "weight_map", [{}, {"ce": [[0.5] * 3] * 3}], ids=["no map", "constant map"]
)
def test_learned_weights_without_metrics(weight_map, tmp_path):
    run = fabricate_learned(metrics=[])
    run["loss_weighting"]["map"] = weight_map
    assert "Learned weights" in write([run], tmp_path)


# Figures.


def test_markers_show_their_numbers(tmp_path):
    text = write(sweep(), tmp_path)
    models = "cifar10-resnet32x4-resnet8x4"
    assert figure_files(tmp_path, "settings_*.svg") == [
        f"settings_accuracy-on-all-classes-against-imbalance-{models}.svg",
        f"settings_accuracy-on-the-tail-against-imbalance-{models}.svg",
        "settings_tail-against-head-imbalance-10.svg",
        "settings_tail-against-head-imbalance-100.svg",
    ]
    all_classes = hover_texts(tmp_path, "settings_accuracy-on-all-*")
    expected = "ltkd, imbalance 100\nall classes 62.12 ± 0.18 %"
    assert expected in all_classes
    assert expected in text
    # Of three methods and the teacher, at two imbalances.
    assert len(all_classes) == 8
    tail = hover_texts(tmp_path, "settings_accuracy-on-the-tail-*")
    assert "kd, imbalance 10\nthe tail 25.25 ± 0.35 %" in tail
    scatter = hover_texts(tmp_path, "settings_tail-against-head-imbalance-10.svg")
    assert "ltkd, 2 runs\nhead 78.00 ± 0.00 %\ntail 30.25 ± 0.35 %" in scatter
    assert len(scatter) == 4


def positions(figure, tag, x, y):
    """Returns the positions of the figure's elements with a tag."""
    return {
        (float(element.get(x)), float(element.get(y)))
        for element in figure.element.iter(tag)
    }


def test_hover_discs_are_on_the_markers():
    """Also on a logarithmic axis."""
    (setting,) = aggregate.group_runs(sweep((100,)))
    (scatter,) = comparison.tail_against_head([setting])[-1].figures
    accuracies = {"kd": {10.0: [50.0], 100.0: [30.0], 200.0: [20.0]}}
    curve = comparison.draw_over_imbalance(
        "all classes", accuracies, {"kd": (1, figures.SOLID)}
    )
    for figure, number in ((scatter, 4), (curve, 3)):
        markers = positions(figure, "use", "x", "y")
        discs = positions(figure, "circle", "cx", "cy")
        assert len(discs) == number
        assert discs <= markers


def imbalance_figures(runs):
    """Returns the names of the figures of accuracy against imbalance."""
    section = comparison.section(aggregate.group_runs(runs))
    names = []
    for component in section.components:
        names += [figure.name for figure in getattr(component, "figures", ())]
    return [name for name in names if "against imbalance" in name]


def test_imbalances_of_different_data():
    other_data = sweep((50,), seeds=1, classes=100)
    names = imbalance_figures([*sweep((10, 100), seeds=1), *other_data])
    assert len(names) == 2
    assert all("cifar10, " in name for name in names)
    assert not imbalance_figures([*sweep((10,), seeds=1), *other_data])


def test_class_tooltips(tmp_path):
    class_names = [f"<species & {c}>" for c in range(10)]
    runs = sweep((100,), ("ce", "ltkd"), class_names=class_names)
    for run in runs:
        # The most frequent class is the last.
        run["class_counts"] = run["class_counts"][::-1]
        run["group_assignment"] = run["group_assignment"][::-1]
    write(runs, tmp_path)
    texts = hover_texts(tmp_path, "*_test-accuracy-by-class.svg")
    (setting,) = aggregate.group_runs(runs)
    ce, ltkd = (
        setting_figures.mean_array(method, "per_class")[9] for method in setting.methods
    )
    assert len(texts) == 10
    assert texts[0].startswith(
        f"<species & 9>, 5,000 training images\nce  {ce:.1f} %\nltkd  {ltkd:.1f} %"
    )
    assert texts[9].startswith("<species & 0>, 50 training images\n")
    assert "\nteacher  " in texts[9]
    mass = hover_texts(tmp_path, "*_mass-by-group-balanced-input.svg")
    assert "head: mass 0.650, true share 0.300" in mass[0]


@pytest.mark.parametrize(
    "names, first",
    [(None, "class 0"), (["7", "8"] * 50, "class 7"), (["ant"], "class 0")],
)
def test_classes_without_names(names, first, tmp_path):
    write(sweep((100,), ("ce",), seeds=1, classes=100, class_names=names), tmp_path)
    texts = hover_texts(tmp_path, "*_test-accuracy-by-class-ce.svg")
    assert len(texts) == 100
    assert re.fullmatch(rf"ce  \d+\.\d %\n{first}, 500 training images", texts[0])


# Files.


def check_figure_file(text):
    """Checks that an SVG file needs no page."""
    root = ElementTree.fromstring(text)
    width = root.get("width")
    height = root.get("height")
    assert root.tag == f"{SVG}svg"
    assert float(width) >= 300
    assert float(height) >= 150
    assert root.get("viewBox") == f"0 0 {width} {height}"
    assert "Helvetica" in root.get("font-family")
    assert "var(" not in text
    assert "#0100" not in text
    # Each link goes to an element of the file.
    ids = {element.get("id") for element in root.iter()}
    links = re.findall(r'(?:href="|url\()(#\w+)', text)
    assert {link[1:] for link in links} <= ids


def test_figure_files_are_complete(tmp_path):
    runs = []
    for run in sweep(methods=("ce", "ltkd"), seeds=1, classes=100):
        runs.append(run | {"metrics": logged_metrics(run, 12)})
    html = write(runs, tmp_path)
    paths = list((tmp_path / "report_files").glob("*.svg"))
    assert len(paths) == len(ParsedPage(html).labels) > 20
    for path in paths:
        assert re.fullmatch(r"[\w.-]+\.svg", path.name)
        check_figure_file(path.read_text(encoding="utf-8"))
    (by_class,) = (tmp_path / "report_files").glob(
        "*imbalance-10-*_test-accuracy-by-class.svg"
    )
    root = ElementTree.parse(by_class).getroot()
    (legend,) = (group for group in root.iter(f"{SVG}g") if group.get("class") == "key")
    labels = list(legend.iter(f"{SVG}text"))
    assert [label.text for label in labels] == ["ce", "ltkd", "teacher"]
    lowest = max(float(label.get("y")) for label in labels)
    assert 350 < lowest < float(root.get("height"))
    # The page has its legends as HTML.
    assert '<g class="key"' not in html


def test_removes_old_figures(tmp_path):
    write(sweep(methods=("ce", "kd"), seeds=1), tmp_path)
    folder = tmp_path / "report_files"
    (folder / "own.svg").write_text("<svg/>")
    (folder / "notes.txt").write_text("own")
    before = {path.name for path in folder.iterdir()}
    write(sweep((100,), ("ce", "kd"), seeds=1), tmp_path)
    after = {path.name for path in folder.iterdir()}
    assert {"own.svg", "notes.txt", "tables.md", "tables.tex"} <= after
    new_name = "cifar10-imbalance-100-resnet32x4-resnet8x4_tail-against-head.svg"
    assert after - before == {new_name}
    assert any("settings_" in name for name in before)
    assert not any("settings_" in name for name in after)
    assert not any("imbalance-10-" in name for name in after)


def test_page_without_figures(tmp_path):
    page.write(tmp_path / "plain.html", "Plain", [page.Heading("Plain", 1)])
    assert not (tmp_path / "plain_files").exists()
    assert "Files beside" not in (tmp_path / "plain.html").read_text()


# The results page.


def published():
    return load.read_json(results_page.PUBLISHED)


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def planned(tmp_path, runs):
    path = tmp_path / "queue.txt"
    path.write_text(json.dumps({"runs": runs}))
    return report.planned_runs(path)


def test_marks_published_numbers():
    content = published()
    with_resnet = [s for s in content["settings"] if s["teacher"] == "resnet32x4"]
    ltkd = with_resnet[0]["methods"]["ltkd"]
    assert ltkd == {"all": [51.08, "S"], "tail": [27.21, "S"]}
    for setting in content["settings"]:
        for method in setting["methods"].values():
            for value in method.values():
                if value is not None:
                    *numbers, mark = value
                    assert mark in content["marks"]
                    assert 1 <= len(numbers) <= 2
                    assert numbers == sorted(numbers)


def test_results_page_compares_with_published(tmp_path):
    for seed in range(3):
        run = fabricate("ltkd", seed, classes=100, group="table")
        (tmp_path / f"b{seed}.json").write_text(json.dumps(run))
    queue = tmp_path / "queue.txt"
    entry = {
        "config": "configs/cifar100lt.py:ltkd_bs,imbalance=100",
        "seeds": [0],
        "group": "table",
    }
    queue.write_text(json.dumps({"about": "x", "runs": [entry]}))
    report.main([f"--results={tmp_path}", "--queue", str(queue)])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (setting,) = aggregate.group_runs(load.load_all([tmp_path]))
    (ltkd,) = setting.methods
    cell = tables.mean_cell(ltkd.values("all").values())
    assert line_of(text, "| ltkd |").startswith(
        f"| ltkd | 51.08 [S] | 27.21 [S] | {cell.text} {cell.note} |"
    )
    assert line_of(text, "| teacher |").startswith("| teacher | ? | 15.28 [S] |")
    all_difference = ltkd.mean("all") - 51.08
    tail_difference = ltkd.mean("groups.tail") - 27.21
    differences = f"ltkd: all {all_difference:+.2f}, tail {tail_difference:+.2f}."
    start = "Measured minus published, in percentage points: "
    assert line_of(text, start) == start + differences.replace("-", "−")
    assert line_of(text, "| ltkd_bs |").startswith(
        "| ltkd_bs | ? | ? | not run yet | not run yet |"
    )
    assert "not run yet" in line_of(text, "| dkd |")
    assert "reconstructed from descriptions" in text
    assert "**[S]** second-hand" in text
    command = "python -m experiments.main --config=configs/cifar100lt.py:ltkd,seed=0"
    assert command in text


def test_results_page_gives_a_range_of_published_numbers():
    run = fabricate("balanced_softmax", classes=100, teacher=False)
    run["config"]["student"]["model"] = "resnet32"
    (setting,) = aggregate.group_runs([run])
    all_classes = setting.methods[0].mean("all")
    text = results_page.render_results([run], published())
    # No teacher was used, so the title names none.
    section = text.split("## cifar100, imbalance 100, resnet32\n")[1].split("\n## ")[0]
    row = line_of(section, "| balanced_softmax |")
    assert row.startswith(
        f"| balanced_softmax | 43.00–45.10 [S] | ? | {all_classes:.2f} |"
    )
    differences = f"all {all_classes - 43.0:+.2f} and {all_classes - 45.1:+.2f}."
    assert differences.replace("-", "−") in line_of(section, "Measured minus published")


def test_results_page_names_hyperparameters():
    runs = [fabricate("ltkd", classes=classes) for classes in (10, 100, 100)]
    runs[2]["config"]["method"]["alpha"] = 8.0
    text = results_page.render_results(runs, published())
    cifar100, cifar10 = (
        text.split(f"## {data}, imbalance 100, resnet32x4 → resnet8x4\n")[1]
        for data in ("cifar100", "cifar10")
    )
    # A label has what differs in its own section. Below are all hyperparameters.
    assert "| ltkd (alpha=1) | alpha=1, " in cifar100
    assert "| ltkd (alpha=8) | alpha=8, " in cifar100
    assert "| ltkd | alpha=1, " in cifar10.split("\n## ")[0]
    assert "temperature=4" in line_of(cifar10, "| ltkd | alpha=1, ")


def test_results_page_separates_hardware():
    runs = [fabricate("ce", 0), fabricate("ce", 1, device="2-core CPU")]
    runs[1]["timing"] = {"seconds": 61.0}
    text = results_page.render_results(runs, published())
    assert "| ce | NVIDIA H100 | tf32 | abc1234 | – | 0 | 1 h 12 min |" in text
    assert "| ce | 2-core CPU | tf32 | abc1234 | – | 1 | 1 min 01 s |" in text


def test_results_page_ignores_the_order_of_files():
    runs = runs_with({"ce": [30.0, 31.0], "kd": [32.0, 33.0]})
    runs += runs_with({"ce": [20.0], "kd": [21.0]}, classes=100)
    text = results_page.render_results(runs, published())
    assert text == results_page.render_results(runs[::-1], published())


def test_results_page_without_runs():
    text = results_page.render_results([], published())
    assert "not run yet" in line_of(text, "| ltkd |")
    assert "51.08 [S]" in text


def test_search_chooses_on_validation(tmp_path):
    queue = []
    runs = []
    for alpha, accuracy in ((1.0, 40.0), (4.0, 44.0), (8.0, None)):
        queue.append(
            {
                "config": "configs/cifar100lt.py:ltkd",
                # No result depends on the second key.
                "set": {"method.alpha": alpha, "checkpoint_every": 77},
                "group": "search",
            }
        )
        if accuracy is not None:
            groups = dict.fromkeys(GROUP_NAMES, accuracy)
            run = fabricate("ltkd", classes=100, group="search")
            run["validation"] = {"all": accuracy, "groups": groups}
            config = load_config("configs/cifar100lt.py:ltkd")
            config.method.alpha = alpha
            run["config"] = json.loads(config.to_json())
            runs.append(run)
    entries = planned(tmp_path, queue)
    text = results_page.render_results(runs, published(), entries)
    rows = []
    for line in text.split("## The search")[1].splitlines():
        if line.startswith("|") and "ltkd (" in line:
            rows.append(line)
    assert ["alpha=4" in row for row in rows] == [False, True, False]
    assert ["chosen" in row for row in rows] == [False, True, False]
    assert ["not run yet" in row for row in rows] == [False, False, True]
    assert "44.00" in rows[1]
    # A search is not a row of the other tables.
    assert "not run yet" in line_of(text, "| ltkd |")
    assert "to be widened" in text
    assert "alpha = 4 of 1, 4" in text
    runs[1]["validation"]["all"] = 30.0
    text = results_page.render_results(runs, published(), entries)
    assert "alpha = 1 of 1, 4" in text


def test_planned_run_is_not_another_one(tmp_path):
    """A run that differs in a hyperparameter does not count as the planned one."""
    config = load_config("configs/cifar100lt.py:kd")
    config.method.temperature = 2.0
    run = fabricate("kd", 1, classes=100, group="search")
    run["config"] = json.loads(config.to_json())
    run["validation"] = {"all": 40.0, "groups": {}}
    queue = [
        {"config": "configs/cifar100lt.py:kd", "group": "search"},
        {"config": "configs/cifar100lt.py:kd,temperature=2", "group": "search"},
        {
            "config": "configs/cifar100lt.py:bikd",
            "set": {"loss_weighting.lr": 0.01},
            "group": "search",
        },
    ]
    text = results_page.render_results([run], published(), planned(tmp_path, queue))
    search = text.split("## The search")[1].split("\n## ")[0]
    rows = [line for line in search.splitlines() if "resnet8x4 | " in line]
    assert [row.split(" | ")[1] for row in rows] == [
        "kd",
        "kd",
        "bikd (loss_weighting.lr=0.01)",
    ]
    # The first is the finished run, of another seed, which the second queue entry is.
    assert ["not run yet" in row for row in rows] == [False, True, True]


def test_planned_runs_by_length(tmp_path):
    names = ("ltkd", "kd,recipe=bikd", "bikd", "bikd,terms=ltkd")
    entries = planned(
        tmp_path, [{"config": f"configs/cifar100lt.py:{name}"} for name in names]
    )
    text = results_page.render_results([], published(), entries)
    start = text.index("## cifar100, imbalance 100, resnet32x4")
    section = text[start:].split("\n## ")[0]
    long, short = section.split("120 epochs:")
    assert "| ltkd |" in long
    assert "bikd" not in long.split("240 epochs:")[1]
    assert all(f"| {name} |" in short for name in ("kd", "bikd", "bikd over ltkd"))
