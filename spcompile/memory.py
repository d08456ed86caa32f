"""Memory of a graph by liveness: when each storage is made, when it is last used, how much is alive at once.

It is a bound from above: each node's result counts, also those that Inductor fuses away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile._torch import OpOverload

__all__ = ["Memory", "measure", "timeline"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Args:
        saved: activations that the forward keeps for the backward.
        forward, backward: the most that is alive at once, saved activations too, inputs not.
    """

    saved: int = 0
    forward: int = 0
    backward: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain data, for JSON."""
        return asdict(self)


def measure(forward: fx.Graph, backward: fx.Graph | None = None, outputs: int | None = None) -> Memory:
    """The memory of a forward graph, and of its backward.

    Args:
        outputs: how many of the forward's outputs are the user's; the others are saved for the backward.
    """
    first = _Storages(forward)
    theirs = first.of(n for n in forward.nodes if n.op == "placeholder")
    if backward is None:
        return Memory(0, _peak(forward, first, set(theirs)), 0)
    kept = first.of(_returned(forward)[outputs:])
    saved = sum(size for key, size in kept.items() if key not in theirs)
    # The backward is given parameters, inputs and views of them by the names that they have in the forward.
    names = {n.name for n in forward.nodes if (own := first.of([n])) and own.keys() <= theirs.keys()}
    second = _Storages(backward)
    owned = second.of(n for n in backward.nodes if n.op == "placeholder" and n.name in names)
    return Memory(saved, _peak(forward, first, set(theirs)), _peak(backward, second, set(owned)))


def timeline(calls: list[Memory]) -> Memory:
    """The memory of several graphs that run one after another, and backward in the opposite order."""
    held = forward = backward = 0
    for memory in calls:
        forward = max(forward, held + memory.forward)
        backward = max(backward, held + memory.backward)
        held += memory.saved
    return Memory(held, forward, backward)


def _returned(graph: fx.Graph) -> list[Any]:
    return tree_leaves(next(n for n in reversed(graph.nodes) if n.op == "output").args)


class _Storages:
    """Which storage each node's results lie in: a view lies in the storage of what it views."""

    def __init__(self, graph: fx.Graph) -> None:
        self.same: dict[int, int] = {}
        for node in graph.nodes:
            source = _viewed(node)
            if source is not None:
                # Passes give a placeholder's views a fake storage of their own.
                for value, base in zip(_tensors(node), _tensors(source), strict=False):
                    key, root = value.untyped_storage()._cdata, base.untyped_storage()._cdata
                    if key != root:
                        self.same[key] = self.same.get(root, root)

    def of(self, nodes: Iterable[Any]) -> dict[int, int]:
        """The storages of nodes' results -> their bytes."""
        found: dict[int, int] = {}
        for value in (x for n in nodes for x in _tensors(n)):
            storage = value.untyped_storage()
            found[self.same.get(storage._cdata, storage._cdata)] = int(storage.nbytes())
        return found


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` is a view of."""
    if not isinstance(node.target, OpOverload) or not node.target.is_view:
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _tensors(node: Any) -> list[Tensor]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _peak(graph: fx.Graph, storages: _Storages, theirs: set[int]) -> int:
    """The most bytes alive at once; storages in ``theirs`` belong to the caller and do not count."""
    nodes = list(graph.nodes)
    made = [storages.of([n]) if n.op != "output" else {} for n in nodes]
    last: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for key in (*made[i], *storages.of(node.all_input_nodes)):
            last[key] = i
    dying: dict[int, list[int]] = {}
    for key, i in last.items():
        dying.setdefault(i, []).append(key)
    alive: dict[int, int] = {}
    total = peak = 0
    for i in range(len(nodes)):
        for key, size in made[i].items():
            if key not in alive and key not in theirs:
                alive[key] = size
                total += size
        peak = max(peak, total)
        for key in dying.get(i, ()):
            total -= alive.pop(key, 0)
    return peak
