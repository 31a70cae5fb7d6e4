"""All losses of `truth.FAMILY` in one function, which compiles in less time than a function for each loss."""

import functools

import jax
import numpy as np

from helpers import truth
from ltkd_jax import losses

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def values(x, family=truth.FAMILY):
    """Returns the losses of each example by the name of the loss."""
    return {name: loss.call(losses, x) for name, loss in family.items()}


def select(condition):
    """Returns the part of the family for which a condition on the loss holds."""
    return {name: loss for name, loss in truth.FAMILY.items() if condition(loss)}


def by_student(loss, x):
    """Returns the sum of the losses as a function of the student's logits."""
    return lambda student: loss.call(losses, x._replace(student=student)).sum()


@jax.jit
def evaluate(x):
    """Returns (values, gradients) by the name of the loss.

    The gradients are by the student's logits and of each example: examples meet in the teacher's statistics only.
    """

    def one(loss):
        def total(student):
            value = loss.call(losses, x._replace(student=student))
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(x.student)
        return value, gradient

    return {name: one(loss) for name, loss in truth.FAMILY.items()}


def evaluated(x):
    """Returns the losses of each example by the name of the loss, by way of `evaluate`."""
    return {name: value for name, (value, _) in evaluate(x).items()}


def assert_close(actual, expected, **options):
    """Compares the losses in `actual`, by name, with those in `expected`."""
    for name, value in actual.items():
        close(value, expected[name], **{"err_msg": name} | options)
