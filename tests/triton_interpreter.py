"""Triton's interpreter, made to tell the truth about precision.

What Triton 3.6 and 3.7 get wrong, and what is done about it:

- a ``tl.dot`` of bf16 multiplies bit patterns (triton #11584): operands are converted;
- a cast of fp32 to bf16 truncates: it rounds to the nearest, ties to even;
- TF32 is not modelled and looks exact: operands of a dot with ``input_precision="tf32"`` are rounded to it
  (those of "tf32x3" and "ieee" are not);
- a bf16 constant cannot be made;
- every call of a function patches Triton's language anew, half of the time: it is patched once for all.

What it leaves out, and no test with it can show: races, time, the types of variables that a loop carries (the
compiler refuses what the interpreter runs: ``test_machine_code.py``), and accesses beyond an operand (tests
surround operands with NaN for that).
"""

from __future__ import annotations

import math
import types
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["Launch", "dry", "install", "launches", "moved"]


class Launch(NamedTuple):
    """A kernel that was started."""

    kernel: str
    programs: int
    operands: int  # bytes of the tensors that it was given, each counted once


moved = [0]
"""Bytes loaded and stored by all kernels so far, without lanes that are masked off."""
launches: list[Launch] = []
"""Kernels started so far."""
dry = [False]
"""Whether kernels are only noted down, and not run."""


def from_bf16(x: np.ndarray) -> np.ndarray:
    """The float32 values of bf16 bit patterns."""
    return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bit patterns of the nearest bf16 numbers, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to ten bits of mantissa, ties away from zero, as ``cvt.rna.tf32`` does."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    rounded = ((x.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def install() -> None:
    """Mend the interpreter of this process."""
    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        have, want = source.dtype.scalar, kind.scalar
        if have == tl.bfloat16 != want:
            return cast(self, handle(from_bf16(source.data), tl.float32), kind)
        if want == tl.bfloat16 != have:
            return handle(to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, kind)

    def create_fp_to_fp(self: Any, source: Any, kind: Any, mode: Any) -> Any:
        both = {source.dtype.scalar, kind.scalar}
        return cast_impl(self, source, kind) if tl.bfloat16 in both else fp_to_fp(self, source, kind, mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        x, y, kind = a.data, b.data, a.dtype.scalar
        if kind == tl.bfloat16:
            x, y = from_bf16(x), from_bf16(y)
        elif kind == tl.float32 and str(precision).endswith("TF32"):
            x, y = to_tf32(x), to_tf32(y)
        elif kind not in (tl.float16, tl.float32):
            return dot(self, a, b, d, precision, imprecise)
        return handle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def counting(access: Any, at: int) -> Any:
        def call(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
            entries = int(np.count_nonzero(args[at].data))
            moved[0] += entries * pointers.get_element_ty().primitive_bitwidth // 8
            return access(self, pointers, *args, **kwargs)

        return call

    builder.create_masked_load = counting(builder.create_masked_load, 0)
    builder.create_masked_store = counting(builder.create_masked_store, 1)

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = {x.data_ptr(): x.numel() * x.itemsize for x in args if isinstance(x, torch.Tensor)}
        launches.append(Launch(self.fn.__name__, math.prod(self.grid), sum(tensors.values())))
        return None if dry[0] else run(self, *args, **kwargs)

    run, interpreter.GridExecutor.__call__ = interpreter.GridExecutor.__call__, start
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(both)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    builder.get_bf16 = lambda self, value: handle(to_bf16(np.array([value], np.float32)), tl.bfloat16)
