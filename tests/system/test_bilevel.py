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


def hypergradients(problem, arguments, learning_rate):
    """Returns the hypergradient of the fast path, and that of naive differentiation."""
    fast_fn = functools.partial(
        fast_hypergradient, problem, learning_rate=learning_rate
    )
    naive_fn = functools.partial(
        bilevel.hypergradient, problem, learning_rate=learning_rate, unroll=True
    )
    _, actual = jax.jit(fast_fn)(*arguments)
    _, expected = jax.jit(naive_fn)(*arguments)
    return actual, expected


def test_resnet8_in_float64():
    with jax.enable_x64(True):
        problem, *arguments = create_problem("resnet8", "ltkd")
        arguments = double(arguments)
        actual, expected = hypergradients(problem, arguments, learning_rate=0.3)
        assert relative_error(actual, expected) < 1e-10
        # A ReLU net has kinks: the small step makes it unlikely to cross one.
        assert finite_difference_error(problem, *arguments, 0.3, expected, 1e-6) < 1e-6


def test_resnet8x4_in_float32():
    problem, *arguments = create_problem(
        "resnet8x4", "kd", shape=(8, 8, 3), classes=20, outer="hard"
    )
    actual, expected = hypergradients(problem, arguments, learning_rate=0.1)
    assert relative_error(actual, expected) < 1e-5
