"""Tests of what the benchmarks count, and of their options.

tests/system/test_benchmark.py runs them completely.
"""

import importlib.util

import numpy as np
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import (
    bilevel_step,
    compiled,
    compilers,
    hlo,
    input_pipeline,
    profile,
    timing,
    train_step,
)
from experiments.reporting import writers
from ltkd_jax.data import datasets, streaming
from ltkd_jax.data.prepare import recipes


def test_bilevel_ratios():
    mib = 2**20
    costs = {
        "fast, weight net unchanged": bilevel_step.Cost(80e9, 90 * mib, 2.0),
        "fast, weight net changed": bilevel_step.Cost(100e9, 100 * mib, 3.0),
        "naive": bilevel_step.Cost(100e9, 100 * mib, 4.0),
        "naive, teacher in the step": bilevel_step.Cost(160e9, 100 * mib),
        "teacher, one forward": bilevel_step.Cost(60e9, 10 * mib, 1.0),
    }
    assert bilevel_step.fast_flops(costs, 5) == pytest.approx(84e9)
    assert bilevel_step.fast_flops(costs, 1) == 100e9
    assert bilevel_step.official_flops(costs) == 220e9
    table = bilevel_step.table(costs)
    assert table.rows[0] == [
        "fast, weight net unchanged",
        "80.00",
        "0.800",
        "90.0",
        "0.900",
        "2.000",
        "0.500",
    ]
    assert table.rows[3][-2:] == ["–", "–"]
    assert "naive" in writers.as_text(table)


@pytest.mark.parametrize(
    "command, options",
    [
        (
            "bilevel",
            ("--batch_size=many", "--batch_size=0", "--repeats=-1", "--precision=half"),
        ),
        ("stream", ("--repeats=0", "--size=4", "--num_workers=x")),
        (
            "train",
            ("--methods=kd,nosuch", "--precisions=", "--teachers=file", "--steps=0"),
        ),
        ("pytorch", ("--methods=dkd", "--repeats=0")),
        (
            "compiled",
            (
                "--target=h200",
                "--devices=0",
                "--memory_gib=0",
                "--programs=all",
                "--losses=nosuch",
                "--sizes=64x100,1024",
            ),
        ),
    ],
)
def test_bad_options_are_refused(capsys, command, options):
    for option in options:
        name, _, value = option.partition("=")
        with pytest.raises(SystemExit):
            benchmark.main([command, option])
        errors = capsys.readouterr().err
        assert name in errors
        assert value in errors


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--target=v5e", "--devices=1,3"], "3 devices: a host of this TPU has one of"),
        (["--programs=losses", "--sizes=64x100,64x10"], "ltkd100 has 100 groups"),
    ],
)
def test_options_that_do_not_fit(arguments, expected):
    """They are refused before the compiler is looked for."""
    with pytest.raises(SystemExit, match=expected):
        benchmark.main(["compiled", *arguments])


