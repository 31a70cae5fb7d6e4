"""Tests of the report on fabricated runs: the statistics against numbers worked out by hand, then what is written."""

import json
import math
import shutil
import subprocess

import pytest
from helpers.fabricated import NAMES, STRENGTH, Page, comparison, fabricate, learned, metrics_of, save
from matplotlib import image

from experiments import report
from experiments.reporting import figures, results_page, tables


def page_of(runs, tmp_path):
    report.write_page(runs, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


# Statistics, worked out by hand.


def test_mean_and_sample_deviation():
    assert tables.mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)  # (4 + 1 + 9) / 2
    assert tables.mean_std([5.0]) == (5.0, None, 1)
    assert tables.mean_std([]) == (None, None, 0)


def test_paired_standard_error():
    # Differences 2, 3, 7: mean 4, sample variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3) = 1.5275.
    found = tables.paired({0: 12.0, 1: 23.0, 2: 17.0}, {0: 10.0, 1: 20.0, 2: 10.0})
    assert (found.mean, found.n, found.verdict) == (4.0, 3, "better")
    assert found.error == pytest.approx(1.5275, abs=1e-4)


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ({0: 10.0, 1: 12.0}, {0: 9.0, 1: 10.0}, "better"),  # 1, 2: mean 1.5 > 2 · 0.5
        ({0: 9.0, 1: 10.0}, {0: 10.0, 1: 12.0}, "worse"),
        ({0: 11.0, 1: 13.0}, {0: 10.0, 1: 10.0}, "not distinguishable"),  # 1, 3: mean 2 = 2 · 1, not above
        ({0: 50.0, 1: 10.0}, {0: 40.0, 1: 15.0}, "not distinguishable"),
        ({0: 90.0}, {0: 10.0}, "not distinguishable"),  # one seed says nothing
        ({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0}, "not distinguishable"),  # no shared seed
    ],
)
def test_verdict(ours, theirs, verdict):
    assert tables.paired(ours, theirs).verdict == verdict


def test_lower_is_better_turns_the_verdict():
    ours, theirs = {0: 5.0, 1: 6.0}, {0: 9.0, 1: 9.5}
    assert tables.paired(ours, theirs).verdict == "worse"
    assert tables.paired(ours, theirs, lower_is_better=True).verdict == "better"


def test_pairing_is_by_seed_and_ignores_what_only_one_has():
    found = tables.paired({0: 1.0, 1: 5.0, 7: 99.0}, {1: 2.0, 0: 0.0, 8: -99.0})
    assert (found.n, found.mean) == (2, 2.0)


# Gathering.


def test_seeds_are_one_row_and_hyperparameters_are_not():
    runs = [fabricate("ltkd", seed) for seed in (0, 1)]
    other = fabricate("ltkd", 0)
    other["config"]["method"]["alpha"] = 4.0
    (setting,) = tables.gather([*runs, other])
    assert {method.label: len(method.runs) for method in setting.methods} == {"ltkd (alpha=1)": 2, "ltkd (alpha=4)": 1}


def test_rows_of_a_name_are_in_the_order_of_their_numbers():
    runs = [fabricate("ltkd", 0) for _ in range(3)]
    for run, alpha in zip(runs, (16.0, 0.5, 2.0)):
        run["config"]["method"]["alpha"] = alpha
    (setting,) = tables.gather(runs)
    assert [method.label[12:-1] for method in setting.methods] == ["0.5", "2", "16"]


def test_the_same_run_twice_counts_once():
    run = fabricate("kd", 0)
    elsewhere = json.loads(json.dumps(run))
    elsewhere["config"]["teacher"]["cache"] = "elsewhere"
    (setting,) = tables.gather([run, elsewhere])
    assert [len(method.runs) for method in setting.methods] == [1]


def test_splits_lengths_and_data_are_kept_apart():
    split = fabricate("kd", 0)
    split["seeds"]["split"] = 1
    runs = [fabricate("kd", 0), split, fabricate("kd", 0, epochs=60), fabricate("kd", 0, classes=100)]
    assert len(tables.gather(runs)) == 4


def test_a_method_without_a_teacher_stands_beside_the_others():
    alone = fabricate("ce", 0, teacher=False)
    alone["config"]["teacher"] = None
    (setting,) = tables.gather([alone, fabricate("kd", 0)])
    assert [method.label for method in setting.methods] == ["ce", "kd"]


