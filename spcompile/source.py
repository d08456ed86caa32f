"""The user's line that a node comes from, as every error, warning and report tells it."""

from __future__ import annotations

import re

from torch import fx

__all__ = ["source_of"]

_FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\S+)(?:\n[ \t]*(?![ \t]|File ")(.*))?')


def source_of(where: fx.Node | str | None, outermost: bool = False) -> str:
    """The innermost frame of the user's stack: "file.py:12 in forward: code"; empty if there is none.

    The code that stands for a library's call is not the user's.

    Args:
        where: a node, or its stack trace.
        outermost: of the frames the first instead: the function that was compiled.
    """
    trace = (where.meta.get("stack_trace") if isinstance(where, fx.Node) else where) or ""
    found = [(path.replace("\\", "/"), *others) for path, *others in _FRAME.findall(trace)]
    frames = [f for f in found if "/spcompile/library/" not in f[0]]
    if not frames:
        return ""
    path, line, function, code = frames[0 if outermost else -1]
    return f"{path.rsplit('/', 1)[-1]}:{line} in {function}: {code.strip()}"
