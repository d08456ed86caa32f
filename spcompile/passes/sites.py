"""What is told of an attention that was seen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAILED", "Site"]

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
