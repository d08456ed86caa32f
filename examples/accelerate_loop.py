"""A loop with Accelerate, the sequence over all ranks.

Accelerate's list of Dynamo backends is closed: `dynamo_backend="spcompile"` is an error there. Compile the
model yourself, in place, before `prepare`; and keep the loader out of `prepare`, which would deal its batches
out to the ranks.

PYTHONHASHSEED=0 torchrun --nproc-per-node 2 examples/accelerate_loop.py
python examples/accelerate_loop.py --eager  # the same on one process, without spcompile
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from spcompile.data import sampler
from spcompile.example import tiny

EAGER = "--eager" in sys.argv
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)

tokens = torch.randint(0, 256, (6, 102))
dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
loader = DataLoader(dataset, batch_size=2, sampler=sampler(dataset, shuffle=True, seed=1))

model = tiny("LN")
if not EAGER:
    torch._dynamo.config.optimize_ddp = False  # prepare wraps the model in DDP, which would cut the graph
    model.compile(backend="spcompile")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)

for number, (ids, labels) in enumerate(loader):
    loss = model(ids, labels=labels)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {number} loss {loss.item():.8f}", flush=True)

accelerator.end_training()
