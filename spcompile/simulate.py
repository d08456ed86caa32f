"""All ranks in one process: run a graph that was localized for P ranks as P ranks would, without any.

Used by tests and for debugging. It is fx's own interpreter with a list of P values per node; where the graph
has a collective, the P values are exchanged. An input that the graph writes to is each rank's own while it
runs; at the end the ranks' values are compared bit for bit and written to the real one, once.

NOTE [What a simulation leaves out], and which test on real ranks (tests/test_ranks.py) covers it:
  * Inductor: its code, layouts, reinplacing of mutating operators, random numbers
    (``test_training_and_inference_are_eager``, ``test_all_that_a_step_leaves_behind``);
  * the process group: real collectives, their order and waiting (the same two, and ``test_the_wait_...``;
    whatever runs on real ranks is looked at for reads before a wait, tests/real_ranks.py);
  * what ranks tell each other before a call (``test_ranks_that_differ_get_an_error_on_every_rank``);
  * differences between processes, as here one process traces for all ranks (``same_text`` in the first);
  * the runtime's own state: ordered effects reach Inductor's scheduler as tokens only there
    (``test_all_that_a_step_leaves_behind`` factorizes a matrix).
  * sharded tensors: an output that stays a rank's part is read at once, and inputs are always whole
    (tests/test_outputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from spcompile import _torch, collectives, floats, frontend, library, limits
from spcompile.boundary import open_boundary
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.passes.canonical import canonicalise, in_their_order, own_copy
from spcompile.passes.chunks import in_pieces
from spcompile.passes.shard import shard_joint_graph
from spcompile.passes.shard.communicate import joined, split_dim
from spcompile.passes.shard.copies import written
from spcompile.passes.shard.ports import lent_as
from spcompile.ports import Layout
from spcompile.serve import served
from spcompile.sizes import InputSizes, expression

__all__ = ["RanksDisagree", "run_on_ranks", "simulated"]

_c10d = torch.ops._c10d_functional
_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def _seeded(size: list[int], seed: Tensor, mode: str, **_: Any) -> Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    return {"rand": torch.rand, "randn": torch.randn}[mode](size, generator=generator)


# In eager mode Inductor's draws take no notice of their seed; compiled they are made from it alone. And a
# view was traced on strides that a rank's part need not have: compiled it takes any.
_AS_COMPILED: dict[Any, Callable[..., Any]] = {
    _torch.inductor_random: _seeded,
    torch.ops.aten.view.default: torch.reshape,
}


class RanksDisagree(AssertionError):
    """A value that every rank must have alike differs between them."""


class _Ranks(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, ranks: int) -> None:
        super().__init__(module)
        self.ranks = ranks
        self.writes = _written_inputs(module.graph)
        self.written: list[tuple[Any, _PerRank]] = []

    def write(self) -> None:
        """Leave in the inputs what the ranks have written; raises if they have not written alike."""
        for real, own in self.written:
            real.copy_(_agreed(own))

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output", "get_attr"):
            if n.op == "output":
                return super().run_node(n)
            value = super().run_node(n)
            if n.name in self.writes:
                self.written.append((value, _PerRank(value.clone() for _ in range(self.ranks))))
                return self.written[-1][1]
            return value if isinstance(value, _PerRank) else _PerRank([value] * self.ranks)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        exchange = _EXCHANGES.get(n.target)
        if exchange is not None:
            return exchange(*args, **kwargs)
        return _PerRank(self.turn(r, n, args, kwargs) for r in range(self.ranks))

    def turn(self, r: int, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """What rank ``r`` computes at node ``n``."""

        def own(x: Any) -> Any:
            return x[r] if isinstance(x, _PerRank) else x

        collectives._simulated_rank.append(r)
        try:
            mine = tree_map(own, (args, kwargs), is_leaf=_is_per_rank)
            return _AS_COMPILED.get(n.target, n.target)(*mine[0], **mine[1])
        finally:
            collectives._simulated_rank.pop()


def _written_inputs(graph: fx.Graph, tag: str | None = None) -> set[str]:
    """The names of the placeholders that a graph writes to (that its nodes of one partitioner tag do)."""
    nodes = [n for n in graph.nodes if tag is None or n.meta.get("partitioner_tag") == tag]
    return {x.name for n in nodes for x in written(n) if x.op == "placeholder"}


class _PerRank(list[Any]):
    """One value per rank."""


def _is_per_rank(x: Any) -> bool:
    return isinstance(x, _PerRank)


def _all_gather(x: _PerRank, size: int, name: str) -> _PerRank:
    return _PerRank([torch.cat(list(x))] * size)


def _all_reduce(x: _PerRank, op: str, name: str) -> _PerRank:
    return _PerRank([reduce(_REDUCE[op], x)] * len(x))


def _reduce_scatter(x: _PerRank, op: str, size: int, name: str) -> _PerRank:
    return _PerRank(reduce(_REDUCE[op], x).chunk(size))


def _shift(x: _PerRank, by: int, size: int, name: str, after: Any = None) -> _PerRank:
    return _PerRank(x[(r - by) % size] for r in range(size))


def _mirror(x: _PerRank, size: int, name: str) -> _PerRank:
    return _PerRank(x[::-1])


def _all_to_all(x: _PerRank, output: list[int], sent: list[int], name: str) -> _PerRank:
    parts = [y.split(sent) for y in x]
    return _PerRank(torch.cat([p[r] for p in parts]) for r in range(len(x)))


_EXCHANGES: dict[Any, Callable[..., _PerRank]] = {
    _c10d.all_gather_into_tensor.default: _all_gather,
    _c10d.all_reduce.default: _all_reduce,
    _c10d.reduce_scatter_tensor.default: _reduce_scatter,
    _c10d.all_to_all_single.default: _all_to_all,
    torch.ops.spcompile.start_shift.default: _shift,
    torch.ops.spcompile.start_mirror.default: _mirror,
    _c10d.wait_tensor.default: lambda x: x,
}


def _agreed(value: Any) -> Any:
    """Rank 0's value, once it is sure that all ranks have the same to the last bit (NaN equals NaN)."""
    if not isinstance(value, _PerRank):
        return value
    first = value[0]
    for r, other in enumerate(value[1:], 1):
        same = first == other
        if isinstance(first, Tensor):
            same = torch.equal(first.nan_to_num(), other.nan_to_num())
        if not same:
            raise RanksDisagree(f"rank {r} returns another tensor than rank 0: {first} and {other}")
    return first


