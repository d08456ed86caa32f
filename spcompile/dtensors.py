"""A sharded tensor as PyTorch's DTensor, for a loss, a metric or a checkpoint that works with those."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from spcompile._torch import resolve_process_group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.groups import sequence_group
from spcompile.parts import local
from spcompile.ports import Layout
from spcompile.sharded import ShardedTensor

__all__ = ["dtensor"]


def dtensor(x: Tensor, mesh: DeviceMesh | None = None) -> DTensor:
    """``x``, a tensor that a compiled module returned, as a DTensor: ``Shard(dim)`` along the sequence.

    Nothing is gathered or copied, and autograd goes through. What is whole on every rank becomes
    ``Replicate()``.

    Args:
        mesh: the mesh of the DTensor, the ranks along the sequence; to be given where it shall meet DTensors
            of the same mesh, or of one that it is an axis of. Default: a mesh of these ranks.
    Raises:
        SpcompileError: ``mesh`` has other ranks, there is no process group, or DTensor cannot say how ``x``
            lies: it knows tokens in runs of ceil(T / ranks) alone, in a dim of their own.
    """
    group = x._part.layout.group if isinstance(x, ShardedTensor) else sequence_group(Config(mesh=mesh))
    if group.name in ("", "explained"):
        raise SpcompileError(
            "spcompile.dtensor: a DTensor needs ranks. "
            "Remedy: call torch.distributed.init_process_group() first; on one rank as well."
        )
    if mesh is None:
        mesh = _mesh(group.name, x.device.type)
    elif mesh.ndim != 1 or mesh.get_group().group_name != group.name:
        raise SpcompileError(
            f"spcompile.dtensor: mesh={mesh} is not of the ranks along the sequence. "
            "Remedy: pass the mesh that the option mesh= has, for instance mesh['sp'], or none."
        )
    if not isinstance(x, ShardedTensor):
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    layout = x._part.layout
    _check(layout)
    stride = torch.empty(layout.shape, device="meta").stride()
    placement = Shard(layout.shard.dim)
    return DTensor.from_local(local(x), mesh, [placement], shape=x.shape, stride=stride, run_check=False)


def _check(layout: Layout) -> None:
    shard, ranks = layout.shard, layout.group.size
    each = -(-shard.length // ranks)
    run = min(shard.block, shard.length)  # the first rank's; a longer block of a short sequence is one run
    if shard.outer != 1:
        raise SpcompileError(
            f"spcompile.dtensor: dim {shard.dim} of {list(layout.shape)} merges the sequence with dims "
            "before it, so no rank has a run of it. Remedy: return the tensor as it was before the view."
        )
    if run != each:
        raise SpcompileError(
            f"spcompile.dtensor: ranks have {run} of the {shard.length} entries of dim {shard.dim} (they "
            f"stay where their tokens are), where a DTensor on {ranks} ranks has {each}. Remedy: return the "
            "tensor before it is cut to that length, or a length that ranks and chunks divide; or take "
            "spcompile.local(x)."
        )


@functools.cache
def _mesh(group: str, device_type: str) -> DeviceMesh:
    process_group: Any = resolve_process_group(group)
    return DeviceMesh.from_group(process_group, device_type)
