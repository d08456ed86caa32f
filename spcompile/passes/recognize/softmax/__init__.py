"""Softmax attention: what it is made of, and the operator in its place."""

from spcompile.passes.recognize.softmax.match import match, rewrite

__all__ = ["match", "rewrite"]
