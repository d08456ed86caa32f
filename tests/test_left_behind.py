"""All that training steps leave behind is eager's: buffers, parameters and written arguments too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spcompile.simulate import simulated
from tests import left_samples
from tests.left_samples import SAMPLES, batch, steps
from tests.proof import relative_error


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of all that is left."""
    assert found.keys() == expected.keys()
    numbers = {n: x for n, x in expected.items() if x.numel()}
    return max(relative_error(found[n].double(), x.double(), 1e-6) for n, x in numbers.items())


@pytest.mark.parametrize("name", SAMPLES)
def test_steps_leave_what_eager_leaves(name: str) -> None:
    assert worst(steps(name, simulated(3)), steps(name)) <= 1e-9
