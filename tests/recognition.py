"""What the tests of recognition share: operands, tables of spellings, and `see`, which looks at a function.

`see` runs its Dynamo graph as it was and as recognition edited it, both eagerly, and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx

from spcompile.passes.recognize import Site, recognize

B, H, T, D = 2, 4, 7, 5
INF = float("inf")


def qkv(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = shapes or ((B, H, T, D),) * 3
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def future(t: int = T, s: int | None = None) -> Tensor:
    """True where key j comes after query i."""
    return torch.arange(s or t)[None, :] > torch.arange(t)[:, None]


def spelling(table: dict, *expected):
    def register(fn):
        table[fn.__name__] = (fn, expected)
        return fn

    return register



def _same(new: Tensor, old: Tensor, tol: float) -> None:
    scale = old.abs().max().item() if old.numel() and old.dtype.is_floating_point else 1.0
    torch.testing.assert_close(new, old, rtol=0, atol=tol * max(scale, 1.0), equal_nan=True)


def _gradients(outs: list[Tensor], leaves: list[Tensor], seed: int) -> list[Tensor]:
    outs = [o for o in outs if o.requires_grad]
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outs]
    if not outs or not leaves:
        return []
    grads = torch.autograd.grad(outs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for d, x in zip(grads, leaves, strict=True)]


def compare(old: fx.GraphModule, new: fx.GraphModule, args: tuple, tol: float = 1e-10) -> object:
    """Outputs (with dtypes, shapes, strides, changes of the arguments) and the gradients of both graphs
    agree."""
    args_old = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    args_new = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    torch.manual_seed(0)
    want = old(*args_old)
    torch.manual_seed(0)
    got = new(*args_new)
    for x, y in zip(want, got, strict=True):
        if isinstance(x, Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype and x.requires_grad == y.requires_grad
            sizes = zip(x.shape, x.stride(), y.stride(), strict=True)
            assert all(n == 1 or s == t for n, s, t in sizes), (x.stride(), y.stride())
            _same(y.detach(), x.detach(), tol)
    for x, y in zip(args_old, args_new, strict=True):
        if isinstance(x, Tensor):
            _same(y.detach(), x.detach(), tol)
    leaves = [[a for a in xs if isinstance(a, Tensor) and a.requires_grad] for xs in (args_old, args_new)]
    tensors = [[o for o in outs if isinstance(o, Tensor)] for outs in (want, got)]
    for x, y in zip(*(_gradients(o, a, 1) for o, a in zip(tensors, leaves, strict=True)), strict=True):
        _same(y, x, tol)
    return got


class Seen:
    """What recognition made of one function."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.graphs: list[fx.GraphModule] = []

    @property
    def rewritten(self) -> list[tuple[str, str]]:
        return [(s.kind, s.mask) for s in self.sites if s.rewritten]

    @property
    def reasons(self) -> list[str]:
        return [s.reason for s in self.sites if not s.rewritten]

    def calls(self, op: str) -> int:
        """How often the op stands in the graphs, nested ones included."""
        modules = {id(m): m for g in self.graphs for m in g.modules() if isinstance(m, fx.GraphModule)}
        return sum(
            op in str(n.target) for m in modules.values() for n in m.graph.nodes if n.op == "call_function"
        )


def see(fn: Callable, *args: object, tol: float = 1e-10, fullgraph: bool = True) -> Seen:
    """Compile `fn` with recognition alone, checking every graph against itself unedited; run it on `args`."""
    seen = Seen()

    def backend(gm: fx.GraphModule, _: list) -> Callable:
        old = copy.deepcopy(gm)
        seen.sites += recognize(gm)
        seen.graphs.append(gm)
        return lambda *a: compare(old, gm, a, tol)

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=fullgraph)(*args)
    return seen
