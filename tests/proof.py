"""How the tests prove: one joint graph per model, sharded for many numbers of ranks, against eager."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

from spcompile import _torch, frontend, library
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.passes.canonical import canonicalise, in_their_order, own_copy
from spcompile.passes.shard import Sharded, shard_joint_graph
from spcompile.simulate import run_on_ranks

__all__ = ["Eager", "Joint", "capture", "eager", "left_behind", "loss_of", "relative_error"]


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output: itself, or the field of a Hugging Face output."""
    return output if isinstance(output, Tensor) else output.loss


@dataclass
class Eager:
    """The only reference: what a step of the unsharded eager model leaves behind.

    ``written`` are the buffers and arguments that it changes, as "buffer NAME" and "argument NAME".
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    written: dict[str, Tensor] = field(default_factory=dict)

    def error(self, loss: Tensor, left: Mapping[str, Tensor | None]) -> float:
        """The largest relative error of the loss and of all in ``left``: gradients, and what is written."""
        top = max(float(g.abs().max()) for g in self.gradients.values())
        worst = relative_error(loss, self.loss)
        for name, expected in self.gradients.items():
            found = left[name]
            assert found is not None, f"{name} got no gradient"
            worst = max(worst, relative_error(found, expected, 1e-6 * top))
        for name, expected in self.written.items():
            found = left.get(name)
            assert found is not None, f"{name} is not written"
            worst = max(worst, relative_error(found, expected))
        return worst


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """max |found - expected| over the largest |expected|; infinite for NaN."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, expected.shape)
    scale = max(float(expected.abs().max()), floor, 1e-300)
    worst = float((found - expected).abs().max()) / scale
    return worst if worst == worst else float("inf")


def _state(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a step may write to: buffers and arguments, by name."""
    arguments = {f"argument {n}": x for n, x in inputs.items() if isinstance(x, Tensor)}
    return {f"buffer {n}": b for n, b in model.named_buffers()} | arguments


def left_behind(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """What a step has left: every gradient, buffer and argument."""
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return gradients | {n: x.detach().clone() for n, x in _state(model, inputs).items()}


def eager(model: nn.Module, inputs: Mapping[str, Any]) -> Eager:
    """What a step of the eager model leaves behind; the model and the inputs are then as before."""
    model.zero_grad()
    state = _state(model, inputs)
    before = {n: x.detach().clone() for n, x in state.items()}
    loss = loss_of(model(**inputs))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    written = {n: x.detach().clone() for n, x in state.items() if not torch.equal(x, before[n])}
    with torch.no_grad():
        for n in written:
            state[n].copy_(before[n])
    return Eager(loss.detach(), gradients, written)


@dataclass
class Joint:
    """A captured joint graph with its real inputs."""

    module: fx.GraphModule
    primals: list[Any]
    names: list[str | None]
    state: dict[int, str]  # the position among the primals of each buffer and argument
    outputs: int
    sites: list[Any]
    operators: Counter[str]  # spcompile's own, in Dynamo's graph after recognition
    nodes: int  # of that graph

    def shard(self, ranks: int, **options: Any) -> tuple[fx.GraphModule, Sharded]:
        """The graph that each of ``ranks`` ranks runs."""
        local = _copied(self.module)
        sharded = shard_joint_graph(local.graph, Group(ranks, "simulated"), Config.of(options))
        local.recompile()
        return local, sharded

    def run(self, ranks: int, **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The loss, and the gradients and state that every rank is left with; raises if the ranks disagree.

        The model itself is left as it is.
        """
        local, _ = self.shard(ranks, **options)
        primals = [x.clone() if i in self.state else x for i, x in enumerate(self.primals)]
        # Of all that a model returns, the gradient is that of the loss: the scalar.
        tangents = [torch.full(x.shape, float(x.dim() == 0), dtype=x.dtype) for x in self._tangents()]
        results = run_on_ranks(local, ranks, *primals, *tangents)
        gradients = dict(zip(self.names, results[self.outputs :], strict=True))
        loss = next(x for x in results[: self.outputs] if isinstance(x, Tensor) and x.dim() == 0)
        state = {name: primals[i] for i, name in self.state.items()}
        return loss, {n: g for n, g in gradients.items() if n is not None} | state

    def _tangents(self) -> list[Tensor]:
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        return [n.meta["val"] for n in nodes if n.name.startswith("tangents")]


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same attributes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


class _Captured(Exception):
    pass


def capture(model: nn.Module, inputs: Mapping[str, Any], recognize: bool = True) -> Joint:
    """The joint graph of ``model``'s loss, as Inductor's hook gets it."""
    found: dict[str, Any] = {}

    def partition(joint: fx.GraphModule, example: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        found["module"], found["outputs"] = _copied(joint), num_fwd_outputs
        return _torch.default_partition(joint, example, num_fwd_outputs=num_fwd_outputs)

    def forward(gm: fx.GraphModule, example: Any) -> Callable[..., Any]:
        def run(*primals: Any) -> Any:
            found["primals"] = list(primals)
            raise _Captured

        return make_boxed_func(run)

    def backend(gm: fx.GraphModule, example: Any) -> Any:
        gm = own_copy(gm)
        places = canonicalise(gm)
        found["sites"] = frontend.prepare(gm, Config(recognize=recognize)).sites
        nodes = [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        found["operators"] = Counter(
            re.findall(r"^spcompile\.(\w+)", "\n".join(str(n.target) for n in nodes), re.M)
        )
        found["nodes"] = len(nodes)
        compile_joint = _torch.aot_autograd(
            fw_compiler=forward,
            partition_fn=partition,
            decompositions=_torch.select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        return in_their_order(compile_joint(gm, [example[i] for i in places]), places)

    torch._dynamo.reset()  # all of models/ is one frame's code, and Dynamo gives up on code compiled often
    library.watch()
    try:
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**inputs)
    except _Captured:
        pass
    finally:
        torch._dynamo.reset()
    parameters = {id(p): n for n, p in model.named_parameters()}
    names = [parameters.get(id(x)) for x in found["primals"]]
    state = {id(x): n for n, x in _state(model, inputs).items()}
    places = {i: state[id(x)] for i, x in enumerate(found["primals"]) if id(x) in state}
    kept = [found[n] for n in ("outputs", "sites", "operators", "nodes")]
    return Joint(found["module"], found["primals"], names, places, *kept)
