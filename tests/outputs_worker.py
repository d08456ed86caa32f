"""One real Gloo rank of tests/test_outputs.py: ``python -m tests.outputs_worker CASE`` prints a JSON line."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import spcompile
from spcompile import _torch, sharded
from spcompile.passes import chunks
from tests.proof import relative_error
from tests.uncompiled import uncompiled

VOCAB, WIDTH = 20, 8


class Block(nn.Module):
    """Causal attention with two heads; returns its keys too, if asked."""

    def __init__(self, keys: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.keys = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), keys

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return (x, k.clone()) if self.keys else x


class LM(nn.Module):
    """Loss, logits, keys and predictions, as a Hugging Face model returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(VOCAB, WIDTH), Block(True), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        x, keys = self.block(self.embed(ids))
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits, keys, logits.argmax(-1), x.sum(1)


class Stack(nn.Module):
    """Three blocks and a loss; a graph break before the last if asked."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks, self.breaks = nn.ModuleList(Block() for _ in range(3)), breaks

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.embed(ids)))
        if self.breaks:
            torch._dynamo.graph_break()
        logits = self.head(self.blocks[2](x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tokens(length: int = 13) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def gradients(net: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    top = max(float(g.abs().max()) for g in expected.values())
    return max(relative_error(found[n], expected[n], 1e-6 * top) for n in expected)


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "loss": lambda out: out[0],
    "logits": lambda out: out[1].pow(2).mean(),
    "both": lambda out: out[0] + out[1].sin().sum() + (out[2] * out[2]).sum(),
    "whole": lambda out: out[0] + out[4].mul_(2).sin().sum(),
}

reads: list[tuple[int, ...]] = []


def count_reads() -> None:
    """Every gather of a sharded tensor's parts is counted; those of a trace are not."""
    gathered = sharded.gathered

    def counted(local: Tensor, layout: Any) -> Tensor:
        if type(local) is Tensor:
            reads.append(layout.shape)
        return gathered(local, layout)

    sharded.gathered = counted


def parts() -> dict[str, Any]:
    """Outputs against eager: gradients, values, and what reads them."""
    net, ids = seeded(LM), tokens()
    compiled = torch.compile(net, backend="spcompile")
    errors = {}
    for name, loss in LOSSES.items():
        expected = gradients(net, lambda loss=loss: loss(net(ids, ids)))
        reads.clear()
        errors[name] = worst(gradients(net, lambda loss=loss: loss(compiled(ids, ids))), expected)
        errors[f"{name} reads"] = len(reads) != {"loss": 0, "logits": 1, "both": 2, "whole": 0}[name]
    found, expected = compiled(ids, ids), net(ids, ids)
    reads.clear()
    kept = [x.detach() for x in found]
    errors["metadata"] = any(
        any(f(a) != f(b) for f in (Tensor.size, Tensor.stride, lambda x: (x.dtype, x.requires_grad)))
        for a, b in zip(found, expected)
    )
    errors["not read"] = bool(reads) or not isinstance(kept[1], Tensor)
    errors["values"] = max(relative_error(a + 0, b.detach()) for a, b in zip(kept, expected))
    errors["printed"] = str(found[1]) != str(expected[1]) and repr(found[3]) != repr(expected[3])
    errors["list"] = found[3].tolist() != expected[3].tolist()
    errors["numpy"] = bool((found[3].numpy() != expected[3].numpy()).any())
    saved = io.BytesIO()
    torch.save(kept[1], saved)
    saved.seek(0)
    errors["saved"] = relative_error(torch.load(saved), expected[1].detach())
    errors["copied"] = relative_error(copy.deepcopy(kept[2]), expected[2].detach())
    kept[1].mul_(2)
    errors["written"] = relative_error(kept[1] + 0, 2 * expected[1].detach())
    return {"errors": errors | twice(net, compiled, ids) | still(net, compiled, ids)}


