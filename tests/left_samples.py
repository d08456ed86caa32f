"""Models that leave more behind than a loss and gradients, or whose graph is more than functions of tensors.

Each body stands in a small language model after causal attention; ``x`` is [B, T, D]. ``STEPS`` training
steps are compared by :func:`steps`: losses, gradients, parameters, buffers and written arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.while_loop import while_loop

VOCAB, DIM, TOKENS, STEPS = 20, 8, 13, 2
CAPTURED = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


class Sample(nn.Module):
    """Embedding, causal attention, ``body`` and a loss."""

    def __init__(self, body: Callable[..., Tensor], **buffers: Any) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, 3 * DIM)
        self.head, self.body = nn.Linear(DIM, VOCAB), body
        self.norm = nn.BatchNorm1d(DIM)
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def forward(self, ids: Tensor, **extra: Any) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = self.head(self.body(self, x, **extra))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


Extra = Callable[[int], dict[str, Any]]
SAMPLES: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], Extra]] = {}


def sample(extra: Extra = lambda step: {}, **buffers: Tensor) -> Callable[[Any], Any]:
    """Add a body; ``extra(step)`` are the arguments of a call."""

    def add(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        SAMPLES[body.__name__] = (body, buffers, extra)
        return body

    return add


def batch() -> Tensor:
    return torch.randint(1, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def model(name: str) -> nn.Module:
    body, buffers, _ = SAMPLES[name]
    torch.manual_seed(0)
    return Sample(body, **buffers).double().train()


def steps(name: str, backend: Any = None, compiles: list[int] | None = None) -> dict[str, Tensor]:
    """All that ``STEPS`` steps leave behind."""
    net, left = model(name), {}

    def counted(gm: Any, inputs: Any, **options: Any) -> Any:
        compiles.append(1) if compiles is not None else None
        return backend(gm, inputs, **options)

    torch._dynamo.reset()
    call = net if backend is None else torch.compile(net, backend=counted)
    for step in range(STEPS + (compiles is not None)):
        extra = SAMPLES[name][2](step)
        with torch._dynamo.config.patch(CAPTURED):
            loss = call(batch(), **extra)
        loss.backward()
        left |= {f"loss {step}": loss.detach().clone()}
        left |= {f"argument {n} {step}": x for n, x in extra.items() if isinstance(x, Tensor)}
        for n, p in net.named_parameters():
            if p.grad is not None:
                left[f"gradient {n} {step}"] = p.grad.clone()
                with torch.no_grad():
                    p.sub_(p.grad, alpha=0.1)
                p.grad = None
    left |= {f"parameter {n}": p.detach() for n, p in net.named_parameters()}
    return left | {f"buffer {n}": b for n, b in net.named_buffers()}


# ---- written buffers


@sample(steps=torch.zeros(()))
def counter(self: Any, x: Tensor) -> Tensor:
    self.steps += 1
    return x + 0.1 * self.steps


@sample(steps=torch.ones(()))
def old_and_new(self: Any, x: Tensor) -> Tensor:
    """What was read before the write is the old value."""
    old = self.steps * 0.5
    self.steps.mul_(3)
    self.steps += x.detach().mean()
    return x + old + self.steps


@sample(first=torch.ones(3), second=torch.zeros(3))
def swapped(self: Any, x: Tensor) -> Tensor:
    first = self.first.clone()
    self.first.copy_(self.second)
    self.second.copy_(first + 1)
    return x + self.first.sum()


@sample()
def batch_norm(self: Any, x: Tensor) -> Tensor:
    """Statistics over all ranks' tokens, and a counter of steps."""
    return self.norm(x.transpose(1, 2)).transpose(1, 2)


@sample(codes=torch.linspace(-1, 1, 4 * DIM, dtype=torch.float64).view(4, DIM), sizes=torch.ones(4))
def codebook(self: Any, x: Tensor) -> Tensor:
    """Vector quantisation whose codes follow the mean of what is nearest to them."""
    with torch.no_grad():
        flat = x.flatten(0, 1)
        nearest = (flat[:, None] - self.codes).square().sum(-1).argmin(1)
        one_hot = F.one_hot(nearest, 4).to(x.dtype)
        self.sizes.lerp_(one_hot.sum(0), 0.1)
        self.codes.lerp_(one_hot.T @ flat / self.sizes[:, None], 0.1)
    return x + (self.codes[nearest].view_as(x) - x).detach() * 0.5


@sample(loads=torch.zeros(DIM, dtype=torch.int64), bias=torch.zeros(DIM))
def expert_loads(self: Any, x: Tensor) -> Tensor:
    """Counts of tokens per expert, and the bias that evens them out."""
    chosen = (x + self.bias).topk(2, -1).indices
    self.loads += torch.zeros_like(self.loads).scatter_add(
        0, chosen.flatten(), torch.ones_like(chosen).flatten()
    )
    self.bias += 0.01 * (self.loads.double().mean() - self.loads).sign()
    return x + torch.zeros_like(x).scatter(-1, chosen, 1.0)


@sample(keys=torch.zeros(2, TOKENS + 4, DIM), values=torch.zeros(2, TOKENS + 4, DIM))
def cache(self: Any, x: Tensor) -> Tensor:
    """Keys and values kept by slice and by index."""
    self.keys[:, :TOKENS] = x.detach()
    self.values.index_copy_(1, torch.arange(2, TOKENS + 2), x.detach() * 2)
    return x + self.keys.mean() + self.values[:, 3:5].sum()


# ---- written arguments


