"""Every model of models/ trains on the demo's text, sharded, beside unsharded eager: equal curves.

`python -m demo.family` does the same with real processes and Inductor, for more steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from demo import compare, text
from spcompile.simulate import simulated
from tests.releases import each_change

WINDOWS, ROUNDS, LENGTH, RANKS = 2, 3, 24, 2
NAMES = [n for n in models.names() if n.endswith(":tiny")]
# One of each kind of memory state for each change, the others for a release.
KINDS = ("linear_llama3:tiny", "mamba2:tiny", "gla:tiny", "kda:tiny")


def losses(model: nn.Module, batches: list[Tensor], backend: object = None) -> list[float]:
    run = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    found = []
    for ids in batches:
        loss = run(ids, labels=ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", each_change(NAMES, KINDS))
def test_curves_are_equal(name: str) -> None:
    batches = text.batches(text.read(None), LENGTH, WINDOWS, 0) * ROUNDS
    curves = []
    for backend in (None, simulated(RANKS)):
        torch.manual_seed(0)
        torch.compiler.reset()
        curves.append(losses(models.get(name, pattern="LN", layers=2)(), batches, backend))
    gap, step = compare.furthest(*curves)
    assert gap <= compare.ALL, f"the losses differ by {gap:.1e} at step {step + 1}"
    first, last = curves[0][:WINDOWS], curves[0][-WINDOWS:]
    assert all(after < before for before, after in zip(first, last)), "the loss did not fall"
