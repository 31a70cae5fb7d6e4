"""The benchmarks, run on small networks, and what the bilevel step costs."""

import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import bilevel_step, loss, train_step
from ltkd_jax import groups, losses

SMALL = ("--teacher=resnet14", "--student=resnet8")
QUICK = (*SMALL, "--repeats=1", "--steps=1")


@pytest.fixture(autouse=True)
def cheap_variants(monkeypatch):
    """Leaves out lookaheads that are written out, which take longest to compile."""
    variants = bilevel_step.variants
    monkeypatch.setattr(
        bilevel_step,
        "variants",
        lambda iteration: [
            v for v in variants(iteration) if "written out" not in v.name
        ],
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["train", "--methods=ce,bikd", "--teachers=table", *QUICK],
            ["ce ", "bikd ", "TFLOP/s"],
        ),
        (
            ["profile", "--method=ltkd", "--steps=1", *SMALL],
            ["conv_general_dilated, backward", "the rest"],
        ),
        (
            ["bilevel", "--batch_size=8", "--repeats=1", *SMALL],
            ["official algorithm", "naive, teacher in the step"],
        ),
        (
            ["pytorch", "--methods=kd", *QUICK],
            ["kd ", "PyTorch / ours", "[4096, 10000]"],
        ),
    ],
    ids=["train", "profile", "bilevel", "pytorch"],
)
def test_report(words, expected, capsys):
    if words[0] == "pytorch":
        pytest.importorskip("torch")
    benchmark.main(words)
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected), printed


def test_step_flops_are_three_forwards_and_the_teachers():
    models = {"teacher": "resnet14", "student": "resnet8"}
    sources = (train_step.Case("ltkd", source) for source in ("table", "network"))
    table, network = (train_step.start(case, **models).flops() for case in sources)
    student, teacher = (
        2 * 12.4e6 * 64,
        2 * 26.7e6 * 64,
    )  # multiply-adds of an image, twice, times the batch
    assert 2.5 < table / student < 3.5 and 0.9 < (network - table) / teacher < 1.2


def test_bilevel_step_costs():
    """ResNet32x4 → ResNet8x4, batch 100, by the compiler's counts.

    FLOPs with the table and k = 5 are at most 0.4 of the official algorithm's; memory is at most 1.25 of the naive
    form's, and of K = 5 at most 1.3 of K = 2's.
    """
    iteration = bilevel_step.Iteration(
        teacher="resnet32x4",
        student="resnet8x4",
        method="kd",
        batch_size=100,
        num_classes=100,
        precision="float32",
    )
    costs = bilevel_step.measure(bilevel_step.variants(iteration), iteration, repeats=0)
    assert (
        0.2
        < bilevel_step.fast_flops(costs, 5) / bilevel_step.official_flops(costs)
        <= 0.4
    )
    for name in (
        "fast, weight net unchanged",
        "fast, weight net changed",
        "fast, decided on the device",
    ):
        assert costs[name].memory <= 1.25 * costs["naive"].memory
    assert (
        costs["K = 5, compiled loop"].memory
        <= 1.3 * costs["K = 2, compiled loop"].memory
    )


def test_pytorch_losses_are_ours():
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch_baseline

    student, teacher = loss.random_logits((32, 100))
    by_rank = groups.ClassGroups.from_counts(np.arange(100, 0, -1))
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    twins = (
        pytorch_baseline.kd(s, t).mean(),
        pytorch_baseline.ltkd(s, t, pytorch_baseline.by_rank(100)),
    )
    ours = (
        losses.kd(student, teacher).mean(),
        losses.ltkd(student, teacher, by_rank).mean(),
    )
    np.testing.assert_allclose([float(value) for value in twins], ours, rtol=1e-5)


@pytest.mark.parametrize("method", ["kd", "ltkd", "bikd"])
def test_pytorch_step_trains_the_student(method):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch_baseline

    step = pytorch_baseline.Step(
        method, teacher="resnet8", student="resnet8", batch_size=4, update_every=1
    )
    networks = {"student": step.student, "weight net": step.weight_net}
    before = {
        name: [x.clone() for x in network.parameters()]
        for name, network in networks.items()
    }
    step()
    for name, network in networks.items():
        changed = any(
            not torch.equal(old, new)
            for old, new in zip(before[name], network.parameters())
        )
        assert changed == (name == "student" or method == "bikd")
