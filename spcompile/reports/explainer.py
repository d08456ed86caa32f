"""``spcompile.explain``: what the backend would do with a model on many ranks, in one process, and not run.

The model's graphs go the backend's way up to Inductor. What would run is replaced by a stub that returns
tensors of the right shape, so the model itself runs once, through its graph breaks, and computes nothing.
Inputs and parameters may be on the meta device: then nothing is allocated, whatever the length.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from spcompile import _torch, frontend, inductor, library
from spcompile.boundary import open_boundary
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.groups import sequence_group
from spcompile.passes.canonical import canonicalise, in_their_order, own_copy
from spcompile.passes.overlap import erase_dead_waits
from spcompile.passes.shard import shard_joint_graph
from spcompile.reports.memory import Memory, largest, measure
from spcompile.reports.report import Record, Report, strategy_names

__all__ = ["explain"]


def explain(model: Callable[..., Any], ranks: int | None = None, **options: Any) -> Callable[..., Report]:
    """Inspect what ``torch.compile(model, backend="spcompile", options=options)`` does.

    Args:
        model: a module or a function; neither its parameters nor what is compiled of it is touched.
        ranks: how many; no process group is needed for them. Default: the ranks of the running job.
        options: the backend's options.
    Returns:
        A function that takes the model's arguments, whole and on any device (also meta), and returns the
        :class:`~spcompile.reports.report.Report`. Under ``torch.no_grad()`` it is that of inference.
    Raises:
        SpcompileError: bad options, or a model that cannot be called.
    """
    config = Config.of({**options, **({} if ranks is None else {"ranks": ranks})})
    inductor.patches(config.mode, config.inductor)
    if not callable(model):
        raise SpcompileError(
            f"explain({type(model).__name__}): nothing to call. Remedy: give a module or a function, "
            "then its arguments: explain(model, ranks=8)(input_ids)."
        )
    group = sequence_group(config)
    model = getattr(model, "_orig_mod", model)

    def run(*args: Any, **kwargs: Any) -> Report:
        library.watch()
        session = _Session(group, config)
        start = time.perf_counter()
        broken: Counter[str] = Counter(_torch.counters["graph_break"])
        isolated = {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE else {}
        # Lengths seen here must not make the user's own compilation take them for dynamic.
        compiled = torch.compile(model, backend=session.backend, dynamic=False, **isolated)
        compiled(*args, **kwargs)
        seconds = time.perf_counter() - start
        now: Counter[str] = Counter(_torch.counters["graph_break"])
        breaks = dict(now - broken)
        own = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
        name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "")
        trained = sum(x.nbytes for x in own if x.requires_grad)
        return Report(
            group.size,
            session.records,
            session.calls,
            breaks,
            sum(x.nbytes for x in own),
            trained,
            seconds,
            name,
            sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)),
        )

    return run


_LARGEST = 20
_COMPILE = inspect.signature(torch.compile).parameters


class _Session:
    """One call of the model: the graphs it compiles, in order, and how often each runs."""

    def __init__(self, group: Group, config: Config) -> None:
        self.group, self.config = group, config
        self.records: list[Record] = []
        self.calls: list[int] = []

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        record = Record(self.group, strategy_names(self.group, self.config))
        index = len(self.records)
        self.records.append(record)
        self.calls.append(0)
        gm = own_copy(gm)
        places = canonicalise(gm)
        example_inputs = [example_inputs[i] for i in places]
        boundary, example_inputs = open_boundary(gm, example_inputs, self.group, self.config)
        moved = _off_meta(gm, example_inputs)
        with record.timed("recognize"):
            found = frontend.prepare(gm, self.config)
        record.sites = found.sites
        compilers = _Compilers(self.group, self.config, found, record, "meta" if moved is not None else None)
        run = _torch.aot_autograd(
            fw_compiler=compilers.forward,
            bw_compiler=compilers.stub,
            inference_compiler=compilers.inference,
            partition_fn=compilers.partition,
            decompositions=_torch.select_decomp_table(),
            keep_inference_input_mutations=True,
        )(gm, moved if moved is not None else example_inputs)
        boundary.settle(record.lent)

        def called(*args: Any) -> Any:
            self.calls[index] += 1
            taken = boundary.take(args)
            return boundary.give(run(*taken), boundary.sizes.values([*args, *taken]))

        return in_their_order(called, places)


class _Compilers:
    """What AOTAutograd calls for one graph, in place of Inductor."""

    def __init__(
        self, group: Group, config: Config, found: frontend.Frontend, record: Record, device: str | None
    ) -> None:
        self.group, self.config, self.record, self.device = group, config, record, device
        self.named = found.hints, found.parameters

    def shard(self, joint: fx.GraphModule) -> fx.GraphModule:
        """Shard the joint graph in place; returns the same graph lowered for one rank."""
        self.record.graphs["before"] = _copied(joint)
        alone = _copied(joint)
        shard_joint_graph(alone.graph, Group(1, ""), replace(self.config, ranks=1))
        with self.record.timed("shard"):
            sharded = shard_joint_graph(joint.graph, self.group, self.config, *self.named)
        joint.recompile()
        self.record.saw_joint(joint.graph, sharded)
        self.record.graphs["after"] = _copied(joint)
        return alone

    def on(self, ranks: int) -> fx.GraphModule:
        """The graph that this was made of, sharded for another number of ranks."""
        other = _copied(self.record.graphs["before"])
        config = replace(self.config, ranks=ranks)
        shard_joint_graph(other.graph, Group(ranks, "explained"), config, *self.named)
        erase_dead_waits(other.graph)
        other.recompile()
        return other

    def partition(self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        """AOTAutograd's partition_fn."""

        def halves(module: fx.GraphModule) -> Any:
            split = _torch.min_cut_rematerialization_partition
            forward, backward = split(module, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
            for half in (forward, backward):
                erase_dead_waits(half.graph)
                half.recompile()
            return forward, backward

        def memory(module: fx.GraphModule) -> Memory:
            forward, backward = halves(module)
            return measure(forward.graph, backward.graph, num_fwd_outputs)

        self.record.alone = memory(self.shard(joint))
        self.record.measure = lambda ranks: memory(self.on(ranks))
        forward, backward = halves(joint)
        self.record.memory = measure(forward.graph, backward.graph, num_fwd_outputs)
        self.record.largest = largest(forward.graph, backward.graph)[:_LARGEST]
        for half in (forward, backward):
            self.record.saw_final(half.graph)
        self.record.graphs |= {"forward": forward, "backward": backward}
        return forward, backward

    def inference(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """AOTAutograd's inference_compiler."""
        self.record.alone = measure(self.shard(gm).graph)
        self.record.measure = lambda ranks: measure(self.on(ranks).graph)
        erase_dead_waits(gm.graph)
        self.record.memory = measure(gm.graph)
        self.record.largest = largest(gm.graph)[:_LARGEST]
        self.record.saw_final(gm.graph)
        return self.forward(gm, example_inputs)

    def forward(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """A stub of the forward; an input that the graph would overwrite stays as it is."""
        metadata = _torch.tracing_metadata()
        return _stub(
            gm, self.device, list(metadata.mutated_inp_runtime_indices) if metadata is not None else []
        )

    def stub(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """A stub of the backward."""
        return _stub(gm, self.device, [])


def _stub(gm: fx.GraphModule, device: str | None, mutated: list[int]) -> Callable[..., Any]:
    outputs = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    values = [x.meta.get("val") if isinstance(x, fx.Node) else x for x in outputs]

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if 0 not in shape else 0
        return _zeros(size, value.dtype, torch.device(device or value.device)).as_strided(shape, stride)

    def run(*args: Any) -> list[Any]:
        return [*(args[i] for i in mutated), *(like(v) for v in values[len(mutated) :])]

    return make_boxed_func(run)


_MAPPED = 2**28


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, as code between graphs may look at them; a file without content where they take much memory."""
    if device.type != "cpu" or size * dtype.itemsize < _MAPPED:
        return torch.zeros(size, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.UntypedStorage.from_file(file.name, True, size * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (size,), (1,))


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, its values shared."""
    graph = fx.Graph()
    found: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        found[node] = graph.node_copy(node, found.__getitem__)
    return fx.GraphModule(gm, graph)


def _off_meta(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any] | None:
    """Let a graph of meta tensors be traced as one of the CPU; returns its new inputs, None if there is none.

    Many operators do otherwise on meta than on a device: ``nll_loss`` has no gradient there (torch 2.13).
    """
    if not any(isinstance(x, Tensor) and x.device.type == "meta" for x in example_inputs):
        return None
    mode = _torch.detect_fake_mode(example_inputs) or _torch.detect_fake_mode(
        [n.meta.get("example_value") for n in gm.graph.nodes]
    )
    made: dict[int, Tensor] = {}

    def moved(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu") if x.type == "meta" else x
        if not isinstance(x, Tensor) or x.device.type != "meta":
            return x
        if id(x) not in made:
            with mode:
                shape, stride = tuple(map(int, x.shape)), tuple(map(int, x.stride()))
                new = torch.empty_strided(
                    shape, stride, dtype=x.dtype, device="cpu", requires_grad=x.requires_grad
                )
                made[id(x)] = (
                    torch.nn.Parameter(new, x.requires_grad) if isinstance(x, torch.nn.Parameter) else new
                )
        return made[id(x)]

    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = _mapped((node.args, node.kwargs), moved)
                if "example_value" in node.meta:
                    node.meta["example_value"] = _mapped(node.meta["example_value"], moved)
            module.recompile()
    return [moved(x) for x in example_inputs]


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(tree, function)
