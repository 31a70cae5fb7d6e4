"""The benchmark of the bilevel step: what it counts, and that the step is as cheap as is said."""

import numpy as np
import pytest

from experiments import benchmark, benchmark_stream, tables
from ltkd_jax.data import prepare, sources, stream


def test_the_arithmetic_of_the_ratios():
    cost = benchmark.Cost
    costs = {
        "fast, weight net unchanged": cost(80e9, 90 * 2**20, 2.0),
        "fast, weight net changed": cost(100e9, 100 * 2**20, 3.0),
        "naive": cost(100e9, 100 * 2**20, 4.0),
        "naive, teacher in the step": cost(160e9, 100 * 2**20),
        "teacher, one forward": cost(60e9, 10 * 2**20, 1.0),
    }
    assert benchmark.ours(costs, 5) == pytest.approx(84e9) and benchmark.ours(costs, 1) == 100e9
    assert benchmark.official(costs) == 220e9
    table = benchmark.bilevel_table(costs)
    assert table.rows[0] == ["fast, weight net unchanged", "80.00", "0.800", "90.0", "0.900", "2.000", "0.500"]
    assert table.rows[3][-2:] == ["–", "–"] and "naive" in tables.as_text(table)


def test_help_and_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["bilevel", "--help"])
    assert "--student" in capsys.readouterr().out
    for what, bad in [
        *(("bilevel", bad) for bad in ("--batch_size=many", "--batch_size=0", "--repeats=-1")),
        *(("stream", bad) for bad in ("--repeats=0", "--size=4", "--workers=x")),
    ]:
        with pytest.raises(SystemExit):
            benchmark.main([what, bad])


def test_the_streams_benchmark_reads_the_same_batches_both_ways(tmp_path):
    benchmark_stream.photographs(tmp_path / "images", 24)
    prepare.prepare(prepare.own_recipe("photographs"), tmp_path / "tfds", tmp_path / "images")
    train = sources.load("photographs", tmp_path / "tfds", size=16, margin=True).train
    with stream.batches(train, seed=0, batch_size=4, first_step=0, num_steps=6) as batches:
        for ours, plain in zip(batches, benchmark_stream.plain_loop(train, 4, 0, 6), strict=True):
            np.testing.assert_array_equal(ours.images, plain)
    rates = benchmark_stream.measure(train, 4, 2, [0])
    assert set(rates) == {"plain loop", "stream, threads"} and min(rates.values()) > 0
    with pytest.raises(SystemExit, match="unknown model 'resnet9'"):
        benchmark.main(["bilevel", "--student=resnet9"])


@pytest.mark.slow
def test_the_bilevel_step_is_as_cheap_as_is_said():
    """ResNet32x4 → ResNet8x4, batch 100, by the compiler's counts: FLOPs of the step with the table and k = 5 at most
    0.4 of the official algorithm's; memory at most 1.25 of the naive form's; K = 5 at most 1.3 of K = 2."""
    iteration = benchmark.Iteration(benchmark.Pair())
    costs = benchmark.measure(benchmark.bilevel_variants(iteration), iteration, repeats=0)
    assert 0.2 < benchmark.ours(costs, 5) / benchmark.official(costs) <= 0.4
    for name in ("fast, weight net unchanged", "fast, weight net changed", "fast, decided on the device"):
        assert costs[name].memory <= 1.25 * costs["naive"].memory
    assert costs["K = 5, compiled loop"].memory <= 1.3 * costs["K = 2, compiled loop"].memory


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    benchmark.main(["bilevel", "--teacher=resnet14", "--student=resnet8", "--batch_size=8", "--repeats=1"])
    printed = capsys.readouterr().out
    assert "resnet14 → resnet8" in printed and "official algorithm" in printed and "K = 5, written out" in printed
