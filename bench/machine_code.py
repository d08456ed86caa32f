"""The Triton kernels as machine code for GPUs that are not there: what ``triton.compile`` makes of them.

``VARIANTS`` has every kernel in each role in which the operators launch it. Registers, stack and shared
memory are what the compiler says; blocks per multiprocessor follow from them; instructions are counted in
the disassembly.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spcompile.kernels.linear.launch import AMD

__all__ = [
    "SCANS",
    "SHARED",
    "VARIANTS",
    "Code",
    "Variant",
    "compiled",
    "compiled_scan",
    "described",
]


class Variant(NamedTuple):
    """A kernel as one of the operators launches it.

    ``wide`` says whether its products have the 64 rows of a warp group's.
    """

    kernel: str
    constants: Mapping[str, Any] = MappingProxyType({})
    wide: bool = True


# Kernels that are launched as another one is.
_LIKE = {
    "diagonal.columns": "outputs, per key",
    "diagonal.outputs": "outputs, per key",
    "delta.outputs": "delta, back",
    "delta.prologue": "delta, back",
    "segments.prologue": "summaries",
    "diagonal.prologue": "summaries",
    "delta_per_key_back.pairs": "within",
    "delta_per_key.summaries": "delta, per key",
    "delta_per_key.summaries_back": "delta, per key",
    "delta_per_key.written": "delta, per key",
    "delta_per_key.corrected": "delta, per key",
}
# Bytes of shared memory that a block may have.
SHARED: dict[int | str, int] = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, AMD: 64 << 10}

_BACK = {"READ": 2, "REVERSE": True}
# OF_GATE, the part in a decay's gradient: 0 none, 1 READS, 2 WRITES.
_DQ, _DK = {"OF_GATE": 1, "final": None}, {"OF_GATE": 2, "SCALED": True, "final": None, **_BACK}
_TRAINED = {"TRAINED": True}
# Where a segment is not the first of a run, FOLD: a few states of earlier ones are read before.
VARIANTS = {
    "summaries": Variant("segments.summaries"),
    "prologue": Variant("segments.prologue", {"GATED": False}),
    "prologue, decay": Variant("segments.prologue"),
    "outputs": Variant("segments.outputs", {"GATED": False}),
    "outputs, decay": Variant("segments.outputs"),
    "outputs, decay, dq": Variant("segments.outputs", _DQ),
    "outputs, decay, dk": Variant("segments.outputs", _DK),
    "pairs": Variant("segments.pairs", {"less": None}),
    "delta, systems": Variant("inverse.systems"),
    "delta, summaries": Variant("delta.summaries"),
    "delta, summaries back": Variant("delta.summaries", {"BACK": True, "REVERSE": True}),
    "delta, prologue": Variant("delta.prologue"),
    "delta, outputs": Variant("delta.outputs"),
    "delta, writes": Variant("delta.corrected"),
    "delta, gradients": Variant("delta.corrected", {"BACK": True, "REVERSE": True}),
    "delta, pairs": Variant("segments.pairs"),
    "delta, dk of readings": Variant("segments.outputs", {**_DQ, "STRICT": True, "FOLD": False}),
    "delta, dk": Variant("segments.outputs", {**_DK, "LESS": True, "FOLD": False}),
    "per key, summaries": Variant("diagonal.summaries"),
    "per key, prologue": Variant("diagonal.prologue"),
    "per key, scores": Variant("diagonal.within", wide=False),
    "per key, pairs back": Variant("diagonal.within", {"GRADS": True}, wide=False),
    "per key, outputs": Variant("diagonal.outputs"),
    "per key, dv": Variant("diagonal.outputs", {"SCALED": True, "MIRRORED": True, **_BACK}),
    "per key, dq": Variant("diagonal.columns"),
    "per key, dk": Variant("diagonal.columns", {"ROLE": 2, **_BACK}),
    "delta per key, prepared": Variant("delta_per_key.prepared"),
    "delta per key, summaries": Variant("delta_per_key.summaries"),
    "delta per key, summaries back": Variant("delta_per_key.summaries_back"),
    "delta per key, outputs": Variant("delta_per_key.written"),
    "delta per key, writes": Variant("delta_per_key.written", _TRAINED),
    "delta per key, gradients": Variant("delta_per_key.corrected"),
    "delta per key, readings": Variant("delta_per_key_back.readings"),
    "delta per key, pairs": Variant("delta_per_key_back.pairs", wide=False),
}
_DEFAULTS: dict[str, Any] = {
    "READ": 0,
    "REVERSE": False,
    "GATED": True,
    "SCALED": False,
    "OF_GATE": 0,
    "STRICT": False,
    "FOLD": True,
}
_DEFAULTS |= {"TRAINED": False, "LESS": False, "BACK": False, "GRADS": False, "MIRRORED": False, "ROLE": 1}
_FLOATS = {"g", "beta", "states", "matrices", "logs", "carry", "before", "final", "inner", "sums", "plus"}
_FLOATS |= {"given", "of_gate", "dq", "dk", "dg", "back", "back_logs", "back_matrices"}
_FLOATS |= {"through", "behind", "plus_q", "plus_k", "plus_g"}
_OPERANDS = {"q", "k", "v", "do", "other", "out", "less_k", "less_v", "errors", "mate", "less", "written"}
_OPERANDS |= {"dv", "out_q", "out_k"}
# Float32 where operands are float16 (``launch.narrow``).
_NARROW = {"kept", "kept_back", "scores", "queries", "readers", "writers", "of_queries", "of_keys"}
# Inverses, in float16 where operands are bf16.
_SYSTEMS = {"systems", "adjoints"}
_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}


def compiled(variant: Variant, size: int, dtype: torch.dtype, arch: int | str) -> Any:
    """The kernel for heads of ``size``, as the operators launch it, for sm_``arch`` or an AMD target."""
    from spcompile.kernels.linear.launch import narrow, tiles

    file, name = variant.kernel.split(".")
    function = getattr(importlib.import_module(f"spcompile.kernels.triton.{file}"), name)
    heads = torch.empty(1, 1, 1, size, dtype=dtype)
    name += ", less" if variant.constants.get("LESS") else ""
    if variant.kernel in ("delta.summaries", "delta.corrected"):
        name = "delta, back" if variant.constants.get("BACK") else "delta"
    constants = tiles(_LIKE.get(variant.kernel, name), heads, heads, arch)
    small = tiles("pairs", heads, heads, arch)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {**_DEFAULTS, "PK": small["BK"], "PV": small["BV"], **variant.constants}
    if not constants["FOLD"]:
        constants |= dict.fromkeys(("logs", "carry", "matrices"))
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    inverses = torch.float16 if dtype == torch.bfloat16 else torch.float32
    kinds = (_OPERANDS, dtype), (_NARROW, narrow(heads)), (_FLOATS, torch.float32), (_SYSTEMS, inverses)
    signature, aligned = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = next((_POINTERS[of] for names, of in kinds if name in names), None)
        signature[name] = pointer or ("fp32" if name == "scale" else "i32")
        if pointer or (name[-1] in "bht" and name[0] in "qkvdxolm" and len(name) == 2) or name == "segment":
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=_target(arch), options=launch)


# The scan over states of 128 x 128, by factors or by matrices.
SCANS = {
    "scan, factors": Variant("scan._scan", {"HOW": 1, "BK": 32}),
    "scan, matrices": Variant("scan._scan", {"HOW": 2, "BK": 128}),
}


def compiled_scan(name: str, arch: int | str) -> Any:
    """The scan over the segments, for sm_``arch`` or an AMD target."""
    from spcompile.kernels.linear.launch import precise
    from spcompile.kernels.triton.scan import _scan, launch

    by = SCANS[name].constants
    constants = {"K": 128, "V": 128, "BV": 32, "INITIAL": True, "REVERSE": True, "WIDE": tl.float32, **by}
    constants["PRECISION"] = precise(arch)
    kinds = dict.fromkeys(("a", "b", "initial", "before", "final"), "*fp32")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in _scan.arg_names}
    source = ASTSource(fn=_scan, signature=signature, constexprs=constants)
    return triton.compile(source, target=_target(arch), options=launch(by["HOW"] == 2, by["BK"]))


def _target(arch: int | str) -> GPUTarget:
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


class Code(NamedTuple):
    """What a kernel's machine code is like: per thread, per block, and counts of instructions."""

    warps: int
    registers: int
    stack: int  # bytes per thread of what does not fit into registers; on AMD what is spilled
    shared: int  # bytes per block
    blocks: int | None  # per multiprocessor
    wide: int  # products of a warp group (wgmma) or of a block (tcgen05)
    products: int  # all others of the tensor cores: mma, mfma
    tma: int
    copies: int  # cp.async
    columns: int = 0  # of tensor memory (sm_100), of 512


