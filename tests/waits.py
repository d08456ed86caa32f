"""What Inductor's code reads of a collective before it has waited for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from unittest import mock

from torch._inductor.graph import GraphLowering

__all__ = ["kept_codes", "unwaited"]

_STARTS = r"torch\.ops\.(?:_c10d_functional\.(?!wait_tensor)|spcompile\.start_)\w+\.default\("
_ALIAS = r"(\w+) = (?:reinterpret_tensor\()?(\w+)(?=[,;\[]|$)"


def unwaited(code: str) -> list[str]:
    """The lines that use what a collective brings, or writes in place, between its start and its wait."""
    found, names = [], {}  # name -> the buffer that a collective is writing to
    for line in map(str.strip, code.split("def call", 1)[-1].splitlines()):
        used = [n for n in names if re.search(rf"\b{n}\b", line)]
        started = re.match(rf"(?:(\w+) = )?{_STARTS}(\w+)", line)
        waited = re.match(r"torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)\)", line)
        alias = re.match(_ALIAS, line)
        if waited is not None:
            names = {n: b for n, b in names.items() if b != names.get(waited[1])}
        elif started is not None:
            found += [line] * bool(used)
            names[started[1] or started[2]] = started[1] or started[2]
        elif alias is not None and alias[2] in names:
            names[alias[1]] = names[alias[2]]
        elif used and not line.startswith(("assert_", "del ", "#")):
            found.append(line)
    return found


@contextlib.contextmanager
def kept_codes() -> Iterator[list[str]]:
    """The code of each graph that Inductor compiles meanwhile."""
    codes: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", codes.append):
        yield codes