def test_label_names_seeds_split_and_teachers():
    (setting,) = tables.gather(comparison({"kd": [40.0, 41.0]}))
    assert "student seeds, one split (split seed 0)" in setting.note()
    runs = comparison({"kd": [40.0, 41.0]})
    runs[0]["teacher"]["hash"] = "another"
    assert "2 teachers" in tables.gather(runs)[0].note()


# What is said.


def test_console_has_deviations_and_verdicts():
    text = tables.console(comparison({"ce": [30.0, 32.0, 31.0], "kd": [31.0, 31.5, 31.2], "ltkd": [40.0, 43.0, 41.0]}))
    assert "41.33 ± 1.53" in text and "31.00 ± 1.00" in text
    assert "better than ce and kd" in text  # ltkd, by about 10
    assert "+0.23 ± 0.43 not distinguishable n = 3" in text  # kd against ce: 1, −0.5, 0.2


def test_one_seed_shows_no_deviation_and_claims_nothing():
    text = tables.console(comparison({"ce": [30.0], "ltkd": [60.0]}))
    assert "no difference can be told from chance" in text
    assert "+30.00 not distinguishable n = 1" in text
    assert "±" not in text


def test_bold_only_where_it_is_clear():
    def bold(numbers):
        (setting,) = tables.gather(comparison(numbers))
        return [row[0].text for row in tables.accuracy_table(setting).cells() if row[1].bold]

    assert bold({"ce": [30.0, 31.0], "ltkd": [40.0, 41.5]}) == ["ltkd"]
    assert bold({"ce": [30.0, 40.0], "ltkd": [40.0, 31.0]}) == []
    assert bold({"ltkd": [40.0, 41.0]}) == []


# Reading.


def test_load_work_directory_and_bare_file(tmp_path):
    run = fabricate("ltkd")
    loaded = report.load(save(tmp_path / "run", run))
    assert loaded["finished"] and loaded["source"] == "run" and len(loaded["metrics"]) == 24
    (tmp_path / "bare.json").write_text(json.dumps(run))
    assert report.load(tmp_path / "bare.json")["test"] == run["test"]
    assert len(report.find([tmp_path])) == 2


