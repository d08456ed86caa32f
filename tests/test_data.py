"""Which data a rank reads: the same along the sequence axis, each entry once along the others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from spcompile import SpcompileError
from spcompile.data import replicas, sampler


class Mesh:
    """What the helpers ask of a DeviceMesh, which needs a process group to be made."""

    def __init__(self, place: tuple[int, ...] | None, shape: tuple[int, ...], names: Any) -> None:
        self.place, self.shape, self.mesh_dim_names = place, shape, names

    def get_coordinate(self) -> list[int] | None:
        return None if self.place is None else list(self.place)

    def size(self, dim: int) -> int:
        return self.shape[dim]


SHAPES = [((2, 2), ("dp", "sp")), ((2, 3), ("sp", "dp")), ((2, 2, 2), ("pods", "sp", "dp")), ((4,), ("sp",))]


@pytest.mark.parametrize(("shape", "names"), SHAPES, ids=str)
def test_the_same_along_the_sequence_and_all_along_the_rest(shape: Any, names: Any) -> None:
    read: dict[tuple[int, ...], list[set[int]]] = {}
    axis = names.index("sp")
    for place in itertools.product(*map(range, shape)):
        found = set(sampler(range(24), Mesh(place, shape, names), seed=3))
        read.setdefault(place[:axis] + place[axis + 1 :], []).append(found)
    assert all(found == alike[0] for alike in read.values() for found in alike)
    parts = [alike[0] for alike in read.values()]
    assert set.union(*parts) == set(range(24)) and sum(map(len, parts)) == 24


def test_without_a_mesh_all_read_all() -> None:
    assert replicas() == (1, 0)
    assert sorted(sampler(range(5))) == [0, 1, 2, 3, 4]
    assert list(sampler(range(5), shuffle=False)) == [0, 1, 2, 3, 4]


def test_a_mesh_without_the_axis_or_the_rank() -> None:
    with pytest.raises(SpcompileError, match=r"no axis 'sp'.*its axes are dp, cp"):
        replicas(Mesh((0, 0), (2, 2), ("dp", "cp")))
    with pytest.raises(SpcompileError, match="mesh_dim_names"):
        replicas(Mesh((0, 0), (2, 2), None))
    with pytest.raises(SpcompileError, match="not in the mesh"):
        replicas(Mesh(None, (2, 2), ("dp", "sp")))
