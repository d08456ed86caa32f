"""Memory of a graph by liveness: when each storage is made, when it is last used, how much is alive at once.

It is a bound from above: each node's result counts, also those that Inductor fuses away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile import ports
from spcompile._torch import OpOverload

__all__ = ["Large", "Memory", "largest", "measure", "timeline"]


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
        return Memory(0, _total(_peak(forward, first, set(theirs))), 0)
    kept = first.of(_returned(forward)[outputs:])
    saved = sum(size for key, size in kept.items() if key not in theirs)
    ahead, back = _peaks(forward, backward, first, theirs)
    return Memory(saved, _total(ahead), _total(back))


class Large(NamedTuple):
    """A tensor that is alive when the most memory is.

    Args:
        bytes: of its storage.
        shape, dtype, op: of the node that made it.
        stack: the user's lines that it comes from.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    stack: str


def largest(forward: fx.Graph, backward: fx.Graph | None = None) -> list[Large]:
    """The tensors alive at the peak of the forward, or of the backward if that is higher; largest first."""
    first = _Storages(forward)
    theirs = first.of(n for n in forward.nodes if n.op == "placeholder")
    if backward is None:
        alive = _peak(forward, first, set(theirs))
    else:
        alive = max(_peaks(forward, backward, first, theirs), key=_total)
    # What the forward saved is a placeholder of the backward; the forward's node has the user's line.
    made = {n.name: n for n in forward.nodes if n.op != "placeholder"}
    found = [
        Large(
            size,
            tuple(map(int, value.shape)),
            str(value.dtype).removeprefix("torch."),
            str((origin := made.get(node.name, node)).target),
            origin.meta.get("stack_trace") or "",
        )
        for size, node in alive
        for value in _tensors(node)[:1]
    ]
    return sorted(found, key=lambda large: -large.bytes)


_Alive = list[tuple[int, fx.Node]]


def _total(alive: _Alive) -> int:
    return sum(size for size, _ in alive)


def _peaks(
    forward: fx.Graph, backward: fx.Graph, first: _Storages, theirs: dict[int, int]
) -> tuple[_Alive, _Alive]:
    # The backward is given parameters, inputs and views of them by the names that they have in the forward.
    names = {n.name for n in forward.nodes if (own := first.of([n])) and own.keys() <= theirs.keys()}
    second = _Storages(backward)
    owned = second.of(n for n in backward.nodes if n.op == "placeholder" and n.name in names)
    return _peak(forward, first, set(theirs)), _peak(backward, second, set(owned))


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
    """The operand that ``node`` is a view of, or that it overwrites."""
    in_place = node.target is ports.ops.add_late.default
    if not in_place and (not isinstance(node.target, OpOverload) or not node.target.is_view):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _tensors(node: Any) -> list[Tensor]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _peak(graph: fx.Graph, storages: _Storages, theirs: set[int]) -> _Alive:
    """What is alive when most bytes are: (bytes, node that made it); storages in ``theirs`` do not count."""
    nodes = list(graph.nodes)
    born: dict[int, tuple[int, int]] = {}  # storage -> (when, bytes)
    last: dict[int, int] = {}
    for i, node in enumerate(nodes):
        made = storages.of([node]) if node.op != "output" else {}
        for key, size in made.items():
            if key not in theirs:
                born.setdefault(key, (i, size))
        for key in (*made, *storages.of(node.all_input_nodes)):
            last[key] = i
    change = [0] * (len(nodes) + 1)
    for key, (i, size) in born.items():
        change[i] += size
        change[last[key] + 1] -= size
    alive = list(accumulate(change))
    peak = max(range(len(alive)), key=alive.__getitem__)
    return [(size, nodes[i]) for key, (i, size) in born.items() if i <= peak <= last[key]]
