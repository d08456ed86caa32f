"""Ten seconds that tell whether anything works at all; runs before every commit."""

from __future__ import annotations

import torch
from torch import nn

from spcompile.simulate import simulated


class Tiny(nn.Module):
    """Textbook linear attention over token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return (scores.tril() @ self.value(x)).square().mean()


def test_one_layer_on_three_ranks_is_eager() -> None:
    torch.manual_seed(0)
    model, ids = Tiny().double(), torch.randint(0, 11, (2, 7))
    expected = model(ids)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, backend=simulated(3, nan_padding=True))(ids)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
