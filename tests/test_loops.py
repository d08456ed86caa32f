"""Loops over tokens that Dynamo unrolls are re-rolled: found, equal to what they were, sharded with one
exchange of summaries in each direction; look-alikes are left alone and are right."""

from __future__ import annotations

import functools

import pytest
import torch
from loop_samples import LEFT, SAMPLES, SIZES, Sample
from recognition import see
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.proof import Eager, Joint, capture, eager
from tests.releases import each_change

B, T = SIZES["B"], SIZES["T"]
RANKS = (1, 2, 3)  # 13 tokens: no number of ranks but one divides them
SHIFTED = {"constant_decay_from_no_state", "written_in_part", "token_shift", "stabilised_by_a_maximum"}
"""Of those, some tensors begin a token later than others, which is realigned at the price of exchanges."""


def operands(sample: Sample) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in sample.shapes()]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_loop_becomes_ops_that_equal_it(name: str) -> None:
    sample = SAMPLES[name]
    seen = see(sample, *operands(sample))
    assert tuple(k for k, _ in seen.rewritten) == sample.kinds, seen.sites
    assert seen.calls("linear_attention") == sample.kinds.count("linear")
    assert max(len(g.graph.nodes) for g in seen.graphs) < 400


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_affine_loop_is_left_alone(name: str) -> None:
    sample, reason = LEFT[name]
    seen = see(sample, *operands(sample))
    assert not seen.rewritten
    assert not reason or any(reason in r for r in seen.reasons), seen.sites


# ---------------------------------------------------------------- on ranks


