"""The one exception class that users see."""

from __future__ import annotations

__all__ = ["SpcompileError"]


class SpcompileError(RuntimeError):
    """A request that spcompile cannot serve: it names what, where in the user's source, and the remedy.

    Broken invariants of spcompile itself are ``assert`` statements and never this class.
    """
