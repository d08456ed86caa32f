"""A training loop of your own, the sequence over all ranks. All ranks read the same batches.

PYTHONHASHSEED=0 torchrun --nproc-per-node 2 examples/plain_loop.py
python examples/plain_loop.py --eager       # the same on one process, without spcompile
"""

import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from spcompile.data import sampler
from spcompile.example import tiny

EAGER = "--eager" in sys.argv
torch.manual_seed(0)  # the same weights on every rank
if not EAGER:
    dist.init_process_group("gloo")  # "nccl" on GPUs

tokens = torch.randint(0, 256, (6, 102))
dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
loader = DataLoader(dataset, batch_size=2, sampler=sampler(dataset, shuffle=True, seed=1))

model = tiny("LN")
step = model if EAGER else torch.compile(model, backend="spcompile")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for number, (ids, labels) in enumerate(loader):
    loss = step(ids, labels=labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if EAGER or dist.get_rank() == 0:
        print(f"step {number} loss {loss.item():.8f}", flush=True)

if not EAGER:
    dist.destroy_process_group()
