"""A bias by head and distance (ALiBi, T5): operator, kernels, strategy against the reference; recognition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spcompile.attention as spc
from spcompile.attention import reference
from spcompile.kernels.softmax import blockwise, flash
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies import SOFTMAX
from tests.proof import capture, eager
from tests.test_softmax_options import documents, draw, expect
from tests.threads import Ranks, operands, reference_gradients, shards, whole

# causal, window, soft cap, sinks, heads of the bias, longest distance beyond the tokens
KINDS: dict[str, tuple[bool, int | None, float | None, bool, int, int]] = {
    "causal": (True, None, None, False, 4, 0),
    "all": (False, None, None, False, 4, 3),
    "alike": (True, None, None, False, 1, 0),
    "window": (True, 4, None, False, 4, 0),
    "window both ways": (False, 4, None, True, 1, 1),
    "cap and sinks": (True, None, 1.5, True, 4, 0),
}


def sample(kind: str, length: int, keys: int) -> tuple[list[Tensor], dict[str, Any]]:
    """grad, q, k, v, relative and, if there are any, sinks; the options."""
    causal, window, cap, sinks, heads, more = KINDS[kind]
    grad, q, k, v, *others = draw(length, keys, sinks)
    (relative,) = operands((heads, 2 * (max(length, keys) + more) - 1))
    named = {"causal": causal, "scale": 0.3, "window": window, "soft_cap": cap}
    return [grad, q, k, v, relative, *others], named


def results(
    function: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], named: dict[str, Any]
) -> Any:
    """out, lse and every gradient."""

    def run(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, sinks: Tensor | None = None) -> Any:
        return function(q, k, v, None, sinks=sinks, relative=relative, **named)

    out, *grads = reference_gradients(lambda *x: run(*x)[0], *given)
    return out, run(*given[1:])[1], *grads


@pytest.mark.parametrize("small", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize(("length", "keys"), [(13, 13), (5, 13), (13, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_operator(monkeypatch: pytest.MonkeyPatch, kind: str, length: int, keys: int, small: bool) -> None:
    if small:
        monkeypatch.setattr(blockwise, "_BUDGET", 2 * 2 * 4 * 14)
        monkeypatch.setattr(blockwise, "_FEW_ROWS", 1)
        monkeypatch.setattr(flash, "_FEWEST_ROWS", 3)
        monkeypatch.setattr(flash, "_ROWS_OF_DOCUMENTS", 3)
    given, named = sample(kind, length, keys)
    expect(results(spc.softmax_attention, given, named), results(reference.softmax_attention, given, named))


@pytest.mark.parametrize("kernel", [flash, blockwise])
@pytest.mark.parametrize("kind", ["causal", "window", "alike"])
def test_kernels_at_a_later_row(kind: str, kernel: Any) -> None:
    (grad, q, k, v, relative), named = sample(kind, 14, 14)
    grad[:, :, :9] = 0
    options = Options(True, 0.3, 9, named["window"])
    x = Operands(q[:, :, 9:], k, v, None, None, None, relative)
    out, lse = kernel.forward(x, options)
    saved = (out, lse) if kernel is flash else ()
    grads = kernel.backward(grad[:, :, 9:], x, *saved, options)
    expected = results(reference.softmax_attention, [grad, q, k, v, relative], named)
    expect((out, lse, *grads), (*(y[:, :, 9:] for y in expected[:3]), *expected[3:5]))
    more = blockwise.backward_relative(grad[:, :, 9:], x, options)[3]
    expect((more,), expected[5:])


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    given, named = sample(kind, 9, 9)
    grad, *tensors = given
    q, k, v, relative, *sinks = (x.requires_grad_() for x in tensors)
    more = (*named.values(), *(sinks or [None]), None, relative)
    torch.library.opcheck(spc.softmax_attention, (q, k, v, None, *more))
    q, k, v, relative, *sinks = (x.detach() for x in tensors)
    more = (*named.values(), *(sinks or [None]), None, relative)
    saved = (grad, q, k, v, None, *spc.softmax_attention(q, k, v, None, *more), *more)
    torch.library.opcheck(spc.softmax_attention_backward, saved)
    torch.library.opcheck(spc.softmax_attention_relative_backward, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    given, named = sample("causal", 50, 50)
    given = [x.to(dtype) for x in given]
    got = results(spc.softmax_attention, given, named)
    wanted = results(reference.softmax_attention, [x.double() for x in given], named)
    for x, y in [*zip(got, wanted, strict=True)][2:]:
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() <= max(2e-6, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("relative", "said"),
    [
        (torch.zeros(3, 17), "each of 2 heads"),
        (torch.zeros(2, 15), "from -8 to 8"),
        (torch.zeros(2, 18), "an entry for each distance"),
        (torch.zeros(2, 17, dtype=torch.int64), "expected floats"),
    ],
)
def test_what_is_refused(relative: Tensor, said: str) -> None:
    (q,) = operands((1, 2, 9, 4))
    with pytest.raises(ValueError, match=said):
        spc.softmax_attention(q, q, q, None, True, 1.0, relative=relative)


# ---- on ranks ----


@pytest.mark.parametrize("way", SOFTMAX)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [24, 13, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sharded(monkeypatch: pytest.MonkeyPatch, size: int, length: int, kind: str, way: str) -> None:
    """The gradient of the bias is the sum of the ranks' terms; what is behind the sequence is NaN."""
    given, named = sample(kind, length, length)
    ranks, strategy = Ranks(size, monkeypatch), SOFTMAX[way].load()
    sequence = ranks.sequence(length)
    split, (relative, *sinks) = [shards(x, sequence) for x in given[:4]], given[4:]
    causal, scale, window, cap = named.values()
    for ids in (None, documents("alike", length)):
        how = Options(causal, scale, 0, window, cap), sequence, sequence

        def work(rank: int, ids: Tensor | None = ids, how: Any = how) -> tuple[Tensor, ...]:
            grad, q, k, v = (x[rank] for x in split)
            x = Operands(q, k, v, None, *(sinks or [None]), ids, relative)
            out, lse, kv = strategy.forward(x, *how)
            return out, lse, *strategy.backward(grad, x, out, lse, kv, *how, relative=True)

        *own, terms = zip(*ranks.run(work), strict=True)
        got = [*(whole(list(x), sequence) for x in own), sum(terms)]
        expect(got, results(reference.softmax_attention, given, named | {"documents": ids})[:6])


