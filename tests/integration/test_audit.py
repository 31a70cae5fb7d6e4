"""Tests of the audit of logits files: its record, sentences, page, and errors."""

import html
import json
import re

import numpy as np
import pytest

from experiments import runtime
from experiments.audit import __main__ as command
from experiments.audit import inputs, run, summary
from ltkd_jax.data import logits
from ltkd_jax.groups import ClassGroups

COUNTS = [50, 40, 30, 20, 10, 5]
LABELS = np.repeat(np.arange(6), 10)


def write(path, classes=6, examples_per_class=10, seed=0, **arrays):
    """Writes logits of a model that prefers the first classes, and returns the path.

    Of the other arrays, those that are None are left out.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), examples_per_class)
    noise = rng.normal(size=(len(labels), classes))
    z = noise + 3 * np.eye(classes)[labels] - 0.1 * np.arange(classes)
    arrays = {"logits": z.astype(np.float32), "labels": labels, **arrays}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **arrays)
    return str(path)


def record_of(z):
    """Returns the record of logits of 10 examples of each of 6 classes."""
    model = inputs.Model("model", "model.npz", logits.from_arrays(z, LABELS))
    counts = np.asarray(COUNTS, float)
    groups = ClassGroups.from_counts(counts)
    return run.build_record(model, None, counts, "as counted", groups, 4.0)


# What an audit says.


def test_uniform_model():
    record = record_of(np.zeros((60, 6)))
    (model,) = record["inputs"][0]["models"]
    third = {"head": 1 / 3, "medium": 1 / 3, "tail": 1 / 3}
    assert model["mass"]["1"] == pytest.approx(third)
    tail = model["groups"]["tail"]
    assert tail["inter"] == pytest.approx(np.log(3), rel=1e-6)
    assert tail["intra"] == pytest.approx(np.log(2), rel=1e-6)
    headline = summary.headline(record)
    assert "every group its share" in headline
    assert "loses most" not in headline


def test_model_of_the_prior():
    counts = np.array(COUNTS, float)
    record = record_of(np.tile(np.log(counts), (60, 1)))
    (model,) = record["inputs"][0]["models"]
    assert model["mass"]["1"] == pytest.approx(record["training"], rel=1e-5)
    ratios = [summary.mass_ratio(model["classes"], c) for c in range(6)]
    np.testing.assert_allclose(ratios, 6 * counts / counts.sum(), rtol=1e-5)
    assert model["classes"]["to"] == [1, 0, 0, 0, 0, 0]
    assert model["between"] == [[100, 0, 0]] * 3
    # The loss on tail classes is −log(5/155) or −log(10/155), of which −log(15/155) is
    # about the group.
    loss = np.log(155 / 5) + np.log(155 / 10)
    percent = 100 * 2 * np.log(155 / 15) / loss
    headline = summary.headline(record)
    for text in (
        "head classes 0.58",
        "0.33 is fair",
        "tail classes 0.10",
        "Class 5",
        "0.19",
        f"{percent:.0f} %",
    ):
        assert text in headline


# The command, of files.


def headings(page):
    return {html.unescape(heading) for heading in re.findall("<h2>(.*?)</h2>", page)}


SECTIONS = {
    "Group mass",
    "Wrong group, or wrong class within it",
    "Calibration by group",
    "Confusion between groups",
}


@pytest.fixture
def main(monkeypatch):
    """The command, which does not change the settings of the process."""
    monkeypatch.setattr(runtime, "initialize", lambda: None)
    return command.main


def test_two_models(main, tmp_path, capsys):
    teacher = write(tmp_path / "resnet<50>.npz", 40, 4)
    student = write(tmp_path / "student.npz", 40, 4, seed=1)
    output = tmp_path / "audit.html"
    main(
        [
            f"--logits={teacher}",
            f"--compare={student}",
            "--imbalance=100",
            "--temperature=2",
            f"--output={output}",
        ]
    )
    record = json.loads((tmp_path / "audit.json").read_text())
    # The record has all that is printed.
    assert summary.as_text(record) in capsys.readouterr().out
    assert record["temperatures"] == ["1", "2"]
    assert np.bincount(record["groups"]["assignment"]).tolist() == [13, 14, 13]
    page = output.read_text()
    assert headings(page) == SECTIONS | {
        "Between the two models",
        "Which classes resnet<50> takes mass from",
    }
    assert "All 40 classes" in page
    assert "exponential with imbalance 100" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_training_input_and_names(tmp_path):
    training_labels = np.repeat(np.arange(6), COUNTS)
    path = write(
        tmp_path / "x.npz",
        labels=LABELS % 5,
        class_names=np.array(["apple", "bee", "<b>cat</b>", "d", "e", "f"], "S"),
        train_logits=np.eye(6)[training_labels] * 9,
        train_labels=training_labels,
    )
    record = run.run(path, temperature=1.0, output=tmp_path / "a.html")
    assert record == json.loads((tmp_path / "a.json").read_text())
    assert record["class_counts"] == COUNTS
    assert record["temperatures"] == ["1"]
    test, training = record["inputs"]
    assert test["title"] == "this input"
    assert training["title"] == "training input"
    assert training["share"] == pytest.approx(record["training"])
    page = (tmp_path / "a.html").read_text()
    assert "1 classes have none" in page
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page


def test_two_classes(main, tmp_path, capsys):
    path = write(tmp_path / "x.npz", classes=2, class_counts=[5, 50])
    main([f"--logits={path}", f"--output={tmp_path / 'a.html'}"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["groups"] == {"names": ["head", "tail"], "assignment": [1, 0]}
    with pytest.raises(SystemExit, match="--groups=0.2,0.3,0.5: fractions=.* 2 class"):
        main([f"--logits={path}", "--groups=0.2,0.3,0.5"])


def test_group_without_examples(tmp_path):
    path = write(tmp_path / "x.npz", labels=LABELS % 4, class_counts=COUNTS)
    record = run.run(path, output=tmp_path / "a.html")
    rows = []
    for line in summary.as_text(record).splitlines():
        cells = line.split()
        if cells[:2] == ["tail", "0"]:
            rows.append(cells[2:])
    # Of loss and calibration.
    assert rows == [["–"] * 4, ["–"] * 5]
    page = (tmp_path / "a.html").read_text()
    assert headings(page) > SECTIONS
    assert "predictions of x" in page


def test_counts_of_a_file(tmp_path):
    examples = logits.from_arrays(np.zeros((60, 6)), LABELS)
    model = inputs.Model("model", "model.npz", examples, class_counts=np.ones(6))
    np.save(tmp_path / "a.npy", COUNTS)
    (tmp_path / "a.json").write_text(json.dumps(COUNTS))
    (tmp_path / "b.json").write_text(json.dumps({"class_counts": COUNTS}))
    (tmp_path / "line.txt").write_text("50 40 30 20 10 5\n")
    (tmp_path / "line.csv").write_text("50, 40,30,20,10,5")
    (tmp_path / "column.txt").write_text("\ufeff50\n40\n\n30.0\n20\n10\n5\n", "utf-8")
    for path in tmp_path.iterdir():
        counts, origin = inputs.class_counts(model, str(path), None)
        assert counts.tolist() == COUNTS
        assert path.name in origin


def test_counts_of_a_model():
    balanced = logits.from_arrays(np.zeros((60, 6)), LABELS)
    model = inputs.Model("model", "model.npz", balanced, class_counts=np.array(COUNTS))
    assert inputs.class_counts(model, None, None)[0].tolist() == COUNTS
    assert inputs.class_counts(model, None, "4,8")[0].tolist() == [8, 6, 4, 3, 2, 2]
    labels = np.repeat(np.arange(6), range(1, 7))
    long_tailed = logits.from_arrays(np.zeros((21, 6)), labels)
    for model in (
        inputs.Model("m", "m.npz", balanced, long_tailed),
        inputs.Model("m", "m.npz", long_tailed),
    ):
        assert inputs.class_counts(model, None, None)[0].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(inputs.AuditError, match="give --counts"):
        inputs.class_counts(inputs.Model("m", "m.npz", balanced), None, None)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "1,100\n2,50\n3,20"),
        ("a.csv", "class,images\n1,100\n2,50"),
        ("a.txt", "0 100\n1 50\n2 20\n"),
        ("a.txt", "50 40\n30 20\n10 5"),
        ("a.txt", "1,100 50 20 10 5"),
        ("a.json", "[[1, 100], [2, 50], [3, 20]]"),
        ("a.json", '{"class_counts": {"1": 100, "2": 50}}'),
        ("a.json", '{"1": 100, "2": 50}'),
        ("a.json", '["1,100", 1, 1, 1, 1, 1]'),
        ("a.json", "[true, true, true, true, true, true]"),
    ],
)
def test_counts_that_are_no_list(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    examples = logits.from_arrays(np.zeros((60, 6)), LABELS)
    model = inputs.Model("model", "model.npz", examples)
    with pytest.raises(inputs.AuditError, match=name):
        inputs.class_counts(model, str(tmp_path / name), None)


@pytest.mark.parametrize(
    "array", [np.ones((3, 2)), np.ones((6, 1)), np.ones(6, bool), np.ones(6, complex)]
)
def test_counts_that_are_no_vector_of_numbers(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    examples = logits.from_arrays(np.zeros((60, 6)), LABELS)
    model = inputs.Model("model", "model.npz", examples)
    with pytest.raises(inputs.AuditError, match="a.npy: class_counts must be"):
        inputs.class_counts(model, str(tmp_path / "a.npy"), None)


# Errors.

ERRORS = {
    "--logits=absent.npz": "absent.npz cannot be read",
    "--logits=softmax.npz": "so they are probabilities: name the array probabilities",
    "--logits=zero.npz": "must be positive and finite; classes [5] have [0.0]",
    "--logits=names.npz": "names.npz: class_names[1]=b'b\\xe9e' is not UTF-8",
    "--logits=counts.npz": "class_counts is [5], the logits are of 6 classes",
    "--logits=train.npz": "the training input has 5 classes, the other 6",
    "--logits=good.npz --compare=other.npz": "--compare: row 0 has label 1",
    "--logits=good.npz --counts=good.npz": "--counts=good.npz can't be read",
    "--logits=good.npz --counts=gone.json": "--counts=gone.json can't be read",
    "--logits=good.npz --imbalance=0.5": (
        "--imbalance=0.5: imbalance=0.5: give a ratio >= 1"
    ),
    "--logits=good.npz --imbalance=x": "give GAMMA or GAMMA,N_MAX",
    "--logits=good.npz --groups=0.5,0.6": (
        "--groups=0.5,0.6: fractions=[0.5, 0.6] must be positive and sum to 1"
    ),
    "--logits=good.npz --groups=0.9,0.05,0.05": "groups ['tail'] would be empty",
    "--logits=good.npz --output=no/such/a.html": "--output=no/such/a.html",
    "--logits=good.npz --output=a.json": "its name ending in .html",
    "--logits=good.npz --output=results.html": "results.json exists and is no audit's",
    "--checkpoint=.": "has no config.json",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "good.npz", class_counts=COUNTS)
    write(folder / "other.npz", labels=(LABELS + 1) % 6)
    write(folder / "zero.npz", class_counts=[*COUNTS[:-1], 0])
    write(folder / "softmax.npz", class_counts=COUNTS, logits=np.full((60, 6), 1 / 6))
    write(folder / "counts.npz", class_counts=COUNTS[:-1])
    names = [name.encode("latin-1") for name in ("ant", "bée", "c", "d", "e", "f")]
    write(folder / "names.npz", class_counts=COUNTS, class_names=names)
    write(
        folder / "train.npz",
        class_counts=COUNTS,
        train_logits=np.zeros((5, 5)),
        train_labels=np.arange(5),
    )
    (folder / "results.json").write_text('{"test": {}}')
    return folder


@pytest.mark.parametrize("arguments, message", ERRORS.items(), ids=ERRORS)
def test_bad_input(arguments, message, main, bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    line = stopped.value.code
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert (bad_files / "results.json").read_text() == '{"test": {}}'


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--logits=a --checkpoint=b",
        "--logits=a --temperature=0",
        "--logits=a --groups=x",
        "--logits=a --save=b.npz",
        "--logits=a --counts=b --imbalance=9",
    ],
)
def test_contradictory_options(arguments, main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err
