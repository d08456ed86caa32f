"""The context in which rules and strategies emit into a graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from spcompile import collectives
from spcompile.config import Config
from spcompile.costs import Sizes
from spcompile.emit import Emitter
from spcompile.rules.base import Context
from spcompile.rules.creation import DRAW_STRIDE, shared_seed

__all__ = ["GraphContext"]


class GraphContext(Context):
    """A context whose tensors are emitted into a graph."""

    def __init__(self, group: collectives.Group, emitter: Emitter, config: Config) -> None:
        super().__init__(group, config.linear, config.softmax)
        self.emitter, self.config = emitter, config
        self._draws = 0
        self.kernels: Counter[tuple[str, str, str]] = Counter()
        """(kind of attention, kernel, why it is not a fused one) -> how many take it."""
        self.sizes: Counter[tuple[str, str, Sizes]] = Counter()
        """(kind of attention, device, sizes) -> how many cross ranks."""
        self.held: list[fx.Node] = []
        """Keys and values of all ranks, which a backward reads."""

    def took(self, kind: str, kernel: str, refused: str = "") -> None:
        self.kernels[kind, kernel, refused] += 1

    def priced(self, kind: str, device: str, sizes: Sizes) -> None:
        self.sizes[kind, device, sizes] += 1

    @contextlib.contextmanager
    def again(self, operators: frozenset[Any]) -> Iterator[None]:
        start = len(self.emitter.emitted)
        yield
        for node in self.emitter.emitted[start:]:
            if node.target in operators:
                self._again(node)

    @staticmethod
    def _again(node: fx.Node) -> None:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta.setdefault("ac_graph_id", 0)

    def keep(self, state: Tensor) -> Tensor:
        node = self.emitter.node_of(state)
        if "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return state

    def gathered(self, keys: Tensor | None) -> Tensor | None:
        if keys is not None:
            self.held.append(self.emitter.node_of(keys))
        return keys

    def gather_again(self, node: fx.Node) -> None:
        """One of ``held`` is gathered again in the backward.

        The chain from this rank's keys on, not the gather alone: what is left untagged of it is saved, as the
        tensor that keys and values are packed into would be, beside them. Sizes are no part of the chain: the
        backward has them.
        """
        chain = [node]
        while chain:
            node = chain.pop()
            self._again(node)
            if node.target is not torch.ops._c10d_functional.all_gather_into_tensor.default:
                chain += [x for x in node.all_input_nodes if isinstance(x.meta["val"], Tensor)]
                continue
            packed = [node.all_input_nodes[0]]
            while packed[-1].target is torch.ops.aten.view.default:
                packed.append(packed[-1].all_input_nodes[0])
            if packed[-1].target is torch.ops.aten.cat.default:
                for part in packed:
                    self._again(part)

    def cached(self, key: Any, compute: Any) -> Tensor:
        # Shared by nodes of several regions, so it must not carry the tags of the first that asks.
        if key not in self._cache:
            with self.emitter.untagged():
                self._cache[key] = compute()
        return self._cache[key]

    def next_seed(self, device: torch.device) -> Tensor:
        self._draws += 1
        with self.emitter.saved():
            shared = self.cached(("seed", device), lambda: shared_seed(self.group, device))
            return shared + (self._draws * DRAW_STRIDE) % 2**62
