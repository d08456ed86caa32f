"""One of four real Gloo ranks of tests/test_sharded_parameters.py: FSDP2 and DDP beside sequence parallelism.

``python -m tests.sharded_worker ALL`` prints one JSON line. The recipes are those of README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from spcompile.reports.report import RECORDS
from tests.proof import Eager, eager

VOCAB, SIZE, LENGTH, BATCH = 12, 8, 10, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, SIZE // 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def data(row: int) -> dict[str, Tensor]:
    """The batch of one row of the mesh: the same along the sequence axis, another along the other."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(row))
    return {"ids": ids[:, :-1], "labels": ids[:, 1:]}


def compiled(module: nn.Module, **options: Any) -> None:
    """Compile what a module computes, and not what a wrapper does around it."""
    module.forward = torch.compile(module.forward, backend="spcompile", options=options)


def fsdp_rows(mesh: Any) -> Model:
    """Parameters are sharded over the rows; we sum the gradients of a row."""
    net = model()
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh["dp"])
    for block in net.blocks:
        compiled(block, mesh=mesh["sp"])
    return net


def fsdp_blocks(mesh: Any) -> Model:
    """Parameters are sharded over all ranks, block by block; FSDP2 alone reduces."""
    net, everyone = model(), mesh._flatten("dp_sp")
    for module in (*net.blocks, net):
        fully_shard(module, mesh=everyone)
    for block in net.blocks:
        compiled(block, mesh=mesh["sp"], gradients="partial")
    return net


def fsdp_whole(mesh: Any) -> Model:
    """Parameters are sharded over all ranks, the model as one."""
    net = fully_shard(model(), mesh=mesh["dp", "sp"]._flatten("all"))
    compiled(net, mesh=mesh["sp"], gradients="partial")
    return net


def ddp(mesh: Any) -> nn.Module:
    """Parameters are whole; DistributedDataParallel alone reduces."""
    net = model()
    compiled(net, mesh=mesh["sp"], gradients="partial")
    return DistributedDataParallel(net)


# What FSDP2 calls; it has had the second name since torch 2.13.
REDUCE_SCATTER = [n for n in ("reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, n)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The elements that go into each reduce-scatter of FSDP2."""
    originals, found = {n: getattr(dist, n) for n in REDUCE_SCATTER}, []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            found.append(given["input"].numel())
            return original(**given)

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(recipe: Callable[[Any], nn.Module], mesh: Any, expected: Eager) -> dict[str, Any]:
    torch._dynamo.reset()
    RECORDS.clear()
    net = recipe(mesh)
    with counted() as scattered:
        loss = net(**data(mesh["dp"].get_local_rank()))
        loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh["dp"].get_group())
    gradients = {}
    for name, p in net.named_parameters():
        whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        gradients[name.removeprefix("module.")] = whole
    transfers = [t for record in RECORDS for t in record.transfers]
    return {
        "error": expected.error(loss / 2, gradients),
        "scattered": scattered,
        "reduced": [t.elements for t in transfers if t.op == "all_reduce" and t.phase == "backward"],
        "sharded": all(site.rewritten for record in RECORDS for site in record.sites) and len(transfers) > 0,
    }


def main() -> None:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    rows = [eager(model(), data(row)) for row in range(2)]
    mean = {n: (g + rows[1].gradients[n]) / 2 for n, g in rows[0].gradients.items()}
    expected = Eager((rows[0].loss + rows[1].loss) / 2, mean)
    recipes = (fsdp_rows, fsdp_blocks, fsdp_whole, ddp)
    print("RESULT " + json.dumps({r.__name__: run(r, mesh, expected) for r in recipes}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
