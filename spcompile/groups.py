"""Which ranks share the sequence, and what they tell each other outside of graphs."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spcompile._torch import resolve_process_group
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError

__all__ = ["fingerprint", "gather_numbers", "gather_objects", "sequence_group"]


def sequence_group(config: Config) -> Group:
    """The ranks along the sequence: of the given mesh, of the whole job, or this process alone.

    Raises:
        SpcompileError: a mesh that is not 1-D, or a job of several processes without a process group.
    """
    if config.ranks is not None:
        return Group(config.ranks, "explained")
    if config.mesh is not None:
        if getattr(config.mesh, "ndim", None) != 1:
            raise SpcompileError(
                f"option mesh={config.mesh!r}: the sequence axis must be a 1-D DeviceMesh, this has "
                f"{getattr(config.mesh, 'ndim', 'no')} dims. "
                "Remedy: pass one axis of it, for instance mesh['sp']."
            )
        if config.mesh.get_coordinate() is None:
            raise SpcompileError(
                f"option mesh={config.mesh!r}: this process, rank {dist.get_rank()}, is not in it. "
                "Remedy: take an axis of a mesh over all ranks, for instance mesh['sp'], so that each rank "
                "is in one; or compile on the ranks of the mesh only."
            )
        return _named(config.mesh.get_group())
    if dist.is_available() and dist.is_initialized():
        return _named(dist.group.WORLD)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpcompileError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but torch.distributed is not initialised, so spcompile "
            "cannot shard. Remedy: call torch.distributed.init_process_group() before the compiled module "
            "first runs."
        )
    return Group(1, "")


def _named(group: dist.ProcessGroup | None) -> Group:
    assert group is not None
    return Group(dist.get_world_size(group), group.group_name)


def fingerprint(*parts: object) -> int:
    """A hash of texts, the same on every rank for the same texts: a non-negative int64."""
    text = "\n".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def gather_numbers(group: Group, numbers: list[int], values: list[Tensor | None]) -> list[list[int]]:
    """Every rank's ``numbers`` and ``values`` (int64, no dims; None is 0), by one collective."""
    process_group = resolve_process_group(group.name)
    on_cpu = "gloo" in str(dist.get_backend_config(process_group)).lower()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        mine = torch.tensor([*numbers, *(0 for _ in values)], dtype=torch.int64, device=device)
        for i, value in enumerate(values, len(numbers)):
            if value is not None:
                mine[i] = value.to(device)
        everyone = [torch.empty_like(mine) for _ in range(group.size)]
        dist.all_gather(everyone, mine, group=process_group)
        return torch.stack(everyone).tolist()


def gather_objects(group: Group, mine: Any) -> list[Any]:
    """Every rank's object, on every rank."""
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, mine, group=resolve_process_group(group.name))
    return everyone