def _saved(x: Any) -> Any:
    """What is saved for the backward: of a tensor each rank's own, of a number the one that all have."""
    return torch.stack(list(x)) if _is_per_rank(x) and isinstance(x[0], Tensor) else _agreed(x)


def _joined(parts: _PerRank, layout: Layout) -> Tensor:
    """The whole tensor of which each rank has its part."""
    shard = layout.shard
    whole = joined(torch.stack([split_dim(x, shard, shard.block) for x in parts]), shard)
    return torch.empty_strided(layout.shape, layout.stride, dtype=whole.dtype).copy_(whole)


def run_on_ranks(module: fx.GraphModule, ranks: int, *args: Any) -> list[Any]:
    """What every one of ``ranks`` ranks returns for the same ``args``; what the graph writes to is written.

    Raises:
        RanksDisagree: two ranks return, or write, different values.
    """
    interpreter = _Ranks(module, ranks)
    with torch.no_grad():
        outputs = [_agreed(x) for x in interpreter.run(*args, enable_io_processing=False)]
        interpreter.write()
    return outputs


def simulated(ranks: int, **options: Any) -> Callable[..., Any]:
    """A backend for ``torch.compile`` that runs the whole pipeline short of Inductor on simulated ranks.

    The compiled module takes and gives what it would on each of ``ranks`` real ranks, and raises
    :class:`RanksDisagree` if they would not agree.
    """
    library.watch()
    config = Config.of(options)
    if config.gradients == "partial":
        raise SpcompileError("simulated ranks must agree: gradients='partial' needs real ones.")
    group = collectives.Group(ranks, "simulated")

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        pristine, gm = gm, own_copy(gm)
        places = canonicalise(gm)
        own_config = limits.compiling(gm, config)
        inputs = [example_inputs[i] for i in places]
        boundary, compiled_for = open_boundary(gm, inputs, group, own_config)
        prepared = frontend.prepare(gm, own_config)
        run = _AotRanks(group, own_config, prepared.hints)
        compiler = _torch.aot_autograd(
            fw_compiler=run.forward,
            bw_compiler=run.backward,
            inference_compiler=run.inference,
            partition_fn=run.partition,
            decompositions=_torch.select_decomp_table(),
            keep_inference_input_mutations=True,  # as Inductor has it: writes are nodes of the graph
        )
        with limits.no_silent_fallback(gm, config), floats.no_restart(gm):
            compiled = compiler(gm, compiled_for)
        if boundary.sizes and own_config.lengths == "symbolic":
            limits.symbolic(boundary.sizes.serve_others(ranks))
        own = served(boundary.around(compiled), prepared.lengths, pristine, places, backend)
        return in_their_order(own, places)

    return backend


