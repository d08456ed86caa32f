"""The edit: what the surroundings want is traced without the loop and put in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from spcompile._torch import enter_autocast, exit_autocast, make_fx
from spcompile.passes.recognize.edit import Editor, Refused, Writer
from spcompile.passes.recognize.loops.emission import Emission
from spcompile.passes.recognize.loops.families import Family, Progress
from spcompile.passes.recognize.loops.merge import merge
from spcompile.passes.recognize.loops.surroundings import Slots, Stacked, Step, Surroundings, Want
from spcompile.passes.shadow import Value

__all__ = ["rewrite"]

_OPS = torch.ops.spcompile


def rewrite(around: Surroundings, editor: Editor) -> tuple[list[str], str]:
    """Replace a loop; (the kinds of its scans, the name of the first new node).

    Raises:
        Refused: it can't be; nothing has been edited.
    """
    made = _Traced(around, editor)
    made.look()
    made.trace()
    return made.kinds, made.insert()


class _Traced:
    """The replacement of one loop."""

    def __init__(self, around: Surroundings, editor: Editor) -> None:
        self.around, self.editor = around, editor
        self.first = around.nodes[0]
        self.holders: dict[Value | fx.Node, fx.Node] = {}
        self.fakes: dict[fx.Node, Tensor] = {}
        self.calls = {v: a for a, v in around.shadow.value_of.items()}
        self.kinds: list[str] = []
        """Of the scans that stand in for it, in order."""
        self.carries = False
        self.autocast = next((v for v in around.loop.body if v.autocast), None)
        """A Value that was computed under autocast: the casts are explicit in what is emitted."""

    # ---- on fake tensors

    def look(self) -> None:
        """Compute everything once, to learn which tensors from outside it needs (and whether it can be)."""
        with self._tracing():
            self._compute(self._held)
        families = [f for f in self.around.loop.families.values() if isinstance(f, Family)]
        if not any(isinstance(x, Progress) for f in families for x in f.args.values()):
            raise Refused("its steps take no parts by a running index")
        if not self.carries and (len(self.around.wants) == 0 or _attends(families)):
            raise Refused("its steps are attention of their own")

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        device = self.first.meta["example_value"].device.type
        with self.around.shadow.mode, torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    def trace(self) -> None:
        """Compute everything again, recorded."""
        nodes = list(self.fakes)

        def run(*inputs: Tensor) -> list[Tensor]:
            given = dict(zip(nodes, inputs, strict=True))
            return self._compute(lambda v: given.get(self.holders[v]) if v in self.holders else None)

        with self._tracing():
            self.graph = make_fx(run, tracing_mode="real")(*self.fakes.values()).graph
        merge(self.graph)
        names = {_OPS.linear_attention.default: "linear", _OPS.affine_scan.default: "scan"}
        names[_OPS.max_scan.default] = "scan"
        self.kinds = [names[n.target] for n in self.graph.nodes if n.target in names] or ["loop"]
        size = len(self.graph.nodes) + 3 * len(self.around.wants)
        if not self.carries and size >= len(self.around.nodes):  # and re-rolling comes to an end
            raise Refused("its steps are shorter written out")
        if any(n.op == "get_attr" for n in self.graph.nodes):
            raise Refused("it makes constants of its own")
        if sum("detach" in str(n.target) for n in self.graph.nodes) and not any(
            v.name == "detach" for v in self.around.loop.body
        ):
            raise Refused("its gradient would be lost")

    def _held(self, v: Value) -> Tensor | None:
        node = self.editor.find(v, self.first)
        if node is None:
            return None
        return self._input(v, node)

    def _input(self, key: Value | fx.Node, node: fx.Node) -> Tensor:
        self.holders[key] = node
        if node not in self.fakes:
            example = node.meta["example_value"]
            size, stride = tuple(map(int, example.shape)), tuple(map(int, example.stride()))
            self.fakes[node] = torch.empty_strided(size, stride, dtype=example.dtype, device=example.device)
        return self.fakes[node]

    def _compute(self, invariant: Any) -> list[Tensor]:
        emission = Emission(self.around.loop, invariant, self.calls)
        whole: list[Family] = []
        last: list[Family] = []
        for want, _, _ in self.around.wants:
            if isinstance(want, Step):
                (last if want.step == self.around.loop.steps - 1 else whole).append(want.family)
            elif isinstance(want, Slots):
                whole.append(want.family)
            else:
                whole += [p[0] for p in want.pieces if isinstance(p, tuple)]
        emission.solve(whole, last)
        self.carries = emission.carries
        return [x for want, _, _ in self.around.wants for x in self._wanted(want, emission, invariant)]

    def _wanted(self, want: Want, emission: Emission, invariant: Any) -> list[Tensor]:
        if isinstance(want, Step):
            return [emission.at(want.family, want.step)]
        if isinstance(want, Slots):
            return [self._filled(want, emission, invariant)]
        return [self._stacked(want, p, emission) for p in want.pieces if isinstance(p, tuple)]

    def _tensor(self, node: fx.Node, invariant: Any) -> Tensor:
        if invariant == self._held:
            return self._input(node, node)
        out = invariant(node)
        assert out is not None
        return out

    def _filled(self, want: Slots, emission: Emission, invariant: Any) -> Tensor:
        """The tensor after all its slots are written."""
        x = emission.stacked(want.family)
        example = want.base.meta["example_value"]
        step = want.index.step
        falls = (step < 0) != emission.evaluator.reverse
        x = x.flip(0) if falls else x
        steps, size, width = self.around.loop.steps, int(example.shape[want.dim]), want.width or 1
        low = min(want.index.start, want.index.start + (steps - 1) * step)
        x = x.movedim(0, want.dim)
        if want.width is not None:
            if abs(step) != width:
                raise Refused("its steps leave gaps in what they write")
            x = x.flatten(want.dim, want.dim + 1)
            step = 1
        if x.shape[want.dim] == size:
            return x.to(example.dtype)
        base = self._tensor(want.base, invariant)
        stop = low + (x.shape[want.dim] - 1) * abs(step) + 1
        return torch.slice_scatter(base, x.to(example.dtype), want.dim, low, stop, abs(step))

    def _stacked(self, want: Stacked, piece: tuple[Family, int, int], emission: Emission) -> Tensor:
        """Several steps in a row, as a part of what they are stacked to."""
        family, first, last = piece
        x = emission.stacked(family)
        low, high = min(first, last), max(first, last)
        if emission.evaluator.reverse:
            low, high = x.shape[0] - 1 - high, x.shape[0] - 1 - low
        x = x if high - low + 1 == x.shape[0] else x[low : high + 1]
        x = x.flip(0) if (last < first) != emission.evaluator.reverse and first != last else x
        x = x.movedim(0, want.dim)
        return x if want.new_dim else x.flatten(want.dim, want.dim + 1)

    # ---- in Dynamo's graph

    def insert(self) -> str:
        """Put what was traced before the loop, let it stand for what was wanted, and erase the loop."""
        graph, env = self.first.graph, dict[fx.Node, fx.Node]()
        inputs = iter(self.fakes)
        keep = ("stack_trace", "nn_module_stack", "source_fn_stack")
        meta = {k: self.first.meta[k] for k in keep if k in self.first.meta}
        name = ""
        results: list[fx.Node] = []
        enter = self._switch_autocast_off()
        for n in self.graph.nodes:
            if n.op == "placeholder":
                env[n] = next(inputs)
            elif n.op == "output":
                results = [env[x] for x in n.args[0]]
            else:
                with graph.inserting_before(self.first):
                    env[n] = new = graph.node_copy(n, env.__getitem__)
                new.meta = meta | {"example_value": n.meta.get("val")}
                if "spcompile" in str(n.target) and not name:
                    name = new.name
        if enter is not None:
            with graph.inserting_before(self.first):
                graph.call_function(exit_autocast, (enter,))
        fresh = iter(results)
        for want, node, users in self.around.wants:
            self._stand_in(want, node, users, fresh)
        for node in reversed(self.around.nodes):
            graph.erase_node(node)
            self.editor.replaced.add(node)
        return name or (results[0].name if results else "")

    def _switch_autocast_off(self) -> fx.Node | None:
        if self.autocast is None:
            return None
        assert self.autocast.fake is not None
        device = self.autocast.fake.device.type
        with self.first.graph.inserting_before(self.first):
            given = (device, torch.get_autocast_dtype(device), False, None)
            return self.first.graph.call_function(enter_autocast, given)

    def _stand_in(self, want: Want, node: fx.Node, users: list[fx.Node], results: Iterator[fx.Node]) -> None:
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        writer = _At(min(users, key=order.__getitem__) if users else node, self.around.shadow.mode)
        record = self.around.shadow.records[node]
        written = self.around.shadow.written_after(record.storages, self.around.end)
        x = self._joined(want, writer, results) if isinstance(want, Stacked) else next(results)
        stand_in = writer.like(x, node, fresh=written)
        for user in users:
            user.replace_input_with(node, stand_in)
        if not users:
            self.editor.replace(node, stand_in)
            node.graph.erase_node(node)

    def _joined(self, want: Stacked, writer: Writer, results: Iterator[fx.Node]) -> fx.Node:
        """The pieces of a stack, those from elsewhere as well."""
        pieces = []
        for p in want.pieces:
            if isinstance(p, tuple):
                pieces.append(next(results))
            else:
                pieces.append(writer.call(torch.unsqueeze, p, want.dim) if want.new_dim else p)
        return pieces[0] if len(pieces) == 1 else writer.call(torch.cat, pieces, want.dim)


def _attends(families: Sequence[Family]) -> bool:
    """Whether attention is recognized better in each step than in all at once."""
    return any("attention" in f.like.name or "softmax" in f.like.name for f in families)


class _At(Writer):
    """A writer before a node that may be the graph's output."""

    def __init__(self, before: fx.Node, mode: Any) -> None:
        self.before = before
        self.mode = mode