class Model(nn.Module):
    """A sample whose operands with tokens are linear in an embedding, and the others parameters."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.sample = sample
        self.embedding = nn.Embedding(11, 8)
        sizes = [[SIZES[c] for c in letters if c not in "BT"] for letters in sample.operands]
        weights = [
            torch.randn(8, *s) if "T" in letters else torch.randn([SIZES[c] for c in letters])
            for s, letters in zip(sizes, sample.operands, strict=True)
        ]
        self.weights = nn.ParameterList(0.5 * w for w in weights)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        given = []
        for letters, w in zip(self.sample.operands, self.weights, strict=True):
            y = torch.tensordot(x, w, 1) if "T" in letters else w
            given.append(y.movedim(1, letters.index("T")) if "T" in letters else y)
        out = self.sample(*given)
        return sum(torch.sin(o).sum() for o in (out if isinstance(out, tuple) else (out,)))


@functools.lru_cache(maxsize=1)
def case(name: str) -> tuple[Eager, Joint]:
    torch.manual_seed(0)
    sample = SAMPLES[name] if name in SAMPLES else LEFT[name][0]
    model, inputs = Model(sample).double(), {"ids": torch.randint(0, 11, (B, T))}
    return eager(model, inputs), capture(model, inputs)


@pytest.mark.parametrize("ranks", each_change([1, 3, 2], [3]))
@pytest.mark.parametrize("name", [n for n in SAMPLES if n != "state_in_place"])
def test_ranks_exchange_summaries_once_each_way(name: str, ranks: int) -> None:
    expected, joint = case(name)
    error = expected.error(*joint.run(ranks, nan_padding=T % ranks != 0))
    assert error <= 1e-9, f"{error:.1e}"
    local, _ = joint.shard(ranks)
    gathers = sum("all_gather" in str(n.target) for n in local.graph.nodes)
    if name not in SHIFTED and ranks > 1:
        scans = len([k for k in SAMPLES[name].kinds if k != "loop"])
        assert gathers == 2 * scans


def test_steps_that_begin_a_token_late_are_not_gathered() -> None:
    """Two and three ranks divide the 12 steps that are rolled, not the 13 tokens, and blocks have room."""
    _, joint = case("stabilised_by_a_maximum")
    for ranks in (2, 3):
        local, _ = joint.shard(ranks)
        sent = [n.args[0].meta["val"].numel() for n in local.graph.nodes if "all_gather" in str(n.target)]
        assert max(sent) <= 2 * B * SIZES["D"]  # a scan's factors and states


@pytest.mark.parametrize("name", [n for n in LEFT if n != "random_steps"])
def test_what_is_left_alone_is_right_on_ranks(name: str) -> None:
    expected, joint = case(name)
    for ranks in (2, 3):
        assert expected.error(*joint.run(ranks)) <= 1e-9


# ---------------------------------------------------------------- where the code is unusual


def _decayed(x: Tensor, a: Tensor) -> Tensor:
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a * h + x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


def _two(shape: tuple[int, ...] = (B, T, 4)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in (shape, shape[-1:])]


def test_inside_a_checkpoint() -> None:
    seen = see(lambda x, a: checkpoint(_decayed, x.sin(), a, use_reentrant=False), *_two())
    assert seen.rewritten == [("scan", "causal")]


def test_an_output_buffer_inside_a_checkpoint() -> None:
    gated = SAMPLES["gated_states"]
    seen = see(lambda x, g: checkpoint(gated.function, x.sin(), g, use_reentrant=False), *operands(gated))
    assert seen.rewritten == [("scan", "causal")]


def test_several_layers() -> None:
    def layers(x: Tensor, a: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(_decayed(x, a))
        return x

    assert see(layers, *_two()).rewritten == [("scan", "causal")] * 3


def test_a_loop_in_each_step_of_a_loop() -> None:
    def blocks(x: Tensor, a: Tensor) -> Tensor:
        state, outs = torch.zeros_like(x[:, 0]), []
        for block in x.split(5, 1):
            inner = torch.zeros_like(state)
            for t in range(5):
                inner = inner + block[:, t] * a
            state = 0.5 * state + inner
            outs.append(state)
        return torch.stack(outs, 1)

    seen = see(blocks, *_two((B, 25, 4)))
    assert seen.rewritten.count(("scan", "causal")) == 1
    assert len(seen.graphs[0].graph.nodes) < 60


def test_chunks_that_carry_a_state() -> None:
    def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unflatten(2, (-1, 4)) for x in (q, k, v))
        decay = g.unflatten(2, (-1, 4)).cumsum(-1)
        mask = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
        o = torch.zeros_like(v)
        for i in range(q.shape[2]):
            q_i, k_i, v_i = q[:, :, i], k[:, :, i], v[:, :, i]
            attn = q_i @ k_i.transpose(-1, -2) * mask[:, :, i]
            o[:, :, i] = (q_i * decay[:, :, i, :, None].exp()) @ S + attn @ v_i
            rest = (decay[:, :, i, -1, None] - decay[:, :, i]).exp()[..., None]
            S = S * decay[:, :, i, -1, None, None].exp() + (k_i * rest).transpose(-1, -2) @ v_i
        return o.flatten(2, 3), S

    torch.manual_seed(0)
    shapes = [(B, 3, 24, 4), (B, 3, 24, 4), (B, 3, 24, 5), (B, 3, 24), (B, 3, 4, 5)]
    args = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    seen = see(lambda q, k, v, g, S: chunks(q, k, v, -g.exp(), S), *args)
    assert ("scan", "causal") in seen.rewritten


def test_an_input_that_the_loop_writes_is_written() -> None:
    def update(x: Tensor, cache: Tensor) -> Tensor:
        for t in range(T):
            cache.mul_(0.9).add_(x[:, t])
        return cache * 2

    x, cache = (torch.randn(s, dtype=torch.float64) for s in ((B, T, 4), (B, 4)))
    assert not see(update, x, cache).rewritten  # `see` compares the inputs after as well


def test_a_buffer_that_is_written_again_later() -> None:
    def fn(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        o, h = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        for t in range(T):
            h = a * h + x[:, t]
            o[:, t] = h
        kept = o * 1
        o.mul_(2)
        return o, kept

    assert see(fn, *_two()).rewritten == [("scan", "causal")]


def test_two_views_of_a_result_that_is_written_later() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x[:, 0])
        for t in range(T):
            h = 0.5 * h + x[:, t]
            seen = h.view(-1)
        h.mul_(2)
        return h * 1, seen * 1

    assert not see(fn, torch.randn(B, T, 4, dtype=torch.float64)).rewritten


def test_a_step_that_is_written_before_all_are_stacked() -> None:
    def fn(x: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(T):
            h = 0.5 * h + x[:, t]
            outs.append(h)
        outs[3].add_(1)
        return torch.stack(outs, 1)

    see(fn, torch.randn(B, T, 4, dtype=torch.float64))


def test_gradients_switched_off_inside() -> None:
    def fn(x: Tensor, a: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(T):
            with torch.no_grad():
                gate = torch.sigmoid(x[:, t])
            h = a * gate * h + x[:, t]
            outs.append(h)
        return torch.stack(outs, 1)

    assert not see(fn, *_two()).rewritten


def test_detached_states_keep_their_gradients() -> None:
    def fn(x: Tensor, a: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0]), []
        for t in range(T):
            h = a * h + torch.sigmoid(x[:, t]).detach() * x[:, t]
            outs.append(h)
        return torch.stack(outs, 1)

    assert see(fn, *_two()).rewritten == [("scan", "causal")]


def test_states_of_half_precision() -> None:
    sample = SAMPLES["scalar_decay"]
    args = [x.detach().bfloat16().requires_grad_() for x in operands(sample)]
    # The loop rounds its state in each of 13 steps, by up to 2^-9 of it; the op keeps it in float32.
    assert see(sample, *args, tol=0.1).rewritten == [("linear", "causal")]


CAST = ("gated_states", "scalar_decay", "selective_scan", "learned_matrix_and_gate")


@pytest.mark.parametrize("name", CAST)
def test_autocast(name: str) -> None:
    sample = SAMPLES[name]
    args = [x.detach().float().requires_grad_() for x in operands(sample)]
    with torch.autocast("cpu", torch.bfloat16):
        # Where the loop, or the op's backward, has matmuls, they round what they take and give to 8 bits.
        seen = see(sample, *args, tol=1e-6 if name == "gated_states" else 0.1)
    assert tuple(k for k, _ in seen.rewritten) == sample.kinds


def test_the_graph_does_not_grow_with_the_tokens() -> None:
    def size(tokens: int) -> int:
        seen = see(_decayed, *_two((B, tokens, 4)))
        return len(seen.graphs[0].graph.nodes)

    assert size(16) == size(64)
