"""Which cases are tried for each change, and which before a release alone (``make sweep``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["each_change"]


def each_change(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """The values of a parameter, or of several where they are tuples; what is not in ``now`` is a release's.

    Raises:
        AssertionError: where ``now`` names a value that there is not.
    """
    values = list(values)
    assert all(n in values for n in now), f"{now} of {values}"
    params = []
    for v in values:
        marks = () if v in now else (pytest.mark.sweep,)
        params.append(pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=marks))
    return params
