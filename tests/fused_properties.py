"""What holds to the bit of the fused kernels, interpreted: ``python -m tests.fused_properties``.

One line of JSON: gate -> property -> by how much it fails. Results are allocated between canaries and full of
NaN: a store beside them shows, and one that is missing.
"""

from __future__ import annotations

import json
import sys
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from spcompile.kernels.linear import launch
from spcompile.kernels.linear.operands import Operands, Options
from tests import triton_interpreter
from tests.fused_worker import DELTA, DIAGONAL, GATES, draw_case, kernel_for

__all__ = ["KINDS"]

KINDS = (*GATES[:3:2], DIAGONAL[1], DELTA[1], DELTA[4], "exclusive, delta rule")
SIZE = "canaries"
TOKENS, LATER = 250, 130
# Tokens of a segment -> how many there are.
SEGMENTS = {256: "one", 128: "two", 64: "four"}
BORDER, ROOM = 1.5, 32


class Canaries:
    """In place of ``Tensor.new_empty`` and ``new_zeros``."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, Tensor]] = []

    def allocate(self, inner: float) -> Any:
        def new(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            shape = tuple(size[0]) if size and isinstance(size[0], (tuple, list, torch.Size)) else size
            room = torch.full((prod(shape) + 2 * ROOM,), BORDER, dtype=dtype or like.dtype)
            inside = room[ROOM : room.numel() - ROOM].fill_(inner)
            self.rooms.append((room, inside))
            return inside.view(shape)

        return new

    def broken(self) -> int:
        """Borders that were written to, and numbers that were not written."""
        found = 0
        for room, inside in self.rooms:
            found += int((room[:ROOM] != BORDER).sum() + (room[-ROOM:] != BORDER).sum())
            found += int(inside.isnan().sum())
        return found


def run(x: Operands, options: Options, grads: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Outputs, the state, and with ``grads`` of these all gradients."""
    kernel = kernel_for(x, options.exclusive)
    forward = kernel.Forward(x, options)
    forward.local()
    found = [*forward.finish(x.initial_state)]
    if grads is not None:
        backward = kernel.Backward(x, options, grads[0], x.initial_state)
        backward.local()
        found += [y for y in backward.finish(grads[1]) if y is not None]
    return found


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference."""
    pairs = zip(one, other, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-3)) for a, b in pairs)


def operands(kind: str) -> tuple[Operands, Options, tuple[Tensor, Tensor]]:
    """Of one head."""
    gate = "mild, delta rule" if kind.startswith("exclusive") else kind
    x = draw_case(f"fp32, {gate}, {SIZE}, ")
    x = Operands(*(None if y is None else y[:, 1:] for y in x))
    assert x.initial_state is not None
    grads = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    return x, Options(True, 0.3, kind.startswith("exclusive"), False), grads


def properties(kind: str) -> dict[str, float]:
    """Of one gate."""
    x, options, grads = operands(kind)
    canaries, found, results = Canaries(), {}, {}
    with (
        mock.patch.object(Tensor, "new_empty", canaries.allocate(torch.nan)),
        mock.patch.object(Tensor, "new_zeros", canaries.allocate(0.0)),
    ):
        for least, name in SEGMENTS.items():
            with mock.patch.object(launch, "_LEAST", least):
                results[name] = run(x, options, grads)
        found["written"] = float(canaries.broken())
    with mock.patch.object(launch, "_LEAST", 128):
        again = run(x, options, grads)
        found["two runs"] = float(sum((a != b).sum() for a, b in zip(again, results["two"], strict=True)))
        later = [None if y is None else y.clone() for y in x]
        for y in (y for y in later[:5] if y is not None):
            y[:, :, LATER:] = y[:, :, LATER:].flip(3 if y.shape[3] > 1 else 2)
        changed, *_ = run(Operands(*later), options, None)
    found["later tokens"] = float((changed[:, :, :LATER] != results["two"][0][:, :, :LATER]).sum())
    assert (changed[:, :, LATER:] != results["two"][0][:, :, LATER:]).any()
    for name in ("two", "four"):
        found[f"{name} segments"] = apart(results[name], results["one"])
    return found


def main() -> int:
    triton_interpreter.install()
    print("FOUND", json.dumps({kind: properties(kind) for kind in KINDS}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
