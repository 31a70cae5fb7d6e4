"""The benchmarks: what they count and how they are asked for, and that the bilevel step is as cheap as is said."""

import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import bilevel_step, loss, profile, timing, train_step
from experiments.benchmark import input_pipeline as reading
from experiments.reporting import writers
from ltkd_jax import groups, losses
from ltkd_jax.data import datasets, streaming
from ltkd_jax.data.prepare import recipes


def test_the_arithmetic_of_the_ratios():
    cost = bilevel_step.Cost
    costs = {
        "fast, weight net unchanged": cost(80e9, 90 * 2**20, 2.0),
        "fast, weight net changed": cost(100e9, 100 * 2**20, 3.0),
        "naive": cost(100e9, 100 * 2**20, 4.0),
        "naive, teacher in the step": cost(160e9, 100 * 2**20),
        "teacher, one forward": cost(60e9, 10 * 2**20, 1.0),
    }
    assert bilevel_step.ours(costs, 5) == pytest.approx(84e9) and bilevel_step.ours(costs, 1) == 100e9
    assert bilevel_step.official(costs) == 220e9
    table = bilevel_step.table(costs)
    assert table.rows[0] == ["fast, weight net unchanged", "80.00", "0.800", "90.0", "0.900", "2.000", "0.500"]
    assert table.rows[3][-2:] == ["–", "–"] and "naive" in writers.as_text(table)


def test_help_and_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["bilevel", "--help"])
    assert "--student" in capsys.readouterr().out
    for what, bad in [
        *(("bilevel", bad) for bad in ("--batch_size=many", "--batch_size=0", "--repeats=-1")),
        *(("stream", bad) for bad in ("--repeats=0", "--size=4", "--workers=x")),
        *(("train", bad) for bad in ("--methods=kd,nosuch", "--precisions=", "--teachers=file", "--steps=0")),
        *(("--against=torch", bad) for bad in ("--methods=ce", "--repeats=0")),
    ]:
        with pytest.raises(SystemExit):
            benchmark.main([what, bad])
        assert (bad.split("=")[1] or "give some of") in capsys.readouterr().err


def test_the_streams_benchmark_reads_the_same_batches_both_ways(tmp_path):
    reading.photographs(tmp_path / "images", 24)
    recipes.prepare(recipes.own_recipe("photographs"), tmp_path / "tfds", tmp_path / "images")
    train = datasets.load("photographs", tmp_path / "tfds", size=16, margin=True).train
    with streaming.batches(train, seed=0, batch_size=4, first_step=0, num_steps=6) as batches:
        for ours, plain in zip(batches, reading.plain_loop(train, 4, 0, 6), strict=True):
            np.testing.assert_array_equal(ours.images, plain)
    rates = reading.measure(train, 4, 2, [0])
    assert set(rates) == {"plain loop", "stream, threads"} and min(rates.values()) > 0
    with pytest.raises(SystemExit, match="unknown model 'resnet9'"):
        benchmark.main(["bilevel", "--student=resnet9"])


