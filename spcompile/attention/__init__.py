"""The attention operators, the algebra of memory states, and the references that define both."""

from spcompile.attention.algebra import ALGEBRAS, StateAlgebra
from spcompile.attention.fold import folded
from spcompile.attention.linear import linear_attention, linear_attention_backward
from spcompile.attention.maximum import max_scan
from spcompile.attention.relative import (
    local_softmax_attention_relative_backward,
    softmax_attention_relative_backward,
)
from spcompile.attention.scan import affine_scan
from spcompile.attention.softmax import (
    local_softmax_attention,
    local_softmax_attention_backward,
    softmax_attention,
    softmax_attention_backward,
)

__all__ = [
    "ALGEBRAS",
    "StateAlgebra",
    "affine_scan",
    "folded",
    "linear_attention",
    "linear_attention_backward",
    "local_softmax_attention",
    "local_softmax_attention_backward",
    "local_softmax_attention_relative_backward",
    "max_scan",
    "softmax_attention",
    "softmax_attention_backward",
    "softmax_attention_relative_backward",
]
