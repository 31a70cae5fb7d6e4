"""The bias audit: every number against float64 NumPy, files of any kind, trained networks, the page, bad input."""

import html.parser
import json
import shutil

import jax
import numpy as np
import pytest
from helpers.small_runs import config_of, prepare_insects, run, streamed, tiny

from experiments import runtime
from experiments.audit import __main__ as audit
from experiments.audit import inputs, page, restore, summary
from experiments.config import checks
from experiments.trainer import build
from ltkd_jax import bias, methods, metrics
from ltkd_jax.data import logits
from ltkd_jax.groups import ClassGroups
from ltkd_jax.training.checkpoint import Checkpoints

C = 7
GROUPS = ClassGroups.from_counts([50, 40, 30, 20, 10, 5, 2], fractions=(0.3, 0.3, 0.4))
OF = np.asarray(GROUPS.assignment)
TEMPERATURES = (1.0, 4.0)


def draw(seed=0, number=97, classes=C, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, classes)) * scale, rng.integers(0, classes, number)


def log_sum(z, members=slice(None)):
    z = z[:, members]
    top = z.max(axis=1, keepdims=True)
    return np.log(np.exp(z - top).sum(axis=1)) + top[:, 0]


def by_group(z):
    return np.stack([log_sum(z, OF == g) for g in range(GROUPS.num_groups)], axis=1)