@sample(lambda step: {"out": torch.full((2, DIM), float(step)).double(), "rows": torch.zeros(TOKENS, DIM)})
def arguments(self: Any, x: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    out.add_(x.detach().sum(1))
    rows.T[:, 1:].copy_(x.detach()[0, 1:].T)
    return x + out[:, None]


@sample(lambda step: {"n": 100 + step, "mask": torch.arange(2 * TOKENS).view(2, TOKENS) % 3 > 0})
def numbers(self: Any, x: Tensor, n: int, mask: Tensor) -> Tensor:
    """One that changes from step to step, and one that is known at run time only."""
    return (x * (n + 1) / n).where(x > n - 102, x) + x / mask.sum().item()


@sample(lambda step: {"mask": torch.arange(2 * TOKENS).view(2, TOKENS) % 3 > 0})
def selected(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """As many rows as a mask selects."""
    chosen = x[mask]
    return x + chosen.mean() + torch.zeros_like(x).masked_scatter(mask[..., None], chosen.sin())


class _Amax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.copy_(torch.maximum(ctx.seen, grad.abs().amax()))
        return grad, None


@sample(seen=torch.zeros(()))
def written_in_the_backward(self: Any, x: Tensor) -> Tensor:
    """The largest gradient, as float8 training keeps it."""
    return _Amax.apply(x, self.seen)


# ---- operators that AOTAutograd wraps


@torch.library.custom_op("spcompile_tests::accumulate", mutates_args=("total", "count"))
def accumulate(x: Tensor, total: Tensor, count: Tensor) -> Tensor:
    total.add_(x.sum((0, 1)))
    count.add_(1)
    return x.mean()


@accumulate.register_fake
def _(x: Tensor, total: Tensor, count: Tensor) -> Tensor:
    return x.new_empty(())


@torch.library.custom_op("spcompile_tests::tally", mutates_args=("parts",))
def tally(x: Tensor, parts: list[Tensor]) -> None:
    for part in parts:
        part.add_(x.amax())


@sample(total=torch.zeros(DIM), count=torch.zeros(()), parts=torch.zeros(2, 3))
def mutating_operator(self: Any, x: Tensor) -> Tensor:
    mean = accumulate(x.detach(), self.total, self.count)
    tally(x.detach(), [self.parts[0], self.parts[1]])
    return x + mean + self.count + self.parts.sum()


CALLS: list[float] = []


@torch.library.custom_op("spcompile_tests::note", mutates_args=())
def note(x: Tensor) -> tuple[Tensor, Tensor]:
    CALLS.append(float(x.sum()))
    return x.sum(), x.amax(1)


@note.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(x.shape[0], x.shape[2])


@sample()
def several_results(self: Any, x: Tensor) -> Tensor:
    total, most = note(x.detach())
    return x + total + most[:, None]


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return flat.T @ flat + torch.eye(DIM, dtype=x.dtype)


@sample()
def cholesky(self: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.cholesky(_gram(x))


@sample()
def inverse_and_solution(self: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.inv(_gram(x)) + x @ torch.linalg.solve(_gram(x), torch.ones(DIM, 1).double())


# ---- transforms, which Dynamo writes out as levels of functorch


@sample()
def vmap(self: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.sin)(x)


@sample()
def per_token_gradient(self: Any, x: Tensor) -> Tensor:
    energy = torch.vmap(torch.func.grad(lambda y: y.sin().sum()))(x.flatten(0, 1)).view_as(x)
    return x + energy + torch.func.jvp(torch.sin, (x,), (x * 2,))[1]


@sample()
def recurrence(self: Any, x: Tensor) -> Tensor:
    def combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return a[0] * b[0], b[0] * a[1] + b[1]

    return x + associative_scan(combine, (x.sigmoid(), x), dim=1, combine_mode="generic")[1]


# ---- operators with a body, and neighbours


@sample()
def bodies(self: Any, x: Tensor) -> Tensor:
    def less(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, y * 0.9

    x = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
    start = (torch.zeros((), dtype=torch.int64), x.detach())
    return x + while_loop(lambda i, y: i < 3, less, start)[1]


@sample()
def neighbours(self: Any, x: Tensor) -> Tensor:
    """Means over neighbours, by halos, and in steps, whole."""
    signal = x.transpose(1, 2)
    near = F.avg_pool1d(signal, 3, 1, 1) + F.avg_pool1d(F.pad(signal, (3, 0)), 4, 1)
    return near.transpose(1, 2) + F.avg_pool1d(signal, 4, 4).mean(-1)[:, None]


@sample(lambda step: {"n": 100 + step}, steps=torch.zeros(()), total=torch.zeros(DIM), count=torch.zeros(()))
def together(self: Any, x: Tensor, n: int) -> Tensor:
    """Several kinds in one graph, for real ranks."""
    self.steps += 1
    x = self.norm(x.transpose(1, 2)).transpose(1, 2) + torch.vmap(torch.sin)(x) / n
    mean = accumulate(x.detach(), self.total, self.count)
    near = F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)
    return near @ torch.linalg.cholesky(_gram(x)) + mean + self.steps + x.flip(1).cos()


def optimizer_steps(kind: str, backend: Any = None) -> dict[str, Tensor]:
    """The parameters and the optimizer's state after ``STEPS`` steps of a compiled optimizer."""
    net = model("counter")
    optimizer = OPTIMIZERS[kind](net.parameters())
    torch._dynamo.reset()
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    torch.set_default_dtype(torch.float64)  # that of the optimizer's own counter of steps
    try:
        for number in range(STEPS):
            for i, p in enumerate(net.parameters()):
                p.grad = torch.full_like(p, 0.1 * (i + 1)) * (number + 1)
            step()
    finally:
        torch.set_default_dtype(torch.float32)
    state = {f"{i} {n}": x for i, s in enumerate(optimizer.state.values()) for n, x in s.items()}
    left = {n: p.detach() for n, p in net.named_parameters()}
    return left | {n: x for n, x in state.items() if isinstance(x, Tensor)}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
}
