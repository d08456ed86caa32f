"""What all tests share: which of them start first."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on real ranks, so that the other test processes do not wait for one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