def twice(net: nn.Module, compiled: Any, ids: Tensor) -> dict[str, float]:
    """Two backwards through one graph, the second by the logits; logits that are read after a backward."""

    def both(call: Any) -> Tensor:
        out = call(ids, ids)
        out[0].backward(retain_graph=True)
        return out[1].sin().sum()

    found = {}
    with torch._functorch.config.patch(donated_buffer=False):
        expected = gradients(net, lambda: both(net))
        found["two backwards"] = worst(gradients(net, lambda: both(compiled)), expected)
    out = compiled(ids, ids)
    out[0].backward()
    found["read after"] = relative_error(out[1].detach() + 0, net(ids, ids)[1].detach())
    return found


def still(net: nn.Module, compiled: Any, ids: Tensor) -> dict[str, float]:
    """Inference."""
    with torch.no_grad():
        found, expected = compiled(ids, ids), net(ids, ids)
        return {"inference": max(relative_error(a + 0, b) for a, b in zip(found, expected))}


def between() -> dict[str, Any]:
    """Blocks compiled by themselves, and a graph break: nothing is gathered between, eager reads the end.
    From the second length on the parts that cross are of symbolic lengths."""
    errors: dict[str, float] = {}
    found: dict[str, int] = {}
    net, plain = seeded(Stack), seeded(Stack)
    whole = seeded(lambda: Stack(True))
    compiled = torch.compile(whole, backend="spcompile")
    for block in net.blocks:
        block.compile(backend="spcompile")
    for name, call, of in (("blocks", net, net), ("break", compiled, whole)):
        _torch.counters.clear()
        for length in (13, 11, 9):
            ids = tokens(length)
            expected = gradients(plain, lambda ids=ids: plain(ids))
            reads.clear()
            error = worst(gradients(of, lambda call=call, ids=ids: call(ids)), expected)
            errors[name] = max(error, errors.get(name, 0.0))
            found[name] = max(len(reads), found.get(name, 0))
        found[f"graphs of {name}"] = _torch.counters["stats"]["unique_graphs"]
    return {"errors": errors, "reads": found}


def llama_blocks() -> dict[str, Any]:
    """A Hugging Face Llama with each block compiled by itself, then with all else that can be, too.

    The norm is eager first, and then the head: PyTorch traces no nn.Linear that is compiled by itself.
    """
    from tests.huggingface import build

    net, inputs = build("llama", 13)
    expected = gradients(net, lambda: net(**inputs).loss)
    errors: dict[str, float] = {}
    found: dict[str, list[tuple[int, ...]]] = {}
    rest = [net.model.embed_tokens, net.model.rotary_emb, net.model.norm, net.lm_head]
    for name, compiled in (("blocks", net.model.layers), ("all", rest)):
        for module in compiled:
            module.compile(backend="spcompile")
        reads.clear()
        errors[name] = worst(gradients(net, lambda: net(**inputs).loss), expected)
        found[name] = list(reads)
    with torch.no_grad():
        errors["loss"] = relative_error(net(**inputs).loss, build("llama", 13)[0](**inputs).loss)
    return {"errors": errors, "reads": found}


