"""FSDP2 on one axis of a 2-D mesh, the sequence on the other: parameters over two ranks, tokens over two.

PYTHONHASHSEED=0 torchrun --nproc-per-node 4 examples/fsdp2_2x2.py
python examples/fsdp2_2x2.py --eager        # the same on one process, without spcompile
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from spcompile.data import replicas, sampler
from spcompile.example import tiny

EAGER = "--eager" in sys.argv
torch.manual_seed(0)
mesh = None if EAGER else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))

tokens = torch.randint(0, 256, (12, 102))
dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
count, _ = replicas(mesh)
loader = DataLoader(dataset, batch_size=4 // count, sampler=sampler(dataset, mesh, shuffle=True, seed=1))

model = tiny("LN")
if mesh is not None:
    # The module is compiled, and FSDP's hooks gather its parameters before it runs.
    model.compile(backend="spcompile", options={"mesh": mesh["sp"]})
    fully_shard(model, mesh=mesh["dp"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for number, (ids, labels) in enumerate(loader):
    loss = model(ids, labels=labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    shown = loss.detach()
    if mesh is not None:
        dist.all_reduce(shown, dist.ReduceOp.SUM, group=mesh["dp"].get_group())
        shown /= count
    if EAGER or dist.get_rank() == 0:
        print(f"step {number} loss {shown.item():.8f}", flush=True)

if not EAGER:
    dist.destroy_process_group()