def truth(z, labels, other=None, temperature=4.0):
    """By example, in float64, from the definitions: losses, masses, divergences."""
    z = z.astype(np.float64) - z.max(axis=1, keepdims=True)
    rows, own = np.arange(len(z)), OF[labels]
    whole, groups = log_sum(z), by_group(z)
    found = {
        "p": np.exp(z - whole[:, None]),
        "inter": whole - groups[rows, own],
        "intra": groups[rows, own] - z[rows, labels],
        "mass": np.exp(by_group(z / temperature) - log_sum(z / temperature)[:, None]),
    }
    if other is not None:
        t, s = z / temperature, other.astype(np.float64) / temperature
        log_t, log_s = (by_group(x) - log_sum(x)[:, None] for x in (t, s))
        found["kl_inter"] = (np.exp(log_t) * (log_t - log_s)).sum(axis=1)
        gap = (t - by_group(t)[:, OF]) - (s - by_group(s)[:, OF])
        p = np.exp(t - log_sum(t)[:, None])
        found["kl_intra"] = np.stack([(p * gap)[:, OF == g].sum(axis=1) for g in range(GROUPS.num_groups)], axis=1)
        found["kl"] = (p * ((t - log_sum(t)[:, None]) - (s - log_sum(s)[:, None]))).sum(axis=1)
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, of which the last is filled up; and what every command does first, the tests have done."""
    monkeypatch.setattr(bias, "BLOCK", 32 * C)
    monkeypatch.setattr(runtime, "once", lambda: None)


def measured(z, labels, other=None):
    other = None if other is None else logits.in_memory(other, labels)
    return bias.measure(logits.in_memory(z, labels), GROUPS, TEMPERATURES, other)


def one_class(z):
    z = z.copy()
    z[:, 2] += 300
    return z


INPUTS = {
    "plain": lambda z: z,
    "float16": lambda z: z.astype(np.float16),
    "extreme": lambda z: np.clip(z * 1e4, -1e4, 1e4),
    "far away": lambda z: z + 1e9,
    "float32 far out": lambda z: (np.sign(z) * 1e29).astype(np.float32),
    "ties": lambda z: np.round(z / 2),
    "one class": one_class,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_number_is_that_of_float64(kind):
    raw, labels = draw(seed=1)
    z, other = INPUTS[kind](raw), draw(seed=2)[0]
    labels[labels == 4] = 3  # a class without an example
    want, found = truth(z, labels, other), measured(z, labels, other)
    told_, parts = bias.summarize(found), bias.divergence(found)
    prediction, confidence = z.argmax(axis=1), want["p"].max(axis=1)
    close = dict(rtol=2e-5, atol=2e-6)
    for name, chosen in [*((n, OF[labels] == g) for g, n in enumerate(GROUPS.names)), ("all", labels >= 0)]:
        group = told_["groups"][name]
        assert group["examples"] == chosen.sum()
        assert group["accuracy"] == pytest.approx(100 * (prediction == labels)[chosen].mean())
        assert group["confidence"] == pytest.approx(100 * confidence[chosen].mean(), rel=1e-5)
        for key in ("inter", "intra"):
            np.testing.assert_allclose(group[key], want[key][chosen].mean(), **close)
        np.testing.assert_allclose(group["loss"], (want["inter"] + want["intra"])[chosen].mean(), **close)
        split = parts["4"][name]
        np.testing.assert_allclose(split["inter"], want["kl_inter"][chosen].mean(), **close)
        np.testing.assert_allclose(list(split["intra"].values()), want["kl_intra"][chosen].mean(axis=0), **close)
        np.testing.assert_allclose(split["kl"], want["kl"][chosen].mean(), **close)
    plain = np.stack([want["p"][:, OF == g].sum(axis=1) for g in range(GROUPS.num_groups)], axis=1)
    for temperature, mass in (("1", plain), ("4", want["mass"])):
        np.testing.assert_allclose(list(told_["mass"][temperature].values()), mass.mean(axis=0), **close)
        for g, row in enumerate(told_["mass_by_group"][temperature]):
            np.testing.assert_allclose(row, mass[OF[labels] == g].mean(axis=0), **close)
    classes = told_["classes"]
    np.testing.assert_allclose(classes["mass"], want["p"].mean(axis=0), **close)
    np.testing.assert_allclose(classes["predicted"], np.bincount(prediction, minlength=C) / len(labels))
    for c in range(C):
        mine = want["p"][labels == c]
        if not len(mine):
            assert classes["recall"][c] is classes["own"][c] is classes["to"][c] is classes["to_groups"][c] is None
            continue
        mean = mine.mean(axis=0)
        assert classes["recall"][c] == pytest.approx(100 * (prediction == labels)[labels == c].mean())
        np.testing.assert_allclose(classes["own"][c], mean[c], **close)
        others = np.where(np.arange(C) == c, -1, mean)
        np.testing.assert_allclose([classes["to_mass"][c], mean[classes["to"][c]]], others.max(), **close)
        assert classes["to"][c] != c
        np.testing.assert_allclose(classes["to_groups"][c], [mean[OF == g].sum() for g in range(3)], **close)


def test_calibration_and_confusion_by_group_are_those_of_their_definitions():
    z, labels = draw(seed=3, number=400)
    found = bias.summarize(measured(z, labels))
    p, prediction = truth(z, labels)["p"], z.argmax(axis=1)
    confidence, hit = p.max(axis=1), prediction == labels
    which = np.minimum((confidence * metrics.NUM_BINS).astype(int), metrics.NUM_BINS - 1)
    for g, name in enumerate(GROUPS.names):
        mine = OF[labels] == g
        gaps = [abs((confidence - hit)[mine & (which == b)].sum()) for b in range(metrics.NUM_BINS)]
        assert found["groups"][name]["ece"] == pytest.approx(100 * sum(gaps) / mine.sum(), rel=1e-4)
        counts = [(mine & (which == b)).sum() for b in range(metrics.NUM_BINS)]
        assert found["groups"][name]["bins"][0] == counts
        between = [100 * (OF[prediction][mine] == h).mean() for h in range(GROUPS.num_groups)]
        np.testing.assert_allclose(found["between"][g], between)


def test_it_agrees_with_the_evaluation_of_training():
    z, labels = draw(seed=4)
    sums = metrics.eval_sums(z.astype(np.float32), labels, np.ones(len(labels), bool))
    whole = metrics.summarize(sums, GROUPS, {})
    found = bias.summarize(measured(z, labels))
    assert found["groups"]["all"]["ece"] == pytest.approx(whole["ece"], rel=1e-4)
    assert found["mass"]["1"] == pytest.approx(metrics.group_mass(sums, GROUPS), rel=1e-5)
    np.testing.assert_allclose(found["between"], whole["confusion"], rtol=1e-6)


def numbers(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [x for v in tree for x in numbers(v)] if isinstance(tree, list) else [np.nan if tree is None else tree]


def test_a_rows_constant_and_the_order_of_rows_change_nothing():
    z, labels = draw(seed=5)
    rng = np.random.default_rng(0)
    shifted = z + rng.normal(size=(len(z), 1)) * 1e4
    order = rng.permutation(len(z))
    want = numbers(bias.summarize(measured(z, labels)))
    for other, of in ((shifted, labels), (z[order], labels[order])):
        np.testing.assert_allclose(numbers(bias.summarize(measured(other, of))), want, rtol=1e-5, atol=1e-6)


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    z, labels = draw(seed=6)
    want = numbers(bias.summarize(measured(z, labels)))
    for size in (1, 97, 1000):
        monkeypatch.setattr(bias, "BLOCK", size * C)
        np.testing.assert_allclose(numbers(bias.summarize(measured(z, labels))), want, rtol=1e-5, atol=1e-6)


def audited(z, labels, counts, **known):
    model = inputs.Model("it", "it.npz", logits.in_memory(z, labels), **known)
    groups = ClassGroups.from_counts(counts)
    return audit.audit(model, None, np.asarray(counts, float), "given", groups, 4.0)


COUNTS = [50, 40, 30, 20, 10, 5]


def test_a_model_that_knows_nothing_is_fair():
    found = audited(np.zeros((60, 6)), np.repeat(np.arange(6), 10), COUNTS)
    (shown,) = found["inputs"]
    assert (
        shown["models"][0]["mass"]["1"]
        == pytest.approx(shown["share"])
        == {"head": 1 / 3, "medium": 1 / 3, "tail": 1 / 3}
    )
    group = shown["models"][0]["groups"]["tail"]
    assert (group["inter"], group["intra"]) == pytest.approx((np.log(3), np.log(2)), rel=1e-6)
    assert "gives every group its share of mass, to within 0.02." in summary.headline(found)
    assert "gives away most" not in summary.headline(found)


def test_a_model_that_says_the_prior_is_as_biased_as_its_data():
    counts = np.array(COUNTS, float)
    found = audited(np.tile(np.log(counts), (60, 1)), np.repeat(np.arange(6), 10), COUNTS)
    (shown,) = found["inputs"]
    assert shown["models"][0]["mass"]["1"] == pytest.approx(found["training"], rel=1e-5)
    classes = shown["models"][0]["classes"]
    np.testing.assert_allclose(np.divide(classes["mass"], classes["share"]), 6 * counts / counts.sum(), rtol=1e-5)
    assert classes["predicted"] == [1, 0, 0, 0, 0, 0] and classes["to"] == [1, 0, 0, 0, 0, 0]
    assert shown["models"][0]["between"] == [[100, 0, 0]] * 3
    said = summary.headline(found)
    assert "gives head classes 0.58 of its mass where 0.33 is fair, and tail classes 0.10 where 0.33 is" in said
    assert (
        "Class 5 gives away most: it gets 0.19 of the mass that is its due, and its own examples give 0.32 to class 0"
        in said
    )
    # −log(15/155) of −log(5/155), and of −log(10/155)
    part = 2 * np.log(155 / 15) / (np.log(155 / 5) + np.log(155 / 10))
    assert f"{100 * part:.0f} % of the loss on tail classes is about the group" in said


# Files.


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def stored_by_columns(path, z, labels):
    np.savez(path, logits=np.asfortranarray(z), labels=labels)


WAYS = {
    "as logits": lambda path, z, labels: np.savez(path, logits=z, labels=labels),
    "compressed": lambda path, z, labels: np.savez_compressed(path, logits=z, labels=labels),
    "by columns": stored_by_columns,
    "big-endian": lambda path, z, labels: np.savez(path, logits=z.astype(">f4"), labels=labels.astype(">i2")),
    "probabilities": lambda path, z, labels: np.savez(path, probabilities=truth(z, labels)["p"], labels=labels),
    "log probabilities": lambda path, z, labels: np.savez(
        path, log_probabilities=z - log_sum(z)[:, None], labels=labels.astype(np.uint8)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_files_of_every_kind_say_the_same(way, tmp_path):
    z, labels = draw(seed=7)
    WAYS[way](tmp_path / "x.npz", z, labels)
    found = bias.summarize(bias.measure(logits.Archive(tmp_path / "x.npz").examples(), GROUPS, TEMPERATURES))
    want = numbers(bias.summarize(measured(z, labels)))
    np.testing.assert_allclose(numbers(found), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, least", [(np.float16, -24), (np.float32, -149), (np.float64, -1074)])
def test_no_probability_is_the_smallest_there_is(dtype, least, tmp_path):
    p = np.array([[1, 0, 0]], dtype)
    with np.errstate(divide="ignore"):
        keys = {"probabilities": p, "log_probabilities": np.log(p)}
    for key, values in keys.items():
        path = write(tmp_path / "x.npz", **{key: values}, labels=[1])
        (block,) = logits.Archive(path).examples().blocks(8)
        np.testing.assert_allclose(block, [[0, least * np.log(2), least * np.log(2)]], rtol=1e-6)


def test_none_is_not_more_than_little(tmp_path):
    path = write(tmp_path / "x.npz", log_probabilities=np.array([[0, -200, -np.inf]], np.float32), labels=[1])
    (block,) = logits.Archive(path).examples().blocks(8)
    assert block.tolist() == [[0, -200, -200]]


def test_rows_are_read_in_blocks_and_bad_ones_counted(tmp_path):
    z, labels = draw(number=40)
    path = write(tmp_path / "x.npz", logits=z, labels=labels)
    assert [len(block) for block in logits.Archive(path).examples().blocks(16)] == [16, 16, 8]
    z[21, 3], z[22, 0], z[39, 1] = np.nan, np.inf, -np.inf
    path = write(tmp_path / "bad.npz", logits=z, labels=labels)
    with pytest.raises(logits.LogitsError, match="3 of 40 rows hold NaN or infinite logits.*row 21 .class 3: nan"):
        list(logits.Archive(path).examples().blocks(16))


def test_a_damaged_file_is_told(tmp_path):
    z, labels = draw()
    path = write(tmp_path / "x.npz", logits=z, labels=labels)
    whole = bytearray(open(path, "rb").read())
    whole[2000] ^= 1
    (tmp_path / "flipped.npz").write_bytes(whole)
    (tmp_path / "cut.npz").write_bytes(whole[:3000])
    with pytest.raises(logits.LogitsError, match="flipped.npz is damaged .*CRC"):
        list(logits.Archive(tmp_path / "flipped.npz").examples().blocks(16))
    with pytest.raises(logits.LogitsError, match="cut.npz is no .npz file"):
        logits.Archive(tmp_path / "cut.npz")


# The command.


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.headings, self.text, self._tag = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag

    def handle_data(self, data):
        self.text += data
        self.headings += [data] if self._tag == "h2" and data.strip() else []


def as_pytorch_would(path, classes=40, each=4, seed=0):
    """Two keys and no more: float32 logits of a biased model, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    z = rng.normal(size=(len(labels), classes)) + 3 * np.eye(classes)[labels] - 0.1 * np.arange(classes)
    return write(path, logits=z.astype(np.float32), labels=labels)


