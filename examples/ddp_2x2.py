"""DDP on one axis of a 2-D mesh, the sequence on the other: two batches a step, each over two ranks.

PYTHONHASHSEED=0 torchrun --nproc-per-node 4 examples/ddp_2x2.py
python examples/ddp_2x2.py --eager          # the same on one process, without spcompile
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from spcompile.data import replicas, sampler
from spcompile.example import tiny

EAGER = "--eager" in sys.argv
torch.manual_seed(0)
mesh = None
if not EAGER:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))

tokens = torch.randint(0, 256, (12, 102))
dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
count, _ = replicas(mesh)  # 2: the ranks of a row of the mesh read the same
loader = DataLoader(dataset, batch_size=4 // count, sampler=sampler(dataset, mesh, shuffle=True, seed=1))

model = tiny("LN")
step = model
if mesh is not None:
    # The sequence's gradients are summed inside the compiled module, DDP averages over its own axis.
    model.compile(backend="spcompile", options={"mesh": mesh["sp"]})
    step = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for number, (ids, labels) in enumerate(loader):
    loss = step(ids, labels=labels)
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
