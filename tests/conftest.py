"""What all tests share: which of them start first, and what their processes do without."""

from __future__ import annotations

import os

import pytest

# Where Triton is installed, each process that compiles starts others, which import torch and wait for kernels
# of a GPU: ten seconds of a core in vain. Nothing else depends on it (torch/_inductor/async_compile.py).
os.environ.setdefault("TORCH_WARM_POOL", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on real ranks, so that the other test processes do not wait for one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
