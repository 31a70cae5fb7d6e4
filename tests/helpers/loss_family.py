"""All losses of `truth.FAMILY` in one function.

It compiles in less time than a function for each loss.
"""

import functools

import jax
import numpy as np

from helpers import truth
from ltkd_jax import losses

assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def values(x, family=truth.FAMILY):
    """Returns the losses of each example by the name of the loss."""
    return {name: loss.call(losses, x) for name, loss in family.items()}


def select(condition):
    """Returns the losses of the family for which a condition holds."""
    return {name: loss for name, loss in truth.FAMILY.items() if condition(loss)}


def total_of_student(loss, x):
    """Returns the sum of the losses as a function of the student's logits."""

    def total(student):
        return loss.call(losses, x._replace(student=student)).sum()

    return total


@jax.jit
def evaluate(x):
    """Returns (values, gradients) by the name of the loss.

    The gradients are with respect to the student's logits, and per example: only the
    teacher's statistics depend on other examples.
    """

    def evaluate_one(loss):
        def total(student):
            value = loss.call(losses, x._replace(student=student))
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(x.student)
        return value, gradient

    return {name: evaluate_one(loss) for name, loss in truth.FAMILY.items()}


def evaluate_values(x):
    """Returns the losses of each example by the name of the loss, see `evaluate`."""
    return {name: value for name, (value, _) in evaluate(x).items()}


def assert_close(actual, expected, **options):
    """Compares the losses in `actual`, by name, with those in `expected`."""
    for name, value in actual.items():
        assert_allclose(value, expected[name], **{"err_msg": name} | options)
