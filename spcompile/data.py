"""Which data a rank reads: the same along the sequence axis, other data along every other axis."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DistributedSampler

from spcompile.errors import SpcompileError

__all__ = ["replicas", "sampler"]


def replicas(mesh: Any = None, sequence: str = "sp") -> tuple[int, int]:
    """How many different batches a step has, and which of them is this rank's.

    They are what samplers call ``num_replicas`` and ``rank``. Ranks that differ in their place on the
    sequence axis alone get the same.

    Args:
        mesh: the whole ``DeviceMesh``, of which the backend gets ``mesh[sequence]``; default: one axis, the
            sequence, over all ranks.
        sequence: the name of the sequence axis.
    Returns:
        (1, 0) where the sequence is the only axis.
    Raises:
        SpcompileError: the mesh has no axis of that name, or this process is not in it.
    """
    if mesh is None:
        return 1, 0
    names = mesh.mesh_dim_names or ()
    if sequence not in names:
        known = f"its axes are {', '.join(names)}" if names else "init_device_mesh takes mesh_dim_names"
        raise SpcompileError(
            f"the mesh {mesh} has no axis {sequence!r}. Remedy: name another, sequence=...; {known}."
        )
    place = mesh.get_coordinate()
    if place is None:
        raise SpcompileError(
            f"this process is not in the mesh {mesh}. Remedy: make the mesh of all ranks that read data."
        )
    rank = 0
    others = [(mesh.size(i), place[i]) for i, name in enumerate(names) if name != sequence]
    count = math.prod(size for size, _ in others)
    for size, at in others:
        rank = rank * size + at
    return count, rank


def sampler(dataset: Any, mesh: Any = None, sequence: str = "sp", **options: Any) -> DistributedSampler[Any]:
    """A ``DistributedSampler`` for this rank's place in the mesh; also without a process group.

    Every rank draws the same permutation, so all must give the same ``seed`` and call ``set_epoch`` alike.

    Args:
        dataset: with a length.
        mesh, sequence: as for :func:`replicas`.
        options: of the sampler: ``shuffle``, ``seed``, ``drop_last``.
    """
    count, rank = replicas(mesh, sequence)
    return DistributedSampler(dataset, num_replicas=count, rank=rank, **options)