# ---- recognition ----


class Attention(nn.Module):
    """Scores with a bias that `bias` makes, heads first."""

    def __init__(self, bias: nn.Module, causal: bool) -> None:
        super().__init__()
        self.bias, self.causal = bias, causal
        self.qkv, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 0.5 + self.bias(t)
        if self.causal:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, 12)).square().mean()


class Alibi(nn.Module):
    """slope |i - j|, slopes a buffer."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        self.slopes = nn.Parameter(slopes) if learned else slopes

    def forward(self, t: int) -> Tensor:
        i = torch.arange(t)
        return -self.slopes.to(torch.float64)[:, None, None] * (i[None, :] - i[:, None]).abs()


class Buckets(nn.Module):
    """As T5 has it: an embedding of the bucket that a distance falls into."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both, self.table = both, nn.Embedding(16, 4)

    def forward(self, t: int) -> Tensor:
        place, buckets = torch.arange(t)[None, :] - torch.arange(t)[:, None], 16
        found = torch.zeros_like(place)
        if self.both:
            buckets //= 2
            found = found + (place > 0).to(torch.long) * buckets
            place = place.abs()
        else:
            place = -torch.min(place, torch.zeros_like(place))
        near = buckets // 2
        far = near + (torch.log(place.float() / near) / 3.0 * (buckets - near)).to(torch.long)
        far = torch.min(far, torch.full_like(far, buckets - 1))
        found = found + torch.where(place < near, place, far)
        return self.table(found).permute(2, 0, 1).unsqueeze(0)


