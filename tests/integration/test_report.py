"""Tests of reports on fabricated runs: what is read, the page, its figures and files, and the results page."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from helpers.fabricated import (
    NAMES,
    STRENGTH,
    Page,
    fabricate,
    learned,
    metrics_of,
    runs_of,
    save,
    sweep,
)

from experiments import report
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
    """Writes a page, which must parse; returns its text."""
    report_page.write_report(runs, folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    Page(text)
    return text


def hover_texts(folder, pattern):
    """Returns what a pointer shows in the only figure of that name."""
    (path,) = (folder / "report_files").glob(pattern)
    return [title.text for title in ElementTree.parse(path).iter(f"{SVG}title")]


# Reading.


def test_load_work_directory_and_file(tmp_path):
    run = fabricate("ltkd")
    loaded = load.load(save(tmp_path / "run", run))
    assert (
        loaded["finished"]
        and loaded["source"] == "run"
        and len(loaded["metrics"]) == 24
    )
    (tmp_path / "bare.json").write_text(json.dumps(run))
    (tmp_path / "unrelated.json").write_text('{"speed": 1}')
    assert load.load(tmp_path / "bare.json")["test"] == run["test"]
    assert len(load.find([tmp_path])) == 2


def test_unfinished_run_is_listed(tmp_path):
    save(tmp_path / "done", fabricate("ltkd"))
    (save(tmp_path / "going", fabricate("kd")) / "results.json").unlink()
    with (tmp_path / "going" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "epo')  # cut short
    runs = load.find([tmp_path])
    assert sorted(run["finished"] for run in runs) == [False, True]
    assert "unfinished: going (epoch 24)" in tables.console(runs)
    assert "Unfinished runs" in write(runs, tmp_path)


def without(*path):
    """Returns the text of a result file that lacks a key."""
    results = fabricate()
    parent = results
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return json.dumps(results)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{not json", "not readable as JSON"),
        ("[]", "config"),
        ("{}", "config"),
        (without("config", "data"), "config.data"),
        (without("content"), "content"),
        (without("test", "all"), "test accuracy"),
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
    "form, start",
    [("text", "Accuracy on"), ("markdown", "## Acc"), ("latex", r"% needs \use")],
)
def test_command_prints_only_tables(form, start, tmp_path, capsys):
    for i, run in enumerate(sweep(methods=("ce",), seeds=1)):
        save(tmp_path / f"runs/{i}", run)
    path = tmp_path / "page.html"
    report.main(
        [
            str(tmp_path / "runs"),
            f"--table={form}",
            f"--output={path}",
            "--title=A title",
        ]
    )
    out, err = capsys.readouterr()
    assert out.startswith(start) and "page.html" not in out and "page.html" in err
    assert "A title" in Page(path.read_text(encoding="utf-8")).text
    file = {"markdown": "tables.md", "latex": "tables.tex"}.get(form)
    assert file is None or (tmp_path / "page_files" / file).read_text() == out


@pytest.mark.parametrize(
    "words, message",
    [
        (["absent"], "absent: no such file"),
        (["empty"], "no runs in empty"),
        (["run", "--output=absent/page.html"], "absent/page"),
        (["run", "--output=run"], "run"),
        (["--results=empty", "--queue=absent.json"], "absent.json"),
    ],
)
def test_command_error(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "run", fabricate())
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        report.main(words)


# The page.


@pytest.mark.parametrize(
    "classes, seeds, teacher, shots",
    [(10, 1, True, False), (100, 3, True, True), (10, 3, False, True)],
)
def test_page_holds_every_number_and_figure(classes, seeds, teacher, shots, tmp_path):
    runs = []
    for method in ("ce", "ltkd"):
        for seed in range(seeds):
            run = fabricate(method, seed, classes=classes, teacher=teacher, shots=shots)
            runs.append(run | {"metrics": metrics_of(run, 20)})
    html = write(runs, tmp_path)
    parsed = Page(html)
    (setting,) = aggregate.gather(runs)
    for method in setting.methods:
        for column in tables.columns(setting).values():
            cell = tables.number(method.values(column).values())
            assert f"{cell.text} {cell.note}".strip() in parsed.text
            assert (cell.text == "–") == (
                not shots and column in ("shots.medium", "shots.few")
            )
    for title in (
        "Accuracy by class frequency",
        "Confusion between groups",
        "Training",
        "How it was run",
    ):
        assert title in parsed.text
    assert ("The teacher’s bias" in parsed.text) == teacher
    counts = {
        "scatter": 1,
        "curves": 2,
        "dots": (2 + teacher) * (classes == 100),
        "bias": 2 * teacher,
        "training": 6,
    }
    assert len(parsed.labels) == sum(counts.values()) and all(parsed.labels)
    assert ("±" in parsed.text.split("How it was run")[0].replace(tables.RULE, "")) == (
        seeds > 1
    )
    assert (
        "LTKD is reconstructed" in parsed.text
        and "abc1234" in parsed.text
        and "1 h 12 min" in parsed.text
    )
    assert re.search(r'title="ce: [\d.]+ % of head taken for medium"', html)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_page_is_small_reproducible_and_self_contained(tmp_path):
    names = [f"some species {c}" for c in range(100)]
    runs = [
        fabricate(method, seed, classes=100, class_names=names)
        for method in STRENGTH
        for seed in range(2)
    ]
    runs = [run | {"metrics": metrics_of(run)} for run in runs]
    (tmp_path / "again").mkdir()
    text = write(runs, tmp_path)
    assert text == write(runs, tmp_path / "again") and len(text.encode()) < 500_000
    for path in (tmp_path / "report_files").iterdir():
        assert (
            path.read_bytes()
            == (tmp_path / "again" / "report_files" / path.name).read_bytes()
        )
    assert "http" not in text.replace(
        "http://www.w3.org/", ""
    ) and "url(" not in text.replace("url(#", "")
    assert {"script", "link", "img"}.isdisjoint(Page(text).tags)
    assert (
        "#0100" not in text and "#0203" not in text
    )  # every stand-in colour became a variable


def test_hostile_strings_are_escaped(tmp_path):
    keys = ("source", "command", "device", "commit", "config_hash")
    run = fabricate("ltkd", classes=100, **dict.fromkeys(keys, HOSTILE))
    run["config"]["method"] |= {"name": HOSTILE, HOSTILE: HOSTILE}
    run["config"]["data"]["name"] = run["config"]["student"]["model"] = HOSTILE
    run["test"]["groups"] = {HOSTILE: 50.0, "medium": 40.0, "tail": 20.0}
    run |= {
        "class_names": [HOSTILE] * 100,
        "metrics": [
            record | {"terms": {HOSTILE: 1.0}} for record in metrics_of(run, 3)
        ],
    }
    unfinished = {"source": HOSTILE, "finished": False, "metrics": []}
    report_page.write_report([run, unfinished], tmp_path / "report.html", title=HOSTILE)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert "script" not in parsed.tags and "<script" not in text
    assert parsed.text.count('<script>alert("x")</script>') > 10
    for path in (tmp_path / "report_files").glob("*.svg"):
        ElementTree.parse(path)
    assert (
        "<script" not in results_page.render_results([run], published()).split("```")[0]
    )
    assert "\x1b" not in tables.console([unfinished])


def test_page_names_the_source_of_logits(tmp_path):
    runs = [
        fabricate("kd", teacher_logits="table"),
        fabricate("ltkd", teacher_logits="network"),
    ]
    text = write(runs, tmp_path)
    assert (
        "Teacher’s logits: kd from the table of all views; ltkd from the network in the step."
        in text
    )
    assert "network in the step" in results_page.render_results(runs, published())


def test_page_of_one_setting_has_no_comparison(tmp_path):
    text = write(sweep((100,), seeds=1), tmp_path)
    assert "side by side" not in text and text.count("Tail against head</h3>") == 1
    assert "Tail against head" not in write(sweep((100,), ("kd",)), tmp_path)


# Learned weights.


def test_learned_weights_are_drawn(tmp_path):
    text = write([learned(0), learned(1)], tmp_path)
    assert "weight of ce over the epochs: head, medium, tail" in text
    assert "weight of kd over student_ce and teacher_ce: 0.10 to 0.90" in text
    assert (
        text.count("Learned weights") == 1
        and ">bikd<" in text
        and "1,000 balanced ones beside them" in text
    )


@pytest.mark.parametrize(
    "weight_map", [{}, {"ce": [[0.5] * 3] * 3}], ids=["no map", "constant map"]
)
def test_learned_weights_without_metrics(weight_map, tmp_path):
    run = learned(metrics=[])
    run["loss_weighting"]["map"] = weight_map
    assert "Learned weights" in write([run], tmp_path)


# Figures.


def test_marks_show_their_numbers(tmp_path):
    text = write(sweep(), tmp_path)
    models = "cifar10-resnet32x4-resnet8x4"
    assert sorted(
        path.name for path in (tmp_path / "report_files").glob("settings_*.svg")
    ) == [
        f"settings_accuracy-on-all-classes-against-imbalance-{models}.svg",
        f"settings_accuracy-on-the-tail-against-imbalance-{models}.svg",
        "settings_tail-against-head-imbalance-10.svg",
        "settings_tail-against-head-imbalance-100.svg",
    ]
    all_classes = hover_texts(tmp_path, "settings_accuracy-on-all-*")
    expected = "ltkd, imbalance 100\nall classes 62.12 ± 0.18 %"
    assert expected in all_classes and expected in text
    assert len(all_classes) == 8  # of 3 methods and the teacher
    assert "kd, imbalance 10\nthe tail 25.25 ± 0.35 %" in hover_texts(
        tmp_path, "settings_accuracy-on-the-tail-*"
    )
    scatter = hover_texts(tmp_path, "settings_tail-against-head-imbalance-10.svg")
    assert (
        "ltkd, 2 runs\nhead 78.00 ± 0.00 %\ntail 30.25 ± 0.35 %" in scatter
        and len(scatter) == 4
    )


def test_hovers_are_where_the_marks_are():
    """The discs stand where Matplotlib drew the marks, also on a logarithmic axis."""
    (setting,) = aggregate.gather(sweep((100,)))
    (scatter,) = comparison.tail_against_head([setting])[-1].figures
    series = {"kd": {10.0: [50.0], 100.0: [30.0], 200.0: [20.0]}}
    curve = comparison.over_imbalance("all classes", series, {"kd": (1, figures.SOLID)})
    for figure, number in ((scatter, 4), (curve, 3)):
        marks = {
            (float(use.get("x")), float(use.get("y")))
            for use in figure.element.iter("use")
        }
        discs = {
            (float(disc.get("cx")), float(disc.get("cy")))
            for disc in figure.element.iter("circle")
        }
        assert len(discs) == number and discs <= marks


def test_imbalances_of_different_data_are_not_joined():
    def curves(runs):
        parts = comparison.section(aggregate.gather(runs)).parts
        drawn = [
            figure.name for part in parts for figure in getattr(part, "figures", ())
        ]
        return [name for name in drawn if "against imbalance" in name]

    names = curves([*sweep((10, 100), seeds=1), *sweep((50,), seeds=1, classes=100)])
    assert len(names) == 2 and all("cifar10, " in name for name in names)
    assert not curves([*sweep((10,), seeds=1), *sweep((50,), seeds=1, classes=100)])


def test_classes_show_names_and_numbers(tmp_path):
    runs = sweep(
        (100,), ("ce", "ltkd"), class_names=[f"<species & {c}>" for c in range(10)]
    )
    for run in runs:  # the most frequent class is the last
        run["class_counts"], run["group_assignment"] = (
            run["class_counts"][::-1],
            run["group_assignment"][::-1],
        )
    write(runs, tmp_path)
    texts = hover_texts(tmp_path, "*_test-accuracy-by-class.svg")
    (setting,) = aggregate.gather(runs)
    ce, ltkd = (
        setting_figures.mean_of(method, "per_class")[9] for method in setting.methods
    )
    assert len(texts) == 10
    assert texts[0].startswith(
        f"<species & 9>, 5,000 training images\nce  {ce:.1f} %\nltkd  {ltkd:.1f} %"
    )
    assert (
        texts[9].startswith("<species & 0>, 50 training images\n")
        and "\nteacher  " in texts[9]
    )
    assert (
        "head: mass 0.650, true share 0.300"
        in hover_texts(tmp_path, "*_mass-by-group-balanced-input.svg")[0]
    )


@pytest.mark.parametrize(
    "names, first",
    [(None, "class 0"), (["7", "8"] * 50, "class 7"), (["ant"], "class 0")],
)
def test_classes_without_names_are_numbered(names, first, tmp_path):
    write(sweep((100,), ("ce",), seeds=1, classes=100, class_names=names), tmp_path)
    texts = hover_texts(tmp_path, "*_test-accuracy-by-class-ce.svg")
    assert len(texts) == 100 and re.fullmatch(
        rf"ce  \d+\.\d %\n{first}, 500 training images", texts[0]
    )


# Files.


def test_figure_files_stand_alone(tmp_path):
    runs = [
        run | {"metrics": metrics_of(run, 12)}
        for run in sweep(methods=("ce", "ltkd"), seeds=1, classes=100)
    ]
    text = write(runs, tmp_path)
    paths = list((tmp_path / "report_files").glob("*.svg"))
    assert len(paths) == len(Page(text).labels) > 20
    for path in paths:
        content = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(content)
        assert (
            root.tag == f"{SVG}svg"
            and float(root.get("width")) >= 300
            and float(root.get("height")) >= 150
        )
        assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
        assert "Helvetica" in root.get("font-family")
        assert (
            "var(" not in content
            and "#0100" not in content
            and re.fullmatch(r"[\w.-]+\.svg", path.name)
        )
        # Each link goes to something in the file.
        ids = {element.get("id") for element in root.iter()}
        assert {
            link[1:] for link in re.findall(r'(?:href="|url\()(#\w+)', content)
        } <= ids
    (by_class,) = (tmp_path / "report_files").glob(
        "*imbalance-10-*_test-accuracy-by-class.svg"
    )
    root = ElementTree.parse(by_class).getroot()
    (legend,) = (group for group in root.iter(f"{SVG}g") if group.get("class") == "key")
    assert [label.text for label in legend.iter(f"{SVG}text")] == [
        "ce",
        "ltkd",
        "teacher",
    ]
    lowest = max(float(label.get("y")) for label in legend.iter(f"{SVG}text"))
    assert 350 < lowest < float(root.get("height"))
    assert '<g class="key"' not in text  # the page has its legends as HTML


def test_old_figures_are_removed(tmp_path):
    write(sweep(methods=("ce", "kd"), seeds=1), tmp_path)
    folder = tmp_path / "report_files"
    (folder / "own.svg").write_text("<svg/>")
    (folder / "notes.txt").write_text("own")
    before = {path.name for path in folder.iterdir()}
    write(sweep((100,), ("ce", "kd"), seeds=1), tmp_path)
    after = {path.name for path in folder.iterdir()}
    assert {"own.svg", "notes.txt", "tables.md", "tables.tex"} <= after
    assert after - before == {
        "cifar10-imbalance-100-resnet32x4-resnet8x4_tail-against-head.svg"
    }
    assert any("settings_" in name for name in before)
    assert not any("settings_" in name or "imbalance-10-" in name for name in after)


def test_page_without_figures_has_no_folder(tmp_path):
    page.write(tmp_path / "plain.html", "Plain", [page.Heading("Plain", 1)])
    assert (
        not (tmp_path / "plain_files").exists()
        and "Written beside" not in (tmp_path / "plain.html").read_text()
    )


# The results page.


def published():
    return load.read_json(results_page.PUBLISHED)


def row_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def planned(tmp_path, runs):
    path = tmp_path / "queue.txt"
    path.write_text(json.dumps({"runs": runs}))
    return report.planned_runs(path)


def test_published_numbers_are_marked():
    content = published()
    pair = next(
        entry for entry in content["settings"] if entry["teacher"] == "resnet32x4"
    )
    assert pair["methods"]["ltkd"] == {"all": [51.08, "S"], "tail": [27.21, "S"]}
    for entry in content["settings"]:
        for method in entry["methods"].values():
            assert all(
                value is None or value[1] in content["marks"]
                for value in method.values()
            )


def test_results_page_has_published_and_own_numbers(tmp_path):
    for seed in range(3):
        (tmp_path / f"b{seed}.json").write_text(
            json.dumps(fabricate("ltkd", seed, classes=100, group="table"))
        )
    queue = tmp_path / "queue.txt"
    runs = [
        {
            "config": "configs/cifar100lt.py:ltkd_bs,imbalance=100",
            "seeds": [0],
            "group": "table",
        }
    ]
    queue.write_text(json.dumps({"about": "x", "runs": runs}))
    report.main([f"--results={tmp_path}", "--queue", str(queue)])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (setting,) = aggregate.gather(load.find([tmp_path]))
    cell = tables.number(setting.methods[0].values("all").values())
    assert row_of(text, "| ltkd |").startswith(
        f"| ltkd | 51.08 [S] | 27.21 [S] | {cell.text} {cell.note} |"
    )
    assert row_of(text, "| teacher |").startswith("| teacher | ? | 15.28 [S] |")
    all_classes, tail = (
        setting.methods[0].mean(column) for column in ("all", "groups.tail")
    )
    distances = (
        f"ltkd: all {all_classes - 51.08:+.2f}, tail {tail - 27.21:+.2f}.".replace(
            "-", "−"
        )
    )
    assert (
        row_of(text, "Ours less the published")
        == f"Ours less the published, in points: {distances}"
    )
    assert row_of(text, "| ltkd_bs |").startswith(
        "| ltkd_bs | ? | ? | not run yet | not run yet |"
    )
    assert "not run yet" in row_of(text, "| dkd |")
    assert "reconstructed from descriptions" in text and "**[S]** second-hand" in text
    assert (
        "python -m experiments.main --config=configs/cifar100lt.py:ltkd,seed=0" in text
    )


def test_results_page_does_not_depend_on_the_order_of_files():
    runs = runs_of({"ce": [30.0, 31.0], "kd": [32.0, 33.0]}) + runs_of(
        {"ce": [20.0], "kd": [21.0]}, classes=100
    )
    assert results_page.render_results(
        runs, published()
    ) == results_page.render_results(runs[::-1], published())


def test_results_page_without_any_run():
    text = results_page.render_results([], published())
    assert "not run yet" in row_of(text, "| ltkd |") and "51.08 [S]" in text


def test_search_names_the_best_on_validation(tmp_path):
    runs, queue = [], []
    for alpha, accuracy in ((1.0, 40.0), (4.0, 44.0), (8.0, None)):
        queue.append(
            {
                "config": "configs/cifar100lt.py:ltkd",
                "set": {"method.alpha": alpha},
                "group": "search",
            }
        )
        if accuracy is not None:
            validation = {"all": accuracy, "groups": dict.fromkeys(NAMES, accuracy)}
            run = fabricate("ltkd", classes=100, group="search") | {
                "validation": validation
            }
            run["config"]["method"]["alpha"] = alpha
            runs.append(run)
    entries = planned(tmp_path, queue)
    text = results_page.render_results(runs, published(), entries)
    rows = [
        line
        for line in text.split("## The search")[1].splitlines()
        if line.startswith("|") and "ltkd (" in line
    ]
    assert (
        ["alpha=4" in row for row in rows]
        == ["chosen" in row for row in rows]
        == [False, True, False]
    )
    assert ["not run yet" in row for row in rows] == [False, False, True]
    assert "44.00" in rows[1] and "not run yet" in row_of(
        text, "| ltkd |"
    )  # a search is no row of the tables
    assert "to be widened" in text and "alpha = 4 of 1, 4" in text
    runs[1]["validation"]["all"] = 30.0
    assert "alpha = 1 of 1, 4" in results_page.render_results(
        runs, published(), entries
    )


def test_planned_runs_have_a_table_for_each_length(tmp_path):
    names = ("ltkd", "kd,recipe=bikd", "bikd", "bikd,terms=ltkd")
    entries = planned(
        tmp_path, [{"config": f"configs/cifar100lt.py:{name}"} for name in names]
    )
    text = results_page.render_results([], published(), entries)
    section = text[text.index("## cifar100, imbalance 100, resnet32x4") :].split(
        "\n## "
    )[0]
    long, short = section.split("120 epochs:")
    assert "| ltkd |" in long and "bikd" not in long.split("240 epochs:")[1]
    assert all(f"| {name} |" in short for name in ("kd", "bikd", "bikd over ltkd"))
