"""Linear attention: what it is made of, and the operator in its place."""

from spcompile.passes.recognize.linear.match import recognize

__all__ = ["recognize"]
