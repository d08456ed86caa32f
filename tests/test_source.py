"""How a node's place in the user's code is told."""

from __future__ import annotations

import pytest
from torch import fx

from spcompile.source import source_of

USER = '  File "/home/me/model.py", line 12, in forward\n    y = self.mix(x)\n'
INNER = '  File "C:\\me\\layers.py", line 7, in mix\n    return x / 2\n'
LIBRARY = '  File "/site/spcompile/library/delta.py", line 3, in rule\n    return q @ k\n'
NO_CODE = '  File "<string>", line 1, in made\n'
FORWARD, MIX = "model.py:12 in forward: y = self.mix(x)", "layers.py:7 in mix: return x / 2"


@pytest.mark.parametrize(
    ("trace", "innermost", "outermost"),
    [
        (USER, FORWARD, FORWARD),
        (USER + INNER, MIX, FORWARD),
        (USER + LIBRARY, FORWARD, FORWARD),
        (NO_CODE + INNER.rstrip(), MIX, "<string>:1 in made: "),
        (USER + NO_CODE.rstrip(), "<string>:1 in made: ", FORWARD),
        (LIBRARY, "", ""),
        ("", "", ""),
        (None, "", ""),
    ],
)
def test_the_users_line(trace: str | None, innermost: str, outermost: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert source_of(trace) == source_of(node) == innermost
    assert source_of(trace, outermost=True) == source_of(node, outermost=True) == outermost
    assert source_of(fx.Graph().placeholder("x")) == ""
