"""Tokens that see each other whatever the band says (prefix language models, images in a text): operator,
kernels, strategy against the reference; recognition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognition import INF, B, T, future, qkv, see, spelling
from torch import Tensor, nn

import spcompile.attention as spc
from spcompile.attention import reference
from spcompile.kernels.softmax import blockwise, flash
from spcompile.kernels.softmax.operands import Operands, Options
from spcompile.strategies import SOFTMAX
from tests.proof import capture, eager
from tests.test_softmax_options import documents, draw, expect
from tests.threads import Ranks, operands, reference_gradients, shards, whole

IDS = {
    "one prefix": [[0] * 9 + [-1] * 15],
    "of each sequence": [[0] * 5 + [-1] * 19, [0] * 17 + [-1] * 7],
    "images": [[-1, 0, 0, 0, -1, -1] + [1] * 9 + [-1] * 3 + [2] * 6, [-1] * 20 + [4] * 4],
    "in any order": [[3, -1, 0, 3, 0, -2, 3, 1, -1, 3, 0, 0] * 2, [-1] * 24],
}
OPTIONS = {"causal": (True, None), "window": (True, 4), "both ways": (False, 3)}


def prefixes(kind: str, length: int) -> Tensor:
    """Of 24 tokens or fewer."""
    return torch.tensor(IDS[kind])[:, :length]


def results(
    function: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], named: dict[str, Any]
) -> Any:
    """out, lse and every gradient."""
    out, *grads = reference_gradients(lambda *x: function(*x, None, **named)[0], *given)
    return out, function(*given[1:], None, **named)[1], *grads


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
@pytest.mark.parametrize("kernel", ["operator", "blocks"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", IDS)
def test_operator(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: str, kernel: str, packed: bool
) -> None:
    """Also in blocks of a few rows, each kernel."""
    for module in (flash, blockwise):
        monkeypatch.setattr(module, "_ROWS_OF_DOCUMENTS", 3)
    monkeypatch.setattr(flash, "_FEWEST_ROWS", 3)
    causal, window = OPTIONS[options]
    named = {"causal": causal, "scale": 0.3, "window": window, "prefixes": prefixes(kind, 24)}
    named |= {"documents": documents("alike", 24)} if packed else {}
    named |= {"soft_cap": 2.0} if kernel == "blocks" else {}
    given = draw(24, 24, False)
    expect(results(spc.softmax_attention, given, named), results(reference.softmax_attention, given, named))


@pytest.mark.parametrize("ids", ["documents", "prefixes"])
def test_what_no_row_sees_is_not_computed(ids: str) -> None:
    q, k, v = operands((1, 1, 8, 4), (1, 1, 24, 4), (1, 1, 24, 4))
    x = Operands(q, k, v)._replace(**{ids: torch.tensor([[-1] * 4 + [7] * 12 + [9] * 8])})
    assert x.seen(Options(True, 1.0, 5, 3), 0, 2) == ((4, 7) if ids == "documents" else (3, 16))
    assert x.seen(Options(True, 1.0, 0, 3), 0, 2) == (0, 2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["of each sequence", "images"])
def test_opcheck(kind: str, options: str) -> None:
    causal, window = OPTIONS[options]
    grad, *tensors = draw(24, 24, False)
    relative = operands((4, 47))[0]
    for biased in (False, True):
        q, k, v, bias = (x.detach().requires_grad_() for x in (*tensors, relative))
        more = (causal, 0.3, window, None, None, None, bias if biased else None, prefixes(kind, 24))
        torch.library.opcheck(spc.softmax_attention, (q, k, v, None, *more))
        q, k, v = (x.detach() for x in (q, k, v))
        more = (*more[:6], bias.detach() if biased else None, more[7])
        saved = (grad, q, k, v, None, *spc.softmax_attention(q, k, v, None, *more), *more)
        torch.library.opcheck(spc.softmax_attention_backward, saved)
        if biased:
            torch.library.opcheck(spc.softmax_attention_relative_backward, saved)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), "one number per token"),
        (torch.zeros(1, 9), "expected integers"),
    ],
)
def test_what_is_refused(ids: Tensor, said: str) -> None:
    (q,) = operands((2, 2, 9, 4))
    with pytest.raises(ValueError, match=f"prefixes .*{said}"):
        spc.softmax_attention(q, q, q, None, True, 1.0, prefixes=ids)


# ---- on ranks ----


@pytest.mark.parametrize("way", SOFTMAX)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("length", [24, 13, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sharded(
    monkeypatch: pytest.MonkeyPatch, size: int, length: int, kind: str, options: str, way: str
) -> None:
    """A prefix is on, across or behind shards; a window needs more than the neighbours' keys."""
    given, (causal, window), ids = draw(length, length, False), OPTIONS[options], prefixes(kind, length)
    ranks, strategy = Ranks(size, monkeypatch), SOFTMAX[way].load()
    sequence = ranks.sequence(length)
    split, how = [shards(x, sequence) for x in given], (Options(causal, 0.3, 0, window), sequence, sequence)

    def work(rank: int) -> tuple[Tensor, ...]:
        grad, q, k, v = (x[rank] for x in split)
        x = Operands(q, k, v, prefixes=ids)
        out, lse, kv = strategy.forward(x, *how)
        return out, lse, *strategy.backward(grad, x, out, lse, kv, *how)

    got = [whole(list(x), sequence) for x in zip(*ranks.run(work), strict=True)]
    named = {"causal": causal, "scale": 0.3, "window": window, "prefixes": ids}
    expect(got, results(reference.softmax_attention, given, named))


