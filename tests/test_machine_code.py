"""The machine code of the Triton kernels, for GPUs that are not there: it compiles, and hardly spills.

``triton.compile`` and the ptxas of Triton's wheel need no GPU. A kernel takes one or two seconds. Heads of 64
and 128 on sm_90 are compiled here, the others by ``make sweep``.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux alone")


class Variant(NamedTuple):
    """A kernel as one of the operators launches it; ``stack`` are the bytes per thread that it may have."""

    kernel: str
    constants: Mapping[str, Any] = MappingProxyType({})
    stack: int = 0


# Kernels that are launched as another one is.
LIKE = {"diagonal.columns": "outputs, per key", "diagonal.outputs": "outputs, per key"}
# Bytes of shared memory that a block may have.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
BACK = {"READ": 2, "REVERSE": True}
# OF_GATE, the part in a decay's gradient: 0 none, 1 READS, 2 WRITES.
DQ, DK = {"OF_GATE": 1}, {"OF_GATE": 2, "SCALED": True, **BACK}
VARIANTS = {
    "summaries": Variant("segments.summaries"),
    "outputs": Variant("segments.outputs", {"GATED": False}),
    "outputs, decay": Variant("segments.outputs"),
    "outputs, decay, dq": Variant("segments.outputs", DQ, 48),
    "outputs, decay, dk": Variant("segments.outputs", DK, 32),
    "pairs": Variant("segments.pairs"),
    "delta, systems": Variant("delta.systems"),
    "delta, summaries": Variant("delta.summaries"),
    "delta, summaries back": Variant("delta.summaries", {"SOURCE": True, **BACK}, 104),
    "delta, writes": Variant("delta.corrected"),
    "delta, gradients": Variant("delta.corrected", {"SOURCE": True, **BACK}, 160),
    "delta, dk of readings": Variant("segments.outputs", {**DQ, "STRICT": True}, 16),
    "delta, dk": Variant("segments.outputs", {**DK, "LESS": True}, 160),
    "per key, summaries": Variant("diagonal.summaries"),
    "per key, scores": Variant("diagonal.within"),
    "per key, pairs back": Variant("diagonal.within", {"GRADS": True}),
    "per key, outputs": Variant("diagonal.outputs"),
    "per key, dv": Variant("diagonal.outputs", {"SCALED": True, "MIRRORED": True, **BACK}),
    "per key, dq": Variant("diagonal.columns", stack=8),
    "per key, dk": Variant("diagonal.columns", {"ROLE": 2, **BACK}, 8),
}
DEFAULTS = {"READ": 0, "REVERSE": False, "GATED": True, "SCALED": False, "OF_GATE": 0, "STRICT": False}
DEFAULTS |= {"LESS": False, "SOURCE": False, "GRADS": False, "MIRRORED": False, "ROLE": 1}
_FLOATS = {"g", "beta", "states", "matrices", "logs", "before", "inner", "sums", "plus", "given"}
_FLOATS |= {"of_gate", "dq", "dk", "dg"}
_OPERANDS = {"q", "k", "v", "do", "other", "kept", "out", "less_k", "less_v", "errors", "inverses"}
_OPERANDS |= {"mate", "scores"}


def compiled(variant: Variant, size: int, dtype: torch.dtype, arch: int) -> Any:
    """The kernel for heads of ``size``, as the operators launch it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spcompile.kernels.linear.launch import tiles

    file, name = variant.kernel.split(".")
    function = getattr(importlib.import_module(f"spcompile.kernels.triton.{file}"), name)
    heads = torch.empty(1, 1, 1, size, dtype=dtype)
    name += ", less" if variant.constants.get("LESS") else ""
    constants = tiles("delta" if file == "delta" else LIKE.get(variant.kernel, name), heads, heads)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= DEFAULTS | variant.constants
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}[dtype]
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = kind if name in _OPERANDS else "*fp32" if name in _FLOATS else None
        if name == "inverses" and dtype == torch.bfloat16:
            pointer = "*fp16"
        signature[name] = pointer or ("fp32" if name == "scale" else "i32")
        if pointer or (name[-1] in "bht" and name[0] in "qkvdxolm" and len(name) == 2) or name == "segment":
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


def stack(kernel: Any, folder: Path) -> int:
    """Bytes of memory per thread for values that do not fit into registers."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    told = subprocess.run([binary, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", told.stdout + told.stderr)
    assert found is not None, told
    return int(found[1])


def wide_offsets(kernel: Any) -> bool:
    """Whether every offset that all of a program shares has 64 bits: operands may have 2^31 entries."""
    offsets = re.findall(r"tt\.addptr [^:]*: !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"])
    return bool(offsets) and set(offsets) == {"i64"}


@pytest.mark.timeout(500)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("size", "dtype", "arch"),
    [
        (128, torch.bfloat16, 90),
        (64, torch.bfloat16, 90),
        *(
            pytest.param(*more, marks=pytest.mark.sweep)
            for more in (
                (256, torch.bfloat16, 90),
                (64, torch.float32, 90),
                (128, torch.float32, 90),
                (256, torch.float32, 90),
                (256, torch.float32, 80),
                (128, torch.bfloat16, 80),
                (128, torch.bfloat16, 100),
            )
        ),
    ],
    ids=str,
)
def test_a_kernel_compiles(
    variant: str, size: int, dtype: torch.dtype, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size > 128 and "delta" in variant:
        pytest.skip("keys of a delta rule have at most 128 numbers here: ATen's chunks take the others")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # a warm one would hide that it fails
    made = compiled(VARIANTS[variant], size, dtype, arch)
    assert made.metadata.shared <= SHARED[arch], "it would not start"
    if size <= 128 and dtype == torch.bfloat16 and arch == 90:
        assert stack(made, tmp_path) <= VARIANTS[variant].stack
    assert wide_offsets(made)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("how", "rows"), [(1, 32), (2, 128)], ids=["factors", "matrices"])
def test_the_scan_compiles(how: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spcompile.kernels.triton.scan import _scan, launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    constants = {"K": 128, "V": 128, "BK": rows, "BV": 32, "HOW": how, "INITIAL": True, "REVERSE": True}
    constants |= {"WIDE": tl.float32}
    kinds = dict.fromkeys(("a", "b", "initial", "before", "final"), "*fp32")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in _scan.arg_names}
    source = ASTSource(fn=_scan, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch(how == 2, rows))
    assert stack(made, tmp_path) <= (32 if how == 2 else 0) and wide_offsets(made)
