"""What is told of an attention that was seen, and the user's line that a node comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

__all__ = ["FAILED", "Site", "source_of"]

FAILED = "any attention"
"""The kind of the site that tells of a recognition that failed."""


@dataclass(frozen=True)
class Site:
    """One attention that was seen, rewritten or not."""

    kind: str
    """"softmax", "linear", or of a recurrence "scan" or "loop"."""
    mask: str
    """"all", "causal", "window of 4", "causal window of 4"; "and padding" (data per key), "and general" (data
    of rows x keys); with ", soft cap", ", sinks" what else is done to the scores. Of a linear one also
    "reversed" and "bidirectional", "strictly" where a token does not see itself, and "with decay"."""
    rewritten: bool
    reason: str
    """Why it was left as it is; empty if it was rewritten."""
    source: str
    """The user's line: "file.py:123 in forward: code"."""
    name: str
    """The new node's name, or that of the node that was left."""


_FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\S+)\n\s*(.*)')


def source_of(node: fx.Node | None) -> str:
    """The innermost frame of the user's stack: "file.py:123 in forward: code". The code that stands for a
    library's call is not the user's."""
    trace = (node.meta.get("stack_trace") if node is not None else None) or ""
    frames = [f for f in _FRAME.findall(trace) if "/spcompile/library/" not in f[0].replace(chr(92), "/")]
    if not frames:
        return ""
    path, line, function, code = frames[-1]
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line} in {function}: {code.strip()}"