# ---- recognition ----

FOUND: dict = {}
LEFT: dict = {}


def of_tokens() -> Tensor:
    """The tokens' images, none where -1."""
    return torch.tensor([[-1, 0, 0, 0, -1, 1, 1], [0, 0, -1, -1, -1, -1, 2]])


def lengths() -> Tensor:
    """Of the prefix of each sequence."""
    return torch.tensor([3, 5])


def alike(ids: Tensor) -> Tensor:
    """As transformers has it."""
    return ((ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0))[:, None]


@spelling(FOUND, "causal with prefixes")
def images(q, k, v, ids, _):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=alike(ids) | ~future())


@spelling(FOUND, "causal with prefixes")
def types(q, k, v, ids, _):
    """PaliGemma's: the prefix is what has one type of token."""
    ids = torch.where(ids == 0, 0, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~future() | alike(ids))


@spelling(FOUND, "causal window of 3 with prefixes")
def images_beside_a_window(q, k, v, ids, _):
    i = torch.arange(T)
    band = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    return (q @ k.mT).masked_fill(~(band | alike(ids)), -INF).softmax(-1) @ v


@spelling(FOUND, "causal with prefixes")
def hidden_by_a_huge_number(q, k, v, ids, _):
    hidden = future() & ~alike(ids)
    return (q @ k.mT).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(FOUND, "causal with prefixes")