SECTIONS = ["Group mass", "Wrong group, or wrong class within it", "Calibration by group", "Confusion between groups"]


def test_from_two_keys_to_a_page(tmp_path, capsys):
    path, out = as_pytorch_would(tmp_path / "resnet<50>.npz"), tmp_path / "audit.html"
    student = as_pytorch_would(tmp_path / "student.npz", seed=1)
    audit.main(["--logits", path, "--imbalance=100", "--out", str(out), "--against", student, "--temperature=2"])
    printed = capsys.readouterr().out
    assert "gives head classes" in printed and "exponential with imbalance 100" in printed
    for title in (
        "Group mass",
        "Loss in nats",
        "KL from resnet<50> to student",
        "Calibration by group",
        "Confusion between groups",
        "The 15 classes",
    ):
        assert title in printed
    shown = Page(out.read_text())
    assert set(shown.headings) == {*SECTIONS, "Between the two models", "Which classes resnet<50> gives away"}
    assert "All 40 classes" in shown.text and "http" not in out.read_text().replace("http://www.w3.org", "")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert summary.console(found) in printed  # the JSON holds all that is shown
    assert found["temperatures"] == ["1", "2"]
    assert [len(group) for group in np.split(found["groups"]["assignment"], [13, 27])] == [13, 14, 13]
    parts = found["inputs"][0]["divergence"]["2"]["all"]
    assert parts["kl"] == pytest.approx(parts["inter"] + sum(parts["intra"].values()))


