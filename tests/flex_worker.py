"""FlexAttention as Inductor compiles it for an H100, interpreted (``interpreted_inductor.py``).

``TRITON_INTERPRET=1 python -m tests.flex_worker [CASE ...]``. One line of JSON: case -> for each call the
relative errors of out, lse, dq, dk, dv against blocks of ATen operators in float64, how many graphs were
compiled for it, how many entries the largest tensor has that they allocated, and a mask.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers

from spcompile.kernels.softmax import blockwise, flex
from spcompile.kernels.softmax.operands import Operands
from tests import triton_interpreter
from tests.interpreted_inductor import Written, interpreted
from tests.test_flex import mask_of, options_of

# Mask, dtype, causal, query heads; and what is called one after another, (rows, keys, first row).
CASES: dict[str, tuple[str, torch.dtype, bool, int, list[tuple[int, int, int]]]] = {
    "bf16, bool": ("bool", torch.bfloat16, True, 2, [(140, 150, 10), (130, 260, 130), (150, 280, 130)]),
    "fp32, minimum": ("minimum", torch.float32, False, 1, [(131, 60, 0)]),
    "bf16, alibi": ("alibi", torch.bfloat16, True, 2, [(130, 60, 10)]),
    "fp32, capped": ("capped", torch.float32, True, 2, [(70, 140, 70)]),
    "fp32": ("none", torch.float32, True, 2, [(70, 140, 70)]),
}
SIZES = 16, 24  # of keys and values


def operands(kind: str, dtype: torch.dtype, heads: int, t: int, s: int) -> tuple[Operands, Tensor]:
    """All query heads to one key head."""
    torch.manual_seed(t)
    sizes = (heads, t, SIZES[0]), (1, s, SIZES[0]), (1, s, SIZES[1]), (heads, t, SIZES[1])
    q, k, v, grad = (torch.randn(1, *size).to(dtype) for size in sizes)
    return Operands(q, k, v, mask_of(kind, (1, heads, t, s), torch.float32)), grad


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def found(case: str, written: list[Written]) -> list[dict[str, Any]]:
    """What the calls of a case found."""
    kind, dtype, causal, heads, lengths = CASES[case]
    results = []
    for t, s, first in lengths:
        (x, grad), options = operands(kind, dtype, heads, t, s), options_of(kind, causal, 0.3, first)
        before = len(written)
        out, lse = flex.forward(x, options)
        got = out, lse, *flex.backward(grad, x, out, lse, options)
        exact = Operands(*map(wide, x))
        want = *blockwise.forward(exact, options), *blockwise.backward(wide(grad), exact, options)
        # Rows that see nothing: -inf alike, or as far down as their mask.
        far = want[1] < -1e30
        assert torch.equal(far, got[1] < -1e30) and torch.equal(want[1] == -torch.inf, got[1] == -torch.inf)
        pairs = [
            (torch.where(far, 0.0, a), torch.where(far, 0.0, b)) if at == 1 else (a.double(), b)
            for at, (a, b) in enumerate(zip(got, want, strict=True))
        ]
        errors = [float((a - b).abs().max() / b.abs().max().clamp_min(0.1)) for a, b in pairs]
        assert dtype != torch.float32 or all("'tf32x3'" in code.code for code in written)
        largest = max(max(code.largest) for code in written)
        counts = {"graphs": len(written) - before, "largest": largest, "entries": t * s}
        results.append({"errors": errors} | counts)
    return results


def _tanh(x: Any) -> Any:
    """Of a block, in place of the device's function, which the interpreter has no way to call."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


def main() -> int:
    triton_interpreter.install()
    triton_helpers.libdevice.tanh = _tanh
    results = {}
    for case in sys.argv[1:] or CASES:
        torch._dynamo.reset()
        with interpreted() as written:
            results[case] = found(case, written)
    print("FOUND", json.dumps(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