def a_prefix(q, k, v, _, n):
    """A prefix language model's: T5's, UniLM's, GLM's."""
    i = torch.arange(T)
    mask = (i[None, :] <= i[:, None]) | (i < n[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal with prefixes")
def a_prefix_of_rows_and_keys(q, k, v, _, n):
    first = torch.arange(T) < n[:, None]
    mask = ~future() | (first[:, None, :, None] & first[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal with prefixes")
def what_is_not_the_answer(q, k, v, _, n):
    answer = (torch.arange(T) >= n[:, None])[:, None]
    hidden = future() & (answer[:, :, None, :] | answer[..., None])
    return (q @ k.mT).masked_fill(hidden, -INF).softmax(-1) @ v


@spelling(FOUND, "causal with prefixes")
def a_prefix_of_one_length(q, k, v, *_):
    i = torch.arange(T)
    mask = (i[None, :] <= i[:, None]) | (i < 4)
    return F.softmax((q @ k.mT).masked_fill(~mask, -INF), dim=-1) @ v


@spelling(FOUND, "causal with prefixes and documents")
def and_documents(q, k, v, ids, _):
    of = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 5]])
    mask = (alike(ids) | ~future()) & (of[:, None, :, None] == of[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(FOUND, "causal with prefixes and padding")
def and_padding(q, k, v, ids, _):
    keep = torch.tensor([[True] * 5 + [False] * 2, [False] + [True] * 6])
    mask = (alike(ids) | ~future()) & keep[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("name", FOUND)
def test_found_and_equal(name: str) -> None:
    fn, (mask,) = FOUND[name]
    seen = see(fn, *qkv(), of_tokens(), lengths())
    assert seen.rewritten == [("softmax", mask)], seen.sites
    (gm,) = seen.graphs
    (call,) = [n for n in gm.graph.nodes if "softmax_attention" in str(n.target)]
    ids = call.args[11].meta["example_value"]
    assert ids.shape in ((B, T), (1, T)) and not ids.dtype.is_floating_point
    gm.graph.eliminate_dead_code()
    shapes = [getattr(n.meta.get("example_value"), "shape", ()) for n in gm.graph.nodes]
    assert not [x for x in shapes if tuple(x[-2:]) == (T, T)], "a mask of rows x keys is left"


# ---- look-alikes


@spelling(LEFT, "general")
def numbers_below_zero_too(q, k, v, ids, _):
    mask = (ids[:, :, None] == ids[:, None, :])[:, None] | ~future()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def from_one(q, k, v, ids, _):
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same[:, None] | ~future())


@spelling(LEFT, "general")
def keys_that_all_see(q, k, v, ids, _):
    """No prefix: a row that is no image sees later images."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(ids >= 0)[:, None, None, :] | ~future())


@spelling(LEFT, "general")
def a_suffix(q, k, v, _, n):
    i = torch.arange(T)
    mask = (i[None, :] <= i[:, None]) | (i >= n[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def rows_that_see_all(q, k, v, _, n):
    i = torch.arange(T)
    mask = (i[None, :] <= i[:, None]) | (i < n[:, None])[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def a_prefix_that_a_window_hides(q, k, v, _, n):
    """Rows behind the prefix see it beyond their window."""
    i = torch.arange(T)
    band = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 2)
    mask = band | (i < n[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def under_another_window(q, k, v, ids, _):
    i = torch.arange(T)
    mask = (alike(ids) | ~future()) & (i[None, :] < i[:, None] + 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(LEFT, "general")
def two_masks(q, k, v, ids, _):
    i = torch.arange(T)
    scores = (q @ k.mT).masked_fill(~(alike(ids) | ~future()), -INF)
    return scores.masked_fill(i[None, :] > i[:, None] + 1, -INF).softmax(-1) @ v


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes(name: str) -> None:
    """Data, or left; and in any case equal."""
    fn, (mask,) = LEFT[name]
    seen = see(fn, *qkv(), of_tokens(), lengths())
    assert seen.rewritten == [("softmax", mask)], seen.sites


# ---- models on ranks ----


class PrefixModel(nn.Module):
    """A causal language model whose prompt, of a length of its own in each sequence, sees all of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(17, 12), nn.Linear(12, 36, bias=False)
        self.head = nn.Linear(12, 17, bias=False)

    def forward(self, ids: Tensor, labels: Tensor, prompt: Tensor) -> Tensor:
        x = self.embedding(ids)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
        i = torch.arange(t)
        mask = (i[None, :] <= i[:, None]) | (i < prompt[:, None])[:, None, None]
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, 12)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_prefix_language_model(ranks: int) -> None:
    """Loss and every gradient are eager's, a prefix ends in the middle of a shard, padding is NaN."""
    model = PrefixModel().double()
    ids, labels = torch.randint(0, 17, (2, 2, 21), generator=torch.Generator().manual_seed(1))
    given = {"ids": ids, "labels": labels, "prompt": torch.tensor([4, 13])}
    expected, joint = eager(model, given), capture(model, given)
    assert [s.mask for s in joint.sites] == ["causal with prefixes"]
    assert expected.error(*joint.run(ranks, nan_padding=True)) <= 1e-9
