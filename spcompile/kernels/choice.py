"""Whether Triton's kernels may take a call. Nothing here may import torch: options are read before it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

__all__ = ["SWITCH", "opaque", "switched_off", "without_our_kernels", "without_triton"]

SWITCH = "SPCOMPILE_TRITON"
"""The environment variable that turns the Triton kernels off (``0``): is one of them at fault?"""
# Bytes of shared memory that a block may have, at least: what an A100 has, and all kernels are sized for.
_SHARED = 163 << 10


def switched_off() -> bool:
    """Whether the user has turned the Triton kernels off."""
    return os.environ.get(SWITCH) == "0"


def without_triton(device: Any) -> str | None:
    """Why no Triton kernel takes tensors of a ``torch.device``; None if one may."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return "Triton kernels are for NVIDIA GPUs"
    if switched_off():
        return f"{SWITCH}=0"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def without_our_kernels(device: Any) -> str | None:
    """Why none of our own Triton kernels takes them; unlike Inductor's they are sized for an A100."""
    import torch

    refused = without_triton(device)
    if refused is not None or not torch.cuda.is_available():  # a graph for some GPU, made elsewhere
        return refused
    found = torch.cuda.get_device_properties(device)
    if found.shared_memory_per_block_optin >= _SHARED:
        return None
    shared = f"{found.shared_memory_per_block_optin >> 10} KiB of shared memory"
    return f"{found.name} has {shared}, and Triton kernels take up to {_SHARED >> 10}"


def opaque(device: Any) -> bool:
    """Whether many steps of ATen are one operator to Inductor, which then need not compile them.

    On CPUs. A GPU would start a kernel for each, and Inductor fuses them.
    """
    return device.type in ("cpu", "meta")