@pytest.mark.parametrize(
    "target, package", [("h100", "jax-cuda12-plugin"), ("v5e", "libtpu")]
)
def test_missing_compiler(target, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = rf'^error: {package} is not installed: pip install -e "\.\[train,aot\]"'
    with pytest.raises(SystemExit, match=expected) as exit_info:
        benchmark.main(["compiled", f"--target={target}"])
    assert "\n" not in str(exit_info.value)


def test_rows_of_a_program():
    """A program with a loop has a row for its body and one for all iterations."""
    body = hlo.Block(hlo.Counts(kernels=10, bytes=4_000_000, collectives=1))
    entry = hlo.Block(hlo.Counts(kernels=2, bytes=8_000_000, passes=3.9), ((5, body),))
    cost = compilers.Cost(entry, temporaries=3 * 2**20, memory=7 * 2**20, seconds=4.0)
    target = compilers.Target("cuda", bandwidth=1e12, launch=2e-6, memory=2**30)
    program = compiled.Program("epoch", 8, lambda: None, full_size=100)
    assert compiled.rows(program, cost, target) == [
        ["epoch", "8", "2", "8.00", "4", "0", "3.0", "7.0", "4.0", "12"],
        ["· loop 1 ×5", "", "10", "4.00", "0", "1", "", "", "", "24"],
        ["· total", "", "52", "28.00", "4", "5", "", "", "", "132"],
    ]


def test_unknown_model():
    with pytest.raises(SystemExit, match="unknown model 'resnet9'"):
        benchmark.main(["bilevel", "--student=resnet9"])


def test_stream_and_plain_loop_have_equal_batches(tmp_path):
    image_folder = tmp_path / "images"
    data_dir = tmp_path / "tfds"
    input_pipeline.write_photographs(image_folder, 24)
    recipes.prepare(recipes.custom_recipe("photographs"), data_dir, image_folder)
    train = datasets.load("photographs", data_dir, size=16, margin=True).train
    with streaming.batches(
        train, seed=0, batch_size=4, first_step=0, num_steps=6
    ) as batches:
        plain_batches = input_pipeline.plain_loop(train, 4, 6)
        for streamed, plain in zip(batches, plain_batches, strict=True):
            np.testing.assert_array_equal(streamed.images, plain)
    rates = input_pipeline.measure(train, 4, 2, [0], repeats=1)
    assert set(rates) == {"plain loop", "stream, threads"}
    assert min(rates.values()) > 0


def test_best_of_rounds_ignores_the_first():
    values = iter([1.0, 9.0, 4.0, 7.0, 5.0, 6.0])
    measures = {"a": lambda: next(values), "b": lambda: next(values)}
    assert timing.best_of_rounds(measures, 2) == {"a": 4.0, "b": 6.0}


def test_best_calls_in_turns():
    calls = []
    seconds = timing.best(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1
    )
    assert seconds.keys() == {"a", "b"}
    assert calls == list("abab")


def test_cases_by_teacher():
    cases = train_step.cases(["ce", "ltkd"], ["table", "network"], ["float32", "tf32"])
    sources = [("ce", "none"), ("ltkd", "table"), ("ltkd", "network")]
    assert [(case.method, case.teacher) for case in cases] == 2 * sources
    assert cases[3] == train_step.Case("ce", "none", "tf32")


def test_table_of_the_step():
    case = train_step.Case("ltkd", "table")
    cost = train_step.StepCost(64, 0.5, 1e9, 2**30, 9.0, 3.0)
    table = train_step.table({case: cost}, {"float32": 4e9})
    assert table.rows[0] == [
        "ltkd",
        "table",
        "float32",
        "64",
        "128",
        "500.00",
        "1.0",
        "50 %",
        "9.0",
        "3.0",
        "1,024",
    ]


HLO = """
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
  %fusion.3 = f32[] fusion(%x), metadata={op_name="jit(f)/jvp(N)/conv" stack_frame_id=1}
  ROOT %fusion.4 = f32[] fusion(%x), metadata={op_name="jit(f)/transpose(jvp(N))/conv"}
"""


def test_profile_operation_counts():
    labels = profile.primitives(HLO)
    assert labels == {
        "dot.1": "dot",
        "custom.8": "convolution",
        "custom.9": "dot",
        "fusion.3": "conv",
        "fusion.4": "conv, backward",
    }
    micros = {"fusion.3": 50.0, "fusion.4": 40.0, "copy.7": 5.0, "copy.8": 5.0}
    events = []
    for name, time in micros.items():
        event = {"ph": "X", "name": name, "dur": time, "args": {"hlo_op": name}}
        events.append(event)
    # Neither of these is an operation of the device.
    events.append({"ph": "M", "name": "process_name", "pid": 1})
    events.append({"ph": "X", "name": "python", "ts": 0, "dur": 900.0})
    times = profile.time_by_operation({"traceEvents": events}, labels)
    assert times == {"conv": 50, "conv, backward": 40, "copy": 10}
    assert profile.table(times).rows[0] == ["conv", "0.05", "50.0 %"]


@pytest.mark.parametrize(
    "method, number, outer", [("ltkd", 10_847, 0), ("bikd", 10_626, 1_000)]
)
def test_noise_class_counts(method, number, outer):
    data = train_step.noise(train_step.spec_of(train_step.Case(method, "none")))
    assert (len(data.train), len(data.outer)) == (number, outer)
