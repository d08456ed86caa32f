"""The strategies: one row each, which options, reports and traffic read.

Nothing here may import torch: options are checked before that takes its seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LINEAR", "SOFTMAX", "Strategy", "strategy_of"]


Crossing = tuple[str, str]


@dataclass(frozen=True)
class Strategy:
    """One way across the ranks.

    Attributes:
        name: the value of the option ``linear`` or ``softmax``.
        title: what the field calls it.
        where: the module and the name of its implementation, an ``Exchange`` for linear attention
            (``exchange.py``), a ``SoftmaxStrategy`` for softmax (``softmax.py``).
        sends: (operator, collective) -> what is sent, and the bytes that one rank receives as formulas, one
            for each thing that is sent so. In P ranks, b tokens per rank, B, H, G key heads, K, V, w bytes an
            element, n slices of a state; (K V+A) is a state and what a run of tokens multiplies it by. With
            "edges" as a third part: of E neighbouring tokens alone.
        forward, backward: (how many collectives or sends, the bytes that a rank receives in each), of the
            plain causal attention.
        share: of all pairs of a row and a key, P times the part that the slowest rank has; c is 1 if causal.
    """

    name: str
    title: str
    where: str
    sends: Mapping[tuple[str, ...], tuple[str, ...]]
    forward: tuple[Crossing, ...]
    backward: tuple[Crossing, ...]
    share: str = ""

    def load(self) -> Any:
        """The implementation."""
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)


_SCANS = ("affine_scan", "max_scan")
_STATES = "(P-1) B H (K V+A) w"
_KEYS = "(P-1) b B G (K+V) w"
_EDGES = "(P-1) E B G (K+V) w"
_BLOCK = "b B G (K+V) w"
# With key heads as they are, and with one for each query head.
_OF_HEADS = ("(P-1)/P b B (H K+G (K+V)) w", "(P-1)/P b B H (2 K+V) w")


def _rows(times: int) -> tuple[str, ...]:
    """Of so many values a row, and its log-sum-exp: as long as one number, or as two narrow ones."""
    return tuple(f"(P-1)/P b B H ({times} V+{n}) w" for n in (1, 2))


def _steps(of_a_step: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What is sent from rank to rank, in each of several steps, and the last state to all."""
    return {
        ("linear_attention", "shift"): ("memory states", of_a_step),
        ("linear_attention_backward", "shift"): ("gradients of memory states", of_a_step),
        **{(scan, "shift"): ("states of a scan", "N w") for scan in _SCANS},
        **{(scan, "all_reduce"): ("the last state of a scan", "2 (P-1)/P N w") for scan in _SCANS},
    }


_LINEAR = (
    Strategy(
        "allgather",
        "LASP-2",
        "spcompile.strategies.linear_allgather:AllGather",
        {
            ("linear_attention", "all_gather"): ("memory states", _STATES),
            ("linear_attention_backward", "all_gather"): ("gradients of memory states", _STATES),
            **{(scan, "all_gather"): ("states of a scan", "(P-1) N w") for scan in _SCANS},
        },
        (("1", "(P-1) B H (K V+A) w"),),
        (("1", "(P-1) B H (K V+A) w"),),
    ),
    Strategy(
        "scan",
        "log-step scan",
        "spcompile.strategies.linear_scan:Scan",
        _steps("B H (K V+A) w"),
        (("1+ceil(log2(P-1))", "B H (K V+A) w"),),
        (("1+ceil(log2(P-1))", "B H (K V+A) w"),),
    ),
    Strategy(
        "ring",
        "LASP-1",
        "spcompile.strategies.linear_ring:Ring",
        _steps("B H K V w"),
        (("P-1", "B H K V w"),),
        (("P-1", "B H K V w"),),
    ),
    Strategy(
        "pipelined",
        "ZeCO",
        "spcompile.strategies.linear_pipelined:Pipelined",
        _steps("B H K V w/n"),
        (("P+n-2", "B H K V w/n"),),
        (("P+n-2", "B H K V w/n"),),
    ),
)
_BACK: dict[tuple[str, ...], tuple[str, ...]] = {
    ("all_gather",): ("keys and values again", _KEYS),
    ("reduce_scatter",): ("gradients of keys and values", _KEYS),
    ("all_gather", "edges"): ("gradients of neighbours' keys and values", _EDGES),
}
_SOFTMAX = (
    Strategy(
        "allgather",
        "LASP-2H",
        "spcompile.strategies.softmax_allgather:AllGather",
        {
            ("softmax_attention", "all_gather"): ("keys and values", _KEYS),
            ("softmax_attention", "all_gather", "edges"): ("neighbours' keys and values", _EDGES),
            **{
                (f"softmax_attention{relative}_backward", *crossing): said
                for relative in ("", "_relative")
                for crossing, said in _BACK.items()
            },
        },
        (("1", _KEYS),),
        (("2", _KEYS),),
        "1-c/(2*P)",
    ),
    Strategy(
        "ring",
        "Ring Attention",
        "spcompile.strategies.softmax_ring:Ring",
        {
            ("softmax_attention", "shift"): ("keys and values", _BLOCK),
            **{
                (f"softmax_attention{relative}_backward", "shift"): (
                    "keys, values, and their gradients",
                    _BLOCK,
                )
                for relative in ("", "_relative")
            },
        },
        (("P-1", _BLOCK),),
        (("2*P-1", _BLOCK),),
        "1-c/(2*P)",
    ),
    Strategy(
        "alltoall",
        "Ulysses",
        "spcompile.strategies.softmax_alltoall:AllToAll",
        {
            ("softmax_attention", "all_to_all"): (
                "tokens of a rank's heads, and back",
                *_OF_HEADS,
                *_rows(1),
            ),
            **{
                (f"softmax_attention{relative}_backward", "all_to_all"): (
                    "gradients of a rank's heads, and back",
                    *_OF_HEADS,
                    *_rows(2),
                )
                for relative in ("", "_relative")
            },
        },
        (("1", _OF_HEADS[0]), ("1", _rows(1)[0])),
        (("1", _rows(2)[0]), ("1", _OF_HEADS[0])),
        "ceil(B H/P)*P/B/H*(1-c/2)",
    ),
)
LINEAR = {row.name: row for row in _LINEAR}
SOFTMAX = {row.name: row for row in _SOFTMAX}


def strategy_of(kind: str, name: str) -> Strategy:
    """The row of an option's value; ``"auto"`` is the all-gather.

    Args:
        kind: ``"linear"`` or ``"softmax"``.
    """
    return {"linear": LINEAR, "softmax": SOFTMAX}[kind]["allgather" if name == "auto" else name]
