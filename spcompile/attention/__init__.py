"""The attention operators, the algebra of memory states, and the references that define both."""

from spcompile.attention.algebra import ALGEBRAS, BASIC, StateAlgebra
from spcompile.attention.ops import (
    linear_attention,
    linear_attention_backward,
    local_softmax_attention,
    local_softmax_attention_backward,
    softmax_attention,
    softmax_attention_backward,
)

__all__ = [
    "ALGEBRAS",
    "BASIC",
    "StateAlgebra",
    "linear_attention",
    "linear_attention_backward",
    "local_softmax_attention",
    "local_softmax_attention_backward",
    "softmax_attention",
    "softmax_attention_backward",
]