def test_long_tailed_input_and_names_and_a_class_without_example(tmp_path, capsys):
    z, labels = draw(seed=8, number=200, classes=6)
    labels[labels == 5] = 0
    z[np.arange(200), labels] += 3
    train = np.repeat(np.arange(6), COUNTS)
    names = ["apple", "bee", "<b>cat</b>", "dog", "eel", "fox"]
    path = write(
        tmp_path / "x.npz", logits=z, labels=labels, class_names=names,
        train_logits=np.eye(6)[train] * 9, train_labels=train,
    )  # fmt: skip
    audit.main(["--logits", path, "--out", str(tmp_path / "a.html"), "--temperature=1"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["class_counts"] == COUNTS and "counted in its training input" in printed
    assert [shown["title"] for shown in found["inputs"]] == ["this input", "training input"]
    assert found["inputs"][1]["share"] == pytest.approx(found["training"])
    assert "1 classes have none" in printed and "apple" in printed and found["temperatures"] == ["1"]
    text = (tmp_path / "a.html").read_text()
    assert "<b>cat" not in text and "&lt;b&gt;cat" in text


def test_a_group_without_example_is_a_dash(tmp_path, capsys):
    z, labels = draw(seed=9, classes=6)
    path = write(tmp_path / "x.npz", logits=z, labels=labels % 4, class_counts=COUNTS)
    audit.main(["--logits", path, "--out", str(tmp_path / "a.html")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["tail", "0"]]
    assert [row[2:] for row in rows] == [["–"] * 4, ["–"] * 5]  # of loss and calibration
    shown = Page((tmp_path / "a.html").read_text())
    assert set(SECTIONS) < set(shown.headings) and "predictions of x" in shown.text


def test_counts_come_from_where_it_is_said(tmp_path):
    z, labels = draw(classes=6)
    model = inputs.Model("it", "it.npz", logits.in_memory(z, labels))
    known = inputs.Model("it", "it.npz", model.test, class_counts=np.array(COUNTS))
    for name, text in {
        "a.json": json.dumps({"class_counts": COUNTS}),
        "b.json": json.dumps(COUNTS),
        "c.txt": "50 40\n30,20 10 5",
    }.items():
        (tmp_path / name).write_text(text)
        counts, told_ = inputs.class_counts(known, str(tmp_path / name), None)
        assert counts.tolist() == COUNTS and name in told_
    np.save(tmp_path / "d.npy", COUNTS)
    assert inputs.class_counts(model, str(tmp_path / "d.npy"), None)[0].tolist() == COUNTS
    assert inputs.class_counts(known, None, None)[0].tolist() == COUNTS
    assert inputs.class_counts(known, None, "4,8")[0].tolist() == [8, 6, 4, 3, 2, 2]
    tail = inputs.Model("it", "it.npz", logits.in_memory(np.zeros((21, 6)), np.repeat(np.arange(6), range(1, 7))))
    counts, told_ = inputs.class_counts(tail, None, None)
    assert counts.tolist() == [1, 2, 3, 4, 5, 6] and "in their place" in told_
    with pytest.raises(inputs.AuditError, match="does not say how often each class was trained on: give --counts"):
        inputs.class_counts(model, None, None)


def bad_files(folder):
    z, labels = draw(classes=6)
    counted = dict(logits=z, labels=labels, class_counts=COUNTS)
    write(folder / "good.npz", **counted)
    write(folder / "other.npz", **{**counted, "labels": (labels + 1) % 6})
    write(folder / "keys.npz", output=z, targets=labels)
    write(folder / "float.npz", **{**counted, "labels": labels.astype(np.float32)})
    write(folder / "hot.npz", **{**counted, "labels": np.eye(6, dtype=int)[labels]})
    write(folder / "short.npz", **{**counted, "labels": labels[:-1]})
    write(folder / "range.npz", **{**counted, "labels": labels - 1})
    write(folder / "flat.npz", **{**counted, "logits": z[0]})
    write(folder / "one.npz", **{**counted, "logits": z[:, :1]})
    write(folder / "none.npz", **{**counted, "logits": z[:0], "labels": labels[:0]})
    write(folder / "ints.npz", **{**counted, "logits": z.astype(int)})
    write(folder / "zero.npz", **{**counted, "class_counts": [*COUNTS[:-1], 0]})
    write(folder / "counts.npz", **{**counted, "class_counts": COUNTS[:-1]})
    write(folder / "prob.npz", probabilities=z, labels=labels, class_counts=COUNTS)
    write(folder / "half.npz", **{**counted, "train_logits": z})
    np.savez(folder / "names.npz", **counted, class_names=np.array(["a"] * 6, object))
    np.save(folder / "x.npy", z)


ERRORS = [
    ("--logits=absent.npz", "absent.npz: no such file"),
    ("--logits=x.npy", 'x.npy is no .npz file; write one by np.savez("x.npz", logits=logits, labels=labels)'),
    ("--logits=keys.npz", "keys output, targets; it needs logits or probabilities or log_probabilities and labels"),
    ("--logits=float.npz", "labels is float32[97]; give integers [N], such as labels.astype(int).ravel()"),
    ("--logits=hot.npz", "labels is int64[97, 6]; give integers [N], such as np.argmax(labels, axis=1)"),
    ("--logits=short.npz", "96 labels for 97 rows of logits: give one for each row"),
    ("--logits=range.npz", "are outside 0..5, the classes that logits has: count labels from 0"),
    ("--logits=flat.npz", "logits is float64[6]; give floats [N, C]"),
    ("--logits=one.npz", "logits has 97 rows of 1 classes; give at least 1 row, 2 classes"),
    ("--logits=none.npz", "logits has 0 rows of 6 classes"),
    ("--logits=ints.npz", "logits is int64[97, 6]; give floats"),
    ("--logits=zero.npz", "must be positive and finite; classes [5] have [0.0]"),
    ("--logits=counts.npz", "class_counts is [5], the logits are of 6 classes"),
    ("--logits=prob.npz", "97 of 97 rows are no probabilities, from 0 on and of sum 1: if they are logits"),
    ("--logits=half.npz", "it needs train_labels too"),
    ("--logits=names.npz", "class_names is not a plain array"),
    ("--logits=good.npz --against=other.npz", "(97 rows differ): --against must hold the same examples in"),
    ("--logits=good.npz --counts=x.npz", "--counts=x.npz can't be read"),
    ("--logits=good.npz --counts=gone.json", "--counts=gone.json can't be read"),
    ("--logits=good.npz --imbalance=0.5", "--imbalance=0.5: imbalance=0.5: give a ratio >= 1"),
    ("--logits=good.npz --imbalance=x", "give GAMMA or GAMMA,N_MAX, such as 100 or 50,5000"),
    ("--logits=good.npz --groups=0.5,0.6", "--groups=0.5,0.6: fractions=[0.5, 0.6] must be positive and sum to 1"),
    ("--logits=good.npz --groups=0.9,0.05,0.05", "groups ['tail'] would be empty"),
    ("--logits=good.npz --out=no/such/a.html", "--out=no/such/a.html must be a file in a folder that is there"),
    ("--logits=good.npz --out=a.json", "its name ending in .html"),
    ("--checkpoint=.", "has no config.json: give the work directory of a finished run, or a finished teacher's folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    bad_files(folder)
    return folder


@pytest.mark.parametrize("words, message", ERRORS, ids=[words for words, _ in ERRORS])
def test_bad_input_is_told_in_one_line(words, message, bad, monkeypatch):
    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as stopped:
        audit.main(words.split())
    said = str(stopped.value)
    assert said.startswith("error: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    "words", ["", "--logits=a --checkpoint=b", "--logits=a --temperature=0", "--logits=a --groups=x",
              "--logits=a --save=b.npz", "--logits=a --counts=b --imbalance=9"],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        audit.main(words.split())
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


# Trained networks.


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folders as training leaves them, of networks that were drawn and not trained; their variables beside them."""
    folder, config = tmp_path_factory.mktemp("untrained"), tiny(tmp_path_factory.mktemp("none"), devices=1)
    made = {
        "teacher": (build.teacher_program(config), checks.teacher_identity(config)),
        "run": (build.student_program(config, "none"), checks.identity(config)),
    }
    for seed, (name, (program, identity)) in enumerate(made.items()):
        state = program.init(seed)
        Checkpoints(folder / name / "checkpoints").save(program.total_steps, state, {})
        (folder / name / "config.json").write_text(json.dumps(identity))
        results = {"hash": "0", "model": "resnet8", "step": program.total_steps}
        (folder / name / "results.json").write_text(json.dumps(results))
        made[name] = program, state.variables
    return folder, made


def test_a_runs_results_are_not_written_over(tmp_path):
    np.savez(tmp_path / "x.npz", logits=np.eye(4), labels=np.arange(4), class_counts=np.array([9, 5, 3, 1]))
    (tmp_path / "results.json").write_text('{"test": {}}')
    with pytest.raises(SystemExit, match="results.json is there and no audit's"):
        audit.main([f"--logits={tmp_path / 'x.npz'}", f"--out={tmp_path / 'results.html'}"])
    assert (tmp_path / "results.json").read_text() == '{"test": {}}'


def test_the_logits_of_a_folder_are_its_networks(untrained, tmp_path, monkeypatch, capsys):
    folder, made = untrained
    monkeypatch.setattr(page, "write", lambda found, path: None)  # others draw it
    saved, out = tmp_path / "teacher.npz", tmp_path / "a.html"
    audit.main([f"--checkpoint={folder / 'teacher'}", f"--against={folder / 'run'}", f"--save={saved}", f"--out={out}"])
    found = json.loads((tmp_path / "a.json").read_text())
    data = made["run"][0].data
    assert found["name"] == "teacher resnet8 → ltkd resnet8" and found["class_counts"] == data.class_counts.tolist()
    assert [shown["title"] for shown in found["inputs"]] == ["balanced input", "training input"]
    every = data.preprocess(np.concatenate([data.test.images, data.train.images]))
    predict = jax.jit(lambda variables: made["run"][0].model.apply(variables, every, train=False))
    both = [np.asarray(predict(variables), np.float64) for _, variables in made.values()]
    for shown, images, start in zip(found["inputs"], (data.test, data.train), (0, len(data.test))):
        for model, z in zip(shown["models"], (z[start : start + len(images)] for z in both)):
            p = np.exp(z - log_sum(z)[:, None])
            np.testing.assert_allclose(model["classes"]["mass"], p.mean(axis=0), rtol=1e-4)
            loss = -np.log(p[np.arange(len(p)), images.labels]).mean()
            assert model["groups"]["all"]["loss"] == pytest.approx(loss, rel=1e-4)
    # What was saved says the same, without the network.
    model = inputs.read(saved)
    counts, known_from = inputs.class_counts(model, None, None)
    again = audit.audit(model, None, counts, known_from, ClassGroups.from_counts(counts), 4.0)
    for key in ("class_counts", "class_names", "groups", "training"):
        assert again[key] == found[key]
    for mine, theirs in zip(again["inputs"], found["inputs"]):
        (model,), (first, _) = mine["models"], theirs["models"]
        assert {**model, "name": ""} == {**first, "name": ""}
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_and_its_teacher_are_audited_as_they_were_evaluated(tmp_path, capsys):
    results = run(tiny(tmp_path), tmp_path / "run")
    (teacher,) = (path for path in (tmp_path / "teachers").iterdir() if path.is_dir())
    audit.main([f"--checkpoint={teacher}", f"--against={tmp_path / 'run'}", f"--out={tmp_path / 'a.html'}"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["class_counts"] == results["class_counts"]
    balanced, long_tailed = found["inputs"]
    for model, was in zip(balanced["models"], (results["teacher"], results)):
        assert model["groups"]["all"]["accuracy"] == pytest.approx(was["test"]["all"])
        assert model["groups"]["all"]["ece"] == pytest.approx(was["test"]["ece"], rel=1e-3)
        assert model["classes"]["recall"] == pytest.approx(was["test"]["per_class"])
        np.testing.assert_allclose(model["between"], was["test"]["confusion"], rtol=1e-6)
    mass = results["teacher"]["group_mass"]
    assert balanced["models"][0]["mass"]["1"] == pytest.approx(mass["balanced"], rel=1e-4)
    assert long_tailed["share"] == pytest.approx(found["training"])
    capsys.readouterr()


def test_what_is_not_a_finished_network_is_told(untrained, tmp_path):
    def no_steps(folder):
        shutil.rmtree(folder / "checkpoints")
        (folder / "checkpoints").mkdir()

    listed = {"name": "digits", "subset": "list 0123"}
    for spoil, message in (
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "results.json").unlink(), "has no results.json"),
        (no_steps, "is of none, and training ends at step 12"),
        (lambda folder: change(folder, "train", {"epochs": 9.0}), "is of step 12, and training ends at step 36"),
        (lambda folder: change(folder, "seed_spilt", 1), "cannot be restored"),
        (lambda folder: change(folder, "precision", "int4"), "precision"),
        (lambda folder: change(folder, "data", listed), "give that file by --subset"),
        (lambda folder: change(folder, "method", {"gamma": 3}), "its method.gamma is 3, here it is None: use the data"),
    ):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(untrained[0] / "run", folder)
        spoil(folder)
        with pytest.raises(checks.ConfigError, match=message):
            restore.restore(folder)


def change(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    value = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps({**config, key: value}))


EVERY = [*methods.METHODS, "bikd", "bikd,terms=ltkd", "ltkd,num_groups=5,alpha=2,policy=none,cutout=2,mixup=0.2"]


@pytest.mark.parametrize(
    "name, argument", [("digitslt", a) for a in EVERY] + [("cifar100lt", "bikd"), ("imagenetlt", "kd")]
)
def test_every_config_is_made_again_of_its_identity(name, argument):
    config = config_of(name, argument)
    for identity in (checks.identity, checks.teacher_identity):
        recorded = identity(config)
        assert identity(restore._config(recorded, "", "")) == recorded


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["reviewkd", "bikd"])
def test_networks_of_other_methods_are_restored(argument, tmp_path):
    more = {"data.meta_per_class": 8} if argument == "bikd" else {}
    results = run(tiny(tmp_path, argument, **more), tmp_path / "run")
    model = inputs.read(tmp_path / "run")
    predicted = np.concatenate(list(model.test.rows(64))).argmax(axis=1)
    assert 100 * (predicted == model.test.labels).mean() == pytest.approx(results["test"]["all"])


@pytest.mark.slow
def test_a_network_of_a_stream_of_ones_own_images_is_restored(tmp_path):
    where = prepare_insects(tmp_path)
    results = run(streamed(where, tmp_path, "kd"), tmp_path / "run")
    model = inputs.read(tmp_path / "run", data_dir=str(where))
    predicted = np.concatenate(list(model.test.rows(64))).argmax(axis=1)
    assert 100 * (predicted == model.test.labels).mean() == pytest.approx(results["test"]["all"])
    assert list(model.class_names) == ["ant", "bee", "cat", "dog"]
    with pytest.raises(checks.ConfigError, match="insects"):
        inputs.read(tmp_path / "run", data_dir=str(tmp_path))
