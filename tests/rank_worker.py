"""One real Gloo rank of tests/test_ranks.py: ``python -m tests.rank_worker CASE`` prints one JSON line."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import models
import spcompile.backend
import spcompile.reports.report
from tests.agreement_cases import agreement
from tests.left_samples import optimizer_steps, steps
from tests.packed_models import LAYERS, Model
from tests.proof import eager, left_behind, loss_of, relative_error

SHAPE = {"vocab": 50, "hidden": 32, "heads": 2, "kv_heads": 1, "mlp": 48}


def model(pattern: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.get("linear_llama3:tiny", **SHAPE, pattern=pattern, layers=len(pattern), **overrides)()


def batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, SHAPE["vocab"], (2, length), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "labels": ids.clone()}


def train_each() -> dict[str, Any]:
    """The same, each length compiled for itself."""
    return train("each")


def train(lengths: str = "symbolic") -> dict[str, Any]:
    """Two steps, the second of another length, and inference, through Inductor; are the ranks' graphs one?"""
    texts: list[str] = []
    shard = spcompile.backend.shard_joint_graph

    def keep(graph: torch.fx.Graph, *args: Any) -> Any:
        result = shard(graph, *args)
        texts.append(str(graph))
        return result

    spcompile.backend.shard_joint_graph = keep
    net = model("LN").double()
    compiled = torch.compile(net, backend="spcompile", options={"lengths": lengths})
    errors = []
    for length in (65, 3):
        inputs = batch(length)
        expected = eager(net, inputs)
        loss = compiled(**inputs)
        loss.backward()
        errors.append(expected.error(loss.detach(), left_behind(net, inputs)))
    with torch.no_grad():
        ids = batch(65)["ids"]
        found, expected_logits = compiled(ids), net(ids)
        errors.append(relative_error(found, expected_logits))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, texts)
    # A cache of an earlier run may serve some of the graphs; what each of them tells is there all the same.
    graphs = len(spcompile.reports.report.RECORDS)
    return {"errors": errors, "graphs": graphs, "same_text": all(t == texts for t in everyone)}


def delta() -> dict[str, Any]:
    """A delta rule before a softmax layer, one step through Inductor.

    Inductor lays these queries out with the head dim outermost: a kernel that overlooks strides fails here.
    """
    torch.manual_seed(0)
    net = models.get("deltanet:tiny", **SHAPE, pattern="LN", layers=2)().double()
    inputs = batch(33)
    expected = eager(net, inputs)
    loss = torch.compile(net, backend="spcompile")(**inputs)
    loss.backward()
    return {"error": expected.error(loss.detach(), left_behind(net, inputs))}


