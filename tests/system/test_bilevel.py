"""The bilevel step on convolutional networks, which take long to compile."""

import functools

import jax
from helpers.bilevel_problem import (
    create_problem,
    fast_hypergradient,
    finite_difference_error,
    relative_error,
)
from helpers.small_net import double

from ltkd_jax import bilevel


def test_resnet8_in_float64():
    with jax.enable_x64(True):
        problem, *arguments = create_problem("resnet8", "ltkd")
        arguments = double(arguments)
        _, actual = jax.jit(
            functools.partial(fast_hypergradient, problem, learning_rate=0.3)
        )(*arguments)
        naive = jax.jit(
            functools.partial(
                bilevel.hypergradient, problem, learning_rate=0.3, unroll=True
            )
        )
        _, expected = naive(*arguments)
        assert relative_error(actual, expected) < 1e-10
        # A ReLU net has kinks: the step is small, so that none is stepped over.
        assert finite_difference_error(problem, *arguments, 0.3, expected, 1e-6) < 1e-6


def test_resnet8x4_in_float32():
    problem, *arguments = create_problem(
        "resnet8x4", "kd", shape=(8, 8, 3), classes=20, outer="hard"
    )
    _, actual = jax.jit(
        functools.partial(fast_hypergradient, problem, learning_rate=0.1)
    )(*arguments)
    naive = jax.jit(
        functools.partial(
            bilevel.hypergradient, problem, learning_rate=0.1, unroll=True
        )
    )
    _, expected = naive(*arguments)
    assert relative_error(actual, expected) < 1e-5
