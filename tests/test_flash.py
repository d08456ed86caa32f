"""Softmax attention by CUDA's flash attention, whose operators stand-ins replace: a CPU build has none.

The stand-ins hold the calls to what PyTorch's kernel takes. What they leave out: the kernel's own rounding,
and that it is there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile import _torch
from spcompile.attention import reference
from spcompile.kernels.softmax import flash, rows
from spcompile.kernels.softmax.operands import Operands, Options
from tests.proof import relative_error


def scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """In float64, key heads repeated."""
    for x in (q, k):
        assert x.dtype == torch.bfloat16 and x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0 and x.shape[-1] <= 256 and x.numel()
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = q.double() @ k.mT * scale
    if causal:
        assert q.shape[2] == k.shape[2], "how it is aligned must not matter"
        found = found.masked_fill(torch.ones(found.shape[2:]).triu(1).bool(), -torch.inf)
    return found


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention``."""
    assert dropout == 0.0 and v.shape == k.shape
    found = scores(q, k, causal, scale)
    out = found.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out.to(q.dtype), found.logsumexp(-1).float(), None, None, q.shape[2], k.shape[2], None, None, None


def stand_in_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward: of the probabilities that ``lse`` says."""
    cum_q, cum_k, most_q, most_k, dropout, causal, *random = rest
    assert (cum_q, cum_k, most_q, most_k, dropout) == (None, None, q.shape[2], k.shape[2], 0.0)
    assert len(random) == 2 and lse.dtype == torch.float32 and lse.is_contiguous()
    p = torch.exp(scores(q, k, causal, scale) - lse.double().unsqueeze(-1))
    wide = [x.double() for x in (grad, q, k, v, out)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in wide[2:4])
    ds = p * (wide[0] @ values.mT - (wide[0] * wide[4]).sum(-1, keepdim=True)) * scale
    dk, dv = ds.mT @ wide[1], p.mT @ wide[0]
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return tuple(x.to(q.dtype) for x in (ds @ keys, dk, dv))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go the way that they go on a GPU."""
    monkeypatch.setattr(flash, "_on_gpu", lambda q: True)
    monkeypatch.setattr(_torch, "flash_attention_cuda", stand_in)
    monkeypatch.setattr(_torch, "flash_attention_cuda_backward", stand_in_backward)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64, 65])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.usefixtures("gpu")
def test_rows_of_ranks(ranks: int, length: int, causal: bool) -> None:
    """Two query heads to a key head, heads that are no multiple of 8, transposed operands."""
    torch.manual_seed(0)
    sizes = (4, 20), (2, 20), (2, 12), (4, 12)
    q, k, v, grad = (torch.randn(2, length, h, d).bfloat16().transpose(1, 2) for h, d in sizes)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = reference.softmax_attention(*leaves, None, causal, 0.3)[0]
    wants = torch.autograd.grad(want, leaves, grad.double())
    block = -(-length // ranks)
    outs, dqs, sums = [], [], [torch.zeros_like(x).double() for x in (k, v)]
    for first in range(0, length, block):
        x = Operands(q[:, :, first : first + block], k, v)
        options = Options(causal, 0.3, first)
        out, lse = flash.forward(x, options)
        dq, *more = flash.backward(grad[:, :, first : first + block], x, out, lse, options)
        outs.append(out)
        dqs.append(dq)
        for total, part in zip(sums, more, strict=True):
            total += part.double()
    got = [torch.cat(outs, 2), torch.cat(dqs, 2), *sums]
    for x, y in zip(got, (want, *wants), strict=True):
        assert relative_error(x.double(), y.detach()) < 8e-3


@pytest.mark.usefixtures("gpu")
def test_more_rows_than_keys() -> None:
    """Rows behind the last key see all: those of the last rank's padding, or of a user's own call."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, t, 16).bfloat16() for t in (13, 5, 5, 13))
    x, options = Operands(q, k, v), Options(True, 0.3)
    leaves = [y.double().requires_grad_() for y in (q, k, v)]
    want = reference.softmax_attention(*leaves, None, True, 0.3)[0]
    out, lse = flash.forward(x, options)
    got = out, *flash.backward(grad, x, out, lse, options)
    wants = want, *torch.autograd.grad(want, leaves, grad.double())
    for ours, theirs in zip(got, wants, strict=True):
        assert relative_error(ours.double(), theirs.detach()) < 8e-3


def test_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And why not, as the report says it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def given(dtype: torch.dtype = torch.bfloat16, size: int = 64, mask: bool = False) -> Operands:
        q, k, v = (torch.empty(1, 2, 8, size, dtype=dtype, device="cuda") for _ in range(3))
        return Operands(q, k, v, torch.empty(8, 8, device="cuda") if mask else None)

    with FakeTensorMode():
        assert rows.name(given(), Options(True, 0.3)) == "PyTorch's flash attention"
        assert flash.refuses(given(torch.float32)) == "float32, not bfloat16 or float16"
        assert flash.refuses(given(mask=True)) == "a mask that is data"
        assert flash.refuses(given(size=260)) == "heads of more than 256 numbers"
        assert rows.name(given(size=260), Options(True, 0.3)) == "ATen blocks"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert flash.refuses(given()) == "a GPU before sm_80"


def test_the_calls_trace_on_a_gpu() -> None:
    """PyTorch's operators take what they are given, as far as their fake implementations look."""
    with FakeTensorMode():
        q, grad = (torch.empty(1, 4, 64, 32, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(1, 4, 64, 32, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        x, options = Operands(q, k, v), Options(True, 0.3)
        out, lse = flash.forward(x, options)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        (call,) = flash._calls(x, options)
        grads = flash._gradients(x, (grad, q, out, lse), call, options, 32)
        assert [y.shape for y in grads] == [y.shape for y in (q, k, v)]