class _AotRanks:
    """The compilers of one graph; what is saved for the backward differs by rank and travels as [P, ...]."""

    def __init__(self, group: collectives.Group, config: Config, hints: Mapping[str, int]) -> None:
        self.group, self.config, self.hints = group, config, hints
        self.outputs = 0
        self.inputs: dict[str, Any] = {}  # those that the backward writes to
        self.late: set[str] = set()
        self.sizes = InputSizes(())
        self.parts: dict[int, Layout] = {}  # what each rank returns its part of, by its place

    def shard(self, gm: fx.GraphModule) -> None:
        returned = tree_leaves(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args)
        numbers = {i: (lent_as(x), x.meta["val"]) for i, x in enumerate(returned) if isinstance(x, fx.Node)}
        lent = shard_joint_graph(gm.graph, self.group, self.config, self.hints).lent
        for i, (number, value) in numbers.items():
            if number in lent:
                shape, stride = (tuple(map(expression, x)) for x in (value.shape, value.stride()))
                self.parts[i] = Layout(lent[number].expressions(), shape, stride, self.group)
        self.sizes = InputSizes(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder")
        gm.recompile()

    def returned(self, results: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """What every rank returns: what is returned in parts as if it were read at once."""
        values = self.sizes.values(args)
        layouts = {i: layout.at_sizes(values) for i, layout in self.parts.items()}
        return [_joined(x, layouts[i]) if i in layouts else _agreed(x) for i, x in enumerate(results)]

    def partition(self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        self.shard(joint)
        self.outputs = num_fwd_outputs
        self.late = _written_inputs(joint.graph, "must_be_in_backward")
        split = _torch.min_cut_rematerialization_partition
        return split(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

    def forward(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]

        def run(*args: Any) -> Any:
            self.inputs = {n: x for n, x in zip(names, args, strict=True) if n in self.late}
            interpreter = _Ranks(gm, self.group.size)
            outputs = interpreter.run(*args, enable_io_processing=False)
            user = self.returned(outputs[: self.outputs], args)
            interpreter.write()
            return [*user, *map(_saved, outputs[self.outputs :])]

        return make_boxed_func(run)

    def backward(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        in_pieces(gm.graph)
        gm.recompile()
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]

        def run(*args: Any) -> Any:
            def own(name: str, saved: Any) -> Any:
                if name in self.inputs:
                    return self.inputs[name]
                whole = "tangents" in name or not isinstance(saved, Tensor)
                return saved if whole else _PerRank(saved.unbind())

            return run_on_ranks(gm, self.group.size, *map(own, names, args))

        return make_boxed_func(run)

    def inference(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.shard(gm)

        def run(*args: Any) -> Any:
            interpreter = _Ranks(gm, self.group.size)
            with torch.no_grad():
                outputs = self.returned(interpreter.run(*args, enable_io_processing=False), args)
                interpreter.write()
            return outputs

        return make_boxed_func(run)
