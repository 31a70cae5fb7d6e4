"""One device against eight by `jit` or `pmap`: the cases that take long to compile."""

import pytest
from helpers.small_net import assert_eight_devices_are_one, assert_same_first_gradients


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_three_virtual_steps(mode):
    assert_eight_devices_are_one("three virtual steps", mode)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("case", ["ce", "one virtual step", "three virtual steps"])
def test_first_gradients_in_float32(case, mode):
    assert_same_first_gradients(case, mode)
