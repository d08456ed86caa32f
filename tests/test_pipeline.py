"""``passes/__init__.py`` states the whole pipeline: what it says is what runs, and no module is left out."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spcompile import backend, frontend, passes
from spcompile.passes import shard

STATED = re.findall(r"^ {4,6}(\w+) {2,}\S", passes.__doc__ or "", re.MULTILINE)


def called(function: Callable[..., Any]) -> list[str]:
    """The stated steps that a function calls, in the order of its text; of two calls the last."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = sorted(
        (n.lineno, n.col_offset, getattr(n.func, "id", getattr(n.func, "attr", "")))
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
    )
    names = [name for _, _, name in found if name in STATED]
    return list(dict.fromkeys(reversed(names)))[::-1]


def test_the_steps_run_in_the_order_that_is_stated() -> None:
    dynamo = called(backend.spcompile), called(frontend.prepare)
    steps = [*dynamo[0], *dynamo[1], *called(shard.shard_joint_graph), *called(backend.WaitPass.__call__)]
    assert dynamo[0][-1] == "prepare" and steps == STATED


def test_every_module_is_in_it() -> None:
    words = set(re.findall(r"\w+", passes.__doc__ or ""))
    home = Path(passes.__file__).parent
    found = {p.stem for folder in (home, home / "shard") for p in folder.iterdir() if p.stem[0] != "_"}
    assert "canonical" in found and "propagate" in found and not found - words
