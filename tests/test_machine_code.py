"""The machine code of the Triton kernels, for GPUs that are not there: it compiles, and hardly spills.

``triton.compile`` and the ptxas of Triton's wheel need no GPU. Each kernel takes 5 to 30 seconds, so one size
is compiled here and the others by ``make sweep``.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux alone")

# kernel, has a decay, part in its gradient (0: none, 1: READS, 2: WRITES), bytes of stack allowed per thread
VARIANTS = {
    "summaries": ("summaries", True, 0, 0),
    "outputs": ("outputs", False, 0, 0),
    "outputs, decay": ("outputs", True, 0, 0),
    "outputs, decay, dq": ("outputs", True, 1, 64),
    "outputs, decay, dk": ("outputs", True, 2, 64),
    "pairs": ("pairs", True, 0, 0),
}
_POINTERS = {"g", "states", "logs", "before", "inner", "sums"}
_OPERANDS = {"q", "k", "v", "do", "other", "kept", "out"}


def compiled(kernel: str, gated: bool, part: int, size: int, dtype: torch.dtype, arch: int) -> Any:
    """The kernel for heads of ``size``, as the operators launch it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spcompile.kernels.linear import fused
    from spcompile.kernels.triton import segments

    function = getattr(segments, kernel)
    heads = torch.empty(1, 1, 1, size, dtype=dtype)
    constants = fused.tiles(kernel, heads, heads)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"READ": 2 if part == 2 else 0, "REVERSE": part == 2}
    if kernel != "pairs":
        constants |= {"GATED": gated}
    if kernel == "outputs":
        constants |= {"SCALED": part == 2, "OF_GATE": part}
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}[dtype]
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = kind if name in _OPERANDS else "*fp32" if name in _POINTERS else None
        signature[name] = pointer or ("fp32" if name == "scale" else "i32")
        if pointer or (name[-1] in "bht" and name[0] in "qkvdxo" and len(name) == 2) or name == "segment":
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
        *(
            pytest.param(*more, marks=pytest.mark.sweep)
            for more in (
                (64, torch.bfloat16, 90),
                (256, torch.bfloat16, 90),
                (64, torch.float32, 90),
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
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # a warm one would hide that it fails
    kernel, gated, part, allowed = VARIANTS[variant]
    made = compiled(kernel, gated, part, size, dtype, arch)
    if size == 128 and dtype == torch.bfloat16 and arch == 90:
        assert stack(made, tmp_path) <= allowed
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