def test_unfinished_run_is_listed(tmp_path):
    save(tmp_path / "done", fabricate("ltkd"))
    (save(tmp_path / "going", fabricate("kd")) / "results.json").unlink()
    with (tmp_path / "going" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "epo')  # cut short
    runs = report.find([tmp_path])
    assert sorted(run["finished"] for run in runs) == [False, True]
    assert "unfinished: going (epoch 24)" in tables.console(runs)
    assert "Unfinished runs" in page_of(runs, tmp_path).text


@pytest.mark.parametrize("content, said", [("{not json", "not readable as JSON"), ("[]", "config"), ("{}", "config")])
def test_damaged_file_is_named(tmp_path, content, said):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text(content)
    with pytest.raises(report.ReportError, match=f"results.json.*{said}"):
        report.load(tmp_path / "broken")
    with pytest.raises(SystemExit, match="results.json"):
        report.main([str(tmp_path), "--out", str(tmp_path / "page.html")])


@pytest.mark.parametrize(
    "key, value",
    [
        ("class_counts", [0, 0]),
        ("class_counts", "x"),
        ("class_names", 5),
        ("teacher", "x"),
        ("seeds", {"student": "a"}),
    ],
)
def test_a_result_that_no_run_writes_is_named(tmp_path, key, value):
    (tmp_path / "odd.json").write_text(json.dumps({**fabricate(), key: value}))
    with pytest.raises(report.ReportError, match=f"odd.json: not a result file, its '{key}'"):
        report.load(tmp_path / "odd.json")


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    save(tmp_path / "run", fabricate())
    for out in ("absent/page.html", "run"):
        with pytest.raises(SystemExit, match="error: .*"):
            report.main([str(tmp_path / "run"), "--out", str(tmp_path / out)])


def test_damaged_metrics_line_is_named(tmp_path):
    save(tmp_path / "run", fabricate())
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n{broken\n{}\n")
    with pytest.raises(report.ReportError, match="metrics.jsonl, line 2"):
        report.load(tmp_path / "run")


def test_no_such_path():
    with pytest.raises(report.ReportError, match="no such file"):
        report.load("not/here")


# The page.


@pytest.mark.parametrize(
    "classes, seeds, teacher, shots", [(10, 1, True, False), (100, 3, True, True), (10, 3, False, True)]
)
def test_page_holds_every_number_and_figure(tmp_path, classes, seeds, teacher, shots):
    methods = ("ce", "ltkd")
    runs = [
        fabricate(method, seed, classes=classes, teacher=teacher, shots=shots)
        for method in methods
        for seed in range(seeds)
    ]
    runs = [run | {"source": "x", "finished": True, "metrics": metrics_of(run, 20)} for run in runs]
    page = page_of(runs, tmp_path)
    (setting,) = tables.gather(runs)
    for method in setting.methods:
        for _, column in tables.columns(setting):
            cell = tables.number(method.values(column).values())
            assert f"{cell.text} {cell.note}".strip() in page.text
            assert (cell.text == "–") == (not shots and column in ("shots.medium", "shots.few"))
    titles = ["Accuracy by class frequency", "Confusion between groups", "Training", "How it was run"]
    assert all(title in page.text for title in titles)
    assert ("The teacher’s bias" in page.text) == teacher
    drawn = (
        1 + 2 + (2 + teacher) * (classes == 100) + 2 * teacher + 4 + 2
    )  # scatter, curves, dots, bias, training, terms
    assert len(page.labels) == drawn and all(page.labels)
    assert ("±" in page.text.split("How it was run")[0].replace(tables.RULE, "")) == (seeds > 1)
    assert "LTKD is reconstructed" in page.text and "abc1234" in page.text and "1 h 12 min" in page.text
    assert {"script", "link", "img"}.isdisjoint(page.tags)


def test_page_is_the_same_twice_light_and_self_contained(tmp_path):
    runs = [fabricate(method, seed, classes=100) for method in STRENGTH for seed in range(3)]
    runs = [run | {"source": "x", "finished": True, "metrics": metrics_of(run)} for run in runs]
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write_page(runs, tmp_path / name / "report.html", title="A comparison")
        pages.append((tmp_path / name / "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "report_files").iterdir()} for name in "ab"]
    assert files[0] == files[1] and len(files[0]) > 10
    assert len(pages[0].encode()) < 1_000_000
    assert "A comparison" in Page(pages[0]).text
    without_namespaces = pages[0].replace("http://www.w3.org/", "")
    assert "http" not in without_namespaces and "url(" not in without_namespaces.replace("url(#", "")
    assert "#0101" not in pages[0] and "#0203" not in pages[0]  # every stand-in colour became a variable


def test_ids_are_unique_unless_figures_are_equal(tmp_path):
    runs = [run | {"metrics": metrics_of(run, 20)} for run in comparison({"ce": [30.0], "ltkd": [40.0]}, classes=100)]
    ids = page_of(runs, tmp_path).ids
    assert len(ids) == len(set(ids))


HOSTILE = '<script>alert("x")</script>&$\\frac|`'


def test_hostile_strings_are_escaped(tmp_path):
    run = fabricate("ltkd", classes=100) | {"source": HOSTILE, "finished": True}
    run |= {"command": HOSTILE, "device": HOSTILE, "commit": HOSTILE, "config_hash": HOSTILE}
    run["config"]["method"] |= {"name": HOSTILE, HOSTILE: HOSTILE}
    run["config"]["data"]["name"] = run["config"]["student"]["model"] = HOSTILE
    run["test"]["groups"] = {HOSTILE: 50.0, "medium": 40.0, "tail": 20.0}
    run["metrics"] = [entry | {"terms": {HOSTILE: 1.0}} for entry in metrics_of(run, 3)]
    report.write_page(
        [run, {"source": HOSTILE, "finished": False, "metrics": []}], tmp_path / "page.html", title=HOSTILE
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count('<script>alert("x")</script>') > 10
    rendered = results_page.render_results([run], published())
    assert "<script" not in rendered.split("```")[0]
    assert "\x1b" not in tables.console([run | {"source": "\x1b[31m", "finished": False}])


# The results page.


def published():
    return json.loads(results_page.PUBLISHED.read_text(encoding="utf-8"))


def test_published_numbers_are_marked():
    content = published()
    pair = next(entry for entry in content["settings"] if entry["teacher"] == "resnet32x4")
    assert pair["methods"]["ltkd"] == {"all": [51.08, "S"], "tail": [27.21, "S"]}
    values = [
        value for entry in content["settings"] for method in entry["methods"].values() for value in method.values()
    ]
    assert all(value is None or value[1] in content["marks"] for value in values)


def row_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_results_page_puts_published_beside_ours(tmp_path):
    for seed in range(3):
        (tmp_path / f"b{seed}.json").write_text(json.dumps(fabricate("ltkd", seed, classes=100, group="table")))
    (tmp_path / "unrelated.json").write_text('{"speed": 1}')
    queue = tmp_path / "queue.json.txt"
    runs = [{"config": "configs/cifar100lt.py:ltkd_bs,imbalance=100", "seeds": [0], "group": "table"}]
    queue.write_text(json.dumps({"about": "x", "runs": runs}))
    text = results_page.write_results(tmp_path, [queue]).read_text(encoding="utf-8")
    (setting,) = tables.gather(report.find([tmp_path]))
    ours = tables.number(setting.methods[0].values("all").values())
    assert row_of(text, "| ltkd |").startswith(f"| ltkd | 51.08 [S] | 27.21 [S] | {ours.text} {ours.note} |")
    assert row_of(text, "| teacher |").startswith("| teacher | ? | 15.28 [S] |")
    all_, tail = (setting.methods[0].mean(column) for column in ("all", "groups.tail"))
    less = f"ltkd: all {all_ - 51.08:+.2f}, tail {tail - 27.21:+.2f}.".replace("-", "−")
    assert row_of(text, "Ours less the published") == f"Ours less the published, in points: {less}"
    assert row_of(text, "| ltkd_bs |").startswith("| ltkd_bs | ? | ? | not run yet | not run yet |")
    assert "not run yet" in row_of(text, "| dkd |")
    assert "reconstructed from descriptions" in text and "**[S]** second-hand" in text
    assert "python -m experiments.main --config=configs/cifar100lt.py:ltkd,seed=0" in text
    assert results_page.write_results(tmp_path, [queue]).read_text(encoding="utf-8") == text


def test_results_page_does_not_depend_on_the_order_of_files():
    runs = [
        fabricate(method, seed, classes=classes) for method in ("ce", "kd") for seed in (0, 1) for classes in (10, 100)
    ]
    assert results_page.render_results(runs, published()) == results_page.render_results(runs[::-1], published())


def test_results_page_without_any_run_says_so():
    text = results_page.render_results([], published())
    assert "not run yet" in row_of(text, "| ltkd |") and "51.08 [S]" in text


def test_search_names_the_chosen_by_validation_accuracy(tmp_path):
    runs, queue = [], {"runs": []}
    for alpha, accuracy in ((1.0, 40.0), (4.0, 44.0), (8.0, None)):
        entry = {"config": "configs/cifar100lt.py:ltkd", "set": {"method.alpha": alpha}, "group": "search"}
        queue["runs"].append(entry)
        if accuracy is not None:
            run = fabricate("ltkd", 0, classes=100, group="search")
            run["config"]["method"]["alpha"] = alpha
            run["validation"] = {"all": accuracy, "groups": dict.fromkeys(NAMES, accuracy)}
            runs.append(run)
    path = tmp_path / "queue.json"
    path.write_text(json.dumps(queue))
    text = results_page.render_results(runs, published(), results_page.planned_cells(path))
    lines = [line for line in text.split("## The search")[1].splitlines() if line.startswith("|") and "ltkd (" in line]
    assert [("alpha=4" in line, "chosen" in line, "not run yet" in line) for line in lines] == [
        (False, False, False),
        (True, True, False),
        (False, False, True),
    ]
    assert "44.00" in lines[1] and "not run yet" in row_of(text, "| ltkd |")  # a search is no entry of the table
    assert "to be widened" in text and "alpha = 4 of 1, 4" in text
    runs[1]["validation"]["all"] = 30.0
    text = results_page.render_results(runs, published(), results_page.planned_cells(path))
    assert "alpha = 1 of 1, 4" in text


def test_command_writes_a_page(tmp_path, capsys):
    save(tmp_path / "runs" / "one", fabricate("ltkd"))
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out.html"), "--title", "Mine"])
    assert "ltkd classifies" in capsys.readouterr().out
    assert "Mine" in Page((tmp_path / "out.html").read_text(encoding="utf-8")).text


def test_styles_tell_rows_apart():
    methods = [tables.Method(name, name, {}) for name in tables.ORDER] + [tables.Method("ltkd", "ltkd (alpha=4)", {})]
    found = figures.styles(methods)
    assert len({str(style) for style in found.values()}) == len(found)


@pytest.mark.slow
def test_screenshot(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine")
    report.write_page(comparison({"ce": [30.0, 31.0], "ltkd": [40.0, 41.0]}, classes=100), tmp_path / "page.html")
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    options = ["--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    command = [browser, *options, "--window-size=1000,1600", f"--screenshot={shot}", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (1600, 1000)
    assert 0.02 < (abs(pixels - pixels[0, 0]).max(-1) > 0.2).mean() < 0.5  # neither empty nor black


def test_learned_weights_are_drawn(tmp_path):
    report.write_page([learned(0), learned(1)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for label in (
        "weight of ce over the epochs: head, medium, tail",
        "weight of kd over student_ce and teacher_ce: 0.10 to 0.90",
    ):
        assert label in page
    assert page.count("Learned weights") == 1 and ">bikd<" in page
    assert "1,000 balanced ones beside them" in tables.gather([learned()])[0].note()


def test_no_map_and_no_metrics_are_no_error(tmp_path):
    told = {"weights": {"ce": dict.fromkeys(NAMES, 0.5)}, "features": {"ce": dict.fromkeys(NAMES, 0.5)}}
    report.write_page([learned(weighting=told, metrics=[])], tmp_path / "report.html")
    assert "Learned weights" in (tmp_path / "report.html").read_text()
    report.write_page([fabricate("kd") | {"finished": True, "source": "x"}], tmp_path / "report.html")
    assert "Learned weights" not in (tmp_path / "report.html").read_text()


def test_a_constant_map_is_no_error(tmp_path):
    run = learned()
    run["weighting"]["map"] = {"ce": [[0.5] * 3] * 3}
    report.write_page([run], tmp_path / "report.html")


def test_planned_rows_stand_with_their_own_recipe(tmp_path):
    """The same pair by 240 and by 120 epochs: each length has its own table of what is not yet run."""
    path = tmp_path / "queue.json"
    names = ("ltkd", "kd,recipe=bikd", "bikd", "bikd,terms=ltkd")
    runs = [{"config": f"configs/cifar100lt.py:{name}"} for name in names]
    path.write_text(json.dumps({"runs": runs}))
    text = results_page.render_results([], published(), results_page.planned_cells(path))
    section = text[text.index("## cifar100, imbalance 100, resnet32x4") :].split("\n## ")[0]
    long, short = section.split("120 epochs:")
    assert "| ltkd |" in long and "bikd" not in long.split("240 epochs:")[1]
    assert all(f"| {name} |" in short for name in ("kd", "bikd", "bikd over ltkd"))


def test_what_is_off_in_one_config_tells_it_from_another(tmp_path):
    """A part that a config leaves out is off in it, and the report says where the teacher's logits came from."""
    plain, mixed = fabricate("kd"), fabricate("kd")
    mixed["config"]["augment"] = {"policy": "none", "cutout": 16, "mixup": 0.0}
    plain["teacher_logits"], mixed["teacher_logits"] = "table", "network"
    (setting,) = tables.gather([plain, mixed])
    assert [method.label for method in setting.methods] == ["kd", "kd (cutout=16)"]
    report.write_page([plain, mixed], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Teacher’s logits: kd from the table of all views; kd (cutout=16) from the network in the step." in page
    assert "network in the step" in results_page.render_results([mixed], report.read(results_page.PUBLISHED))


def test_a_set_that_was_not_drawn_by_imbalance_is_a_setting_of_its_own():
    drawn, whole, listed = fabricate("kd"), fabricate("kd"), fabricate("kd")
    whole["config"]["data"]["subset"], listed["config"]["data"]["subset"] = "all", "list 0123456789ab"
    whole["class_counts"] = [40, 30, 16]
    titles = {setting.title for setting in tables.gather([drawn, whole, listed])}
    assert titles == {
        "cifar10, imbalance 100, resnet32x4 → resnet8x4",
        "cifar10 (all), imbalance 2.5, resnet32x4 → resnet8x4",
        "cifar10 (list 0123456789ab), imbalance 100, resnet32x4 → resnet8x4",
    }