def experts() -> dict[str, Any]:
    """A checkpointed mixture of experts, at two lengths."""
    from torch.utils.checkpoint import checkpoint

    from tests.experts import LOCAL, Experts, inputs_of

    def spelling(m: Any, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return checkpoint(LOCAL["sorted_and_put_back"], m, x, w, ids, use_reentrant=False)

    torch.manual_seed(0)
    net = Experts(spelling).double()
    compiled, errors = torch.compile(net, backend="spcompile"), []
    for length in (11, 14):
        inputs = inputs_of(length)
        expected = eager(net, inputs)
        loss = compiled(**inputs)
        loss.backward()
        errors.append(expected.error(loss.detach(), left_behind(net, inputs)))
    return {"errors": errors, "gathers": sum(len(r.gathers) for r in spcompile.reports.report.RECORDS)}


def packed() -> dict[str, Any]:
    """Five documents, linear and softmax attention, of two lengths."""
    model = Model(LAYERS["softmax behind linear"])
    compiled, errors = torch.compile(model, backend="spcompile"), []
    for lengths in ([5, 1, 7, 3, 8], [9, 2, 3, 1, 14]):
        generator = torch.Generator().manual_seed(0)
        ids, labels = (torch.randint(11, (1, sum(lengths)), generator=generator) for _ in range(2))
        given = {"ids": ids, "ends": torch.tensor([0, *lengths]).cumsum(0), "labels": labels}
        expected = eager(model, given)
        loss = compiled(**given)
        loss.backward()
        errors.append(expected.error(loss.detach(), left_behind(model, given)))
        model.zero_grad()
    return {"errors": errors}


def ways() -> dict[str, Any]:
    """A step with each way across the ranks but the all-gather, of a length each (`train` has two)."""
    from spcompile.strategies import LINEAR, SOFTMAX

    torch.manual_seed(0)
    nets = {
        kind: models.get("gla:tiny", **SHAPE, pattern=pattern, layers=1)().double()
        for kind, pattern in (("linear", "L"), ("softmax", "N"))
    }
    ways = [(kind, x) for kind, rows in (("linear", LINEAR), ("softmax", SOFTMAX)) for x in rows]
    errors: dict[str, float] = {}
    for number, (kind, name) in enumerate(way for way in ways if way[1] != "allgather"):
        length, net = 13 + number, nets[kind]
        torch.compiler.reset()
        compiled = torch.compile(net, backend="spcompile", options={kind: name})
        inputs = net.example_inputs(seq=length, batch=2)
        expected = eager(net, inputs)
        loss = compiled(**inputs)
        loss.backward()
        errors[name] = expected.error(loss.detach(), left_behind(net, inputs))
        net.zero_grad()
    return {"errors": errors}


def left() -> dict[str, Any]:
    """What steps leave behind: of a model with several kinds of state and operators, and of an optimizer."""
    pairs = [(steps("together", spcompile.backend.spcompile), steps("together"))]
    pairs += [(optimizer_steps("SGD", spcompile.backend.spcompile), optimizer_steps("SGD"))]
    errors = {n: relative_error(a[n].double(), x.double(), 1e-6) for a, b in pairs for n, x in b.items()}
    return {"errors": errors, "names": [list(a) == list(b) for a, b in pairs]}


def waits() -> dict[str, Any]:
    """Inductor's code for a causal linear layer: what stands between each gather and its wait."""
    from torch._inductor.utils import run_and_get_code

    net = model("L")
    compiled = torch.compile(net, backend="spcompile")

    def run() -> None:
        compiled(**batch(512)).backward()

    _, codes = run_and_get_code(run)
    return {"codes": [_order(c) for c in codes]}


def _order(code: str) -> list[str]:
    calls = r"_c10d_functional\.(all_gather\w*|wait_tensor)\.default\(|extern_kernels\.(\w*mm)\("
    found = re.findall(calls, code.split("def call", 1)[-1])
    return [collective.split("_into")[0] or product for collective, product in found]


def other_shape_at_once() -> dict[str, Any]:
    """Rank 1 passes another length at the first call."""
    compiled = torch.compile(model("L"), backend="spcompile")
    return _error(lambda: compiled(**batch(16 + dist.get_rank())))


def other_shape_later() -> dict[str, Any]:
    """Rank 1 passes another length at the second call, when the others run what they have."""
    compiled = torch.compile(model("L"), backend="spcompile")
    with torch.no_grad():
        compiled(**batch(16))
        return _error(lambda: compiled(**batch(16 + dist.get_rank())))


def other_model() -> dict[str, Any]:
    """Rank 1 compiles another model."""
    compiled = torch.compile(model("LN"[dist.get_rank()]), backend="spcompile")
    return _error(lambda: compiled(**batch(16)))


def mesh_of_two_axes() -> dict[str, Any]:
    """A mesh that is not 1-D is refused; one axis of it works."""
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "sp"))
    bad = torch.compile(model("L"), backend="spcompile", options={"mesh": mesh})
    refused = _error(lambda: bad(**batch(16)))
    torch._dynamo.reset()
    net = model("L").double()
    good = torch.compile(net, backend="spcompile", options={"mesh": mesh["sp"]})
    with torch.no_grad():
        ids = batch(16)["ids"]
        return refused | {"error_of_axis": relative_error(good(ids), net(ids))}


class _Gathering(nn.Module):
    """Attention, and an operator that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x.median(1).values.sum()


def warm() -> dict[str, Any]:
    """One step: what the user is told, and whether a cache served it."""
    torch.manual_seed(0)
    net = _Gathering().double()
    ids = torch.arange(9)[None] % 11
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = torch.compile(net, backend="spcompile")(ids)
        loss.backward()
    report = spcompile.reports.report.last().to_dict()
    del report["pass_seconds"]
    counted = torch._dynamo.utils.counters["aot_autograd"]
    return {
        "hits": counted["autograd_cache_hit"],
        "told": [str(w.message) for w in caught if issubclass(w.category, spcompile.backend.ForcedGather)],
        "report": report,
        "error": relative_error(loss.detach(), net(ids).detach()),
    }


def _error(run: Callable[[], object]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        run()
    except Exception as error:  # the test looks at what it says
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"error": None, "seconds": time.monotonic() - start}


def _third_party(name: str, length: int) -> dict[str, Any]:
    """A step of a model whose graph follows the hashes of strings; every rank has others."""
    from tests.zoo import FUNCTIONS, MODELS

    net, inputs = {**MODELS, **FUNCTIONS}[name](length)
    expected = eager(net, inputs)
    loss = loss_of(torch.compile(net, backend="spcompile")(**inputs))
    loss.backward()
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hash("spcompile"))
    gradients = {n: p.grad for n, p in net.named_parameters()}
    return {"error": expected.error(loss.detach(), gradients), "hashes": len(set(hashes))}


def gemma4() -> dict[str, Any]:
    return _third_party("gemma4", 13)


def gdn2() -> dict[str, Any]:
    return _third_party("fla_gdn2_chunk", 16)


_CASES = (
    *(train, train_each, delta, experts, left, waits, other_shape_at_once, other_shape_later, other_model),
    *(mesh_of_two_axes, agreement, warm, gemma4, gdn2, packed, ways),
)
CASES = {f.__name__: f for f in _CASES}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = CASES[sys.argv[1]]()
    print("RESULT " + json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
