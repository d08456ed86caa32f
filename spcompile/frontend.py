"""What happens to Dynamo's graph before autograd: attention is recognized."""

from __future__ import annotations

from torch import fx

from spcompile.config import Config

__all__ = ["prepare"]


def prepare(gm: fx.GraphModule, config: Config) -> list:
    return []