def test_the_best_of_the_rounds_after_the_first():
    calls = []
    seconds = timing.best({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab") and set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_cases_have_each_teacher_once():
    found = train_step.cases(["ce", "ltkd"], ["table", "network"], ["float32", "tf32"])
    assert [(case.method, case.teacher) for case in found[:3]] == [
        ("ce", "none"),
        ("ltkd", "table"),
        ("ltkd", "network"),
    ]
    assert len(found) == 6 and found[3] == train_step.Case("ce", "none", "tf32")


def test_the_table_of_the_step():
    case = train_step.Case("ltkd", "table")
    row = train_step.table({case: train_step.Measured(64, 0.5, 1e9, 2**30, 9.0, 3.0)}, {"float32": 4e9}).rows[0]
    assert row == ["ltkd", "table", "float32", "64", "128", "500.00", "1.0", "50 %", "9.0", "3.0", "1,024"]


def test_a_trace_counts_operations_by_the_primitive_they_come_from():
    hlo = """
    %inside.2 (x: f32[2]) -> f32[2] {
      %x = f32[2]{0} parameter(0)
      ROOT %convolution.7 = f32[2]{0} convolution(%x), window={size=8x8}
    }

    %inside (x: f32[2]) -> f32[2] {
      ROOT %dot.1 = f32[2]{0} dot(%x), metadata={op_name="jit(f)/jvp(Net)/dot"}
    }

    ENTRY %main (x: f32[2]) -> f32[2] {
      %custom.8 = f32[2]{0} fusion(%x), kind=kCustom, calls=%inside.2, backend_config={}
      %custom.9 = f32[2]{0} fusion(%x), kind=kCustom, calls=%inside, backend_config={}
      %fusion.3 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/jvp(Net)/conv" stack_frame_id=1}
      ROOT %fusion.4 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/transpose(jvp(Net))/conv"}
    """
    named = profile.sources(hlo)
    assert named == {
        "dot.1": "dot", "custom.8": "convolution", "custom.9": "dot", "fusion.3": "conv", "fusion.4": "conv, backward",
    }  # fmt: skip

    def ran(name, micros):
        return {"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": 0, "dur": micros, "args": {"hlo_op": name}}

    events = [
        ran("fusion.3", 30.0),
        ran("fusion.4", 40.0),
        ran("fusion.3", 20.0),
        ran("copy.7", 5.0),
        ran("copy.8", 5.0),
    ]
    events += [{"ph": "M", "name": "process_name", "pid": 1}, {"ph": "X", "name": "python", "ts": 0, "dur": 900.0}]
    spent = profile.operations({"traceEvents": events}, named)
    assert spent == {"conv": 50, "conv, backward": 40, "copy": 10}
    assert profile.table(spent).rows[0] == ["conv", "0.05", "50.0 %"]


def test_noise_has_the_papers_numbers_of_images():
    for method, number, meta in (("ltkd", 10_847, 0), ("bikd", 10_626, 1_000)):
        data = train_step.noise(train_step.config(train_step.Case(method, "none")))
        assert len(data.train) == number and len(data.meta) == meta


@pytest.mark.slow
def test_the_steps_benchmark_runs(capsys):
    """FLOPs of the step: three forwards' worth for the student, one for the teacher."""
    benchmark.main(
        ["train", "--methods=ltkd,bikd", "--teacher=resnet14", "--student=resnet8", "--repeats=1", "--steps=1"]
    )
    printed = capsys.readouterr().out
    assert "ltkd" in printed and "bikd" in printed and "TFLOP/s" in printed
    models = (("teacher", "resnet14"), ("student", "resnet8"))
    table, network = (train_step.start(train_step.Case("ltkd", kind), models).flops() for kind in ("table", "network"))
    student, teacher = 2 * 12.4e6 * 64, 2 * 26.7e6 * 64  # multiply-adds of an image, twice, times the batch
    assert 2.5 < table / student < 3.5 and 0.9 < (network - table) / teacher < 1.2


@pytest.mark.slow
def test_the_profile_runs(capsys):
    benchmark.main(["profile", "--method=ltkd", "--teacher=resnet14", "--student=resnet8", "--steps=1"])
    printed = capsys.readouterr().out
    assert "conv_general_dilated, backward" in printed and "the rest" in printed


@pytest.mark.slow
def test_the_twins_losses_are_ours():
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch_baseline

    student, teacher = loss.logits((32, 100))
    ours = {
        "kd": losses.kd(student, teacher).mean(),
        "ltkd": losses.ltkd(student, teacher, groups.ClassGroups.from_counts(np.arange(100, 0, -1))).mean(),
    }
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    theirs = {
        "kd": pytorch_baseline.kd(s, t).mean(),
        "ltkd": pytorch_baseline.ltkd(s, t, pytorch_baseline.by_rank(100)),
    }
    for name, value in ours.items():
        assert float(theirs[name]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.slow
def test_the_comparison_with_pytorch_runs(capsys):
    pytest.importorskip("torch")
    benchmark.main(["--against=torch", "--teacher=resnet14", "--student=resnet8", "--repeats=1", "--steps=1"])
    printed = capsys.readouterr().out
    assert "PyTorch / ours" in printed and "[4096, 10000]" in printed


@pytest.mark.slow
def test_the_bilevel_step_is_as_cheap_as_is_said():
    """ResNet32x4 → ResNet8x4, batch 100, by the compiler's counts: FLOPs of the step with the table and k = 5 at most
    0.4 of the official algorithm's; memory at most 1.25 of the naive form's; K = 5 at most 1.3 of K = 2."""
    iteration = bilevel_step.Iteration(bilevel_step.Pair())
    costs = bilevel_step.measure(bilevel_step.variants(iteration), iteration, repeats=0)
    assert 0.2 < bilevel_step.ours(costs, 5) / bilevel_step.official(costs) <= 0.4
    for name in ("fast, weight net unchanged", "fast, weight net changed", "fast, decided on the device"):
        assert costs[name].memory <= 1.25 * costs["naive"].memory
    assert costs["K = 5, compiled loop"].memory <= 1.3 * costs["K = 2, compiled loop"].memory


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    benchmark.main(["bilevel", "--teacher=resnet14", "--student=resnet8", "--batch_size=8", "--repeats=1"])
    printed = capsys.readouterr().out
    assert "resnet14 → resnet8" in printed and "official algorithm" in printed and "K = 5, written out" in printed
