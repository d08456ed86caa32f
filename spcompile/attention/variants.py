"""The family of linear attention as one table: which operands a variant has and what its ranks exchange.

README's table is made of these rows (``python -m spcompile variants``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

from spcompile.attention.algebra import BASIC, DECAY, MATRIX, StateAlgebra

__all__ = ["VARIANTS", "Variant", "table"]

Decay = Literal["none", "constant", "scalar", "diagonal"]


@dataclass(frozen=True)
class Variant:
    """One variant of ``spcompile::linear_attention``.

    Attributes:
        name: of its model in ``models/``.
        recurrence: what a token does to the state.
        decay: the form of ``log_decay``.
        delta: whether it has ``beta``, the delta rule.
        exclusive: whether a query sees the tokens before its own only.
        note: what happens outside the operator.
    """

    name: str
    recurrence: str
    decay: Decay = "none"
    delta: bool = False
    exclusive: bool = False
    note: str = ""

    @property
    def algebra(self) -> StateAlgebra:
        """The form of the transition of a run of tokens."""
        return MATRIX if self.delta else BASIC if self.decay == "none" else DECAY

    @property
    def summary(self) -> str:
        """What a rank sends."""
        if self.delta:
            return "S and the matrix M"
        sent = {"scalar": " and the sum of log decays", "diagonal": " and the vector of sums of log decays"}
        return "S" + sent.get(self.decay, "")

    def elements(self, k: int, v: int) -> int:
        """Numbers that a rank sends per batch entry and head, each way."""
        return k * v + (k * k if self.delta else {"scalar": 1, "diagonal": k}.get(self.decay, 0))

    def log_decay_shape(self, b: int, h: int, t: int, k: int) -> tuple[int, ...] | None:
        """The shape of ``log_decay``."""
        shapes = {"constant": (1, h, 1, 1), "scalar": (b, h, t, 1), "diagonal": (b, h, t, k)}
        return shapes.get(self.decay)


_PLAIN, _SCALAR = "S + kᵀv", "a S + kᵀv"
_ROWS = (
    Variant("linear_llama3", _PLAIN, note="normaliser: a column of ones beside v"),
    Variant("based", _PLAIN, note="feature map 1, x, x⊗x/√2"),
    Variant("rebased", _PLAIN, note="feature map (γ x + β)²"),
    Variant("retention", "γ S + kᵀv", "constant"),
    Variant("lightning", "γ S + kᵀv", "constant"),
    Variant("simple_gla", _SCALAR, "scalar"),
    Variant("mamba2", _SCALAR, "scalar", note="a = exp(Δ A), v = Δ x"),
    Variant("gla", "Diag(a) S + kᵀv", "diagonal"),
    Variant("hgrn2", "Diag(a) S + (1-a)ᵀv", "diagonal", note="k = 1 - a"),
    Variant("rwkv6", "Diag(a) S + kᵀv", "diagonal", exclusive=True, note="bonus (q u kᵀ) v of the own token"),
    Variant("deltanet", "(I - β kᵀk) S + β kᵀv", delta=True),
    Variant("gated_deltanet", "a (I - β kᵀk) S + β kᵀv", "scalar", delta=True),
    Variant("kda", "(I - β kᵀk) Diag(a) S + β kᵀv", "diagonal", delta=True),
)
VARIANTS = {row.name: row for row in _ROWS}


def table() -> str:
    """The variants in Markdown, as README shows them."""
    rows = [
        {
            "model": f"`{v.name}`",
            "state after a token": v.recurrence,
            "decay": "-" if v.decay == "none" else v.decay,
            "a rank sends": v.summary,
            "besides": v.note,
        }
        for v in _ROWS
    ]
    return tabulate(rows, headers="keys", tablefmt="github")