def described(kernel: Any, arch: int | str) -> Code:
    """Read a compiled kernel."""
    meta = kernel.metadata
    if not isinstance(arch, int):
        text = kernel.asm["amdgcn"]
        used, spilled = (
            int(found[1]) if (found := re.search(rf"\.{name}:\s*(\d+)", text)) else 0
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        matrix = len(re.findall(r"\bv_mfma", text))
        return Code(meta.num_warps, used, 4 * spilled, meta.shared, None, 0, matrix, 0, 0)
    told, text = _disassembled(kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    registers, stack = int(found[1]), int(found[2])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Code(
        meta.num_warps,
        registers,
        stack,
        meta.shared,
        _blocks(registers, meta.shared, meta.num_warps, arch),
        count(r"\b(?:HGMMA|UTC[A-Z]*MMA)\b"),
        count(r"\bHMMA\b"),
        count(r"\bUTMA(?:LDG|STG|REDG)\b"),
        count(r"\bLDGSTS\b"),
        getattr(meta, "tmem_size", None) or 0,
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """The resources that a cubin says it takes, and its instructions."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = ("cuobjdump", "-res-usage"), ("nvdisasm", "-c")
        told, text = (
            subprocess.run([binaries / name, how, file], capture_output=True, text=True, check=True)
            for name, how in commands
        )
    return told.stdout + told.stderr, text.stdout


def _blocks(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks that a multiprocessor runs at once: 64K registers, given to warps in pieces of 256, 64 warps,
    and shared memory, of which the system takes 1 KiB per block."""
    of_warp = -(-registers * 32 // 256) * 256
    memory = SHARED[arch] + 1024
    return min((64 << 10) // (of_warp * warps), memory // (shared + 1024), 64 // warps, 32)
