"""The benchmarks on small networks, and the cost of the bilevel step."""

import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import bilevel_step, loss, train_step
from ltkd_jax import groups, losses

SMALL = ("--teacher=resnet14", "--student=resnet8")
QUICK = (*SMALL, "--repeats=1", "--steps=1")


@pytest.fixture(autouse=True)
def cheap_variants(monkeypatch):
    """Leaves out the unrolled lookaheads, which take longest to compile."""
    all_variants = bilevel_step.variants

    def variants(iteration):
        return [v for v in all_variants(iteration) if "written out" not in v.name]

    monkeypatch.setattr(bilevel_step, "variants", variants)


@pytest.mark.parametrize(
    "arguments, expected",
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
            ["kd ", "PyTorch, channels last, compiled", "[4096, 10000]"],
        ),
    ],
    ids=["train", "profile", "bilevel", "pytorch"],
)
def test_report(arguments, expected, capsys):
    if arguments[0] == "pytorch":
        pytest.importorskip("torch")
    benchmark.main(arguments)
    output = capsys.readouterr().out
    for text in expected:
        assert text in output, output


def test_train_step_flops():
    """Counts three forward passes of the student, and one of a teacher in the step."""
    models = {"teacher": "resnet14", "student": "resnet8"}
    table = train_step.start(train_step.Case("ltkd", "table"), **models).flops()
    network = train_step.start(train_step.Case("ltkd", "network"), **models).flops()
    # A forward pass: two FLOPs for each multiply-add of an image, times the batch size.
    student = 2 * 12.4e6 * 64
    teacher = 2 * 26.7e6 * 64
    # The backward pass costs about two forward passes.
    assert 2.5 < table / student < 3.5
    assert 0.9 < (network - table) / teacher < 1.2


def test_bilevel_step_costs():
    """Bounds FLOPs and memory by the compiler's counts: ResNet32x4 → ResNet8x4.

    FLOPs with the table and k = 5 are at most 0.4 of the official algorithm's. Memory
    is at most 1.25 of the naive form's, and for K = 5 at most 1.3 of that for K = 2.
    """
    iteration = bilevel_step.Iteration(
        teacher="resnet32x4",
        student="resnet8x4",
        method="kd",
        batch_size=100,
        num_classes=100,
        precision="float32",
    )
    # Without repeats the variants are compiled, but not run.
    costs = bilevel_step.measure(bilevel_step.variants(iteration), iteration, repeats=0)
    fast_flops = bilevel_step.fast_flops(costs, 5)
    assert 0.2 < fast_flops / bilevel_step.official_flops(costs) <= 0.4
    for name in (
        "fast, weight net unchanged",
        "fast, weight net changed",
        "fast, decided on the device",
    ):
        assert costs[name].memory <= 1.25 * costs["naive"].memory
    two_steps = costs["K = 2, compiled loop"].memory
    five_steps = costs["K = 5, compiled loop"].memory
    assert five_steps <= 1.3 * two_steps


def test_pytorch_losses_agree():
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch_baseline

    student, teacher = loss.random_logits((32, 100))
    tensors = torch.from_numpy(student), torch.from_numpy(teacher)
    actual = pytorch_baseline.kd(*tensors).mean()
    expected = losses.kd(student, teacher).mean()
    np.testing.assert_allclose(float(actual), expected, rtol=1e-5)

    class_groups = groups.ClassGroups.from_counts(np.arange(100, 0, -1))
    actual = pytorch_baseline.ltkd(*tensors, pytorch_baseline.by_rank(100)).mean()
    expected = losses.ltkd(student, teacher, class_groups).mean()
    np.testing.assert_allclose(float(actual), expected, rtol=1e-5)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("method", ["ce", "kd", "ltkd", "bikd"])
def test_pytorch_step_updates_parameters(method, tuned):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch_baseline

    step = pytorch_baseline.Step(
        method,
        teacher="resnet8",
        student="resnet8",
        batch_size=4,
        update_every=1,
        tuned=tuned,
    )

    def parameters(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    student = parameters(step.student)
    weight_net = parameters(step.weight_net)
    step()
    assert not torch.equal(parameters(step.student), student)
    # Only BiKD trains the weight net.
    is_unchanged = torch.equal(parameters(step.weight_net), weight_net)
    assert is_unchanged == (method != "bikd")