def given() -> dict[str, Any]:
    """Each rank passes its own tokens and gets its own logits back; no rank has all of either."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net, ids, errors = seeded(LM), tokens(), {}
    expected = gradients(net, lambda: net(ids, ids)[0])
    logits = net(ids, ids)[1].detach()
    mine = torch.chunk(ids, ranks, 1)[rank]
    options = {"inputs": "sharded", "outputs": "sharded"}
    compiled = torch.compile(net, backend="spcompile", options=options)
    whole = spcompile.shard(mine)
    reads.clear()
    out: Any = None

    def loss() -> Tensor:
        nonlocal out
        out = compiled(whole, whole)
        return out[0]

    errors["loss"] = worst(gradients(net, loss), expected)
    errors["local"] = relative_error(out[1], torch.chunk(logits, ranks, 1)[rank])
    errors["plain"] = type(out[1]) is not Tensor or whole.shape != ids.shape
    errors["logits"] = worst(
        gradients(net, lambda: compiled(whole, whole)[1].pow(2).sum()),
        gradients(net, lambda: net(ids, ids)[1].pow(2).sum()),
    )
    errors["reads"] = len(reads)
    errors["read"] = bool((whole + 0 != ids).any())
    return {"errors": errors, "uneven": _error(lambda: spcompile.shard(ids[:, : 3 + rank]))} | {
        "global": _error(lambda: compiled(ids, ids))
    }


def as_dtensors() -> dict[str, Any]:
    """Logits as DTensors: where they lie, values, a loss that DTensor computes; and what cannot be one."""
    net, ids = seeded(LM), tokens()
    compiled = torch.compile(net, backend="spcompile")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reads.clear()
    out = compiled(ids, ids)
    made = spcompile.dtensor(out[1])
    errors: dict[str, float] = {"placed": made.placements != (Shard(1),) or made.shape != out[1].shape}
    mine = torch.chunk(net(ids, ids)[1], dist.get_world_size(), 1)[dist.get_rank()]
    errors["local"] = relative_error(made.to_local().detach(), mine.detach())
    errors["whole"] = relative_error(made.full_tensor().detach(), net(ids, ids)[1].detach())
    errors["loss"] = worst(
        gradients(net, lambda: spcompile.dtensor(compiled(ids, ids)[1], mesh).pow(2).sum().full_tensor()),
        gradients(net, lambda: net(ids, ids)[1].pow(2).sum()),
    )
    errors["replicated"] = spcompile.dtensor(torch.ones(3), mesh).placements != (Replicate(),)
    errors["reads"] = len(reads)
    cut = torch.compile(lambda x: net.embed(x)[:, :-3], backend="spcompile")
    flat = torch.compile(lambda x: net.embed(x).flatten(0, 1), backend="spcompile")
    return {"errors": errors} | {
        "cut": _error(lambda: spcompile.dtensor(cut(ids))),
        "flat": _error(lambda: spcompile.dtensor(flat(ids))),
        "mesh": _error(
            lambda: spcompile.dtensor(out[1], init_device_mesh("cpu", (dist.get_world_size(), 1)))
        ),
    }


def one_reads() -> dict[str, Any]:
    """Rank 0 prints logits while the others call the model again."""
    net, ids = seeded(LM), tokens()
    compiled = torch.compile(net, backend="spcompile")
    with torch.no_grad():
        out = compiled(ids, ids)
        return {"error": _error(lambda: str(out[1]) if dist.get_rank() == 0 else compiled(ids, ids))}


def through_inductor() -> dict[str, Any]:
    """A step of which the loss alone is used, and one that uses all; the logits' gradient in pieces."""
    chunks.LEAST_BYTES, chunks.PIECES = 1, 3
    net, ids = seeded(LM), tokens()
    compiled = torch.compile(net, backend="spcompile")
    errors = {}
    for name, loss in LOSSES.items():
        expected = gradients(net, lambda loss=loss: loss(net(ids, ids)))
        errors[name] = worst(gradients(net, lambda loss=loss: loss(compiled(ids, ids))), expected)
    out = compiled(ids, ids)
    out[0].backward()
    errors["read after"] = relative_error(out[1].detach() + 0, net(ids, ids)[1].detach())
    return {"errors": errors}


def _error(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:  # the test looks at what it says
        return str(error)
    return ""


CASES = {
    f.__name__: f for f in (parts, between, llama_blocks, given, as_dtensors, one_reads, through_inductor)
}

if __name__ == "__main__":
    if sys.argv[1] != "through_inductor":
        _torch.compile_fx = uncompiled
    count_reads()
    dist.init_process_group("gloo")
    result = CASES[sys.argv[1]]()
    print("RESULT " + json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