class Together(nn.Module):
    """A learned bias and a mask that is added, or fills in, as one tensor."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.learned, self.added = Buckets(False), added

    def forward(self, t: int) -> Tensor:
        seen = torch.arange(t)[:, None] >= torch.arange(t)
        if not self.added:
            return torch.where(seen, self.learned(t), torch.finfo(torch.float64).min)
        hidden = torch.zeros(t, t, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
        return self.learned(t) + hidden[None, None]


class PerKey(nn.Module):
    """A number for each head and key, beside a mask: filled by it (falcon), or both are added (bloom)."""

    def __init__(self, filled: bool) -> None:
        super().__init__()
        self.filled = filled

    def forward(self, t: int) -> Tensor:
        slopes = 0.5 ** torch.arange(1, 5, dtype=torch.float64)
        bias, least = slopes[:, None, None] * torch.arange(t), torch.finfo(torch.float64).min
        seen = torch.arange(t)[:, None] >= torch.arange(t)
        if self.filled:
            return torch.where(seen, bias, least)
        return bias + torch.zeros(t, t, dtype=torch.float64).masked_fill(~seen, least)


MODELS: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "alibi": (Alibi, True, "causal, relative bias"),
    "alibi both ways": (Alibi, False, "all, relative bias"),
    "learned slopes": (lambda: Alibi(True), True, "causal, relative bias"),
    "buckets": (lambda: Buckets(False), True, "causal, relative bias"),
    "buckets both ways": (lambda: Buckets(True), False, "all, relative bias"),
    "with a mask in one": (lambda: Together(True), False, "causal, relative bias"),
    "masked itself": (lambda: Together(False), False, "causal, relative bias"),
    "per key, filled": (lambda: PerKey(True), False, "causal and bias per key"),
    "per key, added": (lambda: PerKey(False), False, "causal and bias per key"),
}


@pytest.mark.parametrize(("name", "batch"), [*((n, 2) for n in MODELS), ("alibi", 1), ("per key, filled", 1)])
def test_a_bias_by_distance_is_recognized(name: str, batch: int) -> None:
    make, causal, mask = MODELS[name]
    torch.manual_seed(0)
    model = Attention(make(), causal).double()
    inputs = {"x": torch.randn(batch, 13, 12, dtype=torch.float64)}
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert [(s.kind, s.mask, s.rewritten) for s in joint.sites] == [("softmax", mask, True)]
    for ranks in (1, 3):
        assert expected.error(*joint.run(ranks, nan_padding=True)) <= 1e-9
    module, _ = joint.shard(3)
    shapes = [n.meta["val"].shape for n in module.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not [s for s in shapes if 13 in s[-1:] and s[-2:-1] in ((5,), (13,)) and len(s) > 1]


@pytest.mark.parametrize("name", ["of a row", "of a key", "of the product"])
def test_what_is_no_bias_by_distance(name: str) -> None:
    """Its mask stays data, or what is as good: a number of each key."""

    class Bias(nn.Module):
        def forward(self, t: int) -> Tensor:
            i = torch.arange(t, dtype=torch.float64)
            made = {
                "of a row": i[:, None] * i.new_ones(t),
                "of a key": i * 0.1,
                "of the product": i[:, None] * i,
            }
            return made[name] * 0.1

    torch.manual_seed(0)
    model = Attention(Bias(), True).double()
    inputs = {"x": torch.randn(2, 13, 12, dtype=torch.float64)}
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert all("relative" not in s.mask for s in joint.sites)
    assert expected.error(*joint.run(3, nan_padding=True)) <= 1e-9


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float64).min])
def test_a_bias_that_may_hide_keys_is_not_taken_off_its_mask(least: float) -> None:
    """A row all of whose keys a given bias hides attends, in eager, to those that the mask hid."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36, bias=False)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
            seen = torch.arange(t)[:, None] >= torch.arange(t)
            hidden = torch.where(seen, bias[:, None, None], torch.finfo(torch.float64).min)
            return ((q @ k.mT + hidden).softmax(-1) @ v).square().mean()

    torch.manual_seed(0)
    model, bias = Given().double(), torch.zeros(2, 13, dtype=torch.float64)
    bias[:, 0] = least  # all that the first row sees
    inputs = {"x": torch.randn(2, 13, 12, dtype=torch.float64), "bias": bias}
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert [s.mask for s in joint.sites] == ["general"]
    assert expected.error(*joint.run(3, nan_padding=True)) <= 1e-9


@pytest.mark.parametrize("minus", [False, True])
def test_a_mask_by_arithmetic_is_no_bias_that_hides_nothing(minus: bool) -> None:
    """Rows whose keys are all padding weigh, in eager, the padding and what the causal fill hid alike."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36, bias=False)

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
            far = (1 - there[:, None, None]).to(x.dtype) * 1e5 * 1e4
            scores = q @ k.mT - far if minus else q @ k.mT + far * -1.0
            hidden = torch.arange(t)[:, None] < torch.arange(t)
            return (scores.masked_fill(hidden, -1e9).softmax(-1) @ v).square().mean()

    torch.manual_seed(0)
    model, there = Padded().double(), torch.ones(2, 13, dtype=torch.int64)
    there[0, :4] = 0  # on the left: rows that see padding alone
    inputs = {"x": torch.randn(2, 13, 12, dtype=torch.float64), "there": there}
    expected, joint = eager(model, inputs), capture(model, inputs)
    assert expected.error(*joint.run(3, nan_padding=True)) <= 1e-9
