"""How the tests prove: one joint graph per model, sharded for many numbers of ranks, against eager."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

from spcompile import _torch, frontend, library
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.passes import Sharded, shard_joint_graph
from spcompile.passes.canonical import canonicalise, in_their_order
from spcompile.simulate import run_on_ranks

__all__ = ["Eager", "Joint", "capture", "eager", "loss_of", "relative_error"]


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output: itself, or the field of a Hugging Face output."""
    return output if isinstance(output, Tensor) else output.loss


@dataclass
class Eager:
    """The only reference: the unsharded eager model's loss and gradients."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def error(self, loss: Tensor, gradients: Mapping[str, Tensor | None]) -> float:
        """The largest relative error of the loss and of all gradients (design, section 7)."""
        top = max(float(g.abs().max()) for g in self.gradients.values())
        worst = relative_error(loss, self.loss)
        for name, expected in self.gradients.items():
            found = gradients[name]
            assert found is not None, f"{name} got no gradient"
            worst = max(worst, relative_error(found, expected, 1e-6 * top))
        return worst


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """max |found - expected| over the largest |expected|; infinite for NaN."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, expected.shape)
    scale = max(float(expected.abs().max()), floor, 1e-300)
    worst = float((found - expected).abs().max()) / scale
    return worst if worst == worst else float("inf")


def eager(model: nn.Module, inputs: Mapping[str, Any]) -> Eager:
    """Loss and gradients of the eager model; leaves no gradients behind."""
    model.zero_grad()
    loss = loss_of(model(**inputs))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Eager(loss.detach(), gradients)


@dataclass
class Joint:
    """A captured joint graph with its real inputs."""

    module: fx.GraphModule
    primals: list[Any]
    names: list[str | None]
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
        """The loss and gradients that every rank gets; raises if the ranks disagree."""
        local, _ = self.shard(ranks, **options)
        # Of all that a model returns, the gradient is that of the loss: the scalar.
        tangents = [torch.full(x.shape, float(x.dim() == 0), dtype=x.dtype) for x in self._tangents()]
        results = run_on_ranks(local, ranks, *self.primals, *tangents)
        gradients = dict(zip(self.names, results[self.outputs :], strict=True))
        loss = next(x for x in results[: self.outputs] if isinstance(x, Tensor) and x.dim() == 0)
        return loss, {n: g for n, g in gradients.items() if n is not None}

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
        places = canonicalise(gm)
        found["sites"] = frontend.prepare(gm, Config(recognize=recognize)).sites
        nodes = [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        found["operators"] = Counter(
            re.findall(r"^spcompile\.(\w+)", "\n".join(str(n.target) for n in nodes), re.M)
        )
        found["nodes"] = len(nodes)
        compile_joint = _torch.aot_autograd(
            fw_compiler=forward, partition_fn=partition, decompositions=_torch.select_decomp_table()
        )
        return in_their_order(gm, compile_joint(gm, [example[i] for i in places]), places)

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
    kept = [found[n] for n in ("outputs", "sites", "operators", "nodes")]
    return Joint(found["module"], found["primals"], names, *kept)
